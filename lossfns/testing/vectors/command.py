"""The command ``lossfns vectors``, which runs the golden vectors on a program or exports them."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lossfns.errors import LossInputError
from lossfns.terminal import print_refusal, print_report, print_wrapped, say, status, while_read
from lossfns.testing.vectors.vector import FOLDER, LEDGER, METHODS

if TYPE_CHECKING:
    from rich.console import Console

    from lossfns.testing.vectors.runner import VectorReport

FILES = (*(f"{loss}.json" for loss in METHODS), "schema.json", LEDGER)
STYLES = {"pass": "green", "fail": "bold red", "skip": "yellow", "xfail": "yellow", "xpass": "yellow"}


def add_vectors(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``vectors`` command to a command line."""
    p = commands.add_parser(
        "vectors",
        help="right answers as JSON, to test a loss in any language",
        description="Golden vectors: right answers as JSON, for a loss in any language.",
    )
    actions = p.add_subparsers(dest="action", metavar="run|export", required=True)
    p = actions.add_parser(
        "run",
        help="run the vectors on a program",
        description="Run the vectors on a program that reads requests and writes replies as JSON lines. Exits with 0 "
        "if every reply is right, 1 if one is not, 2 if the program cannot be started. A reply "
        '{"id": ..., "unsupported": "why"} skips its vector.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--cmd", required=True, metavar="COMMAND", help="the program, such as './my_impl --fast'")
    p.add_argument("--loss", action="append", metavar="NAME[,NAME...]",
        help=f"some of {', '.join(METHODS)}; all if left out; may be repeated")  # fmt: skip
    p.add_argument(
        "--dtype", choices=("float64", "float32"), default="float64", help="the dtype in which the program computes"
    )
    p.add_argument("--timeout", type=float, default=10.0, metavar="S", help="the longest wait for a reply, in seconds")
    p.add_argument("--xfail", metavar="FILE", help="ids or patterns of vectors that are expected to fail, one a line")
    p.add_argument("--strict", action="store_true", help="a vector that the program does not support is a failure")
    p.add_argument("--json", metavar="FILE", help="write the report as JSON; '-' prints it in place of the table")
    p.set_defaults(run=run_command)
    description = "Copy the files to a folder, to keep them in a repository of your own."
    p = actions.add_parser("export", help="copy the files", description=description)
    p.add_argument("folder", type=Path, metavar="DIR")
    p.set_defaults(run=export_command)


def run_command(args: argparse.Namespace) -> int:
    """Run ``lossfns vectors run``.

    Returns:
        0 if every reply is right, 1 if one is not, 2 if the program cannot be started, 130 if the user interrupts it.
    """
    from lossfns.testing.vectors.program import ended_by_signals
    from lossfns.testing.vectors.runner import run

    try:
        losses = None if args.loss is None else [name.strip() for text in args.loss for name in text.split(",")]
        with status() as show, ended_by_signals():
            report = run(
                args.cmd,
                loss=losses,
                dtype=args.dtype,
                timeout=args.timeout,
                xfail=read_patterns(args.xfail),
                strict=args.strict,
                progress=show,
            )
        print_report(report, draw, args.json)
    except KeyboardInterrupt:
        return 130
    except (LossInputError, OSError) as error:
        return print_refusal(error)
    return 0 if report.ok else 1


def draw(report: VectorReport, console: Console) -> None:
    """Print the text of ``VectorReport.table`` in colours, wrapped to the width of the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not report.counts():
        print_wrapped(console, report.remarks()[1:])
        return
    (title, *verdicts), *rows = report.counts()
    table = Table(title, box=box.SIMPLE_HEAD, pad_edge=False)
    for verdict in verdicts:
        table.add_column(verdict, justify="right")
    for loss, *numbers in rows:
        styles = ["" if n == "0" else STYLES.get(verdict, "") for n, verdict in zip(numbers, verdicts)]
        table.add_row(loss, *map(Text, numbers, styles))
    console.print(table)
    print_wrapped(console, report.remarks()[1:])  # the table ends with an empty line


def read_patterns(path: str | None) -> list[str]:
    """Read the patterns in a file, one a line; ``#`` starts a comment."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines() if path else []
    except (OSError, ValueError) as error:
        raise LossInputError("--xfails", "a text file of names", f"{path} ({error})", "Check the path.") from None
    return [pattern for line in lines if (pattern := line.partition("#")[0].strip())]


def export_command(args: argparse.Namespace) -> int:
    """Run ``lossfns vectors export``.

    Returns:
        0, or 2 if the folder cannot be written.
    """
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(FOLDER / name, args.folder / name)
    except OSError as error:
        return print_refusal(error)
    with while_read(sys.stdout):
        say(f"{len(FILES)} files in {args.folder}")
    return 0
