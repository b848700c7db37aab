"""The commands ``lossfns check SUBJECT`` and ``lossfns explain LAW``."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossfns.errors import LossInputError
from lossfns.terminal import (
    console_on,
    print_refusal,
    print_report,
    print_rows,
    printable,
    say,
    status,
    while_read,
    width_of,
    wrap,
)
from lossfns.testing.report import MARKS, Report, Verdict

if TYPE_CHECKING:
    from rich.console import Console

    from lossfns.loss import Loss
    from lossfns.testing.isolated import Ended, Send

STYLES = {
    "pass": "green",
    "wrong": "bold red",
    "unsure": "yellow",
    "fragile": "yellow",
    "n/a": "dim",
    "skipped": "dim",
}


def add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands ``check`` and ``explain`` to a command line."""
    p = commands.add_parser(
        "check",
        help="test a loss, your own or one of ours, by the laws of its kind",
        description="Test a loss by the laws of its kind and by the golden vectors of the method that it claims to be. "
        "Exits with 0 if it is not wrong (a warning says if it is fragile), 1 if it is wrong, 2 if it cannot be "
        "tested or time is up before anything wrong is found.",
    )
    p.add_argument("subject", metavar="MODULE:NAME", nargs="?", help="a contract function (data, logprobs_list), a "
        "factory of one, or a function of padded [B, T] tensors; FILE.py:NAME also works")  # fmt: skip
    p.add_argument("--list", action="store_true", help="print the laws of each kind, or of --kind, and the bugs")
    p.add_argument("--kind", help="which laws to test: policy, likelihood, reweighted, preference, unpaired, "
        "distillation, advantages or any; detected if left out")  # fmt: skip
    p.add_argument("--factory", action="store_true", default=None,
        help="the subject is a factory; detected if left out")  # fmt: skip
    p.add_argument("--like", metavar="METHOD", help="the method that the subject claims to be, such as "
        "'grpo(kl_beta=0.04)': its golden vectors are run too")  # fmt: skip
    p.add_argument("--skip", metavar="LAW", action="append", default=[], help="leave out a law; with --because")
    p.add_argument("--because", metavar="TEXT", action="append", default=[],
        help="the reason for the --skip before it, which the report shows")  # fmt: skip
    p.add_argument("--couples", metavar="TEXT", default="", help="why the datums of a batch may affect one another, "
        "such as 'the KL baseline is a batch mean': the laws that forbid it are left out")  # fmt: skip
    p.add_argument("--learns", action="store_true", help="also say where exact gradient steps with the loss lead, in "
        "small problems whose answer is known: advice, which changes no verdict")  # fmt: skip
    p.add_argument("--examples", type=non_negative, default=12, metavar="N",
        help="random batches for each law (default: 12)")  # fmt: skip
    p.add_argument("--timeout", type=positive, default=120.0, metavar="SECONDS",
        help="the longest time that the check may take (default: 120)")  # fmt: skip
    p.add_argument("--strict", action="store_true", help="exit with 1 for a fragile loss too")
    p.add_argument("-q", "--quiet", action="store_true", help="print only the broken laws and the summary")
    p.add_argument("--json", metavar="FILE", help="write the report as JSON; '-' prints it in place of the table")
    p.add_argument("--junit", metavar="FILE", help="write the report as JUnit XML")
    p.set_defaults(run=check_command, parser=p)
    p = commands.add_parser(
        "explain",
        help="explain a law or a bug of lossfns check",
        description="Explain a law or a bug: what it states, its severity and the reason, the usual cause, and how to "
        "fix it.",
    )
    p.add_argument("name", metavar="LAW|BUG", help="such as poison or mask-after-exp; lossfns check --list has all")
    p.set_defaults(run=explain_command)


def non_negative(text: str) -> int:
    """Parse an integer of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {number}")
    return number


def positive(text: str) -> float:
    """Parse a finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number of seconds above 0, got {text}")
    return number


