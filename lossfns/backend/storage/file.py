"""A checkpoint in one file, written whole or not at all and read without pickle.

The file is an uncompressed npz archive: one array for each tensor, and the array ``meta``, whose bytes are JSON with
the format, the dtypes of the tensors and the data. The comment at the end of the archive is the SHA-256 of all bytes
before it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from lossfns.errors import LossInputError

FAMILY, VERSION = "lossfns-checkpoint", 2
FORMAT = f"{FAMILY}-{VERSION}"


def save(path: str | Path, tensors: Mapping[str, Tensor], data: Mapping[str, Any], *, overwrite: bool = True) -> Path:
    """Write a checkpoint, and return its path once the file is whole and on the disk.

    Until then, an older file under this path stays as it was. Without ``overwrite`` it is kept, and refused.
    """
    path = Path(path)
    arrays = {name: stored_array(name, x) for name, x in tensors.items()}
    dtypes = {name: str(x.dtype) for name, x in tensors.items()}
    arrays["meta"] = np.frombuffer(to_json({"format": FORMAT, "dtypes": dtypes, "data": dict(data)}), np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, overwrite=overwrite) as file:
            with zipfile.ZipFile(file, "w") as archive:
                archive.comment = b"0" * DIGEST
                for name, x in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, x, allow_pickle=False)
            seal = digest(file)
            file.seek(-DIGEST, os.SEEK_END)
            file.write(seal)
    except LossInputError:
        raise
    except (OSError, ValueError) as error:
        raise LossInputError("path", "a place to write to", f"{path} ({error})", "Choose another.") from error
    return path


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the data. Refuse a file whose bytes have changed; the error names the file."""
    with opened(path) as (archive, meta):
        # Read the open file: by now its path may belong to another one.
        if archive.fp is None or archive.comment != digest(archive.fp):
            raise ValueError("its bytes are not those that were written")
        return {name: restored(array(archive, name), dtype) for name, dtype in meta["dtypes"].items()}, meta["data"]


def metadata(path: str | Path) -> dict[str, Any]:
    """Return the data without reading the tensors."""
    with opened(path) as (_, meta):
        data: dict[str, Any] = meta["data"]
        return data


DIGEST = 64
"""Bytes of the checksum at the end of a file."""


def digest(file: IO[bytes]) -> bytes:
    """Return the SHA-256 of the file without its last ``DIGEST`` bytes, in hexadecimal."""
    remaining, sha = file.seek(-DIGEST, os.SEEK_END), hashlib.sha256()
    file.seek(0)
    while remaining:
        chunk = file.read(min(remaining, 2**20))
        remaining -= len(chunk)
        sha.update(chunk)
    return sha.hexdigest().encode()


@contextmanager
def replacing(path: Path, *, overwrite: bool = True) -> Iterator[IO[bytes]]:
    """Open a new file that replaces the path once it is whole and on the disk. On any error it is removed.

    Without ``overwrite`` a path that exists by then is refused.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:12]}.partial")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            place(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors of a file system that has no hard links."""


def place(temporary: Path, path: Path) -> None:
    """Give a file a name that no file has yet. Check and creation are one step: only one of many writers succeeds."""
    try:
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            os.replace(temporary, path)
    except FileExistsError as error:
        raise existing(path) from error


def existing(path: str | Path) -> LossInputError:
    """Return the error for a checkpoint that would replace another."""
    fix = "Choose another name; save_state(..., overwrite=True) replaces it."
    return LossInputError("path", "a file that does not exist yet", f"{path}", fix)


def sync(folder: Path) -> None:
    """Write the folder's entries to the disk, where the system can: a rename is not safe before that."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def to_json(content: Mapping[str, Any]) -> bytes:
    """Encode the data of a checkpoint; refuse data that JSON cannot hold."""
    try:
        return json.dumps(content).encode()
    except (TypeError, ValueError) as error:
        raise LossInputError("data", "what JSON can hold", str(error), "Keep it as text or numbers.") from error


def stored_array(name: str, x: Tensor) -> np.ndarray:
    """Return a tensor as the array to store. numpy has no bfloat16, so its bits are stored as integers."""
    if not isinstance(name, str) or name in ("", "meta") or "\0" in name:
        raise LossInputError("tensors", "names that a file can hold", repr(name), "Rename it.")
    try:
        x = x.detach().cpu().contiguous()
        return x.view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.numpy()
    except (AttributeError, RuntimeError, TypeError) as error:  # torch's errors for layouts that numpy does not have
        got = f"{x.dtype}, {x.layout} on {x.device}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        fix = "Convert it first, or keep it elsewhere."
        raise LossInputError(f"tensors[{name!r}]", "a dense tensor of plain numbers", got, fix) from error


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, Any]]]:
    """Open an archive and its meta.

    Damaged bytes can raise nearly any error: all become a LossInputError that names the file.
    """
    try:
        if not Path(path).exists():
            raise LossInputError("path", "a checkpoint", f"no file {path}", "Was it saved elsewhere?")
        if not Path(path).is_file():
            raise LossInputError("path", "a checkpoint", f"{path}, which is no file", "Name the file.")
        with zipfile.ZipFile(path) as archive:
            meta = json.loads(bytes(array(archive, "meta")))
            if is_newer(meta["format"]):
                got = f"{path}, written by a newer version of lossfns ({meta['format']})"
                raise LossInputError("path", f"a {FORMAT} file", got, "Update lossfns.")
            if meta["format"] != FORMAT or not isinstance(meta["data"], dict):
                raise TypeError("another format")
            yield archive, meta
    except LossInputError:
        raise
    except Exception as error:
        got = f"{path}, which cannot be read ({type(error).__name__}: {error})"
        raise LossInputError("path", f"a whole {FORMAT} file", got, "It is truncated, corrupt or foreign.") from error


def is_newer(form: str) -> bool:
    """Whether a format is that of a later version."""
    family, _, version = form.rpartition("-")
    return family == FAMILY and version.isdecimal() and int(version) > VERSION


def array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Return one array. All bytes are read before they are parsed: their checksum is verified at the end."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    file = io.BytesIO(archive.read(info))
    x: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    if file.read(1):
        raise ValueError(f"{name} is longer than its header says")
    return x


def restored(array: np.ndarray, dtype: str) -> Tensor:
    """Return an array as a tensor of the dtype that was saved."""
    x = torch.from_numpy(array)
    stored = "torch.int16" if dtype == "torch.bfloat16" else dtype
    if str(x.dtype) != stored:
        raise TypeError(f"{x.dtype} where {stored} is due")
    return x.view(torch.bfloat16) if dtype == "torch.bfloat16" else x
