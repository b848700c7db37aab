"""Checkpoints: exact round trips, and errors that name the file, whatever has become of it."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lossfns import LossInputError
from lossfns.backend.storage import checkpoint
from lossfns.backend.storage import file as storage_file

SEEDED = torch.Generator().manual_seed(0)
TENSORS = {
    "a": torch.randn(3, 4, generator=SEEDED),
    "b": torch.tensor([1.5, -2.25, 3e38]).bfloat16(),
    "n": torch.tensor(7),
    "half": torch.randn(5, generator=SEEDED).half(),
    "double": torch.randn(2, 3, generator=SEEDED, dtype=torch.float64),
    "mask": torch.tensor([True, False, True]),
    "random": torch.Generator().get_state(),
    "none": torch.empty(0, 4),
    "layers.0/weight é": torch.arange(6).reshape(2, 3).T,
}


def bits(x: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return x.dtype, x.shape, bytes(x.contiguous().flatten().view(torch.uint8).numpy()) if x.numel() else b""


def assert_same(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert {name: bits(x) for name, x in tensors.items()} == {name: bits(x) for name, x in expected.items()}


def test_round_trip_keeps_bits_dtypes_and_data(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "deep" / "x.npz", TENSORS, {"steps": 3, "shape": None})
    tensors, data = checkpoint.load(path)
    assert data == checkpoint.metadata(path) == {"steps": 3, "shape": None}
    assert_same(tensors, TENSORS)
    tensors["a"] += 1  # theirs to change


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bits_of_every_nan_zero_and_infinity_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    x = (patterns.to(torch.int16) if dtype.itemsize == 2 else patterns << 16).view(dtype)
    tensors, _ = checkpoint.load(checkpoint.save(tmp_path / "x.npz", {"x": x}, {}))
    assert_same(tensors, {"x": x})


def test_equal_content_is_equal_files(tmp_path: Path) -> None:
    first, second = (checkpoint.save(tmp_path / name, TENSORS, {"steps": 1}) for name in ("x.npz", "y.npz"))
    assert first.read_bytes() == second.read_bytes()


def test_a_save_leaves_no_other_file_and_replaces_the_old_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "x.npz", TENSORS, {"steps": 1})
    checkpoint.save(tmp_path / "x.npz", TENSORS, {"steps": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    assert checkpoint.load(tmp_path / "x.npz")[1] == {"steps": 2}


UNFIT: dict[str, Any] = {
    "float8": torch.zeros(2).to(torch.float8_e4m3fn),
    "sparse": torch.eye(3).to_sparse(),
    "meta-device": torch.empty(2, device="meta"),
    "list": [1.0],
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_tensor_that_a_file_cannot_hold_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(LossInputError, match=rf"tensors\['{name}'\]: expected a dense tensor of plain numbers"):
        checkpoint.save(tmp_path / "x.npz", {"a": torch.ones(1), name: UNFIT[name]}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "meta", "a\0b", 3])
def test_a_name_that_a_file_cannot_hold_is_refused(tmp_path: Path, name: Any) -> None:
    with pytest.raises(LossInputError, match="names that a file can hold"):
        checkpoint.save(tmp_path / "x.npz", {name: torch.ones(1)}, {})


def test_data_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LossInputError, match="data: expected what JSON can hold"):
        checkpoint.save(tmp_path / "x.npz", {}, {"device": torch.device("cpu")})
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    (tmp_path / "folder.npz").mkdir()
    for path in (tmp_path / "file" / "x.npz", tmp_path / "folder.npz", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(LossInputError, match="path: expected a place to write to"):
            checkpoint.save(path, TENSORS, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.npz"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_whatever_breaks_a_write_leaves_the_old_file_alone(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(error), storage_file.replacing(tmp_path / "x") as file:
        file.write(b"half of the n")
        raise error
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "old")]


# Damage


def assert_refused_or_whole(path: Path, expected: dict[str, Tensor], data: dict[str, Any]) -> bool:
    """An error that names the file, or exactly what was saved; whether it was an error."""
    try:
        tensors, read = checkpoint.load(path)
    except LossInputError as error:
        assert str(path) in str(error)
        return True
    assert_same(tensors, expected)
    assert read == data
    return False


SMALL = {"w": torch.randn(7, generator=SEEDED).bfloat16(), "b": torch.arange(3)}


def test_no_byte_can_be_flipped_in_silence(tmp_path: Path) -> None:
    path, rng = checkpoint.save(tmp_path / "x.npz", SMALL, {"steps": 3}), Random(0)
    whole = path.read_bytes()
    for i, byte in enumerate(whole):
        path.write_bytes(whole[:i] + bytes([byte ^ rng.randint(1, 255)]) + whole[i + 1 :])
        assert assert_refused_or_whole(path, SMALL, {"steps": 3})


def test_no_part_of_a_file_is_taken_for_the_whole(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "x.npz", SMALL, {"steps": 3})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert assert_refused_or_whole(path, SMALL, {"steps": 3})


def mangled(whole: bytes, rng: Random) -> bytes:
    """A stretch of the file overwritten, cut out, doubled, moved, zeroed, or all after it lost."""
    a, b = sorted(rng.sample(range(len(whole)), 2))
    b = min(b, a + 2 ** rng.randint(0, 12))
    part, noise = whole[a:b], rng.randbytes(b - a)
    return rng.choice(
        [
            whole[:a] + noise + whole[b:],
            whole[:a] + whole[b:],
            whole[:b] + part + whole[b:],
            whole[:a] + whole[b:] + part,
            whole[:a] + bytes(b - a) + whole[b:],
            whole[:a],
            whole[:a] + part[::-1] + whole[b:],
            whole + noise,
        ]
    )


def test_a_mangled_file_is_refused_by_name(tmp_path: Path) -> None:
    path, rng = checkpoint.save(tmp_path / "x.npz", TENSORS, {"steps": 3}), Random(0)
    whole = path.read_bytes()
    for _ in range(400):
        path.write_bytes(mangled(whole, rng))
        assert assert_refused_or_whole(path, TENSORS, {"steps": 3}) == (path.read_bytes() != whole)


def archive(arrays: dict[str, np.ndarray], **meta: Any) -> bytes:
    """An npz as a checkpoint is one, with such meta."""
    file = io.BytesIO()
    text = json.dumps({"format": storage_file.FORMAT, "dtypes": {}, "data": {}} | meta)
    np.savez(file, meta=np.frombuffer(text.encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]
    return sealed(file)


def sealed(file: io.BytesIO) -> bytes:
    with zipfile.ZipFile(file, "a") as target:
        target.comment = b"0" * storage_file.DIGEST
    return file.getvalue()[: -storage_file.DIGEST] + storage_file.digest(file)


def header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    """The ``w`` of a checkpoint says that it is of such a shape, and is 16 bytes long."""
    file, member = io.BytesIO(archive({}, dtypes={"w": "torch.float32"})), io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": dtype, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(file, "a") as target:
        target.writestr("w.npy", member.getvalue() + bytes(16))
    return sealed(file)


def compressed() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, meta=np.zeros(9, np.uint8))
    return file.getvalue()


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


FOUR = np.zeros(4, np.float32)
FOREIGN: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"hello" * 50,
    "pickle": lambda: pickle.dumps({"w": 1}),
    "torch.save": lambda: (torch.save(SMALL, file := io.BytesIO()), file.getvalue())[1],
    "npy": lambda: (np.save(file := io.BytesIO(), FOUR), file.getvalue())[1],
    "another npz": lambda: npz(w=FOUR),
    "empty npz": lambda: npz(),
    "compressed npz": compressed,
    "meta of floats": lambda: npz(meta=FOUR),
    "meta of objects": lambda: npz(meta=np.array([{}], dtype=object)),
    "meta that is no JSON": lambda: npz(meta=np.frombuffer(b"{nonsense", np.uint8)),
    "meta that is a list": lambda: npz(meta=np.frombuffer(b"[1, 2]", np.uint8)),
    "meta too deep": lambda: npz(meta=np.frombuffer(b"[" * 100_000, np.uint8)),
    "meta without dtypes": lambda: npz(meta=np.frombuffer(b'{"format": "lossfns-checkpoint-2"}', np.uint8)),
    "format of another kind": lambda: archive({}, format=1),
    "format of another program": lambda: archive({}, format="others-checkpoint-1"),
    "format of no number": lambda: archive({}, format="lossfns-checkpoint-x"),
    "format of many digits": lambda: archive({}, format="lossfns-checkpoint-" + "9" * 5000),
    "dtypes that are a list": lambda: archive({"w": FOUR}, dtypes=["w"]),
    "data that is a list": lambda: archive({}, data=[1]),
    "dtype unknown": lambda: archive({"w": FOUR}, dtypes={"w": "torch.float33"}),
    "dtype of another kind": lambda: archive({"w": FOUR}, dtypes={"w": 4}),
    "dtype of another array": lambda: archive({"w": FOUR}, dtypes={"w": "torch.float64"}),
    "bfloat16 in floats": lambda: archive({"w": FOUR}, dtypes={"w": "torch.bfloat16"}),
    "array missing": lambda: archive({}, dtypes={"w": "torch.float32"}),
    "array of objects": lambda: archive({"w": np.array([{}, 1], dtype=object)}, dtypes={"w": "torch.float32"}),
    "array of text": lambda: archive({"w": np.array(["a"])}, dtypes={"w": "torch.float32"}),
    "array of records": lambda: archive({"w": np.zeros(2, "f4,f4")}, dtypes={"w": "torch.float32"}),
    "array of the other byte order": lambda: archive({"w": FOUR.astype(">f4")}, dtypes={"w": "torch.float32"}),
    "shape beyond memory": lambda: header((2**40, 2**10)),
    "shape beyond 64 bits": lambda: header((2**40, 2**40)),
    "shape below 0": lambda: header((-4,)),
    "shape too short": lambda: header((2,)),
    "shape too long": lambda: header((5,)),
    "shape of nothing": lambda: header((0, 7)),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(FOREIGN[what]())
    with pytest.raises(LossInputError, match=r"path: expected .* file, got .*x\.npz, which cannot be read"):
        checkpoint.load(path)


def test_a_checkpoint_made_by_the_helpers_above_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for content in (archive({"w": FOUR}, dtypes={"w": "torch.float32"}), header((2, 2))):
        path.write_bytes(content)
        assert checkpoint.load(path)[0]["w"].sum() == 0


def test_a_newer_format_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(archive({}, format=f"{storage_file.FAMILY}-{storage_file.VERSION + 1}", dtypes=None))
    for read in (checkpoint.load, checkpoint.metadata):
        with pytest.raises(LossInputError, match=r"x\.npz, written by a newer version of lossfns"):
            read(path)


def test_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "loop.npz").symlink_to("loop.npz")
    os.mkfifo(tmp_path / "pipe.npz")  # reading it would wait for ever
    for name in ("missing.npz", "folder.npz", "loop.npz", "pipe.npz", "a\0b"):
        for read in (checkpoint.load, checkpoint.metadata):
            with pytest.raises(LossInputError) as error:
                read(tmp_path / name)
            assert str(tmp_path / name) in str(error.value)


def test_metadata_reads_no_tensor(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "x.npz", {"a": TENSORS["a"]}, {"steps": 3})
    whole = path.read_bytes()
    middle = whole.index(TENSORS["a"].numpy().tobytes()) + 5
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    assert checkpoint.metadata(path) == {"steps": 3}
    with pytest.raises(LossInputError, match=r"x\.npz"):
        checkpoint.load(path)
