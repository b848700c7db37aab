"""Checkpoints: exact round trips, and errors that name the file, whatever has become of it."""

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import safetensors.torch
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
    "float8": torch.randn(5, generator=SEEDED).to(torch.float8_e4m3fn),
    "complex": torch.randn(2, generator=SEEDED, dtype=torch.complex64),
}


def bits(x: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return x.dtype, x.shape, bytes(x.contiguous().flatten().view(torch.uint8).numpy()) if x.numel() else b""


def assert_same(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert {name: bits(x) for name, x in tensors.items()} == {name: bits(x) for name, x in expected.items()}


def test_round_trip_keeps_bits_dtypes_and_data(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "deep" / "x.safetensors", TENSORS, {"steps": 3, "shape": None})
    tensors, data = checkpoint.load(path)
    assert data == checkpoint.metadata(path) == {"steps": 3, "shape": None}
    assert_same(tensors, TENSORS)
    tensors["a"] += 1  # theirs to change


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bits_of_every_nan_zero_and_infinity_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    x = (patterns.to(torch.int16) if dtype.itemsize == 2 else patterns << 16).view(dtype)
    tensors, _ = checkpoint.load(checkpoint.save(tmp_path / "x.safetensors", {"x": x}, {}))
    assert_same(tensors, {"x": x})


def test_other_programs_read_what_is_written(tmp_path: Path) -> None:
    """By the library of the format. It writes the same header for the same tensors, but for our strings."""
    path = checkpoint.save(tmp_path / "x.safetensors", TENSORS, {"steps": 3})
    assert_same(safetensors.torch.load_file(path), TENSORS)
    theirs = safetensors.torch.save({name: x.contiguous() for name, x in TENSORS.items()})
    headers = [json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")]) for file in (path.read_bytes(), theirs)]
    assert json.loads(headers[0].pop("__metadata__")["data"]) == {"steps": 3}
    assert {name: x["dtype"] for name, x in headers[0].items()} == {name: x["dtype"] for name, x in headers[1].items()}
    for file, header in zip((path.read_bytes(), theirs), headers):
        start = 8 + int.from_bytes(file[:8], "little")
        assert all((start + x["data_offsets"][0]) % TENSORS[name].itemsize == 0 for name, x in header.items()), header


def test_equal_content_is_equal_files(tmp_path: Path) -> None:
    first, second = (
        checkpoint.save(tmp_path / name, TENSORS, {"steps": 1}) for name in ("x.safetensors", "y.safetensors")
    )
    assert first.read_bytes() == second.read_bytes()


def test_a_save_leaves_no_other_file_and_replaces_the_old_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "x.safetensors", TENSORS, {"steps": 1})
    checkpoint.save(tmp_path / "x.safetensors", TENSORS, {"steps": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert checkpoint.load(tmp_path / "x.safetensors")[1] == {"steps": 2}


UNFIT: dict[str, Any] = {
    "complex128": torch.zeros(2, dtype=torch.complex128),
    "sparse": torch.eye(3).to_sparse(),
    "meta-device": torch.empty(2, device="meta"),
    "list": [1.0],
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_tensor_that_a_file_cannot_hold_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(LossInputError, match=rf"tensors\['{name}'\]: expected a dense tensor of plain numbers"):
        checkpoint.save(tmp_path / "x.safetensors", {"a": torch.ones(1), name: UNFIT[name]}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "__metadata__", "a\0b", 3])
def test_a_name_that_a_file_cannot_hold_is_refused(tmp_path: Path, name: Any) -> None:
    with pytest.raises(LossInputError, match="names that a file can hold"):
        checkpoint.save(tmp_path / "x.safetensors", {name: torch.ones(1)}, {})


def test_data_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LossInputError, match="data: expected what JSON can hold"):
        checkpoint.save(tmp_path / "x.safetensors", {}, {"device": torch.device("cpu")})
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    (tmp_path / "folder.safetensors").mkdir()
    for path in (
        tmp_path / "file" / "x.safetensors",
        tmp_path / "folder.safetensors",
        tmp_path / ("x" * 300),
        tmp_path / "a\0b",
    ):
        with pytest.raises(LossInputError, match="path: expected a place to write to"):
            checkpoint.save(path, TENSORS, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.safetensors"]


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
    path, rng = checkpoint.save(tmp_path / "x.safetensors", SMALL, {"steps": 3}), Random(0)
    whole = path.read_bytes()
    for i, byte in enumerate(whole):
        path.write_bytes(whole[:i] + bytes([byte ^ rng.randint(1, 255)]) + whole[i + 1 :])
        assert assert_refused_or_whole(path, SMALL, {"steps": 3})


def test_no_part_of_a_file_is_taken_for_the_whole(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "x.safetensors", SMALL, {"steps": 3})
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
    path, rng = checkpoint.save(tmp_path / "x.safetensors", TENSORS, {"steps": 3}), Random(0)
    whole = path.read_bytes()
    for _ in range(400):
        path.write_bytes(mangled(whole, rng))
        assert assert_refused_or_whole(path, TENSORS, {"steps": 3}) == (path.read_bytes() != whole)


def entry(shape: Any = (2, 2), dtype: Any = "F32", place: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": place}


def sealed(entries: Any, more: bytes = bytes(16), **strings: Any) -> bytes:
    """A file with these entries and strings in its header, 16 bytes of tensors, and the right checksums."""
    known = {"seal": "0" * 64, "sha256": hashlib.sha256(more).hexdigest(), "lossfns": storage_file.FORMAT, "data": "{}"}
    header = json.dumps({"__metadata__": known | strings, **entries}, separators=(",", ":")).encode()
    whole = len(header).to_bytes(8, "little") + header
    return whole.replace(b"0" * 64, storage_file.seal_of(whole), 1) + more


def of_library(**strings: str) -> bytes:
    return safetensors.torch.save({"w": torch.zeros(4)}, strings or None)


def raw(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


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
    "npz with a meta of objects": lambda: npz(meta=np.array([{}], dtype=object)),
    "npz with meta too deep": lambda: npz(meta=np.frombuffer(b"[" * 100_000, np.uint8)),
    "npz without seal": lambda: npz(meta=np.frombuffer(b'{"format":"lossfns-checkpoint-2","data":{}}', np.uint8)),
    "safetensors of others": of_library,
    "safetensors of others with strings": lambda: of_library(format="pt", lossfns=storage_file.FORMAT),
    "a header longer than the file": lambda: (2**62).to_bytes(8, "little") + b"{}",
    "a header that is no JSON": lambda: raw(b"{nonsense" * 50),
    "a header that is a list": lambda: raw(b"[1, 2]" + b" " * 100),
    "a header too deep": lambda: raw(b"[" * 100_000),
    "a header without strings": lambda: raw(b'{"w": {}}' + b" " * 100),
    "format of another program": lambda: sealed({}, b"", lossfns="others-checkpoint-1"),
    "format of no number": lambda: sealed({}, b"", lossfns="lossfns-checkpoint-x"),
    "format of many digits": lambda: sealed({}, b"", lossfns="lossfns-checkpoint-" + "9" * 5000),
    "format that is a number": lambda: sealed({}, b"", lossfns=1),
    "data that are a list": lambda: sealed({}, b"", data="[1]"),
    "data that are no JSON": lambda: sealed({}, b"", data="{nonsense"),
    "data that are no text": lambda: sealed({}, b"", data={}),
    "entry that is a list": lambda: sealed({"w": [1]}),
    "dtype unknown": lambda: sealed({"w": entry(dtype="F33")}),
    "dtype of another kind": lambda: sealed({"w": entry(dtype=4)}),
    "dtype of another size": lambda: sealed({"w": entry(dtype="F64")}),
    "tensor missing": lambda: sealed({}),
    "place before the file": lambda: sealed({"w": entry(place=(-16, 0))}),
    "place beyond the file": lambda: sealed({"w": entry(place=(16, 32))}),
    "place of another kind": lambda: sealed({"w": entry(place=["a", "b"])}),
    "two tensors in one place": lambda: sealed({"w": entry(), "v": entry()}),
    "a gap between tensors": lambda: sealed({"w": entry((), place=(0, 4)), "v": entry((), place=(12, 16))}),
    "shape beyond memory": lambda: sealed({"w": entry((2**40, 2**10))}),
    "shape beyond 64 bits": lambda: sealed({"w": entry((2**40, 2**40))}),
    "shape below 0": lambda: sealed({"w": entry((-2, -2))}),
    "shape of floats": lambda: sealed({"w": entry((2.0, 2.0))}),
    "shape too short": lambda: sealed({"w": entry((2,))}),
    "shape too long": lambda: sealed({"w": entry((5,))}),
    "shape of nothing": lambda: sealed({"w": entry((0, 7))}),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(FOREIGN[what]())
    with pytest.raises(LossInputError, match=r"path: expected .* file, got .*x\.safetensors, which cannot be read"):
        checkpoint.load(path)


def test_a_checkpoint_made_by_the_helpers_above_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(sealed({"w": entry()}))
    assert checkpoint.load(path)[0]["w"].tolist() == [[0, 0], [0, 0]]


def test_a_newer_format_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(sealed({}, b"", lossfns=f"{storage_file.FAMILY}-{storage_file.VERSION + 1}", data="new"))
    for read in (checkpoint.load, checkpoint.metadata):
        with pytest.raises(LossInputError, match=r"x\.safetensors, written by a newer version of lossfns"):
            read(path)


def test_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")  # reading it would wait for ever
    for name in ("missing.safetensors", "folder.safetensors", "loop.safetensors", "pipe.safetensors", "a\0b"):
        for read in (checkpoint.load, checkpoint.metadata):
            with pytest.raises(LossInputError) as error:
                read(tmp_path / name)
            assert str(tmp_path / name) in str(error.value)


def test_metadata_reads_no_tensor(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "x.safetensors", {"a": TENSORS["a"]}, {"steps": 3})
    whole = path.read_bytes()
    middle = whole.index(TENSORS["a"].numpy().tobytes()) + 5
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    assert checkpoint.metadata(path) == {"steps": 3}
    with pytest.raises(LossInputError, match=r"x\.safetensors"):
        checkpoint.load(path)
