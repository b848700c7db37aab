"""Run the suite on every faulty server and on every correct variant, and write what it finds as a table.

    python -m tests.conformance.measure [NAME ...] [--jobs 2] [--json FILE] [--write docs/conformance-figures.md]

On a faulty server the run ends at the first check that does not hold: its bug is what the report names first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import peft  # noqa: F401  # what servers and suite import is imported once, before they are forked
import tinker
import uvicorn  # noqa: F401

from lossfns.conformance.checks import CHECKS
from lossfns.conformance.report import Report
from lossfns.conformance.runner import http_target, run
from lossfns.server.app import create_app
from lossfns.server.command import listening_socket, serve_socket
from lossfns.server.service import Service
from tests.conformance.faulty import DEFECTS
from tests.conformance.variants import VARIANTS

TIME_LIMIT = 170.0
"""The seconds after which a run starts no further check: any server has its report within three minutes."""


class Found(NamedTuple):
    """What a run has found.

    Attributes:
        bug: what the report names first; "" if nothing is wrong.
        check, seen: the first check that does not hold, and what it saw.
        broken: the names of all checks that do not hold.
        passed: the number of checks that hold.
        seconds: the time of the run.
    """

    bug: str
    check: str
    seen: str
    broken: list[str]
    passed: int
    seconds: float


def forked(work: Callable[[], None]) -> int:
    """Run work in a process of its own, and return the process's id. Its exit status is 1 after an error."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def kill(pid: int) -> None:
    """Kill a process with its group."""
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


@contextlib.contextmanager
def served(plant: Callable[[], None]) -> Iterator[str]:
    """Return the address of a server that runs in a process of its own, patched by ``plant``."""
    with listening_socket("127.0.0.1", 0) as sock, tempfile.TemporaryDirectory() as folder:

        def serve() -> None:
            plant()
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            os.dup2(null, 2)
            asyncio.run(serve_socket(create_app(Service(device="cpu", state=folder)), sock))

        pid = forked(serve)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        sock.close()  # a server that dies is gone
        try:
            yield url
        finally:
            kill(pid)


def found(plant: Callable[[], None], *, first: bool) -> Found:
    """Run the suite on a server; with ``first``, until the first check that does not hold."""
    with served(plant) as url:
        began = time.monotonic()
        report = Report(url, tinker.__version__, "full")
        report = run(http_target(url, "tml-measure", None), CHECKS, report, first=first, time_limit=TIME_LIMIT)
        wrong = report.broken[0] if report.broken else None
        check, seen = (wrong.check, wrong.seen) if wrong else ("(no check)" if report.stopped else "", report.stopped)
        broken = [r.check for r in report.broken]
        return Found(report.bug, check, seen, broken, report.counts["pass"], time.monotonic() - began)


def measure(plants: Mapping[str, Callable[[], None]], jobs: int, *, first: bool) -> Iterator[tuple[str, Found]]:
    """Run the suite on many servers, some at a time, and yield what it finds as it ends."""
    waiting, running = list(plants), dict[int, str]()
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    name = waiting.pop(0)
                    work = partial(save, Path(folder, name), plants[name], first)
                    running[forked(work)] = name
                pid, _ = os.wait()
                if pid in running:
                    name = running.pop(pid)
                    yield name, Found(*json.loads(Path(folder, name).read_text()))
        finally:
            for pid in running:
                kill(pid)


def save(file: Path, plant: Callable[[], None], first: bool) -> None:
    os.setpgid(0, 0)  # so that its server ends with it
    file.write_text(json.dumps(found(plant, first=first)))


# The report


def table(rows: list[list[str]]) -> str:
    """Return rows as a Markdown table; the first one has the names of the columns."""
    head, *others = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *others])


def is_named(name: str, result: Found) -> bool:
    """Return whether what the report names first is the defect."""
    return result.bug == DEFECTS[name].bug


def defect_row(name: str, result: Found) -> list[str]:
    """Return the row of a faulty server: the first line of its report is the check, the bug and what was seen."""
    bug = result.bug if is_named(name, result) else f"{result.bug or 'nothing'}, not {DEFECTS[name].bug}"
    return [name, bug, result.check or "(missed)", shortened(result.seen), f"{result.seconds:.0f}"]


def shortened(text: str, limit: int = 110) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def variant_row(name: str, result: Found) -> list[str]:
    """Return the row of a correct server."""
    return [name, str(result.passed), ", ".join(result.broken) or "none", f"{result.seconds:.0f}"]


def summary(wrong: Mapping[str, Found], right: Mapping[str, Found]) -> str:
    """Return the figures in words."""
    caught = sum(bool(result.check) for result in wrong.values())
    named = sum(is_named(name, result) for name, result in wrong.items())
    accused = sum(bool(result.broken) for result in right.values())
    return (f"{caught} of {len(wrong)} faulty servers are caught, {named} of them under the name of their bug. "
            f"{accused} of {len(right)} correct servers are accused.")  # fmt: skip


def read(file: str | None) -> tuple[dict[str, Found], dict[str, Found]]:
    """Return the findings in a file, of faulty and of correct servers; none if there is no file."""
    if not file or not Path(file).exists():
        return {}, {}
    findings = json.loads(Path(file).read_text())
    wrong, right = ({name: Found(*x) for name, x in findings[key].items()} for key in ("wrong", "right"))
    return wrong, right


MARK = "<!-- What follows is written by python -m tests.conformance.measure --write. -->"


def write(path: Path, wrong: Mapping[str, Found], right: Mapping[str, Found]) -> None:
    """Replace all of a page that comes after ``MARK``."""
    text, mark, _ = path.read_text(encoding="utf-8").partition(MARK)
    if not mark:
        raise SystemExit(f"{path} has no line {MARK}")
    faulty = [defect_row(name, wrong[name]) for name in DEFECTS if name in wrong]
    correct = [variant_row(name, right[name]) for name in VARIANTS if name in right]
    parts = [
        text + MARK,
        summary(wrong, right),
        table([["correct server", "checks that hold", "checks that fail", "seconds"], *correct]),
        table([["faulty server", "named", "caught by", "seen", "seconds"], *faulty]),
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main() -> None:
    """Measure, print and write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", help="defects or variants; all if left out")
    p.add_argument("--jobs", type=int, default=2, help="how many servers at a time (default: 2)")
    p.add_argument("--json", metavar="FILE", help="update the findings in this file: those of other names stay")
    p.add_argument("--write", metavar="FILE", help="write them as tables into a page")
    p.add_argument("--plant", action="store_true", help="plant each defect in a process of its own, and run nothing")
    args = p.parse_args()
    unknown = set(args.names) - {*DEFECTS, *VARIANTS}
    if unknown:
        p.error(f"unknown: {', '.join(sorted(unknown))}")
    plants = {name: defect.plant for name, defect in DEFECTS.items() if not args.names or name in args.names}
    variants = {name: plant for name, plant in VARIANTS.items() if not args.names or name in args.names}
    if args.plant:
        failed = [name for name, plant in (plants | variants).items() if os.waitpid(forked(plant), 0)[1]]
        p.exit(status=1 if failed else 0, message=f"{len(failed)} cannot be planted: {', '.join(failed)}\n")
    wrong, right = read(args.json)
    for results, measured, first, row in ((right, variants, False, variant_row), (wrong, plants, True, defect_row)):
        for name, result in measure(measured, args.jobs, first=first):
            results[name] = result
            print(" | ".join(row(name, result)), flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps({"wrong": wrong, "right": right}))
    if args.write:
        write(Path(args.write), wrong, right)
    print(summary(wrong, right))


if __name__ == "__main__":
    main()
