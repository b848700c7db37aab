"""The progress of a run on the terminal: live bars and curves where a person watches, else lines of text.

A line comes for each tenth of a phase, and every ten seconds in a slow phase.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO

from lossfns.terminal import console_on, width_of, wrap
from lossfns.train.charts import block_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SHOWN = ("loss", "reward", "accuracy")
"""The metrics of a line of text, if the method has them."""

CURVES = ("reward", "accuracy", "loss", "kl_ref", "margin", "grad_norm")
"""The metrics of the live display. It shows the first four that the method has."""

SILENCE = 10.0
"""A step that ends after this many seconds without a line writes one."""


def display_on(stream: TextIO | None) -> PlainDisplay:
    """Return a live display for a terminal; a plain one for any other stream, or without rich."""
    console = console_on(stream)
    return PlainDisplay(stream) if console is None else LiveDisplay(console)


class PlainDisplay:
    """Progress as lines of text."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.phases: dict[str, int] = {}
        self.shown = time.monotonic()

    def plan(self, phases: Mapping[str, int], done: Mapping[str, int]) -> None:
        """Set the phases of the whole run, with their numbers of steps, and the numbers that are done already."""
        self.phases = {phase: count for phase, count in phases.items() if count}

    def begin_phase(self, phase: str, first: int, count: int) -> None:
        """Start a phase of ``count`` steps; the first ``first`` steps are done already."""
        self.phases[phase] = count
        self.phase, self.first, self.count, self.start = phase, first, count, time.monotonic()
        self.shown = self.start

    def show_step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show that ``done`` steps of the phase are done, and the metrics of the last one."""
        if done * 10 // self.count > (done - 1) * 10 // self.count or time.monotonic() > self.shown + SILENCE:
            self.shown = time.monotonic()
            self.say(f"{self.phase:>8} {done}/{self.count}  {metrics_text(metrics)}  {self.time_left(done)}")

    def show_measured(self, done: int, count: int) -> None:
        """Show that ``done`` of the held-out examples of an evaluation are measured."""
        if 0 < done < count and time.monotonic() > self.shown + SILENCE:
            self.shown = time.monotonic()
            self.say(f"measured {done} of {count} held-out examples")

    def show_evaluations(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show the last one of the evaluations."""
        self.say(f"held out: {held_out_text(rows)}")

    def say(self, text: str) -> None:
        """Write a line."""
        if self.stream is not None:
            print(wrap(text, width_of(self.stream)), file=self.stream, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""

    def time_left(self, done: int) -> str:
        """Return the time that the rest of the run will take at the mean speed of the phase.

        The speed of later phases is not known, so their steps are named instead. At the end of the phase, return the
        time that the phase took.
        """
        spent = time.monotonic() - self.start
        if done == self.count:
            return f"in {clock(spent)}"
        left = f"{clock(spent / (done - self.first) * (self.count - done))} left"
        names = list(self.phases)
        return " ".join([left, *(f"+ {self.phases[name]} {name}" for name in names[names.index(self.phase) + 1 :])])


class LiveDisplay(PlainDisplay):
    """Progress as a bar for each phase, with curves of the metrics below, redrawn in place.

    All phases are shown from the start. A phase takes one line, and its bar fills the space between the texts.
    """

    def __init__(self, console: Console) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
        from rich.table import Column

        super().__init__(console.file)  # type: ignore[arg-type]

        def text(name: str) -> TextColumn:
            return TextColumn(name, markup=False, table_column=Column(no_wrap=True))

        self.progress = Progress(
            SpinnerColumn(finished_text=" "),
            text("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            text("{task.fields[left]}"),
            console=console,
            expand=True,
        )
        self.tasks: dict[str, Any] = {}
        self.values: dict[str, deque[float]] = {}
        self.held_out = self.measuring = ""
        self.live = Live(console=console, refresh_per_second=4, get_renderable=self.render)

    def plan(self, phases: Mapping[str, int], done: Mapping[str, int]) -> None:
        super().plan(phases, done)
        for phase, count in self.phases.items():
            ended = done.get(phase, 0)
            self.tasks[phase] = self.progress.add_task(phase, start=ended > 0, total=count, completed=ended, left="")

    def begin_phase(self, phase: str, first: int, count: int) -> None:
        super().begin_phase(phase, first, count)
        if phase not in self.tasks:
            self.tasks[phase] = self.progress.add_task(phase, left="")
        self.progress.start_task(self.tasks[phase])
        self.progress.update(self.tasks[phase], total=count, completed=first)
        self.values = {}
        self.live.start()

    def show_step(self, done: int, metrics: Mapping[str, float]) -> None:
        self.progress.update(self.tasks[self.phase], completed=done, left=self.time_left(done))
        for name in [name for name in CURVES if name in metrics][:4]:
            self.values.setdefault(name, deque(maxlen=1000)).append(metrics[name])

    def show_measured(self, done: int, count: int) -> None:
        self.measuring = f"{done} of {count} measured" if done < count else ""
        self.live.start()

    def show_evaluations(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.held_out = held_out_text(rows)

    def render(self) -> RenderableType:
        """Return the bars, the curves in two columns, and the held-out measure."""
        from rich.console import Group
        from rich.text import Text

        half = (self.progress.console.width - 4) // 2
        cells = [curve_text(name, list(x), half - 2) for name, x in self.values.items()]
        lines = [f"  {''.join(cell.ljust(half) for cell in cells[i : i + 2])}" for i in range(0, len(cells), 2)]
        below = "; ".join(filter(None, [self.held_out, self.measuring]))
        lines += [f"  held out: {below}"] if below else []
        return Group(self.progress, *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))

    def say(self, text: str) -> None:
        self.progress.console.print(wrap(text, self.progress.console.width), soft_wrap=False)

    def close(self) -> None:
        self.live.stop()


def metrics_text(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN if name in metrics)


def curve_text(name: str, values: Sequence[float], width: int) -> str:
    """Return the last value of a metric and its curve in ``width`` columns.

    >>> curve_text("reward", [0.0, 0.5, 1.0], 24)
    'reward        1.000  ▁▅█'
    """
    finite = [x for x in values if abs(x) < float("inf")]
    curve = block_line(finite, width - 21) if finite and width > 21 else ""
    return f"{name[:9]:<9} {values[-1]:>9.3f}  {curve}".rstrip()


def held_out_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the held-out measurements of the last row, and of the first one of its phase.

    >>> held_out_text([{"phase": "grpo", "step": 0, "seconds": 1.0, "reward": 0.25}])
    'reward 0.250 before training'
    >>> held_out_text([{"phase": "a", "step": 0, "reward": 0.25}, {"phase": "a", "step": 5, "reward": 0.5}])
    'reward 0.250 → 0.500 after 5 steps'
    """
    last = rows[-1]
    first = next(row for row in rows if row["phase"] == last["phase"])
    names = [name for name in last if name not in ("phase", "step", "seconds")]
    then = {name: f"{first[name]:.3f} → " for name in names if first is not last and name in first}
    values = ", ".join(f"{name} {then.get(name, '')}{last[name]:.3f}" for name in names)
    return f"{values} after {last['step']} steps" if last["step"] else f"{values} before training"


def clock(seconds: float) -> str:
    """Return a time as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
