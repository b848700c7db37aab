"""``lossfns compare RUN RUN ...``: what differs in the options of runs, and in what they reached."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lossfns.errors import LossInputError
from lossfns.terminal import print_refusal, printable, say, while_read, width_of
from lossfns.train.charts import COLOURS, Line, Points, block_line, smooth
from lossfns.train.options import check_option
from lossfns.train.page import figure, key, page, table, text
from lossfns.train.record import Record, best, changing, read_record, rises, values_of
from lossfns.train.report import duration, spoken

MOST_RUNS = 2 * COLOURS
"""The most runs of a comparison: each has a colour of its own, the second half with dashed lines."""


def add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``compare`` command to a command line."""
    p = commands.add_parser(
        "compare",
        help="compare runs of lossfns train",
        description="Compare runs: the options in which they differ, the held-out measure before, after and at its "
        "best, and the curves over one another. Works while they go on, too.",
    )
    p.add_argument("folders", metavar="RUN", nargs="+", help="the run folders")
    p.add_argument("--html", metavar="FILE", help="write the comparison with its charts to this HTML file, too")
    p.set_defaults(run=compare_command, parser=p)


def compare_command(args: argparse.Namespace) -> int:
    """Run ``lossfns compare``.

    Returns:
        0, or 2 if a folder holds no run, or no metrics.
    """
    try:
        records = read_records(args.folders)
        if args.html is not None:
            write_page(Path(args.html), comparison(records))
    except (LossInputError, OSError) as error:
        return print_refusal(error)
    with while_read(sys.stdout):
        say(printable("\n".join(lines_of(records, width_of(sys.stdout) or 80)), sys.maxsize))
        if args.html is not None:
            say(f"\npage  {args.html}")
    return 0


def write_page(file: Path, page: str) -> None:
    """Write a page. A file that is no page is not replaced: a slip of the fingers must not cost a run its files.

    Raises:
        LossInputError: for a file with another ending.
    """
    if file.suffix.lower() not in (".html", ".htm"):
        raise LossInputError("--html", "a file ending in .html", repr(str(file)), "Choose another name.")
    file.write_text(page, encoding="utf-8", errors="backslashreplace")


def read_records(folders: Sequence[str]) -> list[Record]:
    """Read the runs.

    Raises:
        LossInputError: if there are fewer than two different folders, or too many, or if a folder holds no run.
    """
    for folder in folders:
        check_option("RUN", folder)
    different = {Path(folder).resolve() for folder in folders}
    if not 2 <= len(different) == len(folders) <= MOST_RUNS:
        got = f"{len(folders)}" if len(different) == len(folders) else "one of them twice"
        raise LossInputError("RUN", f"2 to {MOST_RUNS} different runs", got, "Name each run once.")
    return [read_record(Path(folder)) for folder in folders]


# The differences


def differences(records: Sequence[Record]) -> dict[str, list[str]]:
    """Return the options and the parts of loss, model and versions that differ, each with its value in every run."""
    configs = [config_texts(record.config) for record in records]
    names = dict.fromkeys(name for config in configs for name in config)
    values = {name: [config.get(name, "–") for config in configs] for name in names}
    return {name: row for name, row in values.items() if len(set(row)) > 1}


def config_texts(config: dict[str, Any]) -> dict[str, str]:
    """Return the parts of a config that a comparison shows, as texts by name."""
    options = {name: x for name, x in config["options"].items() if name != "out"}
    parts = {**options, "loss": config.get("loss", ""), **config["versions"]}
    parts |= {words: config["model"].get(name) for name, words in MODEL_WORDS.items()}
    parts |= {f"SHA-256 of {name}": x for name, x in config["sha256"].items()}
    return {name: x if isinstance(x, str) else json.dumps(x) for name, x in parts.items()}


MODEL_WORDS = {
    "model_name": "name of the model",
    "parameters": "number of parameters",
    "device": "device of the model",
    "dtype": "dtype of the weights",
}
"""What a comparison calls the parts of the description of a model."""


