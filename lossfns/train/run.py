"""A run: its folder, its progress on the terminal, a clean end at Ctrl-C, and what it takes to go on after a kill."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from tempfile import TemporaryFile
from types import FrameType
from typing import IO, Any, NamedTuple, TextIO

from lossfns.backend.engine.ranks import Alone, Ranks
from lossfns.backend.storage import checkpoint
from lossfns.errors import LossInputError

if sys.platform != "win32":
    import fcntl

CONFIG, METRICS, RESULT = "config.json", "metrics.jsonl", "result.json"
CHECKPOINT, REFERENCE, CURVES = "checkpoint.npz", "reference.npz", "curves.png"
CHECKPOINTS, REFERENCES = (CHECKPOINT, "checkpoint"), (REFERENCE, "reference")
"""A file of one process, a folder of many."""
FILES = {CONFIG, METRICS, RESULT, *CHECKPOINTS, *REFERENCES, CURVES}
ALONE = Alone()


class State(NamedTuple):
    """What a run knows beside the weights: steps done by phase, the batches' random state, and values measured."""

    done: dict[str, int]
    random: list[Any]
    measured: dict[str, Any]


Save = Callable[[State], None]


class Run:
    """The metrics, the progress bar, the steps and the checkpoints of a run in ``folder``, from ``state`` on.

    ``save`` writes a checkpoint with the state it is given; it is called every ``every`` steps, at the end of
    a phase, and at a stop. As a context the run turns the first Ctrl-C into ``stopping``, which ends ``steps``
    after the step in hand; a second one interrupts at once. Of many ``ranks`` the first writes; all stop together.
    """

    def __init__(
        self,
        folder: Path,
        save: Save = lambda state: None,
        *,
        state: State | None = None,
        every: int = 20,
        terminal: TextIO | None = None,
        ranks: Alone | Ranks = ALONE,
    ) -> None:
        state = state or State({}, [], {})
        self.folder, self.save, self.every, self.terminal = folder, save, every, terminal or sys.stderr
        self.done, self.random, self.measured = dict(state.done), state.random, dict(state.measured)
        self.stopping = self.stopped = False
        self.ranks = ranks
        self._metrics, self.history = (seen if ranks.rank else taken)(folder, sum(self.done.values()))
        self.start = time.monotonic() - (self.history[-1]["seconds"] if self.history else 0)

    def __enter__(self) -> Run:
        self._handler = signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._handler)
        self._metrics.close()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        self.say("stopping after this step; Ctrl-C again stops at once")

    def steps(self, phase: str, count: int, rng: Random) -> Iterator[int]:
        """The steps of a phase that are not done yet, of 0 to count − 1, as long as nobody asks to stop.

        ``rng`` is what the steps draw from: it goes on where the last checkpoint left it.
        """
        first = self.done.get(phase, 0)
        if 0 < first < count:
            restore(rng, self.random)
        self.phase, self.count, self.first, self.phase_start = phase, count, first, time.monotonic()
        for step in range(first, count):
            if any(self.ranks.ask(self.ranks.gather, self.stopping)):
                # Once: what a recipe measures on its way out of a stopped run is no part of its state.
                if not self.stopped:
                    self.checkpoint()
                self.stopped = True
                return
            yield step
            self.done[phase], self.random = step + 1, [*rng.getstate()]
            if (step + 1) % self.every == 0 or step + 1 == count:
                self.checkpoint()

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """What ``measure`` gave the first time, something that JSON can hold; a resumed run remembers it."""
        if name not in self.measured:
            self.measured[name] = measure()
        return self.measured[name]

    def checkpoint(self) -> None:
        """The rows so far to the disk, then the state that counts on them."""
        os.fsync(self._metrics.fileno())
        self.save(State(dict(self.done), self.random, dict(self.measured)))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of ``metrics.jsonl``, and the bar."""
        row = {"phase": self.phase, "step": step + 1, "seconds": round(self.seconds, 3), **metrics}
        self.history.append(row)
        self._metrics.write(json.dumps(row).encode() + b"\n")
        self._metrics.flush()
        self.show(step + 1, metrics)

    @property
    def steps_done(self) -> int:
        return len(self.history)

    @property
    def seconds(self) -> float:
        """Since the start; of a resumed run, without the time between."""
        return time.monotonic() - self.start

    def show(self, done: int, metrics: Mapping[str, float]) -> None:
        """A bar that is redrawn on a terminal; elsewhere a line for every tenth of the way."""
        live = self.terminal.isatty()
        if not live and done * 10 // self.count == (done - 1) * 10 // self.count:
            return
        left = (time.monotonic() - self.phase_start) / (done - self.first) * (self.count - done)
        bar = ("#" * (20 * done // self.count)).ljust(20, ".")
        shown = "  ".join(f"{name} {metrics[name]:.3f}" for name in ("loss", "reward", "accuracy") if name in metrics)
        line = f"{self.phase:>8} [{bar}] {done}/{self.count}  {shown}  {left:.0f} s left"
        end = "\n" if done == self.count or not live else ""
        print(("\r" + line.ljust(100) if live else line), end=end, file=self.terminal, flush=True)

    def say(self, text: str) -> None:
        print(text, file=self.terminal, flush=True)


def begin(folder: Path, config: Mapping[str, Any]) -> None:
    """The folder of a new run, with its ``config.json``; where there is a run already, nothing is overwritten."""
    try:
        if folder.exists() and (not folder.is_dir() or FILES & {path.name for path in folder.iterdir()}):
            got = f"{folder}, which holds another run or is a file"
            fix = "Choose another: nothing is overwritten. --resume goes on with a run."
            raise LossInputError("--out", "a new or empty folder", got, fix)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / CONFIG, config)
    except OSError as error:
        raise LossInputError("--out", "a folder to write in", f"{folder} ({error})", "Choose another.") from None


def begun(folder: Path) -> dict[str, Any]:
    """The config of a run."""
    if not (folder / CONFIG).is_file():
        got = f"{folder}, which {'has no config.json' if folder.is_dir() else 'is no folder'}"
        raise LossInputError("--resume", "the folder of a run", got, "It is what --out named.")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if all(isinstance(config[key], dict) for key in ("options", "model", "sha256", "versions")):
            return config
    except (KeyError, OSError, TypeError, ValueError):
        pass
    got = f"{folder / CONFIG}, which is damaged or of another version"
    raise LossInputError("--resume", "the config of a run", got, "Start a new run.")


def write(path: Path, content: Mapping[str, Any]) -> None:
    """JSON, whole or not at all."""
    with checkpoint.replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def taken(folder: Path, count: int) -> tuple[IO[bytes], list[dict[str, Any]]]:
    """The metrics of a run that is ours alone from here on, with so many rows; what a killed save left is swept."""
    metrics = (folder / METRICS).open("ab+")
    try:
        lock(metrics, folder)
        history = cut(metrics, count)
    except LossInputError:
        metrics.close()
        raise
    for left in folder.glob(".*.partial"):
        left.unlink()
    return metrics, history


def seen(folder: Path, count: int) -> tuple[IO[bytes], list[dict[str, Any]]]:
    """The same for a rank that writes nowhere: the rows are those of rank 0."""
    if count == 0:
        return TemporaryFile(), []
    with (folder / METRICS).open("rb") as metrics:
        return TemporaryFile(), read(metrics, count)


def lock(metrics: IO[bytes], folder: Path) -> None:
    """Two processes would write into each other's run; the lock goes with the process, however it ends."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        got = f"{folder}, which is still running"
        raise LossInputError("--resume", "a run that has ended", got, "Wait for it, or stop it.") from None


def cut(metrics: IO[bytes], count: int) -> list[dict[str, Any]]:
    """The first rows, which become the only ones: a killed run has more of them than its checkpoint knows."""
    metrics.seek(0)
    history = read(metrics, count)
    metrics.truncate(metrics.tell())
    return history


def read(metrics: IO[bytes], count: int) -> list[dict[str, Any]]:
    """The next rows."""
    try:
        rows = [json.loads(metrics.readline()) for _ in range(count)]
        return [{**row, "seconds": float(row["seconds"])} for row in rows]
    except (ValueError, KeyError, TypeError):
        got = f"{metrics.name}, which is damaged"
        raise LossInputError("--resume", f"{count} rows of metrics", got, "Start a new run.") from None


def restore(rng: Random, state: list[Any]) -> None:
    version, internal, gauss = state
    rng.setstate((version, tuple(internal), gauss))


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows in columns, the first row as the head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
