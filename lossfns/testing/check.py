"""``check``: run every law of a loss's kind on batches with many edge cases, and report the likely bug."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from lossfns.errors import LossInputError, did_you_mean
from lossfns.inspect.probe import ALIASES
from lossfns.loss import Loss
from lossfns.testing.batch import Batch
from lossfns.testing.claims import agreement, claim_of, matching_vectors, small_weights, vectors_law
from lossfns.testing.completed import CompletedLoss, completed
from lossfns.testing.factories import FactoryLoss
from lossfns.testing.forms import Adapted
from lossfns.testing.kinds import (
    KINDS,
    READS,
    SMALL,
    broken_by_design,
    columns_for_kind,
    detect_kind,
    detect_targets,
    gradients_or_none,
    takes_datum_advantages,
    takes_rewards,
    working_dtype,
)
from lossfns.testing.laws import (
    ADVANTAGES,
    ANY_KIND,
    COUPLED,
    LAWS_BY_KIND,
    OF_SINGLE_DATUMS,
    SELF_CONTAINED,
    AdvantageLaw,
    Law,
    LawBroken,
    NotApplicable,
    advantages,
    contract,
    frames,
    preference,
    sums,
)
from lossfns.testing.laws.base import ALL_FIELDS, LossFn, RecordingDatum, describe_error, measure
from lossfns.testing.laws.state import global_state_kept
from lossfns.testing.report import Report, Verdict
from lossfns.testing.subject import adapt, adapt_advantages


class Trial(NamedTuple):
    """A law that is ready to run on the subject: its name, what it says, and a function that returns the verdict."""

    law: str
    says: str
    run: Callable[[], Verdict]


class Trials(NamedTuple):
    """The kind of a subject, what it claims, and a trial of each law in the order of diagnosis. See ``Report``."""

    kind: str
    guessed: bool
    couples: str
    like: str
    form: str
    trials: list[Trial]

    def verdicts(self, doing: Callable[[str], None] = lambda law: None) -> Iterator[Verdict]:
        """Yield the verdict of each law, and call ``doing`` with its name before it runs.

        If the contract is broken, nothing else can be measured: the laws after it do not run.
        """
        for trial in self.trials:
            doing(trial.law)
            with without_side_effects():
                verdict = trial.run()
            yield verdict
            if trial.law == "contract" and verdict.verdict == "wrong":
                return


KIND_WORDS = {
    "supervised": "likelihood",
    "sft": "likelihood",
    "crossentropy": "likelihood",
    "reweightedlikelihood": "reweighted",
    "weightedlikelihood": "reweighted",
    "pairedpreference": "preference",
    "pairwisepreference": "preference",
    "unpairedpreference": "unpaired",
    "distill": "distillation",
    "advantage": "advantages",
    "groupadvantages": "advantages",
    "policygradient": "policy",
}
"""Other words for the kinds, in lower case and without spaces."""


def kind_named(text: str) -> str:
    """Return the kind that a text names, in any spelling.

    >>> kind_named("re-weighted likelihood"), kind_named("Unpaired_Preference"), kind_named("supervised")
    ('reweighted', 'unpaired', 'likelihood')
    """
    word = re.sub(r"[^a-z]|loss(es)?$", "", str(text).lower())
    kind = KIND_WORDS.get(word, word)
    if kind not in KINDS:
        hint = did_you_mean(word, KINDS)
        raise LossInputError("kind", f"one of {', '.join(KINDS)}", repr(text), hint or "Leave it out to have it found.")
    return kind


class Declared(NamedTuple):
    """What a caller says about a subject. What the caller leaves out is taken from the subject's attributes."""

    kind: str | None
    skip: Mapping[str, str]
    couples: str


