"""Saves of one name at the same moment, and saves that are killed: no checkpoint is lost or mixed."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tiny import client, texts

from lossfns import LossInputError
from lossfns.backend import AdamParams
from lossfns.backend.storage import checkpoint, folder
from lossfns.backend.storage import file as storage_file

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lossfns.backend", "pytest", "torch.distributed.checkpoint.hf_storage"])
"""Forks children, which need not import torch again, from a process without computations or threads."""


def tensors(writer: int, size: int = 500) -> dict[str, torch.Tensor]:
    """Tensors by which a checkpoint is known, and a mixture of two is found out."""
    return {f"t{i}": torch.full((size,), float(writer)) for i in range(4)}


def writer_of(path: Path) -> int:
    """Return whose checkpoint this is; fail for a mixture."""
    loaded, data = checkpoint.load(path)
    values = {float(x) for tensor in loaded.values() for x in tensor.unique()} | {float(data["writer"])}
    (value,) = values
    return int(value)


def save_file(path: Path, writer: int, overwrite: bool = False, size: int = 500) -> Any:
    return storage_file.save(path, tensors(writer, size), {"writer": writer}, overwrite=overwrite)


def save_folder(path: Path, writer: int, overwrite: bool = False, size: int = 500) -> Any:
    return folder.save(path, tensors(writer, size), {"writer": writer}, folder.ONE, overwrite=overwrite)


SAVES: dict[str, Callable[..., Any]] = {"file": save_file, "folder": save_folder}

REFUSED = "expected a file that does not exist yet"


def saver(kind: str, root: str, count: int, writer: int, barrier: Any, results: Any) -> None:
    """Save under each of ``count`` names at the moment at which another process does."""
    torch.set_num_threads(1)
    told = []
    for i in range(count):
        barrier.wait(60)
        try:
            SAVES[kind](Path(root) / f"{i}", writer)
            told.append("success")
        except LossInputError as error:
            told.append(str(error))
        except BaseException as error:
            told.append(f"{type(error).__name__}: {error}")
    results.put((writer, told))


@pytest.mark.parametrize(
    "count", [pytest.param(12, marks=pytest.mark.repeated), pytest.param(500, marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("kind", SAVES)
def test_of_two_saves_of_one_name_at_the_same_moment_one_succeeds(kind: str, count: int, tmp_path: Path) -> None:
    barrier, results = SERVER.Barrier(2), SERVER.Queue()
    processes = [
        SERVER.Process(target=saver, args=(kind, str(tmp_path), count, writer, barrier, results)) for writer in (1, 2)
    ]
    for process in processes:
        process.start()
    told = dict(results.get(timeout=300) for _ in processes)
    for process in processes:
        process.join(60)
    for i in range(count):
        winners = [writer for writer in told if told[writer][i] == "success"]
        (loser,) = (told[writer][i] for writer in told if writer not in winners)
        assert len(winners) == 1 and writer_of(tmp_path / f"{i}") == winners[0]
        assert REFUSED in loser and str(tmp_path / f"{i}") in loser
    left = {path.name for path in tmp_path.rglob("*")} - {f"{i}" for i in range(count)}
    assert kind == "folder" or left == set()
    for i in range(count if kind == "folder" else 0):
        assert len(list((tmp_path / f"{i}").glob("*.part"))) == 1


@pytest.mark.parametrize(
    "count", [pytest.param(25, marks=pytest.mark.repeated), pytest.param(500, marks=pytest.mark.exhaustive)]
)
def test_of_two_clients_that_save_one_state_at_the_same_moment_one_succeeds(count: int, tmp_path: Path) -> None:
    """Clients of one process; their states differ in the number of steps."""
    clients = [client(seed=seed) for seed in (1, 2)]
    for _ in range(2):
        clients[1].forward_backward(texts(Random(0)), "cross_entropy")
        clients[1].optim_step(AdamParams()).result()
    barrier = threading.Barrier(2)
    told: dict[int, list[str]] = {0: [], 1: []}

    def save(which: int) -> None:
        for i in range(count):
            barrier.wait(60)
            call = clients[which].save_weights_for_sampler if i % 3 == 2 else clients[which].save_state
            try:
                call(tmp_path / f"{i}").result(60)
                told[which].append("success")
            except LossInputError as error:
                told[which].append(str(error))

    threads = [threading.Thread(target=save, args=(which,)) for which in told]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    for i in range(count):
        winners = [which for which in told if told[which][i] == "success"]
        (loser,) = (told[which][i] for which in told if which not in winners)
        assert len(winners) == 1 and loser.startswith(f"name: {REFUSED}, got {tmp_path / f'{i}'}")
        loaded, data = checkpoint.load(tmp_path / f"{i}")
        assert data["steps"] == 2 * winners[0]
        for name, x in clients[winners[0]].model.named_parameters():
            assert torch.equal(loaded[name], x)
    assert len(list(tmp_path.iterdir())) == count


def test_a_name_that_appears_during_a_save_is_not_replaced(tmp_path: Path) -> None:
    replacing = storage_file.replacing(tmp_path / "x", overwrite=False)
    with pytest.raises(LossInputError, match=REFUSED), replacing as file:
        file.write(b"new")
        (tmp_path / "x").write_text("theirs")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "theirs")]


def test_without_hard_links_a_save_is_still_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*paths: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    save_file(tmp_path / "x", 1)
    with pytest.raises(LossInputError, match=REFUSED):
        save_file(tmp_path / "x", 2)
    assert writer_of(tmp_path / "x") == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_link_that_leads_nowhere_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(tmp_path / "nowhere")
    for call in (client().save_state, client().save_weights_for_sampler):
        with pytest.raises(LossInputError, match=f"name: {REFUSED}"):
            call(tmp_path / "x").result()
    assert not (tmp_path / "nowhere").exists()


def test_a_save_that_fails_removes_its_own_tensors_and_no_others(tmp_path: Path) -> None:
    """Another save may be writing; and folders that only look like parts are not ours."""
    save_folder(tmp_path / "x", 1)
    (tmp_path / "x" / "my.part").mkdir()
    (tmp_path / "x" / "0123456789ab.part").mkdir()
    bad = {"t": torch.empty(2, device="meta")}
    with pytest.raises(Exception):  # noqa: B017
        folder.save(tmp_path / "x", bad, {}, folder.ONE)
    parts = {p.name for p in (tmp_path / "x").glob("*.part")}
    assert len(parts) == 3 and {"my.part", "0123456789ab.part"} < parts
    save_folder(tmp_path / "x", 2, overwrite=True)
    parts = {p.name for p in (tmp_path / "x").glob("*.part")}
    assert len(parts) == 2 and "my.part" in parts and writer_of(tmp_path / "x") == 2


# Kills


def save_again_and_again(kind: str, root: str, first: int) -> None:
    """Replace one checkpoint, and write a new one under another name, until the process is killed."""
    torch.set_num_threads(1)
    for i in range(first, first + 10_000):
        SAVES[kind](Path(root) / "same", i, overwrite=True, size=100_000)
        SAVES[kind](Path(root) / f"new-{i}", i, size=100_000)


@pytest.mark.parametrize(
    "kills", [pytest.param(4, marks=pytest.mark.repeated), pytest.param(50, marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("kind", SAVES)
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one(kind: str, kills: int, tmp_path: Path) -> None:
    """At any moment the last whole checkpoint is there; a new name is there as a whole or not at all."""
    rng, seen, inside = Random(kind), -1, 0
    for kill in range(kills):
        process = SERVER.Process(target=save_again_and_again, args=(kind, str(tmp_path), seen + 1))
        process.start()
        before = time.monotonic()
        while not checkpoint.exists(tmp_path / f"new-{seen + 1}") and time.monotonic() < before + 60:
            time.sleep(0.001)
        if kill % 2:
            time.sleep(rng.uniform(0, 0.05))
        else:
            while not half_written(tmp_path) and time.monotonic() < before + 60:
                pass
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        now = writer_of(tmp_path / "same")
        assert now >= seen + 1
        for path in tmp_path.glob("new-*"):
            if checkpoint.exists(path):
                assert writer_of(path) == int(path.name.removeprefix("new-"))
                checkpoint.remove(path)
        inside += bool(half_written(tmp_path))
        seen = now + 1
        for path in half_written(tmp_path):
            if path.name.endswith(".partial"):
                path.unlink()
        SAVES[kind](tmp_path / "same", seen, overwrite=True)  # a save after a kill needs no tidying up
        assert writer_of(tmp_path / "same") == seen
    assert inside >= kills / 4


def half_written(root: Path) -> list[Path]:
    """Return what saves under way, or killed, have written: files and folders that are no checkpoint yet."""
    parts = [p for p in root.glob("*/*.part") if folder.current_part(p.parent) != p.name]
    return [*root.rglob("*.partial"), *parts]


# Folders with a good seal and bad content


def sealed_folder(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the meta of a folder and seal it anew, with the checksums of the files as they are."""
    content = json.loads((path / folder.META).read_text())
    meta = content["meta"]
    part = path / str(meta["part"])
    meta["files"] = folder.local_checksums(part, 0, 1)
    change(meta)
    (path / folder.META).write_text(json.dumps({"seal": folder.seal(meta), "meta": meta}))


