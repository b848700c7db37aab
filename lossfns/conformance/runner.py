"""The run: checks in worker processes that are killed and replaced when they hang or die, each under a time limit."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from lossfns.conformance.base import (
    Check,
    Finding,
    Inconclusive,
    Result,
    Unsupported,
    Wrong,
    is_refusal,
    server_words,
)
from lossfns.conformance.bench import Bench, Facts, connect_facts
from lossfns.conformance.bugs import symptom
from lossfns.conformance.client import Connection, HttpLog, NoAnswer, connect
from lossfns.conformance.report import BROKEN, Report
from lossfns.terminal import printable
from lossfns.testing.isolated import FAILED, Ended, Send, run_isolated

SETUP_SECONDS = 60.0
"""The longest time for the first answer: a server may have to load a model."""

CHECK_SECONDS = 15.0
"""The longest time for a check, beside ``EXPERIMENTS`` times that of an experiment."""

EXPERIMENTS = 20

MOST_SECONDS = 150.0
"""The longest time for any check."""

HEALTH_SECONDS = 5.0
"""The longest time for any answer at all over HTTP."""

MARGIN = 2.0
"""The time beyond its limit that a check has to say what has no answer, before its process is killed."""

MOST_HANGS = 4
"""So many checks in a row without an answer end the run."""


@dataclass(frozen=True)
class Target:
    """The server under test.

    Attributes:
        open: opens a session.
        alive: returns why the server cannot be reached, or "".
        base_model: the model to train; None takes the first that the server offers.
    """

    open: Callable[[], Connection]
    alive: Callable[[], str]
    base_model: str | None = None


def http_target(base_url: str, api_key: str, base_model: str | None) -> Target:
    """Return the target at a URL."""
    return Target(partial(connect, base_url, api_key), partial(unreachable, base_url), base_model)


NO_SUCH_CALL = (404, 405, 501)
"""The statuses of a server that does not know a path or a method."""


def unreachable(base_url: str) -> str:
    """Return why a URL has no server of the API, or ""; a server need not have both of the calls that are tried."""
    try:
        healthy, configured = status_of(base_url, "GET", "healthz"), status_of(base_url, "POST", "client/config")
    except TimeoutError:
        return f"it takes a connection and does not answer within {HEALTH_SECONDS:g} s"
    except (OSError, HTTPException) as error:
        return f"there is no HTTP server: {type(error).__name__}: {error}"
    if healthy in NO_SUCH_CALL and configured in NO_SUCH_CALL:
        return f"no server of this API: GET /api/v1/healthz gives {healthy}, POST /api/v1/client/config {configured}"
    return ""


def status_of(base_url: str, method: str, call: str) -> int:
    """Return the HTTP status of a call of the API, with an empty JSON object as the body of a POST."""
    parts = urlsplit(base_url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=HEALTH_SECONDS)
    body, headers = (b"{}", {"Content-Type": "application/json"}) if method == "POST" else (None, {})
    try:
        connection.request(method, f"{parts.path.rstrip('/')}/api/v1/{call}", body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


def run(
    target: Target,
    checks: Sequence[Check],
    report: Report,
    *,
    xfails: Sequence[str] = (),
    first: bool = False,
    time_limit: float = 900.0,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run the checks in their order, and return the report with a result for each.

    Args:
        target: the server.
        checks: the checks to run.
        report: a report that says what is tested, without results.
        xfails: names, or patterns of names, of checks that are expected not to hold.
        first: whether the first check that does not hold ends the run.
        time_limit: the seconds after which no further check is started.
        progress: called with the name of each check before it runs.
    """
    began = time.monotonic()
    results: list[Result] = []
    stopped = stop(target.alive())
    facts, hangs = Facts(""), 0
    left = list(checks)
    while left and not stopped:
        limit = min(CHECK_SECONDS + EXPERIMENTS * facts.seconds, MOST_SECONDS) if results else SETUP_SECONDS
        # The first requests may load a model. They have a process of their own, from which later limits are derived.
        for result, found in worker(target, left[:] if results else left[:2], facts, limit, progress):
            facts = found
            results.append(expected(result, xfails))
            left.pop(0)
            if result.verdict == "error" and (gone := target.alive()):
                stopped = f"the server is gone since the check {result.check}: {gone}"
                results[-1] = results[-1].having(bug="server-died")
                break
            hangs = hangs + 1 if result.bug == "no-answer" and result.verdict == "error" else 0
            stopped = stopped_by(results, hangs, time.monotonic() - began, time_limit)
            if first and results[-1].verdict in BROKEN:
                stopped = stopped or f"{results[-1].check} does not hold"
            if stopped:
                break
    return replace(report, base_model=facts.base_model, noise=facts.noise, rounding=facts.rounding, results=results,
        stopped=f"{stopped}; {len(left)} checks were not run" if stopped and left else "",
        seconds=time.monotonic() - began)  # fmt: skip


def stop(unreached: str) -> str:
    return f"the server does not answer: {unreached}" if unreached else ""


def stopped_by(results: list[Result], hangs: int, seconds: float, limit: float) -> str:
    """Return why the run ends after a result, or "" if it goes on."""
    if seconds > limit:
        return f"time was up after {limit:g} s"
    if len(results) == 1 and results[0].bug == "no-answer":
        return f"the server does not serve: {results[0].seen}"
    if len(results) == 1 and "AuthenticationError: " in results[0].seen:
        return "the server refuses the key; pass its own with --api-key, or set TINKER_API_KEY"
    if len(results) == 1 and results[0].verdict == "inconclusive":
        return results[0].seen
    return f"{hangs} checks in a row had no answer" if hangs >= MOST_HANGS else ""


