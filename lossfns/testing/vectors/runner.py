"""The runner of the vectors: it sends requests to a program as JSON lines and compares the replies."""

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

MAX_SHOWN = 10
"""The number of failures in the table. The JSON report has all of them."""

MAX_NOISE = 1000
"""The number of lines that are no reply before the run stops."""


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
        loss: one method, or all.
        dtype: "float64" or "float32", the precision of the program, which sets the tolerance.
        timeout: the longest wait for a reply, in seconds.
        xfail: ids, or patterns such as ``gspo-*``, that are expected to fail.
        progress: called with a line of text after each reply.

    Raises:
        LossInputError: if the command cannot be started.
    """
    vectors = load(loss)
    replied = exchange(command, vectors, timeout, progress)
    results = [evaluate(vector, replied, dtype, xfail) for vector in vectors]
    return VectorReport(command, dtype, results, replied.complaint)


class Exchange(NamedTuple):
    """The replies by id, and the complaint about the program; empty if there is none."""

    replies: dict[str, Mapping[str, Any]]
    complaint: str


class Result(NamedTuple):
    """The verdict on one vector (pass, fail, xfail or xpass) and the mistake in the reply."""

    vector: Vector
    verdict: str
    wrong: str
    explained: tuple[str, ...] = ()
    """The bugs whose answer the reply is."""


def evaluate(vector: Vector, replied: Exchange, dtype: str, xfail: Sequence[str]) -> Result:
    """Compare the reply to a vector with the right answer."""
    reply = replied.replies.get(vector.id)
    wrong = mistake(vector, reply, dtype) if reply is not None else "no reply"
    expected = any(fnmatch(vector.id, pattern) for pattern in xfail)
    verdict = ("xfail" if wrong else "xpass") if expected else ("fail" if wrong else "pass")
    if not wrong or reply is None:
        return Result(vector, verdict, wrong)
    accepted = vector.error is not None
    return Result(
        vector, verdict, wrong, tuple(bug for bug in vector.flags if accepted or explains(bug, vector, reply, dtype))
    )


# The other process


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


ENDED = "it ended"


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
    """Write every request. This runs in its own thread, so that neither side waits for the other to read."""
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
    """Return the replies by id and a complaint: read until every reply is there, or until the program fails."""
    replies: dict[str, Mapping[str, Any]] = {}
    ignored: list[str] = []
    missing, deadline = set(ids), time.monotonic() + timeout
    while missing:
        try:
            line = lines.get(timeout=max(deadline - time.monotonic(), 0.001))
        except queue.Empty:
            return replies, with_ignored_lines(f"it gave no reply for {timeout:g} s", ignored)
        if line is None:
            return replies, with_ignored_lines("", ignored) or ENDED
        reply = parse_reply(line)
        if reply is None or reply.get("id") not in missing:
            ignored.append(line)
            if len(ignored) == MAX_NOISE:
                return replies, with_ignored_lines(f"{MAX_NOISE} lines were no reply", ignored)
            continue
        replies[reply["id"]] = reply
        missing.remove(reply["id"])
        deadline = time.monotonic() + timeout
        progress(f"{len(replies)}/{len(ids)}")
    return replies, with_ignored_lines("", ignored)


def parse_reply(line: str) -> Mapping[str, Any] | None:
    """Return the reply in a line, or None if there is none."""
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
    """Return the last lines that the program wrote to standard error."""
    errors.seek(0)
    words = errors.read().decode("utf-8", "replace").strip().splitlines()[-3:]
    return "".join(f"\n  {line[:200]}" for line in words)


# The report


class LikelyBug(NamedTuple):
    """A likely bug, with the number of vectors that it flags, of those that fail, and of those that it explains."""

    flag: str
    vectors: int
    failed: int
    explained: int

    def __str__(self) -> str:
        exact = f", {self.explained} with the very answer of such a loss" if self.explained else ""
        return f"{self.flag}: {BUGS[self.flag].description} ({self.failed} of its {self.vectors} vectors fail{exact})"


@dataclass(frozen=True)
class VectorReport:
    """The verdicts on every vector of a run."""

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

        These are the bugs whose answers are among the replies, sorted by the share of their vectors that they explain.
        If there are none, they are the bugs whose vectors all fail.
        """
        flags = {flag for result in self.failures for flag in result.vector.flags}
        found = [self.likelihood(flag) for flag in BUGS if flag in flags]
        exact = [bug for bug in found if bug.explained]
        all_failing = [bug for bug in found if bug.failed == bug.vectors]
        return sorted(exact or all_failing, key=lambda bug: (-bug.explained / bug.vectors, -bug.failed))[:most]

    def likelihood(self, flag: str) -> LikelyBug:
        hunting = [result for result in self.results if flag in result.vector.flags]
        failed = [result for result in hunting if result.verdict == "fail"]
        return LikelyBug(flag, len(hunting), len(failed), sum(flag in result.explained for result in failed))

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
            rest = len(self.failures) - MAX_SHOWN
            lines += ["", *(line for result in self.failures[:MAX_SHOWN] for line in failure_text(result).splitlines())]
            lines += [f"... and {rest} more; --json FILE has all"] * (rest > 0)
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
    """Return a failure in two lines, and a line for each bug that explains it."""
    vector = result.vector
    bugs = [f"    {flag}: {BUGS[flag].description}" for flag in result.explained]
    return "\n".join([f"{vector.id} ({vector.kind}) {vector.comment}", f"    {result.wrong}", *bugs])
