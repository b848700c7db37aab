"""The command ``lossfns check SUBJECT``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lossfns.errors import LossInputError
from lossfns.terminal import print_report, print_rows, status
from lossfns.testing.report import MARKS, Report

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {
    "pass": "green",
    "wrong": "bold red",
    "unsure": "yellow",
    "fragile": "yellow",
    "n/a": "dim",
    "skipped": "dim",
}


def add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``check`` command to a command line."""
    p = commands.add_parser(
        "check",
        help="test a loss, your own or one of ours, by the laws of its kind",
        description="Test a loss by the laws of its kind and by the golden vectors of the method that it claims to be. "
        "Exits with 0 if all hold, 1 if one is broken, 2 if the subject cannot be tested.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("subject", metavar="MODULE:NAME", help="a contract function (data, logprobs_list), a factory of "
        "one, or a function of padded [B, T] tensors; FILE.py:NAME also works")  # fmt: skip
    p.add_argument("--kind", choices=("policy", "likelihood", "reweighted", "preference", "unpaired",
        "distillation", "any", "advantages"),
        help="which laws to test; detected if left out")  # fmt: skip
    p.add_argument("--factory", action="store_true", default=None,
        help="the subject is a factory; detected if left out")  # fmt: skip
    p.add_argument("--like", metavar="METHOD", help="the method that the subject claims to be, such as "
        "'grpo(kl_beta=0.04)': its golden vectors are run too")  # fmt: skip
    p.add_argument("--examples", type=non_negative, default=12, metavar="N", help="random batches for each law")
    p.add_argument("--json", metavar="FILE", help="write the report as JSON; '-' prints it in place of the table")
    p.add_argument("--junit", metavar="FILE", help="write the report as JUnit XML")
    p.set_defaults(run=check_command)


def non_negative(text: str) -> int:
    """Parse an integer of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {number}")
    return number


def check_command(args: argparse.Namespace) -> int:
    """Run ``lossfns check``.

    Returns:
        0 if all laws hold, 1 if one is broken, 2 if the subject cannot be tested.
    """
    sys.path.insert(0, os.getcwd())  # as ``python`` does, so that a module in the current folder is found
    try:
        from lossfns.testing.check import check
        from lossfns.testing.subject import load, parse_method

        like = None if args.like is None else parse_method(args.like)
        subject = load(args.subject)
        # The output of the loss itself goes to standard error: it is not part of the report.
        with status() as show, contextlib.redirect_stdout(sys.stderr):
            report = check(
                subject,
                kind=args.kind,
                factory=args.factory,
                like=like,
                name=args.subject,
                examples=args.examples,
                progress=lambda law: show(f"checking {law}"),
            )
        write(report, args)
    except (LossInputError, ImportError, OSError) as error:
        print(f"lossfns: {error}", file=sys.stderr)
        return 2
    return 0 if report.ok else 1


def write(report: Report, args: argparse.Namespace) -> None:
    """Print the report and write the requested files."""
    print_report(report, draw, args.json)
    if args.junit:
        Path(args.junit).write_text(report.junit() + "\n", encoding="utf-8")


def draw(report: Report, console: Console) -> None:
    """Print the text of ``Report.table`` in colours, wrapped to the width of the terminal."""
    console.print(f"{report.title}\n", style="bold")
    print_rows(console, [(MARKS[v.verdict], v.law, v.remark) for v in report.verdicts],
        styles=[STYLES[v.verdict] for v in report.verdicts])  # fmt: skip
    for v in report.broken:
        console.print(f"\n{v.law}: {v.says}", style=STYLES[v.verdict])
        print_rows(console, [("", label, text) for label, text in v.explanation])
    console.print(f"\n{report.summary}", style=STYLES[report.broken[0].verdict if report.broken else "pass"])