def check_command(args: argparse.Namespace) -> int:
    """Run ``lossfns check``.

    Returns:
        0 if the subject is not wrong, 1 if it is, 2 if it cannot be tested, 130 after Ctrl-C. With ``--strict`` also 1
        if it is fragile.
    """
    try:
        if args.list:
            with while_read(sys.stdout):
                print_list(args.kind)
            return 0
        if args.subject is None:
            args.parser.error("name a SUBJECT, such as mine.py:my_loss, or pass --list")
        skip = reasons(args.skip, args.because)
        for path in filter(None, (args.json, args.junit)):
            if not Path(path).absolute().parent.is_dir():
                raise LossInputError("report", "a file in a folder that exists", repr(path), "Make the folder first.")
        report = isolated_check(args, skip)
        if args.quiet:
            print_report(report, draw_quietly, args.json, Report.quiet)
        else:
            print_report(report, draw, args.json)
        if args.junit:
            Path(args.junit).write_text(report.junit() + "\n", encoding="utf-8")
    except (LossInputError, CannotTest, OSError) as error:
        return print_refusal(error)
    except KeyboardInterrupt:
        return 130
    return report.exit_status(strict=args.strict)


def reasons(laws: list[str], because: list[str]) -> dict[str, str]:
    """Return law → reason for the options ``--skip`` and ``--because``, which come in pairs."""
    if len(laws) != len(because):
        got = f"{len(laws)} --skip and {len(because)} --because"
        raise LossInputError("skip", "one --because for each --skip", got, "Write --skip LAW --because 'the reason'.")
    return dict(zip(laws, because))


class CannotTest(Exception):
    """The subject cannot be tested; the message says why."""


def isolated_check(args: argparse.Namespace, skip: Mapping[str, str]) -> Report:
    """Check the subject in a child process, and return the report, whatever the subject does.

    Raises:
        CannotTest: if the subject is refused, or ends the process or blocks while it is imported.
    """
    from lossfns.testing.check import kind_named
    from lossfns.testing.isolated import FAILED, Ended, run_isolated
    from lossfns.testing.subject import parse_method

    if not hasattr(os, "fork"):
        fix = "Call lossfns.testing.check in Python, or use WSL."
        raise LossInputError("platform", "a system with fork, which isolates the subject", sys.platform, fix)
    kind = kind_named(args.kind) if args.kind else None
    like = None if args.like is None else parse_method(args.like)
    report, laws, doing = Report(args.subject, kind or "any", couples=args.couples), [CALL], "import"
    with status() as show:
        for message in run_isolated(partial(check_and_send, args, kind, like, skip), args.timeout):
            match message:
                case Ended():
                    return with_end(report, laws, doing, message, args.timeout)
                case [str(word), str(text)] if word == FAILED:
                    raise CannotTest(f"an error of lossfns itself, in the law {doing}: {printable(text)}")
                case ["refused", str(text)]:
                    raise CannotTest(text)
                case ["doing", str(doing)]:
                    show(f"checking {doing}")
                case ["about", laws, *about]:
                    report = Report(args.subject, *about)
                case ["verdict", verdict]:
                    report.verdicts.append(Verdict(**verdict))
                case ["learns", lines]:
                    report.learns.extend(lines)
    return report


CALL = ("contract", "A call returns a 0-d tensor that requires grad, and a dict of metrics.")
"""The law ``contract`` and its statement. The subject breaks it if a call that finds out the kind ends the process."""


def check_and_send(
    args: argparse.Namespace, kind: str | None, like: Loss | None, skip: Mapping[str, str], send: Send
) -> None:
    """Check the subject in this process. Send each step or law before it runs, the list of laws, and each verdict."""
    from lossfns.loading import load
    from lossfns.testing.check import ends_process, prepare, surviving_interrupts
    from lossfns.testing.laws.base import describe_error

    options = {"factory": args.factory, "couples": args.couples, "examples": args.examples}
    calls = False
    try:
        subject = load(args.subject)
        calls = True
        send(["doing", CALL[0]])
        prepared = surviving_interrupts(prepare(subject, kind=kind, like=like, skip=skip, **options))
    except LossInputError as error:
        return send(["refused", printable(str(error))])
    except BaseException as error:
        if calls and isinstance(error, KeyboardInterrupt):
            return send(["verdict", vars(ends_process(*CALL, f"it raises {describe_error(error)}"))])
        return send(["refused", f"{args.subject} cannot be tested: {describe_error(error)}"])
    *about, trials = prepared
    send(["about", [[trial.law, trial.says] for trial in trials], *about])
    for verdict in prepared.verdicts(lambda law: send(["doing", law])):
        send(["verdict", vars(verdict)])
    if args.learns:
        send(["learns", learned(subject, prepared.kind, args.factory)])


