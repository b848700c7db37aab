"""Read files of format 2, in which checkpoints were written until 2026-11: npz archives without pickle.

The array ``meta`` holds JSON with the format, the dtypes of the tensors and the data. The comment at the end of the
archive is the SHA-256 of all bytes before it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

FORMAT = "lossfns-checkpoint-2"


def is_npz(file: IO[bytes]) -> bool:
    """Return whether an open file begins as a zip archive does."""
    file.seek(0)
    return file.read(4) == b"PK\x03\x04"


def load(file: IO[bytes]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the data of an open file. Damage can raise nearly any error."""
    with zipfile.ZipFile(file) as archive:
        meta = read_meta(archive)
        if archive.comment != digest(file):
            raise ValueError("its bytes are not those that were written")
        return {name: restored(array(archive, name), dtype) for name, dtype in meta["dtypes"].items()}, meta["data"]


def metadata(file: IO[bytes]) -> dict[str, Any]:
    """Return the data of an open file without reading the tensors."""
    with zipfile.ZipFile(file) as archive:
        data: dict[str, Any] = read_meta(archive)["data"]
        return data


def read_meta(archive: zipfile.ZipFile) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads(bytes(array(archive, "meta")))
    if meta["format"] != FORMAT or not isinstance(meta["data"], dict):
        raise TypeError("another format")
    return meta


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
