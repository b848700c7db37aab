"""Run the vectors on a program: write requests to it as JSON lines, read replies, and compare them with the answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, NamedTuple

from lossfns.checks import is_real
from lossfns.errors import LossInputError
from lossfns.testing.bugs import BUGS
from lossfns.testing.vectors.flags import explains
from lossfns.testing.vectors.program import Ended, Program, Silence, one_line
from lossfns.testing.vectors.vector import METHODS, SUITE, Vector, load, mistake

MAX_SHOWN_FAILURES = 10
"""The number of failures in the table. The JSON report has all of them."""

MAX_IGNORED_LINES = 1000
"""The run stops after this many lines that are not a reply."""

MAX_ECHOES = 3
"""The run stops after this many requests that come back before the first reply."""

MAX_TIMEOUT = 86_400.0
"""The longest wait for a reply that can be asked for, in seconds: a day."""

NO_REPLY = "no reply"
"""The mistake of a vector that the program did not reply to."""

VERDICTS = ("pass", "fail", "skip", "xfail", "xpass")


def run(
    command: str,
    *,
    loss: str | Sequence[str] | None = None,
    dtype: str = "float64",
    timeout: float = 10.0,
    xfail: Sequence[str] = (),
    strict: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> VectorReport:
    """Send every request to a program and compare its replies with the right answers.

    Args:
        command: the program, split as a shell would and started once; docs/vectors.md describes the protocol. It and
            the processes that it starts are ended before this function returns or raises.
        loss: the loss to test, or several; None tests all losses.
        dtype: "float64" or "float32", in which the program computes. It selects the tolerance.
        timeout: the longest wait for a reply, in seconds, up to a day.
        xfail: ids, or patterns such as ``gspo-*``, that are expected to fail.
        strict: whether a vector that the program does not support counts against it.
        progress: called with a line of text after each reply.

    Raises:
        LossInputError: if an argument is refused, or the command cannot be started.
    """
    names = [None] if loss is None else [loss] if isinstance(loss, str) else list(dict.fromkeys(loss))
    vectors = [vector for name in names for vector in load(name)]
    if not vectors:
        raise LossInputError("loss", "the name of a loss", "an empty list", "Leave it out to test all losses.")
    if dtype not in ("float64", "float32"):
        raise LossInputError("dtype", "'float64' or 'float32'", repr(dtype), "It selects the tolerance.")
    if not is_real(timeout) or not 0 < timeout <= MAX_TIMEOUT:
        fix = "It is the longest wait for one reply."
        raise LossInputError("timeout", f"seconds above 0, at most {MAX_TIMEOUT:g} (a day)", repr(timeout), fix)
    results = {vector.id: evaluate(vector, None, dtype, xfail) for vector in vectors}

    def take(vector: Vector, reply: Mapping[str, Any]) -> None:
        results[vector.id] = evaluate(vector, reply, dtype, xfail)

    with Program(command, (json.dumps(vector.request, allow_nan=False) for vector in vectors)) as program:
        complaint = exchange(program, vectors, timeout, take, progress)
    return VectorReport(command, dtype, list(results.values()), complaint, strict)


class Result(NamedTuple):
    """The verdict on one vector (a name in ``VERDICTS``) and the mistake in the reply, or why it was skipped."""

    vector: Vector
    verdict: str
    wrong: str
    explained: tuple[str, ...] = ()
    """The bugs that give exactly this reply."""
    answered: bool = True
    """Whether the reply has an answer: numbers, not an error."""


def evaluate(vector: Vector, reply: Mapping[str, Any] | None, dtype: str, xfail: Sequence[str]) -> Result:
    """Compare the reply to a vector with the right answer."""
    if reply is not None and is_skip(reply):
        reason = reply["unsupported"]
        return Result(vector, "skip", one_line(reason) if isinstance(reason, str) else "unsupported", answered=False)
    wrong, answered = NO_REPLY, False
    explained: tuple[str, ...] = ()
    if reply is not None:
        try:
            wrong, answered = one_line(mistake(vector, reply, dtype)), has_answer(reply)
            if wrong and answered:
                explained = tuple(bug for bug in vector.flags if explains(bug, vector, reply, dtype))
        except RecursionError:
            wrong = "a reply that is nested too deeply"
    expected = any(fnmatch(vector.id, pattern) for pattern in xfail)
    verdict = ("xfail" if wrong else "xpass") if expected else ("fail" if wrong else "pass")
    return Result(vector, verdict, wrong, explained, answered)


def is_skip(reply: Mapping[str, Any]) -> bool:
    """Return whether a reply says that the program does not have the loss or the setting, and says nothing else."""
    return bool(reply.get("unsupported")) and not {"loss", "grad", "advantages", "error"} & reply.keys()


def has_answer(reply: Mapping[str, Any]) -> bool:
    """Return whether a reply holds numbers that a loss may have computed."""
    return "error" not in reply and ({"loss", "grad"} <= reply.keys() or "advantages" in reply)


def is_echo(reply: Mapping[str, Any]) -> bool:
    """Return whether a line is a request that comes back."""
    return {"config", "data"} <= reply.keys() and not {"grad", "advantages", "error", "unsupported"} & reply.keys()


def exchange(
    program: Program,
    vectors: Sequence[Vector],
    timeout: float,
    take: Callable[[Vector, Mapping[str, Any]], None],
    progress: Callable[[str], None],
) -> str:
    """Read replies, and pass each to ``take`` at once, so that none is kept. Return a complaint about the program.

    Read until every reply has come, or until the program ends, is silent too long or writes too many other lines.
    """
    missing = {vector.id: vector for vector in vectors}
    ignored, quote, echoes, deadline = 0, "", 0, time.monotonic() + timeout

    def complain(complaint: str = "") -> str:
        return "; ".join(part for part in (complaint, quote) if part)

    while missing:
        try:
            line = program.read_line(deadline)
        except Silence as silence:
            return complain(f"it gave no reply for {timeout:g} s{silence}")
        except Ended as ended:
            return complain() or str(ended)  # an ignored line explains more than the status
        reply = parse_reply(line)
        if reply is None or reply["id"] not in missing or is_echo(reply):
            ignored += 1
            quote = quote or f"it wrote a line that is no reply to any open request: {line.strip()[:80]!r}"
            echoes += reply is not None and is_echo(reply)
            if echoes == MAX_ECHOES and len(missing) == len(vectors):
                return "it repeats the requests and answers none"
            if ignored == MAX_IGNORED_LINES:
                return complain(f"{MAX_IGNORED_LINES} lines were no reply")
            continue
        take(missing.pop(reply["id"]), reply)
        deadline = time.monotonic() + timeout
        progress(f"{len(vectors) - len(missing)}/{len(vectors)}")
    return complain()


def parse_reply(line: str) -> Mapping[str, Any] | None:
    """Return the reply in a line, or None if the line is not a reply."""
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return reply if isinstance(reply, dict) and isinstance(reply.get("id"), str) else None


# The report


class LikelyBug(NamedTuple):
    """A bug that the failures suggest.

    Attributes:
        flag: the id of the bug.
        vectors: the number of vectors with this flag that the program answered.
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
    strict: bool = False

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results if result.verdict == "fail"]

    @property
    def ok(self) -> bool:
        """Whether every reply is right. A vector that is not supported counts as right unless the run is strict."""
        return not self.failures and not (self.strict and self.count("skip"))

    @property
    def no_reply(self) -> list[Result]:
        """The vectors that the program did not reply to."""
        return [result for result in self.results if result.wrong == NO_REPLY]

    def count(self, verdict: str, loss: str | None = None) -> int:
        """Return the number of vectors with a verdict, of one loss or of all."""
        return sum(r.verdict == verdict and loss in (None, r.vector.loss) for r in self.results)

    @property
    def losses(self) -> list[str]:
        present = {result.vector.loss for result in self.results}
        return [loss for loss in METHODS if loss in present]

    def likely(self, most: int = 5) -> list[LikelyBug]:
        """Return the likeliest bugs. Only answers count: a crash, silence or a refusal is no sign of any bug.

        If some replies equal the answer of a bug, return these bugs, sorted by the share of their vectors with such a
        reply. Otherwise return the bugs whose vectors all fail.
        """
        flags = {flag for result in self.failures if result.answered for flag in result.vector.flags}
        bugs = [self.count_failures(flag) for flag in BUGS if flag in flags]
        with_exact_answer = [bug for bug in bugs if bug.explained]
        all_failed = [bug for bug in bugs if bug.failed == bug.vectors]
        by_share = sorted(with_exact_answer or all_failed, key=lambda bug: (-bug.explained / bug.vectors, -bug.failed))
        return by_share[:most]

    def count_failures(self, flag: str) -> LikelyBug:
        """Count the answers to vectors with a flag, the wrong ones, and those that the bug gives."""
        flagged = [result for result in self.results if flag in result.vector.flags and result.answered]
        failed = [result for result in flagged if result.verdict == "fail"]
        return LikelyBug(flag, len(flagged), len(failed), sum(flag in result.explained for result in failed))

    def table(self) -> str:
        """Return the report as plain text: the counts of every loss, then the remarks.

        If no vector has a reply, return one sentence.
        """
        if not self.counts():
            return self.remarks()[1]
        first, *others = zip(*self.counts())
        columns = [[cell.ljust(28) for cell in first], *([cell.rjust(6) for cell in column] for column in others)]
        return "\n".join(["".join(row) for row in zip(*columns)] + self.remarks())

    def counts(self) -> list[list[str]]:
        """Return the table of verdicts: a heading, a row of counts for each loss, and a row for all losses.

        Return no rows if no vector has a reply.
        """
        if len(self.no_reply) == len(self.results):
            return []
        verdicts = [v for v in VERDICTS if v in ("pass", "fail") or self.count(v)]

        def row(title: str, loss: str | None) -> list[str]:
            numbers = [self.count(verdict, loss) for verdict in verdicts]
            return [title, *map(str, (*numbers, sum(numbers)))]

        return [[f"vectors {SUITE}", *verdicts, "total"], *(row(loss, loss) for loss in self.losses), row("all", None)]

    def remarks(self) -> list[str]:
        """Return lines on the program, the first failures and the likely bugs. Each part begins with an empty line."""
        if not self.counts():
            why = self.complaint or "it gave no reply"
            return ["", f"{self.command}: {why}; none of {len(self.results)} vectors has a reply"]
        lines = ["", f"{self.command}: {self.complaint}"] if self.complaint else []
        failures = [result for result in self.failures if result.wrong != NO_REPLY]
        if failures:
            shown, rest = failures[:MAX_SHOWN_FAILURES], len(failures) - MAX_SHOWN_FAILURES
            lines += ["", *(line for result in shown for line in failure_text(result).splitlines())]
            if rest > 0:
                lines.append(f"... and {rest} more; --json FILE has all")
        if self.no_reply:
            lines += ["", f"{len(self.no_reply)} vectors have no reply, the first is {self.no_reply[0].vector.id}"]
        if skipped := [result for result in self.results if result.verdict == "skip"]:
            reasons = list(dict.fromkeys(result.wrong for result in skipped))
            more = f" and {len(reasons) - 3} more reasons" if len(reasons) > 3 else ""
            tested = "" if len(skipped) < len(self.results) else "; nothing was tested"
            lines += ["", f"{len(skipped)} vectors are not supported: {'; '.join(reasons[:3])}{more}{tested}"]
        if likely := self.likely():
            lines += ["", "likely bugs, the likeliest first", *(f"  {bug}" for bug in likely)]
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "suite": SUITE,
            "command": self.command,
            "dtype": self.dtype,
            "strict": self.strict,
            "ok": self.ok,
            "counts": {verdict: self.count(verdict) for verdict in VERDICTS},
            "losses": {loss: {verdict: self.count(verdict, loss) for verdict in VERDICTS} for loss in self.losses},
            "no_reply": len(self.no_reply),
            "complaint": self.complaint,
            "skipped": [{"id": r.vector.id, "reason": r.wrong} for r in self.results if r.verdict == "skip"],
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
