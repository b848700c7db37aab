"""The folder of a run: it touches only files that it made, and of several runs that begin in it one gets it."""

import json
import multiprocessing
import os
import signal
import time
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import pytest
from children import start

from lossfns import LossInputError
from lossfns.cli import main
from lossfns.train.run import CHECKPOINT, CONFIG, METRICS, RESULT, Run, create_run, replaced, run_id


def rows_of(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+2=", "completion": str(i + 2)}) + "\n" for i in range(12)))
    return path


def small(folder: Path, *more: str) -> list[str]:
    data = ["--data", str(rows_of(folder.parent)), "--device", "cpu", "--out", str(folder)]
    return ["train", "sft", *data, "--steps", "3", "--batch", "2", *more]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


FOREIGN = [
    *(".notes.partial", ".config.json.0123.partial", ".checkpoint.npz.0123456789ab.partial", "notes.txt"),
    *("metrics.jsonl", "result.json", "checkpoint.npz", "report.html", ".hidden"),
]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_that_is_not_empty_is_refused_and_left_as_it_is(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text("mine")
    assert main(small(folder)) == 2
    said = capsys.readouterr().err
    assert f"--out: expected a new or empty folder, got {folder}, which holds '{name}'" in said
    assert everything(folder) == {name: b"mine"}


def test_partial_files_of_others_stay_when_a_run_is_resumed(tmp_path: Path) -> None:
    """Only what has the run's own random id in its name is removed: a killed process of this run has left it."""
    folder = tmp_path / "run"
    assert main(small(folder)) == 0
    (folder / RESULT).unlink()
    mine, other = run_id(folder), "0" * 32
    assert mine
    left = folder / f".checkpoint.npz.{mine}.0123456789ab.partial"
    left.mkdir()
    (left / "checkpoint.npz").write_text("half of a ch")
    kept = {".notes.partial", ".checkpoint.npz.0123456789ab.partial", f".checkpoint.npz.{other}.0123456789ab.partial"}
    for name in kept:
        (folder / name).write_text("mine")
    assert main(["train", "--resume", str(folder)]) == 0
    assert {name for name in os.listdir(folder) if name.startswith(".")} == kept
    assert all((folder / name).read_text() == "mine" for name in kept)


@pytest.mark.parametrize("config", ["{}", '{"id": "*"}', '{"id": "../.."}', '{"id": 3}', "[]", "nonsense", "[" * 5000])
def test_a_config_without_a_proper_id_removes_nothing(config: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(config)
    (tmp_path / ".x.run.0123456789ab.partial").write_text("mine")
    with Run(tmp_path):
        pass
    assert (tmp_path / ".x.run.0123456789ab.partial").read_text() == "mine"


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / RESULT).write_text("old")
    with pytest.raises(ZeroDivisionError), replaced(tmp_path, RESULT) as path:
        path.write_text("ne")
        raise ZeroDivisionError
    assert everything(tmp_path) == {RESULT: b"old"} and os.listdir(tmp_path) == [RESULT]


# Two runs that begin at once


def compete(number: int, folders: list[Path], barrier: Any, results: Any) -> None:
    for folder in folders:
        barrier.wait(60)
        try:
            create_run(folder, {"id": f"{number:032x}", "padding": [number] * 500})
            results.put((number, str(folder), ""))
        except LossInputError as error:
            results.put((number, str(folder), str(error)))


@pytest.mark.parametrize(
    "races", [pytest.param(60, marks=pytest.mark.repeated), pytest.param(500, marks=pytest.mark.exhaustive)]
)
def test_of_two_runs_that_begin_in_one_empty_folder_exactly_one_gets_it(races: int, tmp_path: Path) -> None:
    """Half of the folders exist already. The config is the winner's, whole; the loser is refused by name."""
    folders = [tmp_path / f"run{i}" for i in range(races)]
    for folder in folders[::2]:
        folder.mkdir()
    fork = multiprocessing.get_context("forkserver")
    barrier, results = fork.Barrier(2), fork.Queue()
    processes = [fork.Process(target=compete, args=(i, folders, barrier, results)) for i in (1, 2)]
    for process in processes:
        process.start()
    ended = [results.get(timeout=120) for _ in range(2 * races)]
    for process in processes:
        process.join(60)
    for folder in folders:
        told = {number: text for number, name, text in ended if name == str(folder)}
        (winner,) = [number for number, text in told.items() if not text]
        config = json.loads((folder / CONFIG).read_text())
        assert config == {"id": f"{winner:032x}", "padding": [winner] * 500}
        assert "--out: expected a new or empty folder" in told[3 - winner] and str(folder) in told[3 - winner]
        assert os.listdir(folder) == [CONFIG]


@pytest.mark.exhaustive
def test_two_commands_that_begin_in_one_folder_do_not_mix(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    commands = [small(folder, "--seed", seed) for seed in ("1", "2")]
    said = [tmp_path / "said1.txt", tmp_path / "said2.txt"]
    processes = [start(*command) for command in zip(commands, said)]
    for process in processes:
        process.join(120)
    shown = [path.read_text() for path in said]
    assert sorted(process.exitcode for process in processes) == [0, 2], shown
    loser = [process.exitcode for process in processes].index(2)
    assert "--out: expected a new or empty folder" in shown[loser]
    assert json.loads((folder / CONFIG).read_text())["options"]["seed"] == (2, 1)[loser]


# Kills


@pytest.mark.exhaustive
def test_a_killed_command_leaves_a_folder_that_is_resumed_or_says_what_is_missing(tmp_path: Path) -> None:
    """Killed at a random moment, from its start on. What a stranger puts into the folder afterwards stays.

    ``test_kill.py`` has 50 kills, half of them inside a save.
    """
    rng = Random(1)
    for number in range(3):
        folder, said = tmp_path / f"run{number}", tmp_path / f"said{number}.txt"
        process = start(small(folder, "--steps", "100000", "--save-every", "1"), said)
        deadline, begun = time.monotonic() + 60, rng.random() < 0.8
        while time.monotonic() < deadline and begun and not (folder / METRICS).exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        if not (folder / CONFIG).exists():
            assert main(["train", "--resume", str(folder)]) == 2
            continue
        (folder / ".mine.partial").write_text("mine")
        config, had = (folder / CONFIG).read_bytes(), (folder / CHECKPOINT).exists()
        before = metrics_of(folder)
        process = start(["train", "--resume", str(folder)], said)
        while time.monotonic() < deadline and not has_gone_on(folder, before, had):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 0, said.read_text()
        assert (folder / ".mine.partial").read_text() == "mine"
        assert (folder / CONFIG).read_bytes() == config
        assert not [name for name in os.listdir(folder) if name.endswith(".partial") and name != ".mine.partial"]


def metrics_of(folder: Path) -> bytes:
    return (folder / METRICS).read_bytes() if (folder / METRICS).exists() else b""


def has_gone_on(folder: Path, before: bytes, had: bool) -> bool:
    """Whether a resumed run has made a step. Without a checkpoint it begins again, and so do its metrics."""
    now = metrics_of(folder)
    return now != before and len(now) > (len(before) if had else 0)


def test_data_and_first_weights_are_never_written_to(tmp_path: Path) -> None:
    assert main(small(tmp_path / "first")) == 0
    files = [tmp_path / "rows.jsonl", tmp_path / "first" / CHECKPOINT]
    before = [sha256(path.read_bytes()).hexdigest() for path in files]
    times = [path.stat().st_mtime_ns for path in files[1:]]
    data = ["--data", str(files[0]), "--init", str(files[1]), "--out", str(tmp_path / "second")]
    assert main(["train", "sft", *data, "--steps", "2", "--batch", "2"]) == 0
    assert [sha256(path.read_bytes()).hexdigest() for path in files] == before
    assert [path.stat().st_mtime_ns for path in files[1:]] == times
