"""A run: its folder, its progress on the terminal, and a clean end at Ctrl-C."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from lossfns import LossInputError


class Run:
    """Writes ``config.json`` and ``metrics.jsonl`` into its folder and shows a progress bar.

    As a context it turns the first Ctrl-C into ``stopped``, which ends ``steps`` after the step in hand;
    a second one interrupts at once.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any], *, terminal: TextIO | None = None) -> None:
        self.folder = Path(folder)
        if (self.folder / "config.json").exists() or (self.folder.exists() and not self.folder.is_dir()):
            got, fix = f"{folder}, which holds another run or is a file", "Choose another: nothing is overwritten."
            raise LossInputError("--out", "a new or empty folder", got, fix)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        self.history: list[dict[str, Any]] = []
        self.stopped = False
        self.terminal = terminal or sys.stderr
        self.start = time.monotonic()
        self._metrics = (self.folder / "metrics.jsonl").open("w", encoding="utf-8")

    def __enter__(self) -> Run:
        self._handler = signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._handler)
        self._metrics.close()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        self.say("stopping after this step; Ctrl-C again stops at once")

    def steps(self, phase: str, count: int) -> Iterator[int]:
        """0 to count − 1, as long as nobody asks to stop."""
        self.phase, self.count, self.phase_start = phase, count, time.monotonic()
        for step in range(count):
            if self.stopped:
                return
            yield step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of ``metrics.jsonl``, and the bar."""
        seconds = round(time.monotonic() - self.start, 3)
        row = {"phase": self.phase, "step": step + 1, "seconds": seconds, **metrics}
        self.history.append(row)
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        self.show(step + 1, metrics)

    @property
    def steps_done(self) -> int:
        return len(self.history)

    def show(self, done: int, metrics: Mapping[str, float]) -> None:
        """A bar that is redrawn on a terminal; elsewhere a line for every tenth of the way."""
        live = self.terminal.isatty()
        if not live and done * 10 // self.count == (done - 1) * 10 // self.count:
            return
        left = (time.monotonic() - self.phase_start) / done * (self.count - done)
        bar = ("#" * (20 * done // self.count)).ljust(20, ".")
        shown = "  ".join(f"{name} {metrics[name]:.3f}" for name in ("loss", "reward", "accuracy") if name in metrics)
        line = f"{self.phase:>8} [{bar}] {done}/{self.count}  {shown}  {left:.0f} s left"
        end = "\n" if done == self.count or not live else ""
        print(("\r" + line.ljust(100) if live else line), end=end, file=self.terminal, flush=True)

    def say(self, text: str) -> None:
        print(text, file=self.terminal, flush=True)


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows in columns, the first row as the head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
