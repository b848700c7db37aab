"""Checkpoints of many processes: a folder, in which torch's distributed checkpoint keeps what each of them has.

``meta.json`` names the folder with the tensors, beside it (safetensors, which any number of processes can read), and
has the data and the SHA-256 of every file. It is replaced in one go: the checkpoint is the old one or the new one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as read
from torch.distributed.checkpoint.state_dict_saver import save as write

from lossfns.backend.engine.ranks import Alone, Ranks
from lossfns.backend.storage import checkpoint
from lossfns.errors import LossInputError

META, FORMAT = checkpoint.FOLDER_META, f"{checkpoint.FAMILY}-folder-1"
ALONE = Alone()


def save(
    path: str | Path, tensors: Mapping[str, Tensor], data: Mapping[str, Any], ranks: Ranks, tied: Mapping[str, str]
) -> Path:
    """The path, once all ranks have written. ``tied`` are names of tensors that are written under another's."""
    path = Path(path)
    part = ranks.first(begin, path, data)
    try:
        writer = HuggingFaceStorageWriter(str(path / part), save_distributed=True)
        written = {name: x for name, x in tensors.items() if name not in tied}
        write(written, storage_writer=writer, process_group=ranks.group)
        files = sums(path / part, ranks)
        ranks.first(
            commit, path, {"format": FORMAT, "part": part, "files": files, "tied": dict(tied), "data": dict(data)}
        )
    except (OSError, CheckpointException) as error:
        ranks.first(sweep, path)
        raise LossInputError("path", "a place to write to", f"{path} ({error})", "Choose another.") from error
    return path


def load(path: str | Path, ranks: Alone | Ranks = ALONE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the data of a whole folder, whatever the number of ranks that wrote it."""
    meta = ranks.together(opened, path)
    part = Path(path) / meta["part"]
    if sums(part, ranks) != meta["files"]:
        raise damaged(path, "its files are not those that were written")
    reader = HuggingFaceStorageReader(str(part))
    kept = reader.read_metadata().state_dict_metadata
    tensors = {name: ranks.room(name, x.size, x.properties.dtype) for name, x in kept.items()}  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that one process is alone
        read(tensors, storage_reader=reader, process_group=ranks.group, no_dist=ranks.group is None)
    return tensors | {name: tensors[other] for name, other in meta["tied"].items()}, meta["data"]


def metadata(path: str | Path) -> dict[str, Any]:
    """The data alone, without reading the tensors."""
    data: dict[str, Any] = opened(path)["data"]
    return data


def opened(path: str | Path) -> dict[str, Any]:
    """The meta of a folder; any damage is an error that names it."""
    file = Path(path) / META
    if not file.is_file():
        got = f"{path}, a folder without {META}"
        raise LossInputError("path", "a checkpoint", got, "Was it saved elsewhere, or not to its end?")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        meta: dict[str, Any] = content["meta"]
        if content["seal"] != seal(meta) or meta["format"] != FORMAT:
            raise ValueError("another format, or not what was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    return meta


def damaged(path: str | Path, why: str) -> LossInputError:
    got = f"{path}, which cannot be read ({why})"
    return LossInputError("path", f"a whole {FORMAT}", got, "It is truncated, corrupt or foreign.")


# Checksums


def seal(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def sums(part: Path, ranks: Alone | Ranks) -> dict[str, str]:
    """The SHA-256 of every file; each rank reads some of them."""
    own = ranks.together(own_sums, part, ranks.rank, ranks.size)
    return {name: sha for each in ranks.gather(own) for name, sha in each.items()}


def own_sums(part: Path, rank: int, size: int) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(part.iterdir())[rank::size]} if part.is_dir() else {}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# What rank 0 does for all


def begin(path: Path, data: Mapping[str, Any]) -> str:
    """A new folder for tensors in that of the checkpoint, by name."""
    if importlib.util.find_spec("safetensors") is None:
        raise ImportError("checkpoints of many processes need safetensors: pip install 'lossfns[ranks]'")
    checkpoint.encoded({}, data)  # refuses what JSON cannot hold
    part = f"{uuid4().hex[:12]}.part"
    try:
        (path / part).mkdir(parents=True)
    except OSError as error:
        raise LossInputError("path", "a place to write to", f"{path} ({error})", "Choose another.") from error
    return part


def commit(path: Path, meta: Mapping[str, Any]) -> None:
    """From here on the checkpoint is this one; what was there before goes."""
    checkpoint.sync(path / meta["part"])
    with checkpoint.replacing(path / META) as file:
        file.write(json.dumps({"seal": seal(meta), "meta": meta}).encode())
    sweep(path)


def sweep(path: Path) -> None:
    """Remove the tensors of other checkpoints: older ones, and those of a save that was killed."""
    current = opened(path)["part"] if (path / META).exists() else None
    for part in path.glob("*.part"):
        if part.name != current:
            shutil.rmtree(part, ignore_errors=True)
