"""Run the vectors on a program: write requests to it as JSON lines, read replies, and compare them with the answers."""

from __future__ import annotations

import json
import queue
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import IO, Any, NamedTuple

from lossfns.errors import LossInputError
from lossfns.testing.bugs import BUGS
from lossfns.testing.vectors.flags import explains
from lossfns.testing.vectors.vector import METHODS, SUITE, Vector, load, mistake

MAX_SHOWN_FAILURES = 10
"""The number of failures in the table. The JSON report has all of them."""

MAX_IGNORED_LINES = 1000
"""The run stops after this many lines that are not a reply."""


def run(
    command: str,
    *,
    loss: str | None = None,
    dtype: str = "float64",
    timeout: float = 10.0,
    xfail: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> VectorReport:
    """Send every request to a program and compare its replies with the right answers.

    Args:
        command: the program, split as a shell would and started once; docs/vectors.md describes the protocol.
        loss: the loss to test; None tests all losses.
        dtype: "float64" or "float32", in which the program computes. It selects the tolerance.
        timeout: the longest wait for a reply, in seconds.
        xfail: ids, or patterns such as ``gspo-*``, that are expected to fail.
        progress: called with a line of text after each reply.

    Raises:
        LossInputError: if the command cannot be started.
    """
    vectors = load(loss)
    exchanged = exchange(command, vectors, timeout, progress)
    results = [evaluate(vector, exchanged, dtype, xfail) for vector in vectors]
    return VectorReport(command, dtype, results, exchanged.complaint)


class Exchange(NamedTuple):
    """The replies by id. The complaint says what is wrong with the program; it is empty if nothing is."""

    replies: dict[str, Mapping[str, Any]]
    complaint: str


class Result(NamedTuple):
    """The verdict on one vector (pass, fail, xfail or xpass) and the mistake in the reply."""

    vector: Vector
    verdict: str
    wrong: str
    explained: tuple[str, ...] = ()
    """The bugs that give exactly this reply."""


def evaluate(vector: Vector, exchanged: Exchange, dtype: str, xfail: Sequence[str]) -> Result:
    """Compare the reply to a vector with the right answer."""
    reply = exchanged.replies.get(vector.id)
    wrong = mistake(vector, reply, dtype) if reply is not None else "no reply"
    expected = any(fnmatch(vector.id, pattern) for pattern in xfail)
    verdict = ("xfail" if wrong else "xpass") if expected else ("fail" if wrong else "pass")
    if not wrong or reply is None:
        return Result(vector, verdict, wrong)
    # A wrong reply to a must-reject vector accepts the input, as every bug among its flags does.
    accepted = vector.error is not None
    explained = tuple(bug for bug in vector.flags if accepted or explains(bug, vector, reply, dtype))
    return Result(vector, verdict, wrong, explained)


# The other process

ENDED = "it ended"
"""An internal complaint: the output ended. ``exchange`` replaces it by one with the exit status."""


def exchange(command: str, vectors: Sequence[Vector], timeout: float, progress: Callable[[str], None]) -> Exchange:
    """Start the program, write every request, read the replies, and end the program."""
    with tempfile.TemporaryFile() as errors:
        process = start_process(command, errors)
        lines: queue.Queue[str | None] = queue.Queue()
        for work in (lambda: write_requests(process, vectors), lambda: read_lines(process, lines)):
            threading.Thread(target=work, daemon=True).start()
        try:
            replies, complaint = collect_replies(lines, [vector.id for vector in vectors], timeout, progress)
            if complaint == ENDED:
                complaint = f"it ended with exit status {process.wait(timeout)}{stderr_tail(errors)}"
        except subprocess.TimeoutExpired:
            complaint = "it closed its output and did not end"
        finally:
            process.kill()
            process.wait()
    return Exchange(replies, complaint)


def start_process(command: str, errors: IO[bytes]) -> subprocess.Popen[str]:
    """Start the program with pipes for requests and replies."""
    try:
        return subprocess.Popen(
            shlex.split(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, ValueError, IndexError) as error:
        raise LossInputError("--cmd", "a command that starts", f"{command!r}: {error}", "Try it in a shell.") from None


def write_requests(process: subprocess.Popen[str], vectors: Iterable[Vector]) -> None:
    """Write every request. This runs in its own thread, so that a full pipe does not block both processes."""
    assert process.stdin is not None
    with suppress(OSError), process.stdin:  # the program may stop reading; requests without a reply count as failed
        for vector in vectors:
            process.stdin.write(json.dumps(vector.request, allow_nan=False) + "\n")
            process.stdin.flush()


def read_lines(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    """Put every line of output into the queue, then None."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.put(line)
    lines.put(None)


def collect_replies(
    lines: queue.Queue[str | None], ids: Sequence[str], timeout: float, progress: Callable[[str], None]
) -> tuple[dict[str, Mapping[str, Any]], str]:
    """Return the replies by id and a complaint.

    Read until every reply has come, or until the program ends, is silent too long or writes too many other lines.
    """
    replies: dict[str, Mapping[str, Any]] = {}
    ignored: list[str] = []
    missing, deadline = set(ids), time.monotonic() + timeout
    while missing:
        try:
            line = lines.get(timeout=max(deadline - time.monotonic(), 0.001))
        except queue.Empty:
            return replies, with_ignored_lines(f"it gave no reply for {timeout:g} s", ignored)
        if line is None:
            return replies, with_ignored_lines("", ignored) or ENDED  # an ignored line explains more than the status
        reply = parse_reply(line)
        if reply is None or reply.get("id") not in missing:
            ignored.append(line)
            if len(ignored) == MAX_IGNORED_LINES:
                return replies, with_ignored_lines(f"{MAX_IGNORED_LINES} lines were no reply", ignored)
            continue
        replies[reply["id"]] = reply
        missing.remove(reply["id"])
        deadline = time.monotonic() + timeout
        progress(f"{len(replies)}/{len(ids)}")
    return replies, with_ignored_lines("", ignored)


def parse_reply(line: str) -> Mapping[str, Any] | None:
    """Return the reply in a line, or None if the line is not a reply."""
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return reply if isinstance(reply, dict) and isinstance(reply.get("id"), str) else None


def with_ignored_lines(complaint: str, ignored: Sequence[str]) -> str:
    """Append the first ignored line to a complaint."""
    if not ignored:
        return complaint
    quote = f"it wrote a line that is no reply to any open request: {ignored[0].strip()[:80]!r}"
    return f"{complaint}; {quote}" if complaint else quote


def stderr_tail(errors: IO[bytes]) -> str:
    """Return the last three lines that the program wrote to standard error."""
    errors.seek(0)
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()[-3:]
    return "".join(f"\n  {line[:200]}" for line in lines)


# The report


class LikelyBug(NamedTuple):
    """A bug that the failures suggest.

    Attributes:
        flag: the id of the bug.
        vectors: the number of vectors with this flag.
        failed: the number of these vectors that fail.
        explained: the number of failures with exactly the answer that the bug gives.
    """

    flag: str
    vectors: int
    failed: int
    explained: int

    def __str__(self) -> str:
        exact = f", {self.explained} with exactly the answer of this bug" if self.explained else ""
        return f"{self.flag}: {BUGS[self.flag].description} ({self.failed} of its {self.vectors} vectors fail{exact})"


@dataclass(frozen=True)
class VectorReport:
    """The results of a run, one for each vector."""

    command: str
    dtype: str
    results: list[Result]
    complaint: str = ""

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results if result.verdict == "fail"]

    @property
    def ok(self) -> bool:
        return not self.failures

    def count(self, verdict: str, loss: str | None = None) -> int:
        """Return the number of vectors with a verdict, of one loss or of all."""
        return sum(r.verdict == verdict and loss in (None, r.vector.loss) for r in self.results)

    @property
    def losses(self) -> list[str]:
        present = {result.vector.loss for result in self.results}
        return [loss for loss in METHODS if loss in present]

    def likely(self, most: int = 5) -> list[LikelyBug]:
        """Return the likeliest bugs.

        If some replies equal the answer of a bug, return these bugs, sorted by the share of their vectors with such a
        reply. Otherwise return the bugs whose vectors all fail.
        """
        flags = {flag for result in self.failures for flag in result.vector.flags}
        bugs = [self.count_failures(flag) for flag in BUGS if flag in flags]
        with_exact_answer = [bug for bug in bugs if bug.explained]
        all_failed = [bug for bug in bugs if bug.failed == bug.vectors]
        by_share = sorted(with_exact_answer or all_failed, key=lambda bug: (-bug.explained / bug.vectors, -bug.failed))
        return by_share[:most]

    def count_failures(self, flag: str) -> LikelyBug:
        """Count the vectors with a flag, those that fail, and those whose reply is the answer of the bug."""
        flagged = [result for result in self.results if flag in result.vector.flags]
        failed = [result for result in flagged if result.verdict == "fail"]
        return LikelyBug(flag, len(flagged), len(failed), sum(flag in result.explained for result in failed))

    def table(self) -> str:
        """Return the report as plain text: the counts of every loss, then the remarks."""
        first, *others = zip(*self.counts())
        columns = [[cell.ljust(28) for cell in first], *([cell.rjust(6) for cell in column] for column in others)]
        return "\n".join(["".join(row) for row in zip(*columns)] + self.remarks())

    def counts(self) -> list[list[str]]:
        """Return the table of verdicts: a heading, a row of counts for each loss, and a row for all losses."""
        verdicts = [v for v in ("pass", "fail", "xfail", "xpass") if v in ("pass", "fail") or self.count(v)]

        def row(title: str, loss: str | None) -> list[str]:
            numbers = [self.count(verdict, loss) for verdict in verdicts]
            return [title, *map(str, (*numbers, sum(numbers)))]

        return [[f"vectors {SUITE}", *verdicts, "total"], *(row(loss, loss) for loss in self.losses), row("all", None)]

    def remarks(self) -> list[str]:
        """Return lines on the program, the first failures and the likely bugs. Each part begins with an empty line."""
        lines = ["", f"{self.command}: {self.complaint}"] if self.complaint else []
        if self.failures:
            shown, rest = self.failures[:MAX_SHOWN_FAILURES], len(self.failures) - MAX_SHOWN_FAILURES
            lines += ["", *(line for result in shown for line in failure_text(result).splitlines())]
            if rest > 0:
                lines.append(f"... and {rest} more; --json FILE has all")
        if likely := self.likely():
            lines += ["", "likely bugs, the likeliest first", *(f"  {bug}" for bug in likely)]
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        verdicts = ("pass", "fail", "xfail", "xpass")
        return {
            "suite": SUITE,
            "command": self.command,
            "dtype": self.dtype,
            "ok": self.ok,
            "counts": {verdict: self.count(verdict) for verdict in verdicts},
            "losses": {loss: {verdict: self.count(verdict, loss) for verdict in verdicts} for loss in self.losses},
            "complaint": self.complaint,
            "failures": [
                {
                    "id": result.vector.id,
                    "kind": result.vector.kind,
                    "comment": result.vector.comment,
                    "flags": list(result.vector.flags),
                    "wrong": result.wrong,
                }
                for result in self.failures
            ],
            "likely_bugs": [{**bug._asdict(), "words": BUGS[bug.flag].description} for bug in self.likely()],
        }


def failure_text(result: Result) -> str:
    """Return a failure as two lines, and one line for each bug that gives exactly this reply."""
    vector = result.vector
    bugs = [f"    {flag}: {BUGS[flag].description}" for flag in result.explained]
    return "\n".join([f"{vector.id} ({vector.kind}) {vector.comment}", f"    {result.wrong}", *bugs])
