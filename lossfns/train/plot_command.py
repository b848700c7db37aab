"""``lossfns plot``: the curves of a run on the terminal and its report, or pictures of losses."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lossfns.describe import presets
from lossfns.errors import LossInputError
from lossfns.terminal import print_refusal, printable, say, while_read, width_of
from lossfns.train.charts import block_line
from lossfns.train.options import check_option, is_path
from lossfns.train.record import Record, changing, read_record, values_of
from lossfns.train.report import write_report


def add_plot(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``plot`` command to a command line."""
    p = commands.add_parser(
        "plot",
        help="draw losses, or the curves of a run of lossfns train",
        description="Show the curves of a run on the terminal, and write report.html into its folder: curves, samples, "
        "gradients, options. Works while the run goes on, too. Or draw losses into a file: values and slopes over what "
        "they see, several of one kind on the same axes. kl draws the estimators of KL, weighings what a token counts, "
        "advantages those of a group. Pictures of losses need the extra viz.",
    )
    p.add_argument("names", metavar="NAME", nargs="*", help="a run folder; or losses; or kl, weighings or advantages")
    p.add_argument("--parts", metavar="FAMILY", help="draw which parts the losses of a family are made of")
    p.add_argument("--out", metavar="FILE", help="the picture of losses: .svg, .png or .pdf (default: NAME.svg)")
    p.set_defaults(run=plot_command, parser=p)


def plot_command(args: argparse.Namespace) -> int:
    """Run ``lossfns plot``.

    Returns:
        0, or 2 if a name is neither a run with metrics nor a loss, or if names and options do not go together.
    """
    if not args.names and args.parts is None:
        args.parser.error("name a run or a loss, or pass --parts FAMILY")
    runs = [name for name in args.names if names_run(name)]
    if len(args.names) > 1:  # a folder may have the name of a loss
        runs = [name for name in runs if name not in presets()]
    try:
        refuse_together(args, runs)
    except LossInputError as error:
        return print_refusal(error)
    return plot_run(runs[0]) if runs else plot_losses(args)


def refuse_together(args: argparse.Namespace, runs: list[str]) -> None:
    """Refuse a run together with other names, or with options for pictures of losses."""
    if not runs:
        return
    if len(args.names) > 1:
        way = f"lossfns compare {' '.join(runs)} shows several runs." if len(runs) > 1 else "Leave out one of them."
        raise LossInputError("NAME", "one run alone, or losses", " and ".join(args.names), way)
    for name, value in (("--out", args.out), ("--parts", args.parts)):
        if value is not None:
            got, fix = f"{value} and the run {runs[0]}", "Leave it out: a run has its report.html in its folder."
            raise LossInputError(name, "losses to draw with it", got, fix)


def names_run(name: str) -> bool:
    """Whether a name stands for a run folder. A text that no path can be does too: its error is that of a folder."""
    return os.sep in name or not is_path(name) or os.path.exists(name)  # False for a name that is too long


def plot_losses(args: argparse.Namespace) -> int:
    from lossfns.plot.command import draw

    try:
        path = draw(args.names, args.out, args.parts)
    except (LossInputError, OSError) as error:
        return print_refusal(error)
    with while_read(sys.stdout):
        say(f"picture     {path}")
    return 0


def plot_run(name: str) -> int:
    """Draw the curves of a run."""
    try:
        check_option("RUN", name)
        record = read_record(Path(name))
        written = write_report(record)
    except (LossInputError, OSError) as error:
        return print_refusal(error)
    except KeyboardInterrupt:
        return 130
    with while_read(sys.stdout):
        print_curves(record)
        say(printable(f"report      {written}", sys.maxsize))
    return 0


def print_curves(record: Record) -> None:
    """Print a line for each metric that has changed, the last phase first: first value, curve and last value."""
    width = min(60, (width_of(sys.stdout) or 80) - 46)
    rows = [(f"{phase:>10} {name:<10}", values_of(record.history, phase, name)) for phase, name in changing(record)]
    if len(held_out := record.held_out()) > 1:
        rows.insert(0, (f"{'held out':>10} {record.measure:<10}", held_out))
    for title, points in rows:
        x = [y for _, y in points]
        say(f"{printable(title)[:21]:<21} {x[0]:>10.4g}  {block_line(x, max(8, width))}  {x[-1]:.4g}")
