"""``lossfns check SUBJECT``: the laws from the command line."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

from lossfns.errors import LossInputError
from lossfns.testing.check import Report


def add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``check`` command to a command line."""
    p = commands.add_parser(
        "check",
        help="test a loss, yours or ours, by the laws of its kind",
        description="Test a loss by the laws of its kind and the golden vectors of the method it claims to be. "
        "Exits 0 if all hold, 1 if one is broken, 2 if the subject cannot be tested.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("subject", metavar="MODULE:NAME", help="a contract function (data, logprobs_list), a factory of "
        "one, or a function of padded [B, T] tensors; FILE.py:NAME works too")  # fmt: skip
    p.add_argument("--kind", choices=("policy", "supervised", "preference", "any", "advantages"),
        help="which laws; found out where it can be")  # fmt: skip
    p.add_argument("--factory", action="store_true", default=None, help="the name is a factory; found out if left out")
    p.add_argument("--like", metavar="METHOD", help="the method it claims to be, such as 'grpo(kl_beta=0.04)': its "
        "golden vectors are run too")  # fmt: skip
    p.add_argument("--examples", type=whole, default=12, metavar="N", help="random batches for each law")
    p.add_argument("--json", metavar="FILE", help="write the report as JSON; '-': to standard output, for the table")
    p.add_argument("--junit", metavar="FILE", help="write the report as JUnit XML")
    p.set_defaults(run=check_command)


def check_command(args: argparse.Namespace) -> int:
    """Run ``lossfns check``; 0, 1 or 2."""
    sys.path.insert(0, os.getcwd())  # a console script does not look there, a user does
    try:
        from lossfns.testing.check import check
        from lossfns.testing.subject import load, method

        like = None if args.like is None else method(args.like)
        subject = load(args.subject)
        with contextlib.redirect_stdout(sys.stderr):  # what a loss prints is no part of the report
            report = check(
                subject,
                kind=args.kind,
                factory=args.factory,
                like=like,
                name=args.subject,
                examples=args.examples,
                progress=show_progress,
            )
        write(report, args)
    except (LossInputError, ImportError, OSError) as error:
        print(f"lossfns: {error}", file=sys.stderr)
        return 2
    finally:
        show_progress("")
    return 0 if report.ok else 1


def write(report: Report, args: argparse.Namespace) -> None:
    """Print the table, or the JSON in its place, and write the files that were asked for."""
    as_json = json.dumps(report.as_dict(), indent=1, ensure_ascii=False)
    show_progress("")
    print(as_json if args.json == "-" else report.table())
    if args.json and args.json != "-":
        Path(args.json).write_text(as_json + "\n", encoding="utf-8")
    if args.junit:
        Path(args.junit).write_text(report.junit() + "\n", encoding="utf-8")


def whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"a whole number of at least 0, got {number}")
    return number


def show_progress(law: str) -> None:
    """The law in hand, on a line of its own that the next one overwrites."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{law}", end="", file=sys.stderr, flush=True)
