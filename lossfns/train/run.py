"""One run: its folder, its steps and metrics, a clean end at Ctrl-C, and the state that a resumed run needs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, NamedTuple, TextIO, TypeVar
from uuid import uuid4

from lossfns.backend.engine.ranks import Ranks, SingleProcess
from lossfns.backend.storage.file import sync
from lossfns.errors import LossInputError
from lossfns.terminal import discard, printable
from lossfns.train.display import display_on
from lossfns.train.rows import RowFile
from lossfns.train.trackers import Tracker

CONFIG, METRICS, EVALUATIONS, RESULT = "config.json", "metrics.jsonl", "evaluations.jsonl", "result.json"
CHECKPOINT, REFERENCE = "checkpoint.safetensors", "reference.safetensors"
BATCH, REPORT = "batch.json", "report.html"
CHECKPOINTS, REFERENCES = (CHECKPOINT, "checkpoint"), (REFERENCE, "reference")
"""One process writes a file, several processes write a folder."""
OLD_CHECKPOINT = "checkpoint.npz"
"""The file that one process wrote until 2026-11. It is read, and replaced at the next save."""
ONE_PROCESS = SingleProcess()
T = TypeVar("T")


class State(NamedTuple):
    """The state of a run besides the weights. A checkpoint keeps it as JSON.

    Attributes:
        done: the number of finished steps of each phase.
        random: the state of the random generator that draws the batches of the current phase.
        measured: the values that ``Run.once`` has measured, by name.
        evaluations: the number of rows of ``evaluations.jsonl``.
    """

    done: dict[str, int]
    random: list[Any]
    measured: dict[str, Any]
    evaluations: int = 0


Save = Callable[[State], None]


class Trained(NamedTuple):
    """The batch of an optimizer step.

    Attributes:
        phase: the phase of the step.
        step: the number of the step in its phase, counted from 1.
        data: the datums.
        loss: the loss with its side columns, as the step got it.
    """

    phase: str
    step: int
    data: Sequence[Any]
    loss: Any


class Run:
    """A run in ``folder``, from ``state`` on: its steps, metrics, checkpoints and progress.

    As a context manager the run handles Ctrl-C. The first one sets ``stopping``, which ends ``steps`` after the
    current step. A closed terminal or pipe has the same effect. The second Ctrl-C goes to the handler before.

    Args:
        folder: an existing folder.
        save: writes a checkpoint that holds the state it is given. It is called every ``every`` steps, at the end
            of a phase, and at a stop.
        state: the state of the newest checkpoint; None for a new run.
        every: the number of steps from one checkpoint to the next.
        terminal: where to show progress; standard error by default.
        ranks: the processes of the run. Rank 0 writes the files, and all ranks stop after the same step.
        trackers: others that get the metrics, too.
    """

    def __init__(
        self,
        folder: Path,
        save: Save = lambda state: None,
        *,
        state: State | None = None,
        every: int = 20,
        terminal: TextIO | None = None,
        ranks: SingleProcess | Ranks = ONE_PROCESS,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        state = state or State({}, [], {})
        self.folder, self.save, self.every, self.ranks = folder, save, every, ranks
        self.done, self.random, self.measured = dict(state.done), state.random, dict(state.measured)
        self.stopping = self.stopped = False
        self.trackers = list(trackers)
        self._files = open_files(folder, [sum(self.done.values()), state.evaluations], ranks.rank)
        self.history, self.evaluations = (file.rows for file in self._files)
        self.start = time.monotonic() - (self.history[-1]["seconds"] if self.history else 0)
        self.display = display_on(terminal or sys.stderr)
        self._open = True
        self.trained: Trained | None = None

    def __enter__(self) -> Run:
        self._handler = signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._handler)
        self._show(self.display.close)
        for file in self._files:
            file.close()
        for tracker in list(self.trackers):
            self._track(tracker, tracker.close)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopping and callable(self._handler):
            self._handler(number, frame)  # Python's own raises KeyboardInterrupt
            return
        self.stopping = True
        with suppress(RuntimeError):  # the signal may have come while another line was being written
            self.say("stopping after this step; Ctrl-C again stops at once")

    def plan(self, phases: Mapping[str, int]) -> None:
        """Name the phases of the whole run with their numbers of steps, so that the progress shows all of them."""
        self._show(self.display.plan, phases, self.done)

    def steps(self, phase: str, count: int, rng: Random) -> Iterator[int]:
        """Yield the steps of a phase that are not done yet, of 0 to ``count`` − 1, until a stop is requested.

        A resumed phase restores ``rng``, which draws the batches, to its state in the last checkpoint.
        """
        first = self.done.get(phase, 0)
        if 0 < first < count:
            restore_rng(rng, self.random)
        if first < count:
            self._show(self.display.begin_phase, phase, first, count)
        self.phase = phase
        for step in range(first, count):
            if any(self.ranks.when_idle(self.ranks.gather, self.stopping)):
                # Save once: measurements that the recipe makes on its way out are not part of the stopped state.
                if not self.stopped:
                    self.checkpoint()
                self.stopped = True
                return
            yield step
            self.done[phase], self.random = step + 1, [*rng.getstate()]
            if (step + 1) % self.every == 0 or step + 1 == count:
                self.checkpoint()

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return ``measure()``, a value that JSON can hold. A resumed run returns the value of the first time."""
        if name not in self.measured:
            self.measured[name] = measure()
        return self.measured[name]

    def checkpoint(self) -> None:
        """Flush the rows to the disk, then save the state, which must not be ahead of them."""
        for file in self._files:
            file.sync()
        self.save(State(dict(self.done), self.random, dict(self.measured), len(self.evaluations)))

    def log(self, step: int, metrics: Mapping[str, float], data: Sequence[Any] = (), loss: Any = None) -> None:
        """Append a row to ``metrics.jsonl`` and show it.

        Args:
            step: the step, counted from 0.
            metrics: its metrics.
            data, loss: the datums of the step and the loss that it bound to them, for the report.
        """
        self.trained = Trained(self.phase, step + 1, data, loss) if data else None
        self._append(0, self._row(self.phase, step + 1, metrics), f"{self.phase}/")
        self._show(self.display.show_step, step + 1, metrics)

    def log_evaluation(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Append a row to ``evaluations.jsonl``: held-out measurements by name, after ``step`` steps of a phase."""
        self._append(1, self._row(phase, step, values), "held out/")
        self._show(self.display.show_evaluations, self.evaluations)

    def in_parts(self, examples: Sequence[T], size: int) -> Iterator[Sequence[T]]:
        """Yield examples to measure on, ``size`` at a time, and show how many have been measured."""
        for i in range(0, len(examples), size):
            self._show(self.display.show_measured, i, len(examples))
            yield examples[i : i + size]
        self._show(self.display.show_measured, len(examples), len(examples))

    def _append(self, file: int, row: dict[str, Any], prefix: str) -> None:
        """Append a row to a file, and pass its values on to the trackers, with the number of steps of the run."""
        self._files[file].append(row)
        values = {f"{prefix}{name}": x for name, x in row.items() if name not in ("phase", "step", "seconds")}
        for tracker in list(self.trackers):
            self._track(tracker, tracker.log, len(self.history), values)

    def _track(self, tracker: Tracker, call: Callable[..., Any], *arguments: Any) -> None:
        """Call a tracker. If it fails, say so, and go on without it: the files of the run have everything."""
        try:
            call(*arguments)
        except Exception as error:
            self.trackers.remove(tracker)
            self.say(f"warning: {tracker.name} fails ({type(error).__name__}: {error}); {METRICS} has everything")

    def _row(self, phase: str, step: int, values: Mapping[str, float]) -> dict[str, Any]:
        place = {"phase": phase, "step": step, "seconds": round(self.seconds, 3)}
        return {**place, **values, **place}  # a metric of one's own loss may have such a name

    @property
    def steps_done(self) -> int:
        return len(self.history)

    @property
    def seconds(self) -> float:
        """The time spent on the run. The time between a stop and a resumption does not count."""
        return time.monotonic() - self.start

    def say(self, text: str) -> None:
        """Write a line to the terminal."""
        self._show(self.display.say, printable(text, sys.maxsize))

    def _show(self, write: Callable[..., None], *arguments: Any) -> None:
        """Write to the terminal. If nobody reads it any more (a closed pipe), stop after this step, and be silent."""
        if self._open:
            try:
                write(*arguments)
            except OSError:
                self._open, self.stopping = False, True
                discard(self.display.stream)


def restore_rng(rng: Random, state: list[Any]) -> None:
    """Restore a generator to a state that was read from JSON."""
    version, internal, gauss = state
    rng.setstate((version, tuple(internal), gauss))


# The folder


def check_new(folder: Path, argument: str = "--out") -> None:
    """Refuse a folder that is not new or empty, so that nothing is overwritten.

    Raises:
        LossInputError: naming some of the files in the folder.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    except NotADirectoryError:
        got, fix = f"{folder}, which is a file", "Choose another: nothing is overwritten."
        raise LossInputError(argument, "a new or empty folder", got, fix) from None
    if CONFIG in names:
        fix = f"Choose another: nothing is overwritten. lossfns train --resume {folder} continues a run."
        raise LossInputError(argument, "a new or empty folder", f"{folder}, which holds another run", fix)
    if names:
        got = f"{folder}, which holds {', '.join(map(ascii, names[:3]))}{', ...' if len(names) > 3 else ''}"
        fix = "Choose another: nothing is overwritten."
        raise LossInputError(argument, "a new or empty folder", got, fix)


def create_run(folder: Path, config: Mapping[str, Any]) -> None:
    """Create the folder of a new run and its ``config.json``, which makes the folder this run's own.

    The file is created only if there is none, and in one step with its content. Of several runs that begin in one
    empty folder at the same moment, exactly one gets it.

    Raises:
        LossInputError: if the folder is not empty, or cannot be written.
    """
    content = encoded(config)  # before the file is there: an interrupt in between would leave it empty
    try:
        check_new(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(folder / CONFIG, "xb", buffering=0) as file:
                file.write(content)
                os.fsync(file.fileno())
        except FileExistsError:
            got, fix = f"{folder}, in which another run has just begun", "Choose another: nothing is overwritten."
            raise LossInputError("--out", "a new or empty folder", got, fix) from None
        if others := sorted(set(os.listdir(folder)) - {CONFIG}):
            (folder / CONFIG).unlink()
            got, fix = f"{folder}, which now holds {', '.join(map(ascii, others[:3]))}", "Choose another."
            raise LossInputError("--out", "a new or empty folder", got, fix)
        sync(folder)
    except (OSError, ValueError) as error:
        if isinstance(error, LossInputError):
            raise
        raise LossInputError("--out", "a folder to write in", f"{folder} ({error})", "Choose another.") from None


def encoded(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"


def run_id(folder: Path) -> str | None:
    """Return the random id of the run in a folder; None if its config has none."""
    try:
        name = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["id"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) and re.fullmatch("[0-9a-f]{32}", name) else None


@contextmanager
def replaced(folder: Path, name: str) -> Iterator[Path]:
    """Yield a path to write to. After the block, the file there replaces the file ``name`` of the run in one step.

    Until then the file is in a new folder with the run's id in its name, so that a later process can remove what a
    killed process has left.
    """
    aside = folder / f".{name}.{run_id(folder) or 'run'}.{uuid4().hex[:12]}.partial"
    aside.mkdir()
    try:
        yield aside / name
        os.replace(aside / name, folder / name)
        sync(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_half_written(folder: Path) -> None:
    """Remove what killed processes of this run have left half written, and nothing else."""
    name = run_id(folder)
    for aside in folder.glob(f".*.{name}.*.partial") if name else ():
        shutil.rmtree(aside, ignore_errors=True)


def load_config(folder: Path, argument: str = "--resume") -> dict[str, Any]:
    """Return the config of an earlier run.

    Raises:
        LossInputError: if the folder holds no run, or its config is damaged.
    """
    if not (folder / CONFIG).is_file():
        got = f"{folder}, which {'has no config.json' if folder.is_dir() else 'is no folder'}"
        raise LossInputError(argument, "the folder of a run", got, "Pass the folder that --out named.")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        parts = [*(config[key] for key in ("options", "model", "sha256", "versions")), config.get("machine", {})]
        if all(isinstance(part, dict) for part in parts):
            return config
    except (KeyError, OSError, TypeError, ValueError, RecursionError):
        pass
    got = f"{folder / CONFIG}, which is damaged or of another version"
    raise LossInputError(argument, "the config of a run", got, "Start a new run.")


def is_finished(folder: Path) -> bool:
    """Whether the run has come to its end, with all of its steps."""
    try:
        return json.loads((folder / RESULT).read_text())["stopped_early"] is False
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def write_json(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write JSON to a file of the run, completely or not at all."""
    with replaced(folder, name) as path, open(path, "wb") as file:
        file.write(encoded(content))
        file.flush()
        os.fsync(file.fileno())


def open_files(folder: Path, counts: Sequence[int], rank: int) -> list[RowFile]:
    """Open the metrics and the evaluations of a run, cut to ``counts`` rows.

    The lock of the metrics keeps other processes from writing to the run. Files that a killed process of this run has
    left half written are removed.

    Raises:
        LossInputError: if another process has the lock, or a file has fewer rows.
    """
    with ExitStack() as opened:
        files = []
        for name, count in zip((METRICS, EVALUATIONS), counts):
            files.append(opened.enter_context(closing(RowFile(folder / name, count, rank))))
        if rank == 0:
            remove_half_written(folder)
        opened.pop_all()
    return files
