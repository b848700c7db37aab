"""Checkpoints: exact round trips, and errors that name the file."""

from pathlib import Path

import pytest
import torch

from lossfns import LossInputError
from lossfns.backend import checkpoint

TENSORS = {
    "a": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "b": torch.tensor([1.5, -2.25, 3e38]).bfloat16(),
    "n": torch.tensor(7),
}


def test_round_trip_keeps_bits_dtypes_and_data(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "deep" / "x.npz", TENSORS, {"steps": 3, "shape": None})
    tensors, data = checkpoint.load(path)
    assert data == {"steps": 3, "shape": None}
    assert tensors.keys() == TENSORS.keys()
    for name, x in TENSORS.items():
        assert tensors[name].dtype == x.dtype and tensors[name].shape == x.shape
        assert torch.equal(tensors[name], x)


def test_a_save_leaves_no_other_file_and_replaces_the_old_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "x.npz", TENSORS, {"steps": 1})
    checkpoint.save(tmp_path / "x.npz", TENSORS, {"steps": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    assert checkpoint.load(tmp_path / "x.npz")[1] == {"steps": 2}


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "foreign", "flipped"])
def test_a_file_that_is_no_whole_checkpoint_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = checkpoint.save(tmp_path / "x.npz", TENSORS, {})
    whole = path.read_bytes()
    middle = whole.index(TENSORS["a"].numpy().tobytes()) + 5
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    files = {"empty": b"", "truncated": whole[: len(whole) // 2], "foreign": b"hello" * 50, "flipped": flipped}
    path.unlink() if damage == "missing" else path.write_bytes(files[damage])
    with pytest.raises(LossInputError, match=r"x\.npz"):
        checkpoint.load(path)
