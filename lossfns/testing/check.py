"""``check``: run every law of a loss's kind on batches with many edge cases, and report the likely bug."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from lossfns.errors import LossInputError, LossWarning, did_you_mean
from lossfns.loss import Loss
from lossfns.testing.batch import Batch
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
from lossfns.testing.laws import (
    ADVANTAGES,
    ANY_KIND,
    COUPLED,
    LAWS_BY_KIND,
    SELF_CONTAINED,
    AdvantageLaw,
    Law,
    LawBroken,
    NotApplicable,
)
from lossfns.testing.laws.base import LossFn
from lossfns.testing.report import Report, Verdict
from lossfns.testing.subject import adapt, adapt_advantages


class Trial(NamedTuple):
    """A law that is ready to run on the subject."""

    law: str
    run: Callable[[], Verdict]


class Trials(NamedTuple):
    """The kind of a subject, whether it was guessed, and a trial of each law in the order of diagnosis."""

    kind: str
    guessed: bool
    trials: list[Trial]


def prepare(
    subject: Any,
    *,
    kind: str | None = None,
    factory: bool | None = None,
    like: Loss | None = None,
    skip: Mapping[str, str] | None = None,
    couples: str = "",
    examples: int = 12,
) -> Trials:
    """Return a trial of each law of a subject's kind. See ``check`` for the arguments."""
    kind = kind or getattr(subject, "kind", None) or ("advantages" if takes_rewards(subject) else None)
    if kind not in (None, *KINDS):
        raise LossInputError("kind", f"one of {', '.join(KINDS)}", repr(kind), "Leave it out to have it detected.")
    skipped = {law.__name__: f"it couples the batch: {couples}" for law in COUPLED if couples} | dict(skip or {})
    if kind == "advantages":
        subject = adapt_advantages(subject)
        advantage_trials = [Trial(law.__name__, partial(run_advantage_law, law, subject)) for law in ADVANTAGES]
        return Trials(kind, False, without_skipped(advantage_trials, skipped, ADVANTAGES))
    with without_expected_warnings():
        loss_fn = adapt(subject, factory=factory)
        claim = like or claim_of(subject, loss_fn)
        guessed = False
        if not kind:
            kind, guessed = detect_kind(claim or loss_fn)
        claim_laws = [] if claim is None else [vectors_law(subject, claim, matching_vectors(subject, claim))]
        if claim is not None and claim is not loss_fn:
            claim_laws.append(agreement(claim))
        laws = (*LAWS_BY_KIND[kind], *claim_laws)
        made = law_trials(loss_fn, kind, detect_targets(loss_fn, kind), examples, laws, guessed)
        return Trials(kind, guessed, without_skipped(made, skipped, laws))


def without_skipped(made: list[Trial], skipped: Mapping[str, str], laws: Sequence[Callable[..., None]]) -> list[Trial]:
    """Replace the trials of the skipped laws by their verdict, which gives the reason."""
    statements = {law.__name__: statement(law) for law in laws}
    unknown = next((name for name in skipped if name not in statements), None)
    if unknown is not None:
        hint = did_you_mean(unknown, statements)
        raise LossInputError("skip", "the name of a law of this kind", repr(unknown), hint or "See --list.")

    def verdict(name: str) -> Verdict:
        return Verdict(name, statements[name], "skipped", seen=skipped[name])

    return [Trial(t.law, partial(verdict, t.law)) if t.law in skipped else t for t in made]


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
    skip: Mapping[str, str] | None = None,
    couples: str = "",
    examples: int = 12,
    progress: Callable[[str], None] = lambda law: None,
) -> Report:
    """Test a loss by every law of its kind, and by the golden vectors of the method it claims to be.

    Args:
        subject: a contract function, a ``Loss``, a factory of one, or a function of padded ``[B, T]`` tensors.
        kind: a name in ``KINDS``. Left out, it is the subject's attribute ``kind``, or it is detected. If the detection
            is not certain, the laws of the kind alone are no reason to fail.
        factory: whether the subject is a factory; detected if left out.
        like: the loss of this library that the subject claims to be. Left out, it is the subject's attribute ``like``,
            or the subject itself if it is a loss of this library.
        name: the name of the subject in the report.
        skip: law → the reason why it is not tested. Left out, it is the subject's attribute ``skip``.
        couples: why the datums of a batch may affect one another, such as "the KL baseline is a batch mean". The laws
            that forbid this are skipped. Left out, it is the subject's attribute ``couples``.
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
    skip = getattr(subject, "skip", None) if skip is None else skip
    couples = couples or getattr(subject, "couples", "")
    prepared = prepare(subject, kind=kind, factory=factory, like=like, skip=skip, couples=couples, examples=examples)
    report = Report(name, prepared.kind, prepared.guessed, couples)
    for trial in prepared.trials:
        progress(trial.law)
        with without_expected_warnings():
            report.verdicts.append(trial.run())
        if trial.law == "contract" and not report.ok:
            break  # nothing else can be measured
    return report


def law_trials(
    loss_fn: LossFn, kind: str, targets: int, examples: int, laws: Sequence[Law], guessed: bool
) -> list[Trial]:
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
        if_broken = "unsure" if guessed and law not in ANY_KIND else severity(law)
        return Trial(law.__name__, partial(run_law, law, if_broken, partial(apply, law), first, drawn, count))

    return [trial(law) for law in laws]


def severity(law: Callable[..., None]) -> str:
    """Return the verdict on a loss that breaks a law."""
    return str(vars(law).get("severity", "wrong"))


def why(law: Callable[..., None]) -> str:
    """Return why a loss that breaks a law is wrong, or no more than fragile."""
    return str(vars(law).get("why", ""))


def makes_own_batches(law: Law) -> bool:
    """Return whether a law makes its own batches. The law ``vectors``, which is made for each claim, does so too."""
    return law in SELF_CONTAINED or law.__name__ == "vectors"


def run_law(
    law: Law, if_broken: str, apply: Callable[[Batch], None], small: Sequence[Batch], drawn: Any, examples: int
) -> Verdict:
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
        return Verdict(law.__name__, statement(law), if_broken, seconds, error.bug, error.seen, example, why(law))
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
        return verdict(severity(law), time.monotonic() - start, found.bug, found.seen, example, why(law))
    return verdict("pass", time.monotonic() - start)