def declared(subject: Any, kind: str | None, skip: Mapping[str, str] | None, couples: str) -> Declared:
    """Combine the arguments of ``check`` with the attributes of a subject. Reasons must be texts."""
    kind = kind or getattr(subject, "kind", None)
    own_skip = getattr(subject, "skip", None) or {}
    couples = couples or getattr(subject, "couples", None) or ""
    if not isinstance(own_skip, Mapping):
        raise LossInputError("skip", "a mapping from laws to reasons", repr(own_skip), "Write {law: reason}.")
    reasons = {**own_skip, **(skip or {})}
    for law, reason in reasons.items():
        if not isinstance(reason, str) or not reason.strip():
            raise LossInputError("skip", f"the reason why {law} is not tested", repr(reason), "Give it as a text.")
    if not isinstance(couples, str):
        fix = 'Say why datums may affect one another, such as "the KL baseline is a batch mean".'
        raise LossInputError("couples", "a reason", repr(couples), fix)
    return Declared(kind_named(kind) if kind else None, reasons, couples)


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
    kind, skip, couples = declared(subject, kind, skip, couples)
    if kind is None and takes_rewards(subject):
        kind = "advantages"
    if kind == "advantages":
        with without_side_effects():
            subject = adapt_advantages(subject)
        trials = [Trial(law.__name__, statement(law), partial(run_advantage_law, law, subject)) for law in ADVANTAGES]
        return Trials(kind, False, couples, "", "", without_skipped(trials, skip))
    try:
        return prepare_loss(subject, kind, factory, like, skip, couples, examples)
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:  # a call that finds out the kind raised SystemExit or the like
        law, says = contract.contract.__name__, statement(contract.contract)
        verdict = ends_process(law, says, f"it raises {describe_error(error)}")
        return Trials(kind or "any", False, couples, "", "", [Trial(law, says, lambda: verdict)])


def ends_process(law: str, says: str, how: str) -> Verdict:
    """Return the verdict on a subject that ends the process in a law, whatever the law is about."""
    why = "a call of a loss returns to the training loop"
    return Verdict(law, says, "wrong", bug="not-the-contract", seen=f"In a call {how}.", why=why)


def surviving_interrupts(prepared: Trials) -> Trials:
    """Return trials in which a subject that raises KeyboardInterrupt breaks the law that is running.

    Use it in a process that the user's Ctrl-C does not reach.
    """

    def run(trial: Trial) -> Verdict:
        try:
            return trial.run()
        except KeyboardInterrupt as error:
            return ends_process(trial.law, trial.says, f"it raises {describe_error(error)}")

    return prepared._replace(trials=[trial._replace(run=partial(run, trial)) for trial in prepared.trials])


def prepare_loss(
    subject: Any,
    kind: str | None,
    factory: bool | None,
    like: Loss | None,
    skip: Mapping[str, str],
    couples: str,
    examples: int,
) -> Trials:
    """Return a trial of each law of a loss."""
    coupled = {law.__name__: f"it couples the batch: {couples}" for law in COUPLED if couples}
    with without_side_effects():
        loss_fn = adapt(subject, factory=factory)
        claim = like or claim_of(subject, loss_fn)
        kind, guessed = (kind, False) if kind else detect_kind(claim or loss_fn)
        targets = detect_targets(loss_fn, kind)
        claim_laws = [] if claim is None else [vectors_law(subject, claim, matching_vectors(subject, claim))]
        if claim is not None and claim is not loss_fn:
            claim_laws += [agreement(claim), small_weights(claim)]
        laws = (*LAWS_BY_KIND[kind], *claim_laws)
        complete = completed(loss_fn, READS[kind])
        if compares_datums(complete, kind):
            complete = replace(complete, one_group=True)
            couples = couples or "it compares the datums of a group"
            coupled = {law.__name__: f"it couples the batch: {couples}" for law in (*COUPLED, *OF_SINGLE_DATUMS)}
        by_design = broken_by_design(loss_fn)
        coupled = {name: why for name, why in (coupled | by_design).items() if name in {law.__name__ for law in laws}}
        if isinstance(loss_fn, Loss) and loss_fn.parts:
            skip = {**skipped_in_sums(loss_fn, laws), **skip}
        loss_fn = complete
        made = law_trials(loss_fn, kind, targets, examples, laws, guessed, claim)
        claimed = "" if claim is None or claim is loss_fn else repr(claim)
        form = loss_fn.description if isinstance(loss_fn, Adapted) else ""
        return Trials(kind, guessed, couples, claimed, form, without_skipped(made, {**coupled, **skip}))


def skipped_in_sums(loss: Loss, laws: Sequence[Law]) -> dict[str, str]:
    """Return the laws that a sum of losses may break although each part obeys them, with the reason."""
    raw = {part.loss.count is None for part in loss.parts.values()}
    of_sums = {*ANY_KIND, preference.pair_canary, preference.odd} - {frames.signal, sums.many_tokens}
    of_sums -= {sums.duplication} if len(raw) > 1 else set()
    reason = "it adds up losses, and this is a law of each by itself: check its parts"
    return {law.__name__: reason for law in laws if law in set().union(*LAWS_BY_KIND.values()) - of_sums}


