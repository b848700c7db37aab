"""``check``: run every law of a loss's kind on batches with many edge cases, and report the likely bug."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from xml.etree import ElementTree

from lossfns.errors import LossInputError, LossWarning
from lossfns.loss import Loss
from lossfns.testing.batch import Batch
from lossfns.testing.bugs import BUGS
from lossfns.testing.claims import agreement, claim_of, matching_vectors, vectors_law
from lossfns.testing.kinds import (
    KINDS,
    READS,
    SMALL,
    columns_for_kind,
    detect_kind,
    detect_targets,
    takes_datum_advantages,
    takes_rewards,
    working_dtype,
)
from lossfns.testing.laws import ADVANTAGES, LAWS_BY_KIND, SELF_CONTAINED, AdvantageLaw, Law, LawBroken, NotApplicable
from lossfns.testing.laws.base import LossFn
from lossfns.testing.subject import adapt

MARKS = {"pass": "ok", "fail": "FAIL", "n/a": "–"}


@dataclass(frozen=True)
class Verdict:
    """The verdict of one law.

    Attributes:
        law: the name of the law.
        says: the law in one sentence.
        verdict: ``"pass"``, ``"fail"`` or ``"n/a"``.
        seconds: the time that the law took.
        bug: the bug that most likely breaks the law.
        seen: the observation that broke the law, or the reason why it does not apply.
        example: the smallest batch that breaks the law.
    """

    law: str
    says: str
    verdict: str
    seconds: float
    bug: str = ""
    seen: str = ""
    example: str = ""

    @property
    def remark(self) -> str:
        """The text for one line of the table: the bug, the reason why the law does not apply, or the law itself."""
        return {"fail": self.bug, "n/a": self.seen}.get(self.verdict) or self.says

    @property
    def explanation(self) -> list[tuple[str, str]]:
        """The details of a broken law, each with its label."""
        bug = BUGS[self.bug]
        details = {
            "seen": self.seen,
            "bug": f"{self.bug}: {bug.description}",
            "also in": ", ".join(bug.sources),
            "batch": self.example,
        }
        return [(label, text) for label, text in details.items() if text]


@dataclass(frozen=True)
class Report:
    """The verdicts of all laws on one subject, in the order of diagnosis."""

    subject: str
    kind: str
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(v.verdict != "fail" for v in self.verdicts)

    @property
    def failures(self) -> list[Verdict]:
        return [v for v in self.verdicts if v.verdict == "fail"]

    @property
    def bug(self) -> str:
        """The most likely bug, which the first broken law names, or "" if every law holds."""
        return self.failures[0].bug if self.failures else ""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        verdicts = [vars(v) for v in self.verdicts]
        return {"subject": self.subject, "kind": self.kind, "ok": self.ok, "bug": self.bug, "verdicts": verdicts}

    @property
    def summary(self) -> str:
        """The verdict in one line, with the time that it took."""
        tested = sum(v.verdict != "n/a" for v in self.verdicts)
        verdict = (
            f"{tested} laws hold"
            if self.ok
            else f"{len(self.failures)} of {tested} laws broken; most likely {self.bug}: {BUGS[self.bug].description}"
        )
        return f"{verdict} ({sum(v.seconds for v in self.verdicts):.1f} s)"

    def table(self) -> str:
        """Return the report as plain text: a line for each law, an explanation of each broken law, and the summary."""
        width = max(len(v.law) for v in self.verdicts)
        lines = [f"{self.subject} ({self.kind})", ""]
        lines += [f"{MARKS[v.verdict]:4}  {v.law:{width}}  {v.remark}" for v in self.verdicts]
        for v in self.failures:
            lines += ["", f"{v.law}: {v.says}"]
            lines += [f"  {label:8} {text}".replace("\n", "\n           ") for label, text in v.explanation]
        return "\n".join([*lines, "", self.summary])

    def junit(self) -> str:
        """Return the report as JUnit XML, with a test case for each law."""
        suite = ElementTree.Element("testsuite", name=f"lossfns check {self.subject}", tests=str(len(self.verdicts)),
            failures=str(len(self.failures)), skipped=str(sum(v.verdict == "n/a" for v in self.verdicts)))  # fmt: skip
        for v in self.verdicts:
            attributes = {"classname": self.subject, "name": v.law, "time": f"{v.seconds:.3f}"}
            case = ElementTree.SubElement(suite, "testcase", attributes)
            if v.verdict == "fail":
                ElementTree.SubElement(case, "failure", message=v.bug).text = f"{v.seen}\n{v.example}"
            elif v.verdict == "n/a":
                ElementTree.SubElement(case, "skipped", message=v.seen)
        return ElementTree.tostring(suite, encoding="unicode")


class Trial(NamedTuple):
    """A law that is ready to run on the subject."""

    law: str
    run: Callable[[], Verdict]


def trials(
    subject: Any,
    *,
    kind: str | None = None,
    factory: bool | None = None,
    like: Loss | None = None,
    examples: int = 12,
) -> tuple[str, list[Trial]]:
    """Return the kind of a subject and a trial of each law of that kind, in the order of diagnosis. See ``check``."""
    kind = kind or getattr(subject, "kind", None) or ("advantages" if takes_rewards(subject) else None)
    if kind not in (None, *KINDS):
        raise LossInputError("kind", f"one of {', '.join(KINDS)}", repr(kind), "Leave it out to have it detected.")
    if kind == "advantages":
        return kind, [Trial(law.__name__, partial(run_advantage_law, law, subject)) for law in ADVANTAGES]
    with without_expected_warnings():
        loss_fn = adapt(subject, factory=factory)
        claim = like or claim_of(subject, loss_fn)
        kind = kind or detect_kind(claim or loss_fn)
        claim_laws = [] if claim is None else [vectors_law(subject, claim, matching_vectors(subject, claim))]
        if claim is not None and claim is not loss_fn:
            claim_laws.append(agreement(claim))
        return kind, law_trials(loss_fn, kind, detect_targets(loss_fn, kind), examples, claim_laws)


@contextmanager
def without_expected_warnings() -> Iterator[None]:
    """Ignore the warnings that deliberately extreme batches cause."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossWarning)
        warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad")
        warnings.filterwarnings("ignore", message="To copy construct from a tensor")
        yield


