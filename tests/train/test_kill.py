"""Runs that are killed at random moments, half of them inside a save, end bit for bit like a run that is not killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import pytest
from children import start

from lossfns.backend.storage import checkpoint
from lossfns.train.run import CHECKPOINT, CONFIG, EVALUATIONS, METRICS, REFERENCE, RESULT

KILLS = {"sft": 14, "dpo": 12, "orpo": 12, "grpo": 8, "dapo": 2, "gspo-token": 2}
"""50 kills in the exhaustive run, half of them inside a save."""


def rows_of(folder: Path) -> Path:
    """Write a few rows that every method can read. All have the same answer, so that some samples are right."""
    row = {"completion": "4", "answer": "4", "chosen": "4", "rejected": "5"}
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}: 2+2=", **row}) + "\n" for i in range(12)))
    return path


def begin(method: str, folder: Path) -> list[str]:
    """The arguments of a small run that is saved every second step, with its data beside its folder."""
    sizes = ["--steps", "24"] if method == "sft" else ["--steps", "20", "--warmup-steps", "4"]
    group = ["--group", "3"] if method in ("grpo", "dapo", "gspo-token") else []
    data = ["--data", str(rows_of(folder.parent)), "--device", "cpu", "--out", str(folder)]
    return ["train", method, *data, *sizes, *group, "--batch", "3", "--save-every", "2", "--eval-every", "3"]


def go_on(method: str, folder: Path) -> Any:
    """Start a process that begins the run, or resumes it."""
    resumed = ["train", "--resume", str(folder)]
    arguments = resumed if (folder / CONFIG).exists() else begin(method, folder)
    return start(arguments, folder.with_suffix(".txt"))


def finish(method: str, folder: Path) -> Path:
    process = go_on(method, folder)
    process.join(120)
    assert process.exitcode == 0, folder.with_suffix(".txt").read_text()
    return folder


MEASURED = ("seconds", "peak_memory")


def contents(folder: Path) -> dict[str, Any]:
    """All that a run leaves, except what a process measures: times, and the memory of its first request."""
    rows = {
        name: [json.loads(line) for line in (folder / name).read_text().splitlines()] for name in (METRICS, EVALUATIONS)
    }
    result = json.loads((folder / RESULT).read_text())
    files = [folder / name for name in (CHECKPOINT, REFERENCE) if (folder / name).exists()]
    return {
        **{file: [{name: x for name, x in row.items() if name not in MEASURED} for row in rows[file]] for file in rows},
        RESULT: {name: x for name, x in result.items() if name not in MEASURED},
        **{path.name: sha256(path.read_bytes()).hexdigest() for path in files},
        "others": {path.name for path in folder.iterdir()} - {METRICS, EVALUATIONS, RESULT, CHECKPOINT, REFERENCE},
    }


def half_written(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if name.endswith(".partial")} if folder.exists() else set()


def steps_done(folder: Path) -> int:
    path = folder / METRICS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(happened: Callable[[], bool], process: Any) -> None:
    deadline = time.monotonic() + 60
    while not happened() and process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.0005)


def strike(process: Any, folder: Path, rng: Random, inside: bool) -> bool:
    """Kill the process at a random moment, aimed inside a save or not. Return whether it was inside one.

    The evidence is the half-written file that it leaves behind.
    """
    old, first = half_written(folder), steps_done(folder)
    if inside:
        seen: set[str] = set()
        saves = rng.randint(1, 2)

        def happened() -> bool:
            seen.update(half_written(folder) - old)
            return len(seen) == saves

        wait_for(happened, process)
        time.sleep(rng.uniform(0, 0.01))
    else:
        steps = rng.randint(0, 3)
        wait_for(lambda: steps_done(folder) >= first + steps, process)
        time.sleep(rng.uniform(0, 0.1 if steps else 0.4))
    process.kill()
    process.join()
    return bool(half_written(folder) - old)


def chain(method: str, folder: Path, due: Counter[bool], rng: Random) -> Path:
    """Run, kill, resume, kill, and so on, until all kills are done or the run ends first; then run to the end."""
    while due.total():
        process = go_on(method, folder)
        inside = strike(process, folder, rng, rng.choice(sorted(+due)))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, folder.with_suffix(".txt").read_text()
        due[inside] = max(0, due[inside] - 1)
        if (folder / CHECKPOINT).exists():
            checkpoint.load(folder / CHECKPOINT)
    return finish(method, folder)


@pytest.mark.parametrize(
    ("method", "kills"),
    [
        pytest.param("sft", 2, marks=pytest.mark.repeated),
        *(pytest.param(method, n, marks=pytest.mark.exhaustive) for method, n in KILLS.items()),
    ],
)
def test_a_run_killed_again_and_again_ends_as_one_left_alone(method: str, kills: int, tmp_path: Path) -> None:
    rng, due = Random(method), Counter({True: kills // 2, False: kills // 2})
    expected = contents(finish(method, tmp_path / "whole"))
    for attempt in range(12):
        assert contents(chain(method, tmp_path / f"killed{attempt}", due, rng)) == expected
        if not due.total():
            return
    pytest.fail(f"kills still to come, inside a save and outside: {due[True]}, {due[False]}")


@pytest.mark.parametrize("method", ["sft", pytest.param("grpo", marks=pytest.mark.exhaustive)])
def test_a_run_stopped_by_ctrl_c_goes_on_as_one_left_alone(method: str, tmp_path: Path) -> None:
    expected = contents(finish(method, tmp_path / "whole"))
    folder = tmp_path / "stopped"
    for steps in (3, 6, 11):
        process = go_on(method, folder)
        wait_for(lambda steps=steps: steps_done(folder) >= steps, process)  # type: ignore[misc]
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 0
        assert json.loads((folder / RESULT).read_text())["stopped_early"]
        assert steps_done(folder) < 24
    assert contents(finish(method, folder)) == expected


@pytest.mark.exhaustive
def test_real_processes_killed_and_resumed_from_the_command_line(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(arguments: list[str], until: int) -> int:
        process = subprocess.Popen(
            [sys.executable, "-m", "lossfns", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        deadline = time.monotonic() + 60
        while steps_done(folder) < until and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill() if until else None
        shown = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), shown
        return process.returncode

    folder = tmp_path / "killed"
    assert run(begin("dpo", folder), until=5) == -signal.SIGKILL
    assert run(["train", "--resume", str(folder)], until=14) == -signal.SIGKILL
    assert run(["train", "--resume", str(folder)], until=0) == 0
    assert contents(folder) == contents(finish("dpo", tmp_path / "whole"))
