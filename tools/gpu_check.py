"""Check on a GPU whatever depends on one, in one command of at most 8 minutes.

    python tools/gpu_check.py [--device cpu] [--only attention waits] [--output FILE]

The checks compare values and gradients with a reference, count how often the host waits for the device, and measure
time and memory. Each section runs in a process of its own for a limited time, so that no crash or hang of one stops
another. The command prints a table after each section and writes all rows to
``benchmarks/results/gpu_check.<device>.json``. It exits with 1 if a check failed. A skipped row gives the reason.

Without a GPU, or with ``--device cpu``, the same checks run on the CPU in small shapes, to try the program itself. The
figures then mean nothing, so they are written only with ``--output``.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # the checkout need not be installed

import torch  # noqa: E402
from gpu_checks import attention, client, logprobs, losses  # noqa: E402
from gpu_checks.measure import Checks, Figures, Skipped, pick, place  # noqa: E402
from memory import elsewhere  # noqa: E402
from side_by_side import device_name, results_file  # noqa: E402

from lossfns import LossWarning  # noqa: E402
from lossfns.terminal import console_on, printable  # noqa: E402

TIME_LIMIT = 480
"""Seconds for the whole command."""

Row = dict[str, Any]
"""Figures with the names of ``section`` and ``check`` and the ``result``: "ok", "FAILED" or "skipped"."""


def compiled(device: str) -> Checks:
    return losses.forms(device) | losses.compiled(device)


def tests(device: str) -> Checks:
    """The project's own device tests. The CPU run takes those of the rehearsed device, to try the call."""
    return {"pytest": partial(run_pytest, pick(device, "tests/device", "tests/device/test_rehearsal.py"), device)}


def run_pytest(path: str, device: str) -> Figures:
    for package in ("pytest", "hypothesis"):
        if find_spec(package) is None:
            raise Skipped(f"{package} is not installed")
    options = ["-q", "-o", "addopts=", "-m", "not exhaustive", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LOSSFNS_DEVICE": pick(device, "cuda", "rehearsal")}
    command = [sys.executable, "-m", "pytest", *options, path]
    completed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = (completed.stdout + completed.stderr).strip().splitlines() or ["no output"]
    if completed.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise AssertionError("; ".join([lines[-1], *failed]))
    return {"note": lines[-1]}


class Section(NamedTuple):
    checks: Callable[[str], Checks]
    limit: float  # seconds


SECTIONS = {
    "losses": Section(losses.losses, 30),
    "compiled": Section(compiled, 180),
    "attention": Section(attention.attention, 110),
    "tiles": Section(logprobs.tiles, 45),
    "linear_logprobs": Section(logprobs.linear, 60),
    "waits": Section(client.waits, 45),
    "step": Section(client.step, 90),
    "tests": Section(tests, 120),
}
"""In the order of running. Their limits sum to more than ``TIME_LIMIT``, which holds for all sections together."""


def reason(error: BaseException) -> str:
    """Return an error on one line, with the line of ours that raised it."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = printable(" ".join(str(error).split()), 600)
    return f"{type(error).__name__} at {place(traceback.extract_tb(error.__traceback__))}: {text}"


def run_check(check: Callable[[], Figures]) -> Row:
    """Return the row of a check. No error leaves it."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    try:
        figures = check()
    except Skipped as why:
        return {"result": "skipped", "note": str(why)}
    except Exception as error:
        return {"result": "FAILED", "note": reason(error)}
    limit = figures.get("limit")
    return {"result": "ok" if limit is None or figures["found"] <= limit else "FAILED", **figures}


def run_section(checks: Callable[[str], Checks], device: str, rows: Connection) -> None:
    """Send the row of each check."""
    os.setsid()  # so that the processes that this one starts end with it
    gc.freeze()  # collections then pass over the imported modules
    warnings.simplefilter("error", LossWarning)  # such as the warning about a loss that cannot be compiled
    made: Checks = {}

    def make_checks() -> Figures:
        made.update(checks(device))
        return {}

    row = run_check(make_checks)  # an error here, such as of memory for the inputs, is a row as well
    if row["result"] != "ok":
        rows.send({"check": "inputs", **row})
    for name, check in made.items():
        rows.send({"check": name, **run_check(check)})


def watch_section(section: Section, device: str, limit: float) -> list[Row]:
    """Run a section in a process of its own for at most ``limit`` seconds. Return the rows that it sends."""
    fork = multiprocessing.get_context("fork")  # CUDA allows it, since this process never uses the device
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=run_section, args=(section.checks, device, sender))
    process.start()
    sender.close()
    rows: list[Row] = []
    end = time.monotonic() + limit
    try:
        while receiver.poll(max(0, end - time.monotonic())):
            rows.append(receiver.recv())
        rows.append({"check": "the rest", "result": "FAILED", "note": f"not done within {limit:.0f} s"})
    except EOFError:
        process.join(5)
        if process.exitcode:
            note = f"the process ended with {process.exitcode}"
            rows.append({"check": "the rest", "result": "FAILED", "note": note})
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    return rows