def check(
    subject: Any,
    *,
    kind: str | None = None,
    factory: bool | None = None,
    like: Loss | None = None,
    name: str | None = None,
    examples: int = 12,
    progress: Callable[[str], None] = lambda law: None,
) -> Report:
    """Test a loss by every law of its kind, and by the golden vectors of the method it claims to be.

    Args:
        subject: a contract function, a ``Loss``, a factory of one, or a function of padded ``[B, T]`` tensors.
        kind: "policy", "supervised", "preference", "any" or "advantages"; detected if left out.
        factory: whether the subject is a factory; detected if left out.
        like: the loss of this library that the subject claims to be. Left out, it is the subject's attribute ``like``,
            or the subject itself if it is a loss of this library.
        name: the name of the subject in the report.
        examples: the number of random batches for each law, in addition to the small ones.
        progress: called with the name of each law before it runs.

    Raises:
        LossInputError: if the subject cannot be tested.

    >>> import lossfns
    >>> report = check(lossfns.dpo(), examples=1)
    >>> report.kind, report.ok
    ('preference', True)
    """
    name = name or str(getattr(subject, "__name__", None) or repr(subject))
    kind, prepared = trials(subject, kind=kind, factory=factory, like=like, examples=examples)
    report = Report(name, kind)
    for trial in prepared:
        progress(trial.law)
        with without_expected_warnings():
            report.verdicts.append(trial.run())
        if trial.law == "contract" and not report.ok:
            break  # nothing else can be measured
    return report