def expected(result: Result, xfails: Sequence[str]) -> Result:
    """Return a result with its verdict replaced if its check was expected not to hold."""
    if not any(fnmatch(result.check, pattern) for pattern in xfails):
        return result
    return result.having(
        verdict={"fail": "xfail", "error": "xfail", "pass": "xpass"}.get(result.verdict, result.verdict)
    )


# One worker


def worker(
    target: Target, checks: Sequence[Check], facts: Facts, limit: float, progress: Callable[[str], None]
) -> Iterator[tuple[Result, Facts]]:
    """Run checks in a child process until all are done, or one hangs or dies. Yield each result with the facts."""
    doing, status, began = checks[0], "", time.monotonic()
    work = partial(work_through, target, checks, facts, limit)
    running: Any = run_isolated(work, math.inf, silence=limit + MARGIN)
    with contextlib.closing(running) as messages:
        for message in messages:
            match message:
                case ["doing", int(i)]:
                    doing, status, began = checks[i], "", time.monotonic()
                    progress(doing.name)
                case ["http", str(status)]:
                    pass
                case ["result", dict(values), dict(found)]:
                    yield Result(**values), Facts(**found)
                    if values["verdict"] == "error":
                        return  # the client may be poisoned: the next check gets a new process
                case Ended() as ended:
                    yield ended_result(doing, ended, status, time.monotonic() - began), facts
                    return
                case [str(word), str(text)] if word == FAILED:
                    seen = f"an error of lossfns itself: {printable(text)}"
                    yield Result(doing.name, doing.says, "error", doing.level, seen=seen, bug=doing.bug), facts
                    return


def ended_result(check: Check, ended: Ended, status: str, seconds: float) -> Result:
    """Return the result of a check whose process was killed or died."""
    last = f"; the last status was {status}" if status else ""
    seen = f"no answer within {seconds:.0f} s{last}" if ended.timed_out else f"{ended.how}{last}"
    return Result(check.name, check.says, "error", check.level, seen=seen, bug="no-answer", seconds=seconds)


def work_through(target: Target, checks: Sequence[Check], facts: Facts, limit: float, send: Send) -> None:
    """Run checks one after another in this process, and send each result."""
    silence_streams()
    last: list[str] = []

    def tell(status: str) -> None:
        if last != [status]:  # a message counts as a sign of life, and the SDK repeats a request for minutes
            last[:] = [status]
            send(["http", status])

    HttpLog(tell)
    bench: Bench | None = None
    for i, check in enumerate(checks):
        send(["doing", i])
        last.clear()
        began = time.monotonic()
        bench, result = attempt(target, bench, check, facts, began + limit)
        if bench is not None:
            facts = bench.facts
        if result.verdict == "error" and last:
            result = result.having(seen=f"{result.seen}; the last status was {last[0]}")
        result = result.having(seconds=time.monotonic() - began)
        if not facts.rate:  # the setup then measures an experiment
            facts.seconds = min(facts.seconds or result.seconds, result.seconds)
        if result.verdict not in ("pass", "unsupported"):
            facts.failed[check.name] = result.seen
        elif result.verdict == "unsupported":
            facts.failed[check.name] = f"unsupported: {result.seen}"
        send(["result", vars(result), facts.as_dict()])
        if result.verdict == "error":
            break
    if bench is not None:
        bench.connection.close()


def attempt(
    target: Target, bench: Bench | None, check: Check, facts: Facts, deadline: float
) -> tuple[Bench | None, Result]:
    """Run one check, and return the bench and the result, whatever the server or the SDK raises."""
    result = Result(check.name, check.says, "pass", check.level)
    blocked = next((name for name in check.needs if name in facts.failed), None)
    if blocked is not None:
        reason = facts.failed[blocked]
        if reason.startswith("unsupported: "):
            return bench, result.having(verdict="unsupported", seen=reason.removeprefix("unsupported: "))
        facts.failed.setdefault(check.name, f"it needs {blocked}")
        return bench, result.having(verdict="inconclusive", seen=f"it needs {blocked}, which does not hold")
    try:
        if bench is None:
            connection = target.open()
            connection.deadline = deadline
            facts = facts if facts.base_model else connect_facts(connection, target.base_model)
            bench = Bench(connection, facts)
        bench.connection.deadline = deadline
        return bench, with_finding(result, check, check.run(bench))
    except Exception as error:
        if bench is not None:
            bench.forget()  # requests may be out of step
        return bench, with_error(result, check, error)


def with_error(result: Result, check: Check, error: Exception) -> Result:
    """Return the result of a check that an exception has ended."""
    seen = printable(str(error), 600)
    match error:
        case Wrong():
            return result.having(verdict="fail", seen=seen, bug=error.bug or check.bug)
        case Unsupported():
            return result.having(verdict="unsupported", seen=seen)
        case Inconclusive():
            return result.having(verdict="inconclusive", seen=seen)
        case NoAnswer():
            return result.having(verdict="error", seen=seen, bug="no-answer")
    words = server_words(error)
    if is_refusal(error):
        return result.having(verdict="fail", seen=f"a valid request is refused: {words}", bug=symptom(words, "refused"))
    return result.having(verdict="error", seen=words, bug=symptom(words, check.bug))


def with_finding(result: Result, check: Check, finding: Finding | None) -> Result:
    """Return the result of a check that has run to its end."""
    if finding is None:
        return result
    numbers = {"error": finding.error, "noise": finding.noise, "tolerance": finding.tolerance, "seen": finding.seen}
    if finding.holds:
        return result.having(**numbers)
    return result.having(verdict="fail", bug=finding.bug or check.bug, **numbers)


def silence_streams() -> None:
    """Drop what the SDK prints and logs: the report has what matters."""
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.dup2(null, 1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
