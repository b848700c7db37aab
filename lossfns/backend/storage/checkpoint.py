"""Checkpoints: tensors and plain data under one path, which is a file, or a folder if many processes write it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lossfns.backend.storage import file, folder
from lossfns.backend.storage.folder import Processes


def save(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    data: Mapping[str, Any],
    processes: Processes = folder.ONE,
    *,
    overwrite: bool = True,
) -> Path:
    """Write a checkpoint: a file if one process writes, a folder if many do.

    Args:
        path: where to write. A checkpoint that is there is replaced once the new one is whole and on the disk.
        tensors: dense tensors by name; in a folder they may be sharded (``DTensor``).
        data: anything that JSON can hold.
        processes: those that call this together.
        overwrite: whether to replace a checkpoint. Otherwise, of several simultaneous saves under one path,
            one succeeds, and the others are refused.

    Raises:
        LossInputError: for a path that cannot be written to, or that exists and is not to be replaced, and for tensors
            or data that cannot be kept.
    """
    if processes.group is None:
        return file.save(path, tensors, data, overwrite=overwrite)
    return folder.save(path, tensors, data, processes, overwrite=overwrite)


def load(
    path: str | Path, processes: Processes = folder.ONE, empty_for: folder.EmptyFor = folder.empty
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the data of a checkpoint, whatever number of processes has written it.

    Args:
        path: a file or a folder.
        processes: those that call this together.
        empty_for: ``empty_for(name, shape, dtype)`` makes the tensor to load ``name`` of a folder into. Tensors of a
            file are loaded whole.

    Raises:
        LossInputError: naming the path, unless it holds a whole checkpoint.
    """
    if os.path.isdir(path):
        return folder.load(path, processes, empty_for)
    tensors, data = processes.all_or_none(file.load, path)
    return tensors, data


def metadata(path: str | Path) -> dict[str, Any]:
    """Return the data without reading the tensors."""
    return folder.metadata(path) if os.path.isdir(path) else file.metadata(path)


def exists(path: Path) -> bool:
    """Whether there is a checkpoint. A folder that a killed save has left does not count."""
    return path.is_file() or (path / folder.META).is_file()


def remove(path: Path) -> None:
    """Remove the checkpoint that is there, if any."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