def law_trials(loss_fn: LossFn, kind: str, targets: int, examples: int, claim_laws: Sequence[Law]) -> list[Trial]:
    """Return trials of the laws of a kind and of the claim, on small batches and on random ones."""
    from lossfns.testing.strategies import batches

    small = [columns_for_kind(batch, kind, targets) for batch in SMALL]
    dtype = working_dtype(loss_fn, small[-1])
    drawn = batches(
        reads=READS[kind],
        pairs=kind == "preference",
        targets=targets,
        per_token=not takes_datum_advantages(loss_fn, small[-1]),
        extremes=False,
        max_sequences=4,
        max_length=6,
    )

    def apply(law: Law, batch: Batch) -> None:
        law(loss_fn, batch.data(), batch.tensors(dtype))

    def trial(law: Law) -> Trial:
        first, count = (small[-1:], 0) if makes_own_batches(law) else (small, examples)
        return Trial(law.__name__, partial(run_law, law, partial(apply, law), first, drawn, count))

    return [trial(law) for law in (*LAWS_BY_KIND[kind], *claim_laws)]


def makes_own_batches(law: Law) -> bool:
    """Return whether a law makes its own batches. The law ``vectors``, which is made for each claim, does so too."""
    return law in SELF_CONTAINED or law.__name__ == "vectors"


def run_law(law: Law, apply: Callable[[Batch], None], small: Sequence[Batch], drawn: Any, examples: int) -> Verdict:
    """Run a law on the small batches in order, then on random ones, and report the smallest batch that breaks it."""
    start = time.monotonic()
    reasons: list[str] = []
    passed = 0

    def violation(batch: Batch) -> LawBroken | None:
        nonlocal passed
        try:
            apply(batch)
        except NotApplicable as reason:
            reasons.append(str(reason))
            return None
        except LawBroken as error:
            return error
        except Exception as error:
            return violation_by(error)
        passed += 1
        return None

    results = ((batch, violation(batch)) for batch in small)
    failure = next(((batch, error) for batch, error in results if error), None)
    if failure is None and examples:
        failure = smallest_failure(violation, drawn, examples)
    seconds = time.monotonic() - start
    if failure:
        batch, error = failure
        # A law that makes its own batches describes them in ``error.seen``.
        example = "" if makes_own_batches(law) else str(batch)
        return Verdict(law.__name__, statement(law), "fail", seconds, error.bug, error.seen, example)
    if passed:
        return Verdict(law.__name__, statement(law), "pass", seconds)
    return Verdict(law.__name__, statement(law), "n/a", seconds, seen=reasons[0])


def smallest_failure(
    violation: Callable[[Batch], LawBroken | None], drawn: Any, examples: int
) -> tuple[Batch, LawBroken] | None:
    """Return the smallest random batch that breaks the law, or None. It is the same batch in every run."""
    from hypothesis import HealthCheck, Phase, given, settings

    failures: list[tuple[Batch, LawBroken]] = []

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None, report_multiple_bugs=False,
              suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink))  # fmt: skip
    @given(drawn)
    def holds(batch: Batch) -> None:
        error = violation(batch)
        if error:
            failures.append((batch, error))
            raise error

    try:
        holds()
    except Exception:
        if not failures:  # an error of hypothesis itself
            raise
    return failures[-1] if failures else None  # hypothesis runs the smallest failing batch last


def violation_by(error: Exception) -> LawBroken:
    """Return the ``LawBroken`` for an unexpected exception in a law."""
    return LawBroken("not-the-contract", f"On valid input a law fails with {type(error).__name__}: {error}.")


def statement(law: Callable[..., None]) -> str:
    """Return the sentence that a law states: the first line of its docstring."""
    return (law.__doc__ or "").partition("\n")[0]


def run_advantage_law(law: AdvantageLaw, fn: Any) -> Verdict:
    """Run a law of group advantages on two interleaved groups of unequal size."""
    rewards, groups = [1.0, 0.0, 0.5, 0.25, 0.0, 1.0, 0.75], ["a", "b", "a", "b", "a", "a", "b"]
    start = time.monotonic()
    verdict = partial(Verdict, law.__name__, statement(law))
    try:
        law(fn, rewards, groups)
    except NotApplicable as reason:
        return verdict("n/a", time.monotonic() - start, seen=str(reason))
    except Exception as error:
        found = error if isinstance(error, LawBroken) else violation_by(error)
        example = f"rewards={rewards}, groups={groups}"
        return verdict("fail", time.monotonic() - start, found.bug, found.seen, example)
    return verdict("pass", time.monotonic() - start)
