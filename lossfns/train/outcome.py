"""The outcome of a run: ``result.json``, the report, and what the terminal shows at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lossfns.terminal import console_on, one_line, say, while_read, width_of
from lossfns.train.checkpoints import checkpoints
from lossfns.train.measures import TEMPERATURE, TITLES
from lossfns.train.recipes import Outcome
from lossfns.train.record import EMPTY, read_record
from lossfns.train.report import duration, write_report
from lossfns.train.run import METRICS, REPORT, RESULT, Run, write_json
from lossfns.train.values import counted


def report_outcome(run: Run, outcome: Outcome, shown: Path) -> None:
    """Write ``result.json`` and ``report.html``, and print the outcome, with the folder as ``shown``."""
    seconds = round(run.seconds, 1)
    result = {
        "stopped_early": run.stopped,
        "seconds": seconds,
        **{name: {"before": outcome.before[name], "after": outcome.after[name]} for name in outcome.before},
        "samples": outcome.samples,
    }
    write_json(run.folder, RESULT, result)
    if run.history:
        write_report(read_record(run.folder))
    with while_read(sys.stdout):
        print_outcome(outcome)
        print_samples(outcome.samples)
        stopped = ", stopped early" if run.stopped else ""
        say(f"{counted(run.steps_done, 'step')}{stopped}; {duration(seconds)} in all, with the measurements")
        say(f"checkpoint  {shown / checkpoints(run.folder)[0].name}")
        say(f"metrics     {shown / METRICS}")
        say(f"report      {shown / REPORT if run.history else 'none: the run has made no step'}")
        say(f"try it      lossfns sample {shown} PROMPT")
        if run.stopped:
            say(f"continue    lossfns train --resume {shown}")


def print_outcome(outcome: Outcome) -> None:
    """Print the held-out measurements before and after between blank lines: a table on a terminal, else lines."""
    rows = [(TITLES[name], before, outcome.after[name]) for name, before in outcome.before.items()]
    console = console_on(sys.stdout)
    if console is None:
        lines = (
            f"{title}: {before:.3f} before, {after:.3f} after ({after - before:+.3f})" for title, before, after in rows
        )
        say("\n" + "\n".join(lines) + "\n")
        return
    from rich import box
    from rich.table import Table

    table = Table("", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for title, before, after in rows:
        table.add_row(title, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    console.print(table)


def print_samples(samples: Sequence[Mapping[str, str]]) -> None:
    """Print the ends of a few prompts, and the starts of samples before and after training, each on one line."""
    if not samples:
        return
    width = (width_of(sys.stdout) or 80) - 12
    say(f"samples at temperature {TEMPERATURE}, before and after training (whole in {RESULT})")
    for sample in samples:
        for name, text in sample.items():
            shown = text if text or name == "prompt" else EMPTY
            say(f"  {name:<8}{one_line(shown, width, end=name == 'prompt')}")
        say("")
