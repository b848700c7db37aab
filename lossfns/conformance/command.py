"""The command ``lossfns conformance``."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from lossfns.errors import LossInputError, did_you_mean
from lossfns.terminal import print_refusal, print_report, print_rows, say, status, while_read

if TYPE_CHECKING:
    from rich.console import Console

    from lossfns.conformance.base import Check, Result
    from lossfns.conformance.report import Report

STYLES = {
    "pass": "green",
    "fail": "bold red",
    "error": "bold red",
    "inconclusive": "yellow",
    "unsupported": "dim",
    "xfail": "yellow",
    "xpass": "yellow",
}


def add_conformance(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``conformance`` to a command line."""
    p = commands.add_parser(
        "conformance",
        help="test a training server through the SDK tinker, from outside",
        description="Test a training server through the public SDK tinker, without access to its weights. Exits with "
        "0 if no check fails, 1 if one does or the server stops answering, 2 if the suite cannot be run. Needs the "
        "extra: tinker.",
    )
    p.add_argument("--base-url", metavar="URL", help="the server, such as http://127.0.0.1:8000")
    p.add_argument("--api-key", metavar="KEY", default=os.environ.get("TINKER_API_KEY", "tml-conformance"),
        help="its key; TINKER_API_KEY, or else tml-conformance, if left out")  # fmt: skip
    p.add_argument(
        "--base-model", metavar="NAME", help="the model to train; the first that the server offers if left out"
    )
    p.add_argument("--level", choices=("core", "full"), default="full",
        help="core: what any server claims; full: all checks (default)")  # fmt: skip
    p.add_argument("--check", metavar="NAME", action="append", default=[],
        help="run only this check, or those of a pattern, and what they need; may be repeated")  # fmt: skip
    p.add_argument("--list", action="store_true", help="print the checks, each with its level and statement")
    p.add_argument("--formulas", action="store_true", help="print the built-in losses as JSON: terms, gradients, "
        "fields and settings")  # fmt: skip
    p.add_argument("--sdk-path", metavar="DIR", help="a folder with another version of the SDK: "
        "pip install --target DIR tinker==0.25.0")  # fmt: skip
    p.add_argument("--xfails", metavar="FILE", help="names or patterns of checks that are expected to fail, one a line")
    p.add_argument("--strict", action="store_true", help="exit with 1 for unsupported and inconclusive checks too")
    p.add_argument("--time-limit", metavar="SECONDS", type=float, default=900.0,
        help="the longest time that the run may take (default: 900)")  # fmt: skip
    p.add_argument("-q", "--quiet", action="store_true", help="print only the broken checks and the summary")
    p.add_argument("--json", metavar="FILE", help="write the report as JSON; '-' prints it in place of the table")
    p.add_argument("--junit", metavar="FILE", help="write the report as JUnit XML")
    p.add_argument("--html", metavar="FILE", help="write the report as one HTML page")
    p.set_defaults(run=conformance_command, parser=p)


def conformance_command(args: argparse.Namespace) -> int:
    """Run ``lossfns conformance``.

    Returns:
        0 if no check fails, 1 if one does, 2 if the suite cannot be run, 130 after Ctrl-C.
    """
    try:
        if args.sdk_path:
            sys.path.insert(0, str(existing_folder(args.sdk_path)))
        from lossfns.conformance.checks import CHECKS

        if args.formulas:
            from lossfns.conformance.formulas import as_data

            with while_read(sys.stdout):
                say(json.dumps(as_data(), indent=1))
            return 0
        if args.list:
            with while_read(sys.stdout):
                say("\n".join(f"{check.level:4}  {check.name:26}  {check.says}" for check in CHECKS))
            return 0
        report = run_checks(args)
        text = type(report).quiet if args.quiet else type(report).table
        print_report(report, draw_quietly if args.quiet else draw, args.json, text)
        if args.junit:
            Path(args.junit).write_text(report.junit() + "\n", encoding="utf-8")
        if args.html:
            from lossfns.conformance.page import page

            Path(args.html).write_text(page(report), encoding="utf-8")
            if args.json != "-":
                with while_read(sys.stdout):
                    say(f"\npage  {args.html}")
    except (LossInputError, OSError) as error:
        return print_refusal(error)
    except KeyboardInterrupt:
        return 130
    return 0 if report.ok else 1