def compares_datums(loss_fn: LossFn, kind: str) -> bool:
    """Return whether a loss that compares the datums of a group is constant where each datum is its own group."""
    if not isinstance(loss_fn, CompletedLoss) or not loss_fn.loss.couples_groups:
        return False
    gradients = gradients_or_none(loss_fn, columns_for_kind(SMALL[1], kind, detect_targets(loss_fn, kind)))
    return gradients is not None and not any(g for row in gradients for g in row)


def without_skipped(made: list[Trial], skipped: Mapping[str, str]) -> list[Trial]:
    """Replace the trials of the skipped laws by their verdict, which gives the reason."""
    unknown = next((name for name in skipped if name not in {trial.law for trial in made}), None)
    if unknown is not None:
        hint = did_you_mean(unknown, [trial.law for trial in made])
        fix = hint or "lossfns check --list has the laws of each kind."
        raise LossInputError("skip", "the name of a law of this kind", repr(unknown), fix)

    def verdict(trial: Trial) -> Verdict:
        return Verdict(trial.law, trial.says, "skipped", seen=skipped[trial.law])

    return [trial._replace(run=partial(verdict, trial)) if trial.law in skipped else trial for trial in made]


@contextmanager
def without_side_effects() -> Iterator[None]:
    """Ignore all warnings of a loss: extreme batches cause them. Put back global state that the loss changes."""
    with warnings.catch_warnings(), global_state_kept():
        warnings.simplefilter("ignore")
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
) -> Report:
    """Test a loss by every law of its kind, and by the golden vectors of the method it claims to be.

    Args:
        subject: a contract function, a ``Loss``, a factory, class or object of one, or a function of padded ``[B, T]``
            tensors or of sums over sequences; see "Forms of a loss" in the documentation.
        kind: a name in ``KINDS``, in any spelling that ``kind_named`` knows. Left out, it is the subject's attribute
            ``kind``, or it is detected. If the detection is not certain, a broken law of this kind alone does not make
            the loss wrong.
        factory: whether the subject is a factory; detected if left out.
        like: the loss of this library that the subject claims to be. Left out, it is the subject's attribute ``like``,
            or the subject itself if it is a loss of this library.
        name: the name of the subject in the report.
        skip: law → the reason why it is not tested; added to the subject's attribute ``skip``.
        couples: why the datums of a batch may affect one another, such as "the KL baseline is a batch mean". The laws
            that forbid this are skipped. Left out, it is the subject's attribute ``couples``.
        examples: the number of random batches for each law, in addition to the small ones.

    Any exception of the subject, SystemExit too, breaks the law that is running. Only KeyboardInterrupt is not caught.
    ``lossfns check`` also survives a subject that ends or blocks its process.

    Raises:
        LossInputError: if the subject cannot be tested.

    >>> import lossfns
    >>> report = check(lossfns.dpo(), examples=1)
    >>> report.kind, report.ok
    ('preference', True)
    """
    name = name or str(getattr(subject, "__name__", None) or repr(subject))
    prepared = prepare(subject, kind=kind, factory=factory, like=like, skip=skip, couples=couples, examples=examples)
    kind, guessed, couples, claim, form, _ = prepared
    return Report(name, kind, guessed, couples, claim, form, list(prepared.verdicts()))


def law_trials(
    loss_fn: LossFn, kind: str, targets: int, examples: int, laws: Sequence[Law], guessed: bool, claim: Loss | None
) -> list[Trial]:
    """Return trials of the laws of a kind and of the claim, on small batches and on random ones."""
    from lossfns.testing.strategies import batches

    one_pair = False
    if isinstance(loss_fn, FactoryLoss) and loss_fn.takes_one_pair:
        one_pair, loss_fn.max_datums = True, 3  # the law ``odd`` tries three
    small = [columns_for_kind(batch.take([0, 1]) if one_pair else batch, kind, targets) for batch in SMALL]
    dtype = working_dtype(loss_fn, small[-1])
    drawn = batches(
        reads=READS[kind],
        pairs=kind == "preference",
        targets=targets,
        per_token=not takes_datum_advantages(loss_fn, small[-1]),
        extremes=False,
        max_sequences=2 if one_pair else 4,
        max_length=6,
    )

    def apply(law: Law, batch: Batch) -> None:
        law(loss_fn, batch.data(), batch.tensors(dtype))

    def show(batch: Batch) -> str:
        return str(with_columns_read(batch, dtype, loss_fn, *([claim] if claim else [])))

    def trial(law: Law) -> Trial:
        first, count = (small[-1:], 0) if makes_own_batches(law) else (small, examples)
        # A kind is a guess mostly because the datums of a batch affect one another, which may be meant.
        unsure = guessed and (law not in ANY_KIND or law in COUPLED)
        if_broken = "unsure" if unsure else severity(law)
        run = partial(run_law, law, if_broken, partial(apply, law), first, drawn, count, show)
        return Trial(law.__name__, statement(law), run)

    return [trial(law) for law in laws]


