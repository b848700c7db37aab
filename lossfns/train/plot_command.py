"""``lossfns plot``: the curves of a run, or pictures of losses."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lossfns.errors import LossInputError
from lossfns.terminal import console_on, say, while_read
from lossfns.train import plots
from lossfns.train.options import check_option
from lossfns.train.outcome import draw_curves, refused
from lossfns.train.run import METRICS, RESULT, load_config


def add_plot(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``plot`` command to a command line."""
    p = commands.add_parser(
        "plot",
        help="draw losses, or the curves of a run of lossfns train",
        description="Draw the curves of a run on the terminal and into its folder, also while it is running. Or draw "
        "losses into a file: values and slopes over what they see, several of one kind on the same axes. kl draws the "
        "estimators of KL, weighings what a token counts, advantages those of a group. Pictures need the extra viz.",
    )
    p.add_argument("names", metavar="NAME", nargs="*", help="a run folder; or losses; or kl, weighings or advantages")
    p.add_argument("--parts", metavar="FAMILY", help="draw which parts the losses of a family are made of")
    p.add_argument("--out", metavar="FILE", help="the picture of losses: .svg, .png or .pdf (default: NAME.svg)")
    p.set_defaults(run=plot_command, parser=p)


def plot_command(args: argparse.Namespace) -> int:
    """Run ``lossfns plot``.

    Returns:
        0, or 2 if a name is neither a run with metrics nor a loss.
    """
    if not args.names and args.parts is None:
        args.parser.error("name a run or a loss, or pass --parts FAMILY")
    is_run = len(args.names) == 1 and (os.sep in args.names[0] or Path(args.names[0]).exists())
    return plot_run(args.names[0]) if is_run else plot_losses(args)


def plot_losses(args: argparse.Namespace) -> int:
    from lossfns.plot.command import draw

    try:
        path = draw(args.names, args.out, args.parts)
    except (LossInputError, OSError) as error:
        return refused(error)
    with while_read(sys.stdout):
        say(f"picture     {path}")
    return 0


def plot_run(name: str) -> int:
    """Draw the curves of a run."""
    try:
        check_option("RUN", name)
        folder = Path(name)
        load_config(folder, "RUN")
        history = read_history(folder)
        curves = draw_curves(folder, history, read_measured(folder))
    except (LossInputError, OSError) as error:
        return refused(error)
    except KeyboardInterrupt:
        return 130
    with while_read(sys.stdout):
        print_curves(history)
        say(f"curves      {curves}")
    return 0


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics of a run that may still be running: a line that is not whole yet is left out.

    Raises:
        LossInputError: if there are none, or a row is damaged.
    """
    try:
        lines = (folder / METRICS).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        lines = []
    if not lines:
        got = f"none in {folder}"
        raise LossInputError("RUN", "a run with metrics", got, "It has not made a step yet.")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "phase": str(row["phase"]), "step": int(row["step"])})
            numbers = [row[name] for name in plots.PLOTTED if name in row]
        except (ValueError, KeyError, TypeError, RecursionError):
            numbers = [None]
        if not all(isinstance(x, (int, float)) for x in numbers):
            place = f"{folder / METRICS}:{number}"
            raise LossInputError(place, "a row of metrics", "a damaged one", "Was the file changed?")
    return rows


def read_measured(folder: Path) -> dict[str, tuple[float, float]]:
    """Return the held-out measurements of a finished or stopped run; none if it has not ended."""
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return {k: (float(v["before"]), float(v["after"])) for k, v in result.items() if isinstance(v, dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def print_curves(history: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each metric that has changed: its first value, its curve and its last value."""
    found = plots.changing_metrics(history)
    values = [plots.values_of(history, phase, name) for phase, name in found]
    console = console_on(sys.stdout)
    width = min(60, (console.width if console else 80) - 46)
    for (phase, name), x in zip(found, values):
        curve = plots.block_line(x, max(8, width))
        say(f"{phase:>10} {name:<10} {x[0]:>10.3f}  {curve}  {x[-1]:.3f}")