def learned(subject: Any, kind: str, factory: bool | None) -> list[str]:
    """Return where exact gradient steps lead in the worlds of this kind, in words, or why that is not known."""
    from lossfns.testing.check import without_side_effects
    from lossfns.testing.kinds import detect_targets
    from lossfns.testing.laws.base import describe_error
    from lossfns.testing.subject import adapt
    from lossfns.testing.worlds import advice

    if kind == "advantages":
        return [f"there is no world for {kind}"]
    try:
        with without_side_effects():
            loss_fn = adapt(subject, factory=factory)
            return advice(loss_fn, kind, detect_targets(loss_fn, kind)) or [f"there is no world for the kind {kind}"]
    except Exception as error:
        return [f"it does not run in the worlds: {printable(describe_error(error))}"]


def with_end(report: Report, laws: Sequence[Sequence[str]], doing: str, ended: Ended, timeout: float) -> Report:
    """Return the report of a check whose process ended, or was killed because time was up."""
    from lossfns.testing.check import ends_process

    if doing == "import":
        how = f"{timeout:g} s passed" if ended.timed_out else ended.how
        raise CannotTest(f"subject: expected that {report.subject} can be imported, but {how} while it was.")
    place = [law for law, _ in laws].index(doing)
    left = len(laws) - place - 1
    untested = f"; the {left} laws after it were not tested" if left else ""
    if ended.timed_out:
        return replace(report, stopped=f"time was up after {timeout:g} s in the law {doing}{untested}")
    verdicts = [*report.verdicts, ends_process(doing, laws[place][1], ended.how)]
    return replace(report, verdicts=verdicts, stopped=f"{ended.how} in the law {doing}{untested}")


def draw(report: Report, console: Console) -> None:
    """Print the text of ``Report.table`` in colours, wrapped to the width of the terminal."""
    draw_broken(report, console)
    print_rows(console, [(MARKS[v.verdict], v.law, v.remark) for v in report.verdicts],
        styles=[STYLES[v.verdict] for v in report.verdicts])  # fmt: skip
    console.print()
    if report.learns:
        print_rows(console, [("", "learns:", line) for line in report.learns])
    draw_summary(report, console)


def draw_quietly(report: Report, console: Console) -> None:
    """Print the text of ``Report.quiet`` in colours."""
    if report.broken:
        draw_broken(report, console)
    draw_summary(report, console)


def draw_broken(report: Report, console: Console) -> None:
    """Print the title and the explanation of each broken law."""
    console.print(f"{report.title}\n", style="bold")
    for v in report.broken:
        console.print(v.headline, style=STYLES[v.verdict])
        print_rows(console, [("", label, text) for label, text in v.explanation])
        console.print()


def draw_summary(report: Report, console: Console) -> None:
    """Print the verdict in one line."""
    verdict = report.broken[0].verdict if report.broken else "unsure" if report.stopped else "pass"
    console.print(report.summary, style=STYLES[verdict])


def print_list(kind: str | None) -> None:
    """Print the laws of each kind, or of one kind, and the bugs."""
    from lossfns.testing.explain import listed

    console = console_on(sys.stdout)
    for title, rows in listed(kind):
        if console is None:
            widths = [max(map(len, cells)) for cells in zip(*rows)]
            lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
            print("\n".join([title, "", *lines, ""]))
        else:
            console.print(f"{title}\n", style="bold")
            print_rows(console, rows, ["cyan"] * len(rows))
            console.print()


def explain_command(args: argparse.Namespace) -> int:
    """Run ``lossfns explain``.

    Returns:
        0, or 2 if there is no law or bug of this name.
    """
    from lossfns.testing.explain import explain

    try:
        lines = explain(args.name)
    except LossInputError as error:
        return print_refusal(error)
    with while_read(sys.stdout):
        say(wrap("\n".join(lines), width_of(sys.stdout) or 100))
    return 0
