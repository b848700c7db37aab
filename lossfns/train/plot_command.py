"""``lossfns plot RUN``: the curves of a run on the terminal, and its report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lossfns.errors import LossInputError
from lossfns.terminal import console_on, say, while_read
from lossfns.train.charts import block_line
from lossfns.train.options import check_option
from lossfns.train.outcome import refused
from lossfns.train.record import Record, changing, read_record, values_of
from lossfns.train.report import write_report


def add_plot(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``plot`` command to a command line."""
    p = commands.add_parser(
        "plot",
        help="show the curves of a run of lossfns train",
        description="Show the curves of a run on the terminal, and write report.html into its folder: curves, samples, "
        "gradients, options. Works while the run goes on, too.",
    )
    p.add_argument("folder", metavar="RUN", help="the run folder")
    p.set_defaults(run=plot_command, parser=p)


def plot_command(args: argparse.Namespace) -> int:
    """Run ``lossfns plot``.

    Returns:
        0, or 2 if the folder holds no run or no metrics.
    """
    try:
        check_option("RUN", args.folder)
        folder = Path(args.folder)
        record = read_record(folder)
        written = write_report(record)
    except (LossInputError, OSError) as error:
        return refused(error)
    except KeyboardInterrupt:
        return 130
    with while_read(sys.stdout):
        print_curves(record)
        say(f"report      {written}")
    return 0


def print_curves(record: Record) -> None:
    """Print a line for each metric that has changed, the last phase first: first value, curve and last value."""
    console = console_on(sys.stdout)
    width = min(60, (console.width if console else 80) - 46)
    rows = [(f"{phase:>10} {name:<10}", values_of(record.history, phase, name)) for phase, name in changing(record)]
    if len(held_out := record.held_out()) > 1:
        rows.insert(0, (f"{'held out':>10} {record.measure:<10}", held_out))
    for title, points in rows:
        x = [y for _, y in points]
        say(f"{title[:21]:<21} {x[0]:>10.4g}  {block_line(x, max(8, width))}  {x[-1]:.4g}")