def lines_of(rows: list[Row]) -> Iterator[tuple[str, str]]:
    """Yield the lines of a table of 80 columns, each with its colour."""
    yield f"{'':7} {'':36} {'found':>8} {'limit':>7} {'ms':>9} {'GiB':>7}", "bold"
    colours = {"ok": "", "FAILED": "red", "skipped": "dim"}
    for row in rows:
        cells = [f"{row['result']:7} {row['check'][:36]:36}"]
        for name, width, form in (("found", 8, ".1e"), ("limit", 7, ".1e"), ("milliseconds", 9, ".2f")):
            value = row.get(name)
            cell = format(value, form) if isinstance(value, float) else "" if value is None else str(value)
            cells.append(cell.rjust(width))
        cells.append(f"{row['gibibytes']:7.3f}" if "gibibytes" in row else "")
        line, note = " ".join(cells).rstrip(), row.get("note", "")
        fits = len(line) + len(note) < 79
        yield f"{line}  {note}".rstrip() if fits else line, colours[row["result"]]
        for rest in () if fits else textwrap.wrap(note, 72):
            yield f"{'':8}{rest}", colours[row["result"]]


def show(lines: Iterable[tuple[str, str]]) -> None:
    """Print lines, in colour on a terminal with rich."""
    console = console_on(sys.stdout)
    for line, colour in lines:
        if console is None:
            print(line, flush=True)
        else:
            console.print(line, style=colour or None, soft_wrap=True)


def commit() -> str | None:
    """Return the commit of the checkout, with a "+" if files differ from it; None without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is a GPU")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--output", type=Path, help="the JSON file; by default one in benchmarks/results, on a GPU")
    args = parser.parse_args()
    start = time.monotonic()
    has_gpu = args.device != "cpu" and elsewhere(torch.cuda.is_available)
    if not has_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if args.device == "cuda":
            parser.error("there is no GPU that PyTorch can use")
        show([("Without a GPU: the checks run on the CPU, in small shapes.", "bold")])
    device = "cuda" if has_gpu else "cpu"
    name, default_output = elsewhere(lambda: (device_name(), results_file("gpu_check")))
    output = args.output or (default_output if has_gpu else None)
    result: dict[str, Any] = {"benchmark": "gpu_check", "device": name, "python": platform.python_version()}
    result |= {"torch": torch.__version__, "commit": commit(), "seconds": {}, "rows": []}
    show([(f"{name}, Python {result['python']}, torch {result['torch']}, commit {result['commit']}", "")])
    for section in args.only:
        section_start = time.monotonic()
        seconds_left = TIME_LIMIT - (section_start - start)
        limit = min(SECTIONS[section].limit, seconds_left)
        if seconds_left < 10:
            rows = [{"check": "all", "result": "skipped", "note": f"the {TIME_LIMIT} s of the command are over"}]
        else:
            rows = watch_section(SECTIONS[section], device, limit)
        seconds = round(time.monotonic() - section_start, 1)
        show([("", ""), (f"{section}: {seconds} s of at most {limit:.0f} s", "bold"), *lines_of(rows)])
        result["seconds"][section] = seconds
        result["rows"] += [{"section": section, **row} for row in rows]
        if output is not None:  # after each section, so that a command that is stopped leaves its rows
            output.write_text(json.dumps(result, indent=1) + "\n")
    counts = {kind: sum(row["result"] == kind for row in result["rows"]) for kind in ("ok", "skipped", "FAILED")}
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    written = f"written: {output.name}" if output else "nothing written"
    show([("", ""), (f"{summary}; {time.monotonic() - start:.0f} s; {written}", "bold")])
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
