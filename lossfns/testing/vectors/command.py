"""``lossfns vectors``: run the vectors on a program, or export them."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from lossfns.errors import LossInputError
from lossfns.testing.vectors.vector import FOLDER, LEDGER, METHODS

FILES = (*(f"{loss}.json" for loss in METHODS), "schema.json", LEDGER)


def add_vectors(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``vectors`` command to a command line."""
    p = commands.add_parser(
        "vectors",
        help="golden vectors: right answers as JSON, for a loss in any language",
        description="Golden vectors: right answers as JSON, for a loss in any language.",
    )
    actions = p.add_subparsers(dest="action", required=True)
    p = actions.add_parser(
        "run",
        help="put the vectors to a program",
        description="Put the vectors to a program that reads requests and writes replies as JSON lines. Exits 0 if "
        "every reply is right, 1 if one is not, 2 if the program cannot be started.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--cmd", required=True, metavar="COMMAND", help="the program, such as './my_impl --fast'")
    p.add_argument("--loss", choices=METHODS, metavar="NAME", help=f"one of {', '.join(METHODS)}; all if left out")
    p.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="what the program computes in")
    p.add_argument("--timeout", type=float, default=10.0, metavar="S", help="the longest wait for a reply, in seconds")
    p.add_argument("--xfail", metavar="FILE", help="ids or patterns, one a line, of vectors expected to fail")
    p.add_argument("--json", metavar="FILE", help="write the report as JSON ('-': to standard output, for the table)")
    p.set_defaults(run=run_command)
    p = actions.add_parser("export", help="copy the files, to vendor them", description="Copy the files.")
    p.add_argument("folder", type=Path, metavar="DIR")
    p.set_defaults(run=export_command)


def run_command(args: argparse.Namespace) -> int:
    """Run ``lossfns vectors run``; 0, 1 or 2."""
    from lossfns.testing.vectors.runner import run, show_progress

    try:
        expected = patterns(args.xfail)
        report = run(
            args.cmd, loss=args.loss, dtype=args.dtype, timeout=args.timeout, xfail=expected, progress=show_progress
        )
    except (LossInputError, OSError) as error:
        print(f"lossfns: {error}", file=sys.stderr)
        return 2
    finally:
        show_progress("")
    text = json.dumps(report.as_dict(), indent=1, ensure_ascii=False)
    print(text if args.json == "-" else report.table())
    if args.json and args.json != "-":
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    return 0 if report.ok else 1


def patterns(path: str | None) -> list[str]:
    """The lines of a file but for comments after ``#``."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if path else []
    return [word for line in lines if (word := line.partition("#")[0].strip())]


def export_command(args: argparse.Namespace) -> int:
    """Run ``lossfns vectors export``."""
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(FOLDER / name, args.folder / name)
    print(f"{len(FILES)} files in {args.folder}")
    return 0
