"""A checkpoint in a folder, to which many processes write the tensors, or shards of tensors, that they have.

``meta.json`` names the subfolder with the tensors (safetensors, which any number of processes can read), and has the
data and the SHA-256 of every file. Replacing it replaces the checkpoint: at any time it is the old one or the new one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor

from lossfns.backend.storage.file import FAMILY, existing, replacing, sync, to_json
from lossfns.errors import LossInputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

META, FORMAT = "meta.json", f"{FAMILY}-folder-1"


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


class Processes(NamedTuple):
    """The processes that save or load together, from the view of one of them. By default, it is the only one.

    Attributes:
        rank, size: the rank of this process, and the number of processes.
        group: the process group of ``torch.distributed``.
        gather: ``gather(x)`` returns the list of the values that the processes pass.
        on_rank_zero: ``on_rank_zero(function, *arguments)`` returns the result of rank 0 on every process.
        all_or_none: ``all_or_none(function, *arguments)`` returns the result; if one process fails, all raise.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None
    gather: Callable[[Any], list[Any]] = lambda x: [x]
    on_rank_zero: Callable[..., Any] = call
    all_or_none: Callable[..., Any] = call


ONE = Processes()
"""A process on its own."""

EmptyFor = Callable[[str, Sequence[int], torch.dtype], Tensor]


def empty(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a whole tensor to load into."""
    return torch.empty(tuple(shape), dtype=dtype)


def save(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    data: Mapping[str, Any],
    processes: Processes,
    *,
    overwrite: bool = True,
) -> Path:
    """Write a checkpoint, and return its path once all processes have written.

    A tensor that has several names is written once. Of two saves at the same time, the one that is done first succeeds,
    and the other is refused.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # imported here: it takes half a second
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as write

    path = Path(path)
    part = processes.on_rank_zero(create_part, path, data)
    first_names: dict[int, str] = {}  # of each tensor, by its id
    tied = {name: first_names[id(x)] for name, x in tensors.items() if first_names.setdefault(id(x), name) != name}
    try:
        writer = HuggingFaceStorageWriter(str(path / part), save_distributed=True)
        written = {name: x for name, x in tensors.items() if name not in tied}
        write(written, storage_writer=writer, process_group=processes.group)
        meta = {"part": part, "files": checksums(path / part, processes), "tied": tied, "data": dict(data)}
        processes.on_rank_zero(commit, path, {"format": FORMAT, **meta}, overwrite)
    except (OSError, CheckpointException) as error:
        if not overwrite and (path / META).exists():
            raise existing(path) from error
        raise LossInputError("path", "a place to write to", f"{path} ({error})", "Choose another.") from error
    finally:
        if processes.rank == 0:
            discard_uncommitted(path, part)
    return path


def load(
    path: str | Path, processes: Processes = ONE, empty_for: EmptyFor = empty
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the data, whatever number of processes has written them.

    ``empty_for(name, shape, dtype)`` makes the tensor to load ``name`` into.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as read

    meta = processes.all_or_none(read_meta, path)
    part = Path(path) / meta["part"]
    if checksums(part, processes) != meta["files"]:
        raise damaged(path, "its files are not those that were written")
    try:
        reader = HuggingFaceStorageReader(str(part))
        stored = reader.read_metadata().state_dict_metadata
        tensors = {name: empty_for(name, x.size, x.properties.dtype) for name, x in stored.items()}  # type: ignore[union-attr]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns that one process is alone
            read(tensors, storage_reader=reader, process_group=processes.group, no_dist=processes.group is None)
        return tensors | {name: tensors[other] for name, other in meta["tied"].items()}, meta["data"]
    except Exception as error:  # what is sealed need not be a checkpoint
        raise damaged(path, f"{type(error).__name__}: {error}") from error


def metadata(path: str | Path) -> dict[str, Any]:
    """Return the data without reading the tensors."""
    data: dict[str, Any] = read_meta(path)["data"]
    return data


def read_meta(path: str | Path) -> dict[str, Any]:
    """Read the meta of a folder. Any damage is an error that names the folder."""
    file = Path(path) / META
    if not file.is_file():
        got = f"{path}, a folder without {META}"
        raise LossInputError("path", "a checkpoint", got, "Was it saved elsewhere, or not to its end?")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        meta: dict[str, Any] = content["meta"]
        if content["seal"] != seal(meta) or meta["format"] != FORMAT:
            raise ValueError("another format, or not what was written")
        if not PART.fullmatch(meta["part"]) or not all(isinstance(meta[x], dict) for x in ("files", "tied", "data")):
            raise TypeError("another format")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    return meta


def damaged(path: str | Path, why: str) -> LossInputError:
    """Return the error for a folder that is not as it was written."""
    got = f"{path}, which cannot be read ({why})"
    return LossInputError("path", f"a whole {FORMAT}", got, "It is truncated, corrupt or foreign.")


# Checksums


def seal(meta: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the meta."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def checksums(part: Path, processes: Processes) -> dict[str, str]:
    """Return the SHA-256 of every file; each process reads some of them."""
    local = processes.all_or_none(local_checksums, part, processes.rank, processes.size)
    return {name: sha for each in processes.gather(local) for name, sha in each.items()}


def local_checksums(part: Path, rank: int, size: int) -> dict[str, str]:
    """Return the SHA-256 of every ``size``-th file, from number ``rank`` on."""
    return {file.name: sha256(file) for file in sorted(part.iterdir())[rank::size]} if part.is_dir() else {}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Steps of rank 0


def create_part(path: Path, data: Mapping[str, Any]) -> str:
    """Make a new subfolder for tensors, and return its name."""
    if importlib.util.find_spec("safetensors") is None:
        raise ImportError("checkpoints of many processes need safetensors: pip install 'lossfns[ranks]'")
    to_json(data)  # refuses data that JSON cannot hold, before anything is written
    part = f"{uuid4().hex[:12]}.part"
    try:
        (path / part).mkdir(parents=True)
    except OSError as error:
        raise LossInputError("path", "a place to write to", f"{path} ({error})", "Choose another.") from error
    return part


def commit(path: Path, meta: Mapping[str, Any], overwrite: bool) -> None:
    """Make the new subfolder the checkpoint, and remove the subfolders of older and of slower saves."""
    with locked(path):
        sync(path / meta["part"])  # raises if a faster save has removed it
        with replacing(path / META, overwrite=overwrite) as file:
            file.write(json.dumps({"seal": seal(meta), "meta": meta}).encode())
        remove_other_parts(path)


def discard_uncommitted(path: Path, part: str) -> None:
    """Remove a subfolder unless it is the checkpoint."""
    with locked(path):
        if current_part(path) != part:
            shutil.rmtree(path / part, ignore_errors=True)


def remove_other_parts(path: Path) -> None:
    """Remove the tensors of other checkpoints: of older ones, and of a save that was killed."""
    current = current_part(path)
    for part in path.glob("*.part"):
        if part.name != current and PART.fullmatch(part.name):
            shutil.rmtree(part, ignore_errors=True)


PART = re.compile("[0-9a-f]{12}[.]part")
"""The names of the subfolders that ``create_part`` makes."""


def current_part(path: Path) -> str | None:
    """Return the name of the subfolder that is the checkpoint, or None."""
    part: str | None = read_meta(path)["part"] if (path / META).exists() else None
    return part


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder in a ``with`` block, where the system has locks of folders.

    Without a lock, two saves that replace one checkpoint at the same time may remove each other's tensors.
    """
    handle = None
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)
