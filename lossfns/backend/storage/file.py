"""A checkpoint in one file, written whole or not at all and read without pickle.

The file has the format safetensors, which many programs read (``safetensors.torch.load_file(path)``):

    8 bytes    length of the header
    header     JSON: dtype, shape and place of each tensor; and ``__metadata__``, strings by name
    the rest   the bytes of the tensors, one after another

Among the strings, ``data`` is the data of the checkpoint in JSON, ``sha256`` is the checksum of the tensors' bytes, and
``seal`` is the checksum of all bytes before them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from lossfns.backend.storage import npz
from lossfns.errors import LossInputError

FAMILY, VERSION = "lossfns-checkpoint", 3
FORMAT = f"{FAMILY}-{VERSION}"

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The dtypes by their names in the format."""


def save(path: str | Path, tensors: Mapping[str, Tensor], data: Mapping[str, Any], *, overwrite: bool = True) -> Path:
    """Write a checkpoint, and return its path once the file is whole and on the disk.

    Until then, an older file under this path stays as it was. Without ``overwrite``, a path that exists is refused.
    """
    path = Path(path)
    for name, x in tensors.items():
        check_tensor(name, x)
    in_order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # so that each one is aligned
    entries = header_entries({name: tensors[name] for name in in_order})
    content = to_json(data).decode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, overwrite=overwrite) as file:
            file.write(header_of(entries, content, PLACEHOLDER))
            sha = hashlib.sha256()
            for name in in_order:
                part = bytes_of(tensors[name].detach().cpu().contiguous())
                sha.update(part)
                file.write(part)
            file.seek(0)
            file.write(header_of(entries, content, sha.hexdigest()))
    except LossInputError:
        raise
    except (OSError, ValueError) as error:
        raise LossInputError("path", "a place to write to", f"{path} ({error})", "Choose another.") from error
    return path


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the data. Refuse a file whose bytes have changed; the error names the file."""
    with opened(path) as file:
        if npz.is_npz(file):
            return npz.load(file)
        entries, strings = read_header(file)
        sha, tensors = hashlib.sha256(), {}
        for name, entry in entries.items():
            tensors[name] = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="cpu")
            part = bytes_of(tensors[name])
            if file.readinto(part) != len(part):  # type: ignore[attr-defined]
                raise ValueError("it is shorter than its header says")
            sha.update(part)
        if sha.hexdigest() != strings["sha256"]:
            raise ValueError("its bytes are not those that were written")
        return tensors, data_of(strings)


def metadata(path: str | Path) -> dict[str, Any]:
    """Return the data without reading the tensors."""
    with opened(path) as file:
        return npz.metadata(file) if npz.is_npz(file) else data_of(read_header(file)[1])


# The header

PREFIX = b'{"__metadata__":{"seal":"'
"""Every header begins with this and the seal."""

DIGEST = 64
"""Bytes of a checksum in hexadecimal."""

PLACEHOLDER = "0" * DIGEST
"""Stands for a checksum that is not known yet."""

LONGEST_HEADER = 100_000_000
"""The most bytes that readers of the format accept."""


def header_entries(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return the entry of each tensor in the header."""
    names, entries, end = {dtype: name for name, dtype in DTYPES.items()}, {}, 0
    for name, x in tensors.items():
        start, end = end, end + x.numel() * x.dtype.itemsize
        entries[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    return entries


def header_of(entries: Mapping[str, Any], data: str, sha256: str) -> bytes:
    """Return the length of the header and the header, with its seal. Spaces fill it up to a multiple of 8 bytes."""
    strings = {"seal": PLACEHOLDER, "sha256": sha256, "format": "pt", "lossfns": FORMAT, "data": data}
    header = json.dumps({"__metadata__": strings, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > LONGEST_HEADER:
        got = f"{len(header)} bytes of names and data"
        raise LossInputError("data", f"a header of at most {LONGEST_HEADER} bytes", got, "Keep less with the weights.")
    content = len(header).to_bytes(8, "little") + header
    start = 8 + len(PREFIX)
    return content[:start] + seal_of(content) + content[start + DIGEST :]


def seal_of(header: bytes) -> bytes:
    """Return the SHA-256 of the header and its length, without the seal, in hexadecimal."""
    start = 8 + len(PREFIX)
    return hashlib.sha256(header[:start] + header[start + DIGEST :]).hexdigest().encode()


def read_header(file: IO[bytes]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return the entries of the tensors, in the order of their bytes, and the strings. Leave the file at the tensors.

    Nothing in a file may ask for more memory than the file has bytes.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not len(PREFIX) + DIGEST <= length <= min(size - 8, LONGEST_HEADER):
        raise ValueError("no header")
    header = file.read(length)
    entries = json.loads(header)
    strings = entries.pop("__metadata__")
    if is_newer(strings["lossfns"]):
        got = f"{file.name}, written by a newer version of lossfns ({strings['lossfns']})"
        raise LossInputError("path", f"a {FORMAT} file", got, "Update lossfns.")
    if strings["lossfns"] != FORMAT or not header.startswith(PREFIX):
        raise TypeError("another format")
    if strings["seal"].encode() != seal_of(prefix + header):
        raise ValueError("its bytes are not those that were written")
    end = 0
    for name, entry in entries.items():
        shape, (start, stop) = entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{name} has a shape of {shape}")
        if (start, stop) != (end, end + math.prod(shape) * DTYPES[entry["dtype"]].itemsize):
            raise ValueError(f"{name} is not where it should be")
        end = stop
    if end != size - 8 - length:
        raise ValueError("it is not as long as its header says")
    return entries, strings


def is_newer(form: str) -> bool:
    """Whether a format is that of a later version."""
    family, _, version = form.rpartition("-")
    return family == FAMILY and version.isdecimal() and int(version) > VERSION


def data_of(strings: Mapping[str, str]) -> dict[str, Any]:
    """Return the data of a checkpoint."""
    data = json.loads(strings["data"])
    if not isinstance(data, dict):
        raise TypeError("data that are no dict")
    return data


# Tensors


def check_tensor(name: str, x: Tensor) -> None:
    """Refuse a tensor or a name that the format does not have."""
    if not isinstance(name, str) or name in ("", "__metadata__") or "\0" in name:
        raise LossInputError("tensors", "names that a file can hold", repr(name), "Rename it.")
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_meta or x.dtype not in DTYPES.values():
        got = f"{x.dtype}, {x.layout} on {x.device}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        fix = "Convert it first, or keep it elsewhere."
        raise LossInputError(f"tensors[{name!r}]", "a dense tensor of plain numbers", got, fix)


def bytes_of(x: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    memory: np.ndarray = x.reshape(-1).view(torch.uint8).numpy()
    return memory.data


# Files


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
            link_new(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors of a file system that has no hard links."""


def link_new(temporary: Path, path: Path) -> None:
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


@contextmanager
def opened(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file to read a checkpoint.

    Damaged bytes can raise nearly any error: all become a LossInputError that names the file.
    """
    try:
        if not Path(path).exists():
            raise LossInputError("path", "a checkpoint", f"no file {path}", "Was it saved elsewhere?")
        if not Path(path).is_file():
            raise LossInputError("path", "a checkpoint", f"{path}, which is no file", "Name the file.")
        with open(path, "rb") as file:
            yield file
    except LossInputError:
        raise
    except Exception as error:
        got = f"{path}, which cannot be read ({type(error).__name__}: {error})"
        raise LossInputError("path", f"a whole {FORMAT} file", got, "It is truncated, corrupt or foreign.") from error
