"""Checkpoints: tensors and plain data in one file, written whole or not at all, read without pickle."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns import LossInputError

FORMAT = "lossfns-checkpoint-1"


def save(path: str | Path, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> Path:
    """Write to a temporary file, flush it to the disk, rename: a reader sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {"format": FORMAT, "dtypes": {name: str(x.dtype) for name, x in tensors.items()}, "data": dict(data)}
    arrays = {name: raw(x) for name, x in tensors.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LossInputError("path", "a place to write to", f"{path} ({error})", "Choose another.") from error
    return path


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the data of a checkpoint; an error that names the file if it is not a whole one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(bytes(file["meta"]))
            if meta["format"] != FORMAT:
                raise KeyError(meta["format"])
            tensors = {name: restored(file[name], dtype) for name, dtype in meta["dtypes"].items()}
            return tensors, meta["data"]
    except FileNotFoundError:
        raise LossInputError("path", "a checkpoint", f"no file {path}", "Was it saved elsewhere?") from None
    except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        got = f"{path}, which cannot be read ({type(error).__name__})"
        raise LossInputError("path", f"a whole {FORMAT} file", got, "It is truncated, corrupt or foreign.") from error


def raw(x: Tensor) -> np.ndarray:
    """numpy has no bfloat16: its bits travel as integers."""
    x = x.detach().cpu().contiguous()
    return x.view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def restored(array: np.ndarray, dtype: str) -> Tensor:
    x = torch.from_numpy(array)
    return x.view(torch.bfloat16) if dtype == "torch.bfloat16" else x