def with_columns_read(batch: Batch, dtype: torch.dtype, *losses: LossFn) -> Batch:
    """Return the batch without the columns that none of these losses reads; all columns where that is not known."""
    read: set[str] = set()
    try:
        for loss_fn in losses:
            measure(loss_fn, [RecordingDatum(datum, read) for datum in batch.data()], batch.tensors(dtype))
        columns = {name: rows for name, rows in batch.columns.items() if {name, ALIASES.get(name)} & read}
        fewer = replace(batch, columns=columns)
        # A loss that copies all fields of a datum shows no read.
        full, cut = (repr([measure(f, b.data(), b.tensors(dtype)) for f in losses]) for b in (batch, fewer))
    except Exception:  # what it returns may be no loss
        return batch
    return fewer if ALL_FIELDS not in read and cut == full else batch


def severity(law: Callable[..., None]) -> str:
    """Return the verdict on a loss that breaks a law."""
    return str(vars(law).get("severity", "wrong"))


def why(law: Callable[..., None]) -> str:
    """Return why a loss that breaks a law is wrong, or only fragile."""
    return str(vars(law).get("why", ""))


def makes_own_batches(law: Law) -> bool:
    """Return whether a law makes its own batches. Two of the laws that are made for each claim do so, too."""
    return law in SELF_CONTAINED or law.__name__ in ("vectors", "small_weights")


def run_law(
    law: Law,
    if_broken: str,
    apply: Callable[[Batch], None],
    small: Sequence[Batch],
    drawn: Any,
    examples: int,
    show: Callable[[Batch], str],
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
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return violation_by(error)
        passed += 1
        return None

    results = ((batch, violation(batch)) for batch in small)
    failure = next(((batch, error) for batch, error in results if error), None)
    if failure is None and examples and any(map(violation, drawn_batches(drawn, examples))):
        failure = smallest_failure(violation, drawn, examples)
    seconds = time.monotonic() - start
    if failure:
        batch, error = failure
        # A law that makes its own batches and gives none describes them in ``error.seen``.
        shown = error.batch or (None if makes_own_batches(law) else batch)
        example = "" if shown is None else show(shown)
        return Verdict(law.__name__, statement(law), if_broken, seconds, error.bug, error.seen, example, why(law))
    if passed:
        return Verdict(law.__name__, statement(law), "pass", seconds)
    return Verdict(law.__name__, statement(law), "n/a", seconds, seen=reasons[0])


@lru_cache(4)
def drawn_batches(drawn: Any, examples: int) -> list[Batch]:
    """Return the random batches, which are the same for every law and in every run."""
    batches: list[Batch] = []
    smallest_failure(batches.append, drawn, examples)
    return batches


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
        with hypothesis_without_folder():
            holds()
    except Exception:
        if not failures:  # an error of hypothesis itself
            raise
    return failures[-1] if failures else None  # hypothesis runs the smallest failing batch last


@contextmanager
def hypothesis_without_folder() -> Iterator[None]:
    """Keep hypothesis from drawing constants of the user's modules, and from leaving a folder ``.hypothesis`` behind.

    hypothesis continues without the folder if it cannot make it, as below ``os.devnull``.
    """
    from hypothesis import configuration
    from hypothesis.internal.conjecture import providers

    none: Any = getattr(providers, "_local_constants", None)
    before = getattr(configuration, "__hypothesis_home_directory", None)
    configuration.set_hypothesis_home_dir(Path(os.devnull) / "hypothesis")
    try:
        with mock.patch.object(providers, "_get_local_constants", lambda: none, create=True):
            yield
    finally:
        configuration.set_hypothesis_home_dir(before)


def violation_by(error: BaseException) -> LawBroken:
    """Return the ``LawBroken`` for an unexpected exception in a law."""
    return LawBroken("not-the-contract", f"On valid input a law fails with {describe_error(error)}.")


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
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        found = error if isinstance(error, LawBroken) else violation_by(error)
        # The other laws make rewards of their own, which ``seen`` gives.
        example = f"rewards={rewards}, groups={groups}" if law is advantages.groupwise else ""
        return verdict(severity(law), time.monotonic() - start, found.bug, found.seen, example, why(law))
    return verdict("pass", time.monotonic() - start)
