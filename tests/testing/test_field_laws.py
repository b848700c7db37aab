"""Laws of the kinds without a preset, and of pairs: correct losses of the field pass, wrong ones are named."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings

import lossfns
from lossfns.loss import Loss
from lossfns.testing import field
from lossfns.testing.batch import Batch
from lossfns.testing.check import Trial, check, prepare, without_side_effects
from lossfns.testing.laws import ANY_KIND, LAWS_BY_KIND
from lossfns.testing.report import Verdict
from lossfns.testing.strategies import batches
from lossfns.tokens import Tokens
from lossfns.weigh import token_mean

CORRECT = [pytest.param(kind, name, id=f"{kind}: {name}") for kind, losses in field.CORRECT.items() for name in losses]
WRONG = [pytest.param(key, id=" ".join(key)) for key in field.WRONG]
OF_ANY_KIND = {law.__name__ for law in ANY_KIND}


def verdicts(subject: Any, kind: str, *, of_kind_alone: bool) -> list[Verdict]:
    """Return the verdicts of the laws, on the small batches; with ``of_kind_alone`` without those of every kind."""
    trials = prepare(subject, kind=kind, examples=0).trials
    return run(trial for trial in trials if not of_kind_alone or trial.law not in OF_ANY_KIND)


def run(trials: Iterable[Trial]) -> list[Verdict]:
    with without_side_effects():
        return [trial.run() for trial in trials]


def first_bug(found: list[Verdict]) -> str:
    """Return the bug that the most severe broken law names."""
    for grade in ("wrong", "fragile"):
        for verdict in found:
            if verdict.verdict == grade:
                return verdict.bug
    return ""


@pytest.mark.parametrize(("kind", "name"), CORRECT)
def test_a_correct_loss_of_the_field_is_not_wrong_by_a_law_of_its_kind(kind: str, name: str) -> None:
    found = verdicts(field.CORRECT[kind][name], kind, of_kind_alone=True)
    assert [v for v in found if v.verdict == "wrong"] == []


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "name"), [x for x in CORRECT if x.values[0] != "advantages"])
def test_a_correct_loss_of_the_field_is_not_wrong_by_a_law_of_every_kind(kind: str, name: str) -> None:
    trials = prepare(field.CORRECT[kind][name], kind=kind, examples=0).trials
    assert [v for v in run(trial for trial in trials if trial.law in OF_ANY_KIND) if v.verdict == "wrong"] == []


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_loss_of_the_field_is_named_by_a_law_of_its_kind(key: tuple[str, str]) -> None:
    kind = field.KIND_OF[key]
    by_any_kind = kind in ("policy", "likelihood")
    found = verdicts(field.WRONG[key], kind, of_kind_alone=not by_any_kind)
    assert first_bug(found) == key[1], [(v.law, v.bug, v.seen) for v in found if v.bug]


# Each fault that a stranger found


def preference_bug(term: Any, **knobs: float) -> str:
    subject = field.with_knobs(field.of_pairs(term), **knobs)
    return first_bug(verdicts(subject, "preference", of_kind_alone=True))


@pytest.mark.parametrize("bound", [5.0, 20.0, 200.0, 900.0])
def test_a_clamped_dpo_margin_is_found_wherever_it_is_clamped(bound: float) -> None:
    """monotone stopped at a margin of −16."""
    assert preference_bug(lambda c, r, beta: field.sp(-beta * (c - r).clamp(min=-bound)), beta=0.05) == "margin-clamped"
    assert preference_bug(lambda c, r, beta: field.sp(-beta * (c.clamp(min=-bound / 2) - r)), beta=0.05) in (
        "margin-clamped",
        "reference-misused",
    )


def test_a_hinge_is_no_clamped_margin() -> None:
    assert preference_bug(lambda c, r, beta: (1 - beta * (c - r)).relu(), beta=0.1) == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_group_means_in_half_precision_are_found(dtype: torch.dtype) -> None:
    """centred used rewards that half precision holds exactly."""
    found = verdicts(field.grouped(lambda xs: field.half_mean(xs, dtype)), "advantages", of_kind_alone=True)
    assert first_bug(found) == "low-precision"


@pytest.mark.parametrize("name", ["label_smoothing", "epsilon", "eps", "label_noise", "noise", "flip_rate"])
def test_the_sign_of_robust_dpo_is_known_by_any_name_of_its_setting(name: str) -> None:
    def term(c: Any, r: Any, **knobs: float) -> Any:
        h, e = 0.1 * (c - r), knobs[name]
        return ((1 - e) * field.sp(-h) + e * field.sp(h)) / (1 - 2 * e)

    subject = field.named(field.with_knobs(field.of_pairs(term), **{name: 0.1}), "robust_dpo")
    assert first_bug(verdicts(subject, "preference", of_kind_alone=True)) == "smoothing-misapplied"


def test_a_setting_that_guards_a_division_is_no_label_smoothing() -> None:
    assert preference_bug(lambda c, r, beta, eps: field.sp(-beta * (c - r) / (1 + eps)), beta=0.1, eps=1e-8) == ""


@pytest.mark.parametrize("which", [("own", "none"), ("none", "own"), ("own", "chosen")])
def test_simpo_with_one_side_normalised_by_length_is_found(which: tuple[str, str]) -> None:
    found = verdicts(field.uneven(*which), "preference", of_kind_alone=True)
    assert first_bug(found) == "one-side-normalised"
    assert first_bug(verdicts(field.uneven("own", "own"), "preference", of_kind_alone=True)) == ""


def test_a_reference_that_is_forgotten_on_one_side_is_found() -> None:
    """Also where the loss is linear in the margin, so that it looks like a likelihood term of the chosen side."""

    def loss_fn(data: Any, logprobs: Any, beta: float = 0.1) -> Any:
        w, lp, ref = field.rows(data, logprobs, "ref_logprobs")
        own, other = (torch.stack([(x * a).sum() for x, a in zip(w, xs)]) for xs in (lp, ref))
        margin = own[0::2] - (own[1::2] - other[1::2])
        return (1 - beta * margin).relu().mean() + 0 * other.sum(), {}

    assert first_bug(verdicts(loss_fn, "preference", of_kind_alone=True)) == "reference-misused"


def test_accuracies_are_of_rewards_by_any_name() -> None:
    names = ("acc", "accuracy", "accuracies", "reward_acc", "rewards/accuracies")
    for name in names:
        subject = field.wrong_metric(lambda v, name=name: {name: v["lc"] > v["lr"]})  # type: ignore[misc]
        assert first_bug(verdicts(subject, "preference", of_kind_alone=True)) == "metric-wrong", name
    right = field.wrong_metric(lambda v: dict.fromkeys(names, v["c"] > v["r"]))
    assert first_bug(verdicts(right, "preference", of_kind_alone=True)) == ""


@pytest.mark.parametrize("name", ["focal", "dft", "dft over its own weights", "confidence"])
def test_reweighted_likelihoods_are_not_accused(name: str) -> None:
    """They were called weights-binarised and negative-weights-lost."""
    report = check(field.CORRECT["reweighted"][name], kind="reweighted", examples=2)
    assert [v.bug for v in report.broken] == []


def test_the_focal_loss_of_the_readme_is_not_accused() -> None:
    def terms(t: Tokens) -> Any:
        return -((1 - t.logprobs.exp()) ** 2) * t.logprobs, {}

    focal = Loss("focal", {"gamma": 2}, (), terms, token_mean.share, token_mean.count)
    assert [(v.law, v.bug) for v in check(focal, kind="reweighted", examples=0).broken] == []


def test_kto_whose_kl_couples_the_batch_is_not_accused() -> None:
    report = check(field.CORRECT["unpaired"]["kto"], kind="unpaired", examples=2)
    assert report.failures == []
    assert "independence" in {v.law for v in report.verdicts if v.verdict == "n/a"}


def test_whitened_advantages_are_a_design_and_masked_ones_in_their_statistics_a_bug() -> None:
    report = check(field.whitened(over_all=False), examples=2)
    assert report.failures == []
    assert {v.law for v in report.verdicts if v.verdict == "n/a"} >= {"independence", "split"}
    assert check(field.whitened(over_all=True), examples=0).bug == "mask-missing"


def test_a_finite_number_in_a_masked_slot_makes_a_loss_wrong_and_nan_fragile() -> None:
    def product(data: Any, logprobs: Any) -> Any:
        w = torch.cat([field.column(d, "weights") for d in data])
        lp = torch.cat(list(logprobs))
        return -(w * lp).sum() / w.sum(), {"nll": float(-(w * lp).sum() / w.sum())}

    def leaky_metric(data: Any, logprobs: Any) -> Any:
        w, lp = field.flat(data, logprobs)
        return -(w * lp).sum() / w.sum(), {"mean_logprob": float(torch.cat(list(logprobs)).mean())}

    graded = {v.law: v.verdict for v in check(product, examples=0).verdicts}
    assert (graded["masked_values"], graded["poison"]) == ("pass", "fragile")
    graded = {v.law: v.verdict for v in check(leaky_metric, examples=0).verdicts}
    assert graded["metric_scope"] == "wrong"


def test_a_metric_that_depends_on_the_order_of_the_datums_is_found() -> None:
    def last(data: Any, logprobs: Any) -> Any:
        w, lp = field.flat(data, logprobs)
        return -(w * lp).sum() / w.sum(), {"last": float(lp[-1])}

    found = check(last, examples=0)
    assert ("permutation", "metric-not-mergeable") in [(v.law, v.bug) for v in found.failures]


def test_a_metric_of_the_padding_itself_may_change_with_it() -> None:
    def packed(data: Any, logprobs: Any) -> Any:
        w, lp = field.flat(data, logprobs)
        return -(w * lp).sum() / w.sum(), {"packing_efficiency": float((w != 0).double().mean())}

    assert [v.law for v in check(packed, examples=0).failures] == []


# Laws and strategies


def test_every_law_of_these_kinds_says_something_of_a_correct_loss() -> None:
    """No law steps aside for all of them. Each is tried until it has passed once."""
    kinds = ("preference", "unpaired", "reweighted", "distillation")
    silent = {law.__name__ for k in kinds for law in LAWS_BY_KIND[k]} - OF_ANY_KIND
    with without_side_effects():
        for kind, subject in ((k, correct) for k in kinds for correct in field.CORRECT[k].values()):
            trials = prepare(subject, kind=kind, examples=0).trials
            silent -= {trial.law for trial in trials if trial.law in silent and trial.run().verdict == "pass"}
    assert silent == set()


@given(batches(reads=("labels", "ref_logprobs"), poison=True))
@settings(max_examples=30, deadline=None)
def test_labels_are_drawn_as_one_for_each_sequence(batch: Batch) -> None:
    assert all(len(set(row)) == 1 and row[0] in (0.0, 1.0) for row in batch.columns["labels"])
    assert Batch.of(batch.data(), batch.tensors()).columns["labels"] == batch.columns["labels"]


def test_advantages_may_refuse_strings_and_groups_of_unequal_size() -> None:
    report = check(field.CORRECT["advantages"]["integers in blocks of one size"])
    assert report.failures == []


def test_our_losses_need_no_more_than_they_did() -> None:
    assert check(lossfns.dpo(label_smoothing=0.1), examples=0).broken == []