def overwritten(path: Path, content: bytes) -> None:
    (file,) = path.glob("*.part/*.safetensors")
    file.write_bytes(content)


META: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a part that is elsewhere": lambda meta: meta.update(part="../other"),
    "a part that is a number": lambda meta: meta.update(part=3),
    "no part": lambda meta: meta.pop("part"),
    "a part that is not there": lambda meta: meta.update(part="0123456789ab.part"),
    "no data": lambda meta: meta.pop("data"),
    "data that are a list": lambda meta: meta.update(data=[1]),
    "tied to nothing": lambda meta: meta.update(tied={"x": "nothing"}),
    "tied that are a list": lambda meta: meta.update(tied=["x"]),
    "tied to a list": lambda meta: meta.update(tied={"x": ["t0"]}),
    "no files": lambda meta: meta.update(files={}),
    "files that are a list": lambda meta: meta.update(files=[1]),
    "another format": lambda meta: meta.update(format="x"),
}


@pytest.mark.parametrize("what", META)
def test_a_sealed_folder_of_bad_content_is_refused_by_name(what: str, tmp_path: Path) -> None:
    save_folder(tmp_path / "x", 1)
    sealed_folder(tmp_path / "x", META[what])
    with pytest.raises(LossInputError, match="path: expected a whole lossfns-checkpoint-folder-1, got") as caught:
        checkpoint.load(tmp_path / "x")
    assert str(tmp_path / "x") in str(caught.value)


@pytest.mark.parametrize(
    "count", [pytest.param(20, marks=pytest.mark.repeated), pytest.param(200, marks=pytest.mark.exhaustive)]
)
def test_a_folder_of_mutated_tensors_is_refused_by_name_or_read_whole(count: int, tmp_path: Path) -> None:
    """The checksums are those of the mutated file, so that only reading it can tell."""
    save_folder(tmp_path / "x", 1, size=5)
    (file,) = (tmp_path / "x").glob("*.part/*.safetensors")
    whole, refused = file.read_bytes(), 0
    for i in range(count):
        rng = Random(i)
        a = rng.randrange(len(whole) if i % 2 else 300)  # the header has 300 bytes and more
        overwritten(tmp_path / "x", rng.choice([whole[:a], whole[:a] + rng.randbytes(4) + whole[a + 4 :], whole[a:]]))
        sealed_folder(tmp_path / "x", lambda meta: None)
        try:
            assert set(checkpoint.load(tmp_path / "x")[0]) == {f"t{i}" for i in range(4)}
        except LossInputError as error:
            refused += 1
            assert str(tmp_path / "x") in str(error)
    assert refused > count / 4