def run_checks(args: argparse.Namespace) -> Report:
    """Run the checks that the arguments choose, and return the report."""
    from lossfns.conformance.checks import CHECKS
    from lossfns.conformance.report import Report
    from lossfns.conformance.runner import http_target, run
    from lossfns.testing.vectors.command import read_patterns

    if not args.base_url:
        args.parser.error("name the server with --base-url URL, or pass --list")
    for path in filter(None, (args.json, args.junit, args.html)):
        if not Path(path).absolute().parent.is_dir():
            raise LossInputError("report", "a file in a folder that exists", repr(path), "Make the folder first.")
    if not args.base_url.startswith(("http://", "https://")):
        fix = f"Write http://{args.base_url} if the server has no TLS."
        raise LossInputError("base-url", "an address with http:// or https://", repr(args.base_url), fix)
    xfails = read_patterns(args.xfails)
    for pattern in xfails:
        if not any(fnmatch(check.name, pattern) for check in CHECKS):
            fix = "lossfns conformance --list prints the names."
            raise LossInputError("xfails", "names or patterns of checks", repr(pattern), fix)
    sdk = installed_sdk(args.sdk_path)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    report = Report(args.base_url, sdk, args.level, date=today, strict=args.strict, partial=bool(args.check))
    target = http_target(args.base_url, args.api_key, args.base_model)
    checks = chosen(CHECKS, args.level, args.check)
    with status() as show:
        return run(target, checks, report, xfails=xfails, time_limit=args.time_limit,
            progress=lambda name: show(f"checking {name}"))  # fmt: skip


def chosen(checks: Sequence[Check], level: str, patterns: Sequence[str]) -> list[Check]:
    """Return the checks of a level, or those that the patterns name with the checks that they need."""
    by_name = {check.name: check for check in checks}
    if not patterns:
        return [check for check in checks if level == "full" or check.level == "core"]
    names = [name for name in by_name if any(fnmatch(name, pattern) for pattern in patterns)]
    if not names:
        fix = did_you_mean(patterns[0], by_name)
        raise LossInputError("check", "the name of a check; --list has them", repr(patterns[0]), fix)
    wanted: set[str] = set()
    while names:
        name = names.pop()
        wanted.add(name)
        names += [need for need in by_name[name].needs if need not in wanted]
        if "gradient-descent" in by_name[name].needs:
            names += [need for need in ("save-state", "create-from-state") if need not in wanted]
    return [check for check in checks if check.name in wanted]


def existing_folder(path: str) -> Path:
    """Return the folder of an SDK, or refuse a path that has none."""
    if not (Path(path) / "tinker").is_dir():
        fix = f"pip install --target {path} tinker==0.25.0"
        raise LossInputError("sdk-path", "a folder that holds the package tinker", repr(path), fix)
    return Path(path).absolute()


def installed_sdk(folder: str | None) -> str:
    """Import the SDK, and return its version and where it is."""
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    try:
        from lossfns.conformance.client import sdk_version

        version = sdk_version()
    except ImportError as error:
        fix = "pip install 'lossfns[tinker]', or name a folder with --sdk-path."
        raise LossInputError("sdk", "the package tinker", f"{type(error).__name__}: {error}", fix) from error
    return f"{version} in {folder}" if folder else version


def draw(report: Report, console: Console) -> None:
    """Print the text of ``Report.table`` in colours, wrapped to the width of the terminal."""
    from lossfns.conformance.report import MARKS, explanation, remark

    console.print(f"{report.title}\n", style="bold")
    for r in report.broken:
        console.print(f"{MARKS[r.verdict]}  {r.check}: {r.says}", style=STYLES[r.verdict])
        print_rows(console, [("", label, text) for label, text in explanation(r)])
        console.print()
    if report.results:
        rows = [(MARKS[r.verdict], r.check, numbers(r), remark(r)) for r in report.results]
        print_rows(console, rows, styles=[STYLES[r.verdict] for r in report.results])
        console.print()
    draw_summary(report, console)


def numbers(r: Result) -> str:
    """Return the error of a check, or "" if it has none."""
    return "" if math.isnan(r.error) else "0" if r.error == 0 else f"{r.error:.0e}"


def draw_quietly(report: Report, console: Console) -> None:
    """Print the text of ``Report.quiet`` in colours."""
    from lossfns.conformance.report import MARKS

    if report.broken:
        rows = [(MARKS[r.verdict], r.check, r.seen) for r in report.broken]
        print_rows(console, rows, styles=[STYLES[r.verdict] for r in report.broken])
    draw_summary(report, console)


def draw_summary(report: Report, console: Console) -> None:
    """Print the verdict in one line."""
    unsure = not report.broken and (report.counts["inconclusive"] or report.stopped)
    console.print(report.summary, style=STYLES["fail" if report.broken else "inconclusive" if unsure else "pass"])
