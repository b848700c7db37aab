"""The progress of a run on the terminal: live bars where a person watches, else a line for each tenth of a phase.

A phase that is slow gets a line every ten seconds, too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, TextIO

from lossfns.terminal import console_on

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = ("loss", "reward", "accuracy")
"""The metrics to show, if the method has them."""

SILENCE = 10.0
"""The most seconds without a line, if steps end."""


def display_on(stream: TextIO | None) -> PlainDisplay:
    """Return a live display for a terminal; a plain one for any other stream, or without rich."""
    console = console_on(stream)
    return PlainDisplay(stream) if console is None else LiveDisplay(console)


class PlainDisplay:
    """Progress as lines of text."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream

    def begin_phase(self, phase: str, first: int, count: int) -> None:
        """Start a phase of ``count`` steps; the first ``first`` steps are done already."""
        self.phase, self.first, self.count, self.start = phase, first, count, time.monotonic()
        self.shown = self.start

    def show_step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show that ``done`` steps of the phase are done, and the metrics of the last one."""
        if done * 10 // self.count > (done - 1) * 10 // self.count or time.monotonic() > self.shown + SILENCE:
            self.shown = time.monotonic()
            self.say(f"{self.phase:>8} {done}/{self.count}  {metrics_text(metrics)}  {self.time_left(done)}")

    def say(self, text: str) -> None:
        """Write a line."""
        if self.stream is not None:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""

    def time_left(self, done: int) -> str:
        """Return the time that the rest of the phase will take at its mean speed; at its end, the time that it took."""
        spent = time.monotonic() - self.start
        if done == self.count:
            return f"in {clock(spent)}"
        return f"{clock(spent / (done - self.first) * (self.count - done))} left"


class LiveDisplay(PlainDisplay):
    """Progress as a bar for each phase, redrawn in place. A phase takes one line: the bar has what the texts leave."""

    def __init__(self, console: Console) -> None:
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
            text("{task.fields[metrics]}"),
            text("{task.fields[left]}"),
            console=console,
            refresh_per_second=4,
            expand=True,
        )

    def begin_phase(self, phase: str, first: int, count: int) -> None:
        super().begin_phase(phase, first, count)
        self.task = self.progress.add_task(phase, total=count, completed=first, metrics="", left="")
        self.progress.start()

    def show_step(self, done: int, metrics: Mapping[str, float]) -> None:
        self.progress.update(self.task, completed=done, metrics=metrics_text(metrics), left=self.time_left(done))

    def say(self, text: str) -> None:
        self.progress.console.print(text, soft_wrap=False)

    def close(self) -> None:
        self.progress.stop()


def metrics_text(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN if name in metrics)


def clock(seconds: float) -> str:
    """Return a time as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