def result_rows(records: Sequence[Record]) -> list[list[str]]:
    """Return a row for each run: the held-out measure before, after and at its best; steps, time, state."""
    rows = []
    for number, record in enumerate(records, 1):
        points = record.held_out()
        values = ["–"] * 3
        if points:
            step, value = best(record)
            values = [f"{points[0][1]:.3f}", f"{points[-1][1]:.3f}", f"{value:.3f} @ {step}"]
        rows.append([f"{number}", *values, f"{len(record.history)}", duration(record.seconds), record.state])
    return rows


def shared_measure(records: Sequence[Record]) -> str:
    """Return the name of the held-out measure that all runs have; an empty text if they have none in common."""
    names = {record.measure for record in records}
    return (names.pop() or "") if len(names) == 1 else ""


def result_head(records: Sequence[Record]) -> list[str]:
    """Return the column heads of ``result_rows``."""
    measure = shared_measure(records)
    better = ("best (high)" if rises(measure) else "best (low)") if measure else "best"
    return ["run", "before", "after", better, "steps", "time", "state"]


def common_curves(records: Sequence[Record]) -> dict[str, list[Points]]:
    """Return the curves that at least two runs have in their last phase: by metric, the points of each run."""
    curves: dict[str, list[Points]] = {}
    if measure := shared_measure(records):
        curves[f"held-out {spoken(measure)}"] = [record.held_out() for record in records]
    for name in dict.fromkeys(name for record in records for _, name in changing(record)):
        curves[name] = [values_of(record.history, record.main_phase, name) for record in records]
    return {name: rows for name, rows in curves.items() if sum(len(points) > 1 for points in rows) > 1}


# Text


def lines_of(records: Sequence[Record], width: int) -> list[str]:
    """Return the comparison as lines of text."""
    lines = [f"{number:>3}  {record.folder}" for number, record in enumerate(records, 1)]
    measure = shared_measure(records)
    lines += ["", f"held-out {spoken(measure)}" if measure else "held out"]
    rows = [result_head(records), *result_rows(records)]
    sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += ["  ".join(cell.rjust(size) for cell, size in zip(row, sizes)) for row in rows]
    lines += ["", "options that differ" if (different := differences(records)) else "no option differs"]
    for name, values in different.items():
        lines.append(f"  {name}")
        for number, value in enumerate(values, 1):
            lines += textwrap.wrap(f"{number:>5}  {value}", width, subsequent_indent=" " * 7, max_lines=4)
    for name, curves in common_curves(records).items():
        lines += ["", name]
        every = [y for points in curves for _, y in points]
        for number, points in enumerate(curves, 1):
            ys = [y for _, y in points]
            if ys:
                curve = block_line(ys, max(8, min(60, width - 28)), (min(every), max(every)))
                lines.append(f"{number:>3} {ys[0]:>10.4g}  {curve}  {ys[-1]:.4g}")
    return lines


# A page


def line_look(i: int) -> str:
    """Return the look of a run's lines: a colour of its own, dashed in the second half."""
    return f"c{i % COLOURS}{' dashed' if i >= COLOURS else ''}"


def comparison(records: Sequence[Record]) -> str:
    """Return the comparison as the text of an HTML file."""
    names = [f"{number}: {record.folder}" for number, record in enumerate(records, 1)]
    figures = []
    for name, curves in common_curves(records).items():
        held_out = name.startswith("held-out ")
        shown = curves if held_out else map(smooth, curves)
        lines = [Line(points, line_look(i), marks=held_out) for i, points in enumerate(shown) if points]
        note = ", ".join(f"{i}: {points[-1][1]:.3g}" for i, points in enumerate(curves, 1) if points)
        figures.append(figure(name, note if len(records) <= 4 else "", lines))
    different = [[name, *values] for name, values in differences(records).items()]
    head = ["", *(f"run {number}" for number in range(1, len(records) + 1))]
    parts = [
        f"<h1>{len(records)} runs</h1>",
        key((line_look(i), name) for i, name in enumerate(names)),
        f"<h2>Held-out {text(spoken(shared_measure(records)))}</h2>",
        table(result_rows(records), head=result_head(records)),
        "<h2>Curves</h2><p>Metrics of training are running means. The numbers are the last values.</p>"
        if figures
        else "",
        f'<div class="grid">{"".join(figures)}</div>',
        "<h2>What differs</h2>",
        table(different, head=head, numbers=False) if different else "<p>No option, model or version differs.</p>",
    ]
    return page(f"{len(records)} runs", "\n".join(parts))
