"""``check``: detection of the subject, the report, the command line and pytest."""

import functools
import json
import math
import multiprocessing
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

import lossfns
from lossfns import LossInputError
from lossfns.cli import main
from lossfns.testing import mutants, padded
from lossfns.testing.batch import Batch
from lossfns.testing.bugs import BUGS
from lossfns.testing.check import check, kind_named, prepare, with_columns_read, without_side_effects
from lossfns.testing.claims import CLAIMS
from lossfns.testing.explain import LAWS
from lossfns.testing.kinds import KINDS, SMALL, columns_for_kind
from lossfns.testing.laws import (
    ADVANTAGES,
    COUPLED,
    LAWS_BY_KIND,
    LawBroken,
    NotApplicable,
    advantages,
    contract,
    masks,
    policy,
    sums,
)
from lossfns.testing.laws.base import Outcome, Probe, contrast, metric_difference
from lossfns.testing.report import BROKEN, MARKS, Report, Verdict
from lossfns.testing.subject import FactoryLoss, PaddedLoss, adapt
from tools import explanations

# Losses as others write them


def column(datum: Any, name: str) -> Tensor:
    return torch.from_numpy(datum.loss_fn_inputs[name].to_numpy().copy())


def active(datum: Any, logprobs: Tensor, *names: str) -> list[Tensor]:
    """Weights, logprobs and columns with zeros where the weight is 0."""
    w = column(datum, "weights")
    if w.shape != logprobs.shape:
        raise ValueError(f"{w.shape} weights for {logprobs.shape} logprobs")
    return [w, *(torch.where(w != 0, x, 0) for x in (logprobs, *(column(datum, name) for name in names)))]


def nll(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    rows = [active(*pair) for pair in zip(data, logprobs_list)]
    loss = -sum((w * lp).sum() for w, lp in rows) / sum(w.sum() for w, _ in rows)
    return loss, {"loss": float(loss)}


def reinforce(batch: Sequence[Any], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    rows = [active(*pair, "advantages") for pair in zip(batch, logprobs)]
    return -sum((w * a * lp).sum() for w, lp, a in rows) / sum(w.sum() for w, *_ in rows), {}


def dpo(data: Sequence[Any], logprobs_list: Sequence[Tensor], beta: float = 0.1) -> tuple[Tensor, dict[str, float]]:
    if len(data) % 2:
        raise ValueError("an odd number of datums")
    rows = [active(*pair, "ref_logprobs") for pair in zip(data, logprobs_list)]
    gaps = torch.stack([(w * (lp - ref)).sum() for w, lp, ref in rows])
    trained = torch.stack([(w != 0).any() for w, *_ in rows])
    both = trained[0::2] & trained[1::2]
    terms = torch.where(both, -torch.nn.functional.logsigmoid(beta * (gaps[0::2] - gaps[1::2])), 0)
    return terms.sum() / both.sum(), {}


def ppo_of_tensors(
    logprobs: Tensor, old_log_probs: Tensor, advantages: Tensor, response_mask: Tensor, eps: float = 0.2
) -> Tensor:
    lp, old, a = (torch.where(response_mask != 0, x, 0) for x in (logprobs, old_log_probs, advantages))
    ratio = (lp - old).clamp(-20, 20).exp()
    terms = -torch.min(ratio * a, ratio.clamp(1 - eps, 1 + eps) * a)
    return (response_mask * terms).sum() / response_mask.sum()


def make_reinforce_loss(advantages: Sequence[float], ref_logprobs: Sequence[Tensor], kl_beta: float = 0.1) -> Any:
    """A factory that takes one advantage for each datum, as the documented example of the hosted APIs does."""

    def loss_fn(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        total, count = torch.zeros(()), torch.zeros(())
        for datum, lp, a, given in zip(data, logprobs_list, advantages, ref_logprobs):
            w, lp = active(datum, lp.float())
            ref = torch.where(w != 0, torch.as_tensor(given), 0)
            log_ratio = (ref - lp).clamp(-20, 20)
            total = total - a * w.dot(lp) + kl_beta * w.dot(log_ratio.exp() - log_ratio - 1)
            count = count + w.sum()
        return total / count, {}

    return loss_fn


def make_dpo_loss(ref_chosen: Sequence[float], ref_rejected: Sequence[float], beta: float = 0.1) -> Any:
    """A factory for one pair that ignores any other, as the documented example does."""

    def loss_fn(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        gaps = []
        for datum, lp, row in zip(data, logprobs_list, (ref_chosen, ref_rejected)):
            w, lp = active(datum, lp)
            gaps.append((w * (lp - torch.where(w != 0, torch.tensor(row), 0))).sum())
        return -torch.nn.functional.logsigmoid(beta * (gaps[0] - gaps[1])), {}

    return loss_fn


class Scaled:
    """A class of losses with a setting."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return self.scale * reinforce(data, logprobs_list)[0], {}


def whatever(*args: Any) -> Any:
    return nll(*args)


def half_of_nll(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Any:
    return nll(data, logprobs_list)[0] / 2, {}


def centred(rewards: Sequence[float], groups: Sequence[Any]) -> list[float]:
    means = {g: sum(r for r, h in zip(rewards, groups) if h == g) / groups.count(g) for g in groups}
    return [r - means[g] if r != means[g] and len(set(rewards)) > 1 else 0.0 for r, g in zip(rewards, groups)]


# What a subject is


@pytest.mark.parametrize(
    ("subject", "kind"),
    [
        (nll, "likelihood"),
        (reinforce, "policy"),
        (dpo, "preference"),
        (whatever, "likelihood"),
        (ppo_of_tensors, "policy"),
        (padded(ppo_of_tensors, eps=0.3), "policy"),
        (make_reinforce_loss, "policy"),
        (make_dpo_loss, "preference"),
        (Scaled, "policy"),
        pytest.param(Scaled(2.0), "policy", id="Scaled(2.0)"),
        (centred, "advantages"),
        (lossfns.cross_entropy, "likelihood"),
        (lossfns.multi_target_cross_entropy(), "likelihood"),
        (lossfns.grpo, "policy"),
        (lossfns.gspo(), "policy"),
        (lossfns.reinforce, "policy"),
        (lossfns.dpo(beta=0.5), "preference"),
        (lossfns.orpo, "preference"),
        (lossfns.cross_entropy().bind(denominator=4.0), "likelihood"),
        (lossfns.group_advantages, "advantages"),
        (mutants.multi_target_cross_entropy_targets_transposed, "likelihood"),
    ],
    ids=lambda x: x if isinstance(x, str) else getattr(x, "__name__", repr(x)),
)
def test_the_kind_is_found_out(subject: Any, kind: str) -> None:
    prepared = prepare(subject, examples=0)
    ready = prepared.trials
    assert prepared.kind == kind
    laws = ADVANTAGES if kind == "advantages" else LAWS_BY_KIND[kind]
    assert [t.law for t in ready][: len(laws)] == [law.__name__ for law in laws]
    assert {t.law for t in ready[len(laws) :]} <= {*CLAIMS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_is_given_is_taken(kind: str) -> None:
    assert prepare(centred if kind == "advantages" else nll, kind=kind).kind == kind


def test_a_claim_says_the_kind_too() -> None:
    assert prepare(lambda data, logprobs_list: (torch.zeros(()), {}), like=lossfns.dpo()).kind == "preference"


@pytest.mark.parametrize(
    ("subject", "options", "field"),
    [
        (3, {}, "subject"),
        (nll, {"kind": "rl"}, "kind"),
        (nll, {"factory": True}, "subject"),
        (lambda logprobs, mask, temperature: None, {}, "subject"),
        (lambda: 1 / 0, {}, "subject"),
    ],
    ids=["a number", "no such kind", "no such column", "a parameter without a value", "a factory that fails"],
)
def test_what_cannot_be_tested_is_refused(subject: Any, options: dict[str, Any], field: str) -> None:
    with pytest.raises(LossInputError) as caught:
        check(subject, **options)
    assert caught.value.field == field


def test_forms_are_found_out() -> None:
    assert adapt(nll) is nll and adapt(whatever) is whatever and adapt(make_dpo_loss, factory=False) is make_dpo_loss
    assert isinstance(adapt(ppo_of_tensors), PaddedLoss) and repr(adapt(lossfns.ppo)) == repr(lossfns.ppo())
    made = adapt(make_reinforce_loss)
    assert isinstance(made, FactoryLoss)
    made(BATCH.data(), BATCH.tensors())
    assert made.forms == ("numbers", "rows")


@pytest.mark.parametrize(
    "subject", [nll, reinforce, dpo, ppo_of_tensors, make_reinforce_loss, Scaled, centred, whatever]
)
def test_a_correct_loss_of_another_hand_obeys_every_law(subject: Any) -> None:
    report = check(subject, examples=3)
    assert report.ok, report.table()


def test_the_settings_of_every_form_are_varied() -> None:
    for subject in (dpo, ppo_of_tensors, Scaled, lossfns.grpo, lossfns.grpo()):
        assert verdict(subject, "no_inert_knob").verdict == "pass"


def test_a_loss_of_one_pair_is_tried_on_one_pair() -> None:
    """Its factory takes the rows of one pair. That it drops another datum in silence is fragile."""
    report = check(make_dpo_loss, examples=0)
    assert (report.kind, [v.bug for v in report.broken]) == ("preference", ["odd-datum-dropped"]), report.table()
    assert report.ok and "it takes one pair" in {v.seen for v in report.verdicts if v.verdict == "n/a"}


def test_what_is_made_with_another_setting_is_another_loss() -> None:
    assert check(Scaled(1.0), like=lossfns.reinforce(), examples=0).ok
    assert "agreement" in {v.law for v in check(Scaled(2.0), like=lossfns.reinforce(), examples=0).failures}


def verdict(subject: Any, law: str, examples: int = 0) -> Verdict:
    """Return the verdict of one law."""
    with without_side_effects():
        return next(trial for trial in prepare(subject, examples=examples).trials if trial.law == law).run()


# What the report says


def test_a_report_is_json_and_a_table() -> None:
    report = check(half_of_nll, examples=2, name="mine")
    parsed = json.loads(json.dumps(report.as_dict()))
    assert parsed["subject"] == "mine" and parsed["kind"] == "likelihood" and parsed["ok"] is False
    assert parsed["bug"] == report.bug == report.failures[0].bug == "constant-factor"
    assert [v["law"] for v in parsed["verdicts"]] == [law.__name__ for law in LAWS_BY_KIND["likelihood"]]
    for v in parsed["verdicts"]:
        assert v["verdict"] in MARKS and v["seconds"] >= 0 and v["says"].endswith(".")
        assert (v["bug"] in BUGS) == (v["verdict"] in BROKEN) and bool(v["seen"]) == (v["verdict"] != "pass")
    lines = report.table().splitlines()
    assert lines[0].startswith("mine (likelihood")
    assert sum(line.startswith(("ok ", "WRONG ", "unsure ")) for line in lines) > 20
    assert (
        any(BUGS["constant-factor"].description in line for line in lines)
        and "most likely constant-factor: " in lines[-1]
    )


def test_a_report_of_a_loss_without_fault_names_no_bug() -> None:
    report = check(nll, examples=0)
    assert report.ok and report.bug == "" and report.failures == [] and "laws hold" in report.table()


def test_the_batch_that_breaks_a_law_breaks_it_again() -> None:
    mutant = mutants.cross_entropy_order_dependent
    broken = verdict(mutant, "split")
    batch = eval(broken.example, {"Batch": Batch})
    with pytest.raises(LawBroken) as caught:
        sums.split(mutant, batch.data(), batch.tensors())
    assert (caught.value.bug, caught.value.seen) == (broken.bug, broken.seen)


def test_what_small_batches_do_not_show_a_random_one_does_and_shrinks() -> None:
    def wrong_with_a_weight_of_two(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Any:
        loss, metrics = nll(data, logprobs_list)
        return loss * (1 + any(float(column(datum, "weights").max()) == 2 for datum in data)), metrics

    assert verdict(wrong_with_a_weight_of_two, "split").verdict == "pass"
    broken = verdict(wrong_with_a_weight_of_two, "split", examples=40)
    assert sorted(w for row in eval(broken.example, {"Batch": Batch}).weights for w in row) == [1.0, 2.0]


def test_nothing_else_is_measured_of_what_is_no_loss() -> None:
    report = check(lambda data, logprobs_list: (1.0, {}), examples=0)
    assert [v.law for v in report.verdicts] == ["contract"] and report.bug == "not-the-contract"


def test_junit_counts_what_the_report_does() -> None:
    report = check(half_of_nll, examples=0, name="mine")
    suite = ElementTree.fromstring(report.junit())
    cases = suite.findall("testcase")
    assert suite.get("tests") == str(len(cases)) == str(len(report.verdicts))
    assert suite.get("failures") == str(len(suite.findall("testcase/failure"))) == str(len(report.failures)) == "1"
    skipped = [v for v in report.verdicts if v.verdict == "n/a"]
    assert suite.get("skipped") == str(len(suite.findall("testcase/skipped"))) == str(len(skipped)) != "0"
    assert [case.get("name") for case in cases] == [v.law for v in report.verdicts]
    (failure,) = suite.iter("failure")
    assert failure.get("message") == "constant-factor" and report.failures[0].seen in (failure.text or "")


# What a report says is true


def test_the_gradient_is_named_where_the_loss_is_the_same() -> None:
    """The fault: "the loss is -0.625, not -0.625", where the gradient differs."""
    same = {"value": -0.625, "gradients": [[0.25, 0.5]], "metrics": {}, "missing": ()}
    probe = Probe(nll, Batch([[-1.0, -1.0]], [[1.0, 1.0]]), torch.float64)
    assert probe.difference(Outcome(**same), Outcome(**same)) == ""
    other = Outcome(**{**same, "gradients": [[0.25, 0.125]]})
    words = "the loss is the same, but the gradient of token 1 of datum 0 is 0.125, not 0.5"
    assert probe.difference(other, Outcome(**same)) == words
    assert probe.difference(Outcome(**{**same, "value": -0.5}), Outcome(**same)) == "the loss is -0.5, not -0.625"
    assert metric_difference(Outcome(**{**same, "metrics": {"kl": 2.0}}), Outcome(**same)) == (
        "the metric 'kl' is 2.0, not 'missing'"
    )
    wide = probe.with_batch(Batch([[-1.0, -1.0]], [[1.0, 1.0]], targets=2))
    assert "the gradient of target 1 of token 0 of datum 0 is 0.125" in wide.difference(other, Outcome(**same))


@pytest.mark.parametrize(
    ("x", "y"), [(1.0, 2.0), (0.1, 0.1 + 1e-9), (1.0, 1.0 + 2**-52), (math.nan, 1.0), (math.inf, -math.inf)]
)
def test_numbers_that_differ_are_printed_with_digits_that_differ(x: float, y: float) -> None:
    first, _, second = contrast(x, y).partition(", not ")
    assert first != second and len(first) < 20


def unmasked(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Any:
    """A fragile loss: a nan in a masked slot gets into it."""
    weights = [column(datum, "weights") for datum in data]
    if any(w.shape != lp.shape for w, lp in zip(weights, logprobs_list)):
        raise ValueError("the weights have another length")
    return -sum((w * lp).sum() for w, lp in zip(weights, logprobs_list)) / sum(map(torch.sum, weights)), {}


def test_failures_come_first_and_quiet_prints_nothing_else() -> None:
    """The fault: 30 lines of ok before the finding."""
    report = check(half_of_nll, examples=0, name="mine")
    table, quiet = report.table(), report.quiet()
    assert table.index("WRONG  likelihood: ") < table.index("constant-factor: ") < table.index("ok       contract")
    assert "ok  " not in quiet and "constant-factor: " in quiet and quiet.splitlines()[-1] == report.summary
    right = check(nll, examples=0)
    assert right.quiet() == right.summary


def test_a_fragile_loss_is_not_wrong_and_says_so() -> None:
    report = check(unmasked, examples=0)
    assert report.ok and report.counts["wrong"] == 0 < report.counts["fragile"]
    assert report.summary.startswith("warning, not wrong: 1 fragile of ") and report.bug == "mask-after-exp"
    assert (report.exit_status(), report.exit_status(strict=True)) == (0, 1)
    suite = ElementTree.fromstring(report.junit())
    assert suite.get("failures") == "0" and [p.get("value") for p in suite.iter("property")].count("fragile") == 1


def test_an_unsure_verdict_never_fails() -> None:
    report = Report("mine", "reweighted", True, verdicts=[Verdict("signal", "It.", "unsure", bug="no-gradient")])
    assert (report.ok, report.exit_status(), report.exit_status(strict=True)) == (True, 0, 0)
    assert "taken as reweighted; --kind for another" in report.table() and "warning, not wrong" in report.summary


def test_a_law_that_is_skipped_is_shown_with_the_reason() -> None:
    report = check(unmasked, examples=0, skip={"poison": "our slots are finite"})
    skipped = next(v for v in report.verdicts if v.law == "poison")
    assert (skipped.verdict, skipped.seen) == ("skipped", "our slots are finite") and report.broken == []
    assert "skipped  poison" in report.table() and "our slots are finite" in report.table()
    assert report.as_dict()["counts"]["skipped"] == 1 and 'message="our slots are finite"' in report.junit()


def coupled(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Any:
    """A loss with a baseline that is a mean over the batch."""
    rows = [active(*pair, "advantages") for pair in zip(data, logprobs_list)]
    mean = sum((w * lp.detach()).sum() for w, lp, _ in rows) / sum(w.sum() for w, *_ in rows)
    return -sum((w * (a - mean / 8) * lp).sum() for w, lp, a in rows) / sum(w.sum() for w, *_ in rows), {}


def test_a_coupling_that_is_declared_is_shown_and_its_laws_are_skipped() -> None:
    why = "the baseline is a mean over the batch"
    report = check(coupled, examples=0, couples=why)
    skipped = {v.law for v in report.verdicts if v.verdict == "skipped"}
    assert skipped == {law.__name__ for law in COUPLED}
    assert why in report.title and report.as_dict()["couples"] == why and f'value="{why}"' in report.junit()
    assert {v.law for v in check(coupled, examples=0).broken} & skipped  # undeclared, it is found
    assert {v.law for v in check(mutants.dpo_cross_talk, examples=0).broken} & skipped


def test_a_subject_declares_by_attributes_what_the_options_say() -> None:
    def mine(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Any:
        return unmasked(data, logprobs_list)

    vars(mine).update(kind="supervised", couples="it does not", skip={"poison": "finite"}, like=lossfns.cross_entropy())
    report = check(mine, examples=0, skip={"lengths": "checked before"})
    assert (report.kind, report.couples, report.like) == ("likelihood", "it does not", repr(lossfns.cross_entropy()))
    reasons = {v.law: v.seen for v in report.verdicts if v.verdict == "skipped"}
    assert reasons["poison"] == "finite" and reasons["lengths"] == "checked before"
    assert "claims to be cross_entropy(" in report.title and report.as_dict()["like"] == report.like


@pytest.mark.parametrize(
    ("attributes", "field"),
    [
        ({"skip": ["poison"]}, "skip"),
        ({"skip": {"poison": ""}}, "skip"),
        ({"couples": 3}, "couples"),
        ({"kind": 3}, "kind"),
    ],
    ids=str,
)
def test_attributes_that_say_nothing_are_refused(attributes: dict[str, Any], field: str) -> None:
    def mine(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Any:
        return nll(data, logprobs_list)

    vars(mine).update(attributes)
    with pytest.raises(LossInputError) as caught:
        check(mine, examples=0)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("re-weighted likelihood", "reweighted"),
        ("reweighted_likelihood", "reweighted"),
        ("unpaired-preference", "unpaired"),
        ("Unpaired Preference losses", "unpaired"),
        ("supervised", "likelihood"),
        ("Policy", "policy"),
        ("paired preference", "preference"),
        ("group advantages", "advantages"),
        *((kind, kind) for kind in KINDS),
    ],
)
def test_the_name_of_a_kind_is_read_in_any_spelling(text: str, kind: str) -> None:
    assert kind_named(text) == kind


def test_a_subject_that_raises_what_is_no_exception_is_wrong_in_python_too() -> None:
    def exits(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Any:
        raise SystemExit(3)

    def interrupts(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Any:
        raise KeyboardInterrupt

    for kind in (None, "likelihood"):
        report = check(exits, kind=kind, examples=0)
        assert report.bug == "not-the-contract" and "SystemExit: 3" in report.failures[0].seen
    with pytest.raises(KeyboardInterrupt):
        check(interrupts, examples=0)


# A claim


def test_a_claim_adds_the_golden_vectors_and_the_agreement() -> None:
    subject = padded(ppo_of_tensors, eps=0.2)
    report = check(subject, like=lossfns.ppo(), examples=0)
    assert report.ok and [v.law for v in report.verdicts][-3:] == [*CLAIMS], report.table()
    wrong = check(subject, like=lossfns.ppo(clip=(0.9, 1.1)), examples=0)
    assert [v.law for v in wrong.failures] == ["agreement"] and wrong.bug == "another-loss"
    last = check(subject, like=lossfns.dapo(), examples=0).failures
    assert {v.law for v in last} == {"vectors", "agreement"}
    assert all(v.why == CLAIMS[v.law].why and v.why for v in (*wrong.failures, *last))


def ppo_over_at_least_one(logprobs: Tensor, old_log_probs: Tensor, advantages: Tensor, response_mask: Tensor) -> Tensor:
    """PPO whose denominator is kept at 1 or above."""
    mean = ppo_of_tensors(logprobs, old_log_probs, advantages, response_mask)
    return mean * response_mask.sum() / response_mask.sum().clamp(min=1.0)


def test_a_denominator_that_is_kept_at_one_is_fragile_and_no_other_loss() -> None:
    """A weight of 0.5 alone: −0.5·A / 0.5 for PPO, −0.5·A / 1 here. Masks of 0 and 1 have no such sum."""
    report = check(padded(ppo_over_at_least_one), like=lossfns.ppo(), kind="policy")
    broken = {v.law: v.bug for v in report.broken}
    assert report.ok and broken == {"small_weights": "epsilon-in-denominator"}, report.table()
    assert "add up to 0.59375, " in report.broken[0].seen  # 9.5 / 16
    other = check(padded(ppo_over_at_least_one), like=lossfns.ppo(clip=(0.9, 1.1)), examples=0)
    assert [(v.verdict, v.seen) for v in other.verdicts if v.law == "small_weights"] == [
        ("n/a", "it is another loss, whatever the weights")
    ]


def uncapped_grpo(
    logps: Tensor, old_logps: Tensor, ref_logps: Tensor, advantages: Tensor, mask: Tensor, beta: float = 0.04
) -> Tensor:
    """GRPO as TRL writes it: no cap on a log-ratio."""
    lp, old, ref, a = (torch.where(mask != 0, x, 0) for x in (logps, old_logps, ref_logps, advantages))
    ratio, x = (lp - old).exp(), ref - lp
    terms = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a) + beta * (x.exp() - x - 1)
    return (mask * terms).sum() / mask.sum()


def test_a_loss_that_differs_by_our_caps_alone_is_told_the_loss_without_them() -> None:
    """At log-ratios of ±25 the ratio is e²⁵, not e²⁰."""
    subject = padded(uncapped_grpo)
    report = check(subject, like=lossfns.grpo(kl_beta=0.04), kind="policy", examples=0)
    hint = "It agrees with grpo(clip=(0.8, 1.2), kl_beta=0.04, kl=k3_uncapped, weigh=token_mean, log_ratio_cap=None,"
    assert hint in report.broken[0].seen and report.broken[0].law == "agreement", report.table()
    without = lossfns.grpo(kl_beta=0.04, kl=lossfns.kl.k3_uncapped, log_ratio_cap=None)
    assert check(subject, like=without, kind="policy", examples=0).ok
    other = check(subject, like=lossfns.grpo(kl_beta=0.4), kind="policy", examples=0)
    assert not any("It agrees with" in v.seen for v in other.broken)


def test_a_batch_is_shown_with_the_columns_that_are_read() -> None:
    """REINFORCE reads advantages. A claim shows what the other loss reads. Of a copy of all fields nothing is known."""

    def of_copies(data: Sequence[Any], logprobs: Sequence[Tensor]) -> Any:
        return reinforce([lossfns.Datum(datum.model_input, {**datum.loss_fn_inputs}) for datum in data], logprobs)

    def shown(like: lossfns.Loss) -> list[str]:
        triple = padded(lambda logprobs, advantages, mask: -3 * (logprobs * advantages * mask).sum())
        broken = check(triple, kind="policy", examples=0, like=like).failures[-1]
        return [*eval(broken.example, {"Batch": Batch}).columns]

    assert shown(lossfns.reinforce(weigh=lossfns.token_sum)) == ["advantages"]
    assert shown(lossfns.ppo(weigh=lossfns.token_sum)) == ["advantages", "old_logprobs"]
    batch = columns_for_kind(SMALL[1], "policy", 0)
    assert [*with_columns_read(batch, torch.float64, reinforce).columns] == ["advantages"]
    assert with_columns_read(batch, torch.float64, of_copies) is batch


def test_a_vector_without_a_graph_is_no_loss() -> None:
    """Its report shows the batch, on which the loss has no value."""

    def of_each_token(data: Sequence[Any], logprobs: Sequence[Tensor]) -> Any:
        return logprobs[0].detach(), {}

    report = check(of_each_token, kind="likelihood", examples=0)
    assert report.bug == "not-the-contract" and report.failures[0].example, report.table()


def test_a_mean_over_padded_slots_has_one_name_in_every_law() -> None:
    """Σ w·A·lp / (B·T): neither the order of the datums nor a constant is to blame."""

    def over_slots(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -(logprobs * advantages * mask).mean()

    broken = {v.law: v.bug for v in check(padded(over_slots), kind="policy").failures}
    assert broken == dict.fromkeys(("padding", "split", "on_policy"), "padding-in-denominator")


def test_the_warnings_of_a_subject_on_our_batches_are_not_shown() -> None:
    """torch warns of the deviation of a group of one. Warnings are errors in these tests."""

    def standardised(rewards: Sequence[float], groups: Sequence[Any]) -> list[float]:
        warnings.warn("a word of the user's", stacklevel=1)
        return centred(rewards, groups)

    def warning(*args: Any) -> Any:
        warnings.warn("a word of the user's", stacklevel=1)
        return nll(*args)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert check(standardised).ok and check(warning, examples=0).kind == "likelihood"
    assert shown == []


# A law by itself


def test_a_law_is_a_plain_function() -> None:
    data, logprobs = BATCH.data(), BATCH.tensors()
    for law in (contract.contract, sums.split, policy.sign, masks.poison):
        law(reinforce, data, logprobs)
        law(lossfns.ppo(), data, logprobs)
    with pytest.raises(LawBroken, match="sign-flipped: the loss is maximised") as caught:
        policy.sign(mutants.reinforce_sign_flipped, data, logprobs)
    assert caught.value.bug == "sign-flipped" and isinstance(caught.value, AssertionError)
    with pytest.raises(NotApplicable, match="no reference"):
        policy.kl(reinforce, data, logprobs)
    with pytest.raises(LawBroken, match="not-the-contract"):
        contract.contract(lambda data, logprobs_list: 0.0, data, logprobs)  # type: ignore[arg-type,return-value]


def test_a_law_of_advantages_is_one_too() -> None:
    advantages.centred(centred, [1.0, 0.0], ["a", "a"])
    with pytest.raises(LawBroken, match="std-over-n"):
        advantages.deviation(mutants.group_advantages_std_over_n, [1.0, 0.0], ["a", "a"])
    broken = check(lambda rewards, groups: 1 / 0)
    assert broken.kind == "advantages" and {v.bug for v in broken.verdicts} == {"not-the-contract"}


BATCH = Batch(
    [[-1.0, -2.0, -0.5], [-1.5, -0.25]],
    [[0.0, 1.0, 1.0], [1.0, 2.0]],
    {
        "advantages": [[1.0] * 3, [-0.5] * 2],
        "old_logprobs": [[-1.0, -2.25, -0.5], [-1.5, -0.5]],
        "ref_logprobs": [[-1.0, -2.5, -1.0], [-2.0, -0.25]],
    },
)


# The command line

HERE = f"{__file__}:"


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Return exit status, standard output and standard error of ``lossfns check``, without random batches."""
    status = main(["check", *args, "--examples", "0"])
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["lossfns:cross_entropy"], 0, "laws hold"),
        (["lossfns:group_advantages"], 0, "10 laws hold"),
        ([HERE + "nll"], 0, "nll (likelihood)"),
        ([HERE + "half_of_nll"], 1, "most likely constant-factor"),
        ([HERE + "make_reinforce_loss", "--factory"], 0, "(policy)"),
        ([HERE + "nll", "--kind", "any"], 0, "(any)"),
        ([HERE + "nll", "--like", "cross_entropy"], 0, "ok       agreement"),
        ([HERE + "half_of_nll", "--like", "cross_entropy(weigh=sequence_mean)"], 1, "WRONG    agreement"),
        (["lossfns.testing.mutants:ppo_mask_after_exp"], 1, "most likely mask-after-exp"),
        (["lossfns.testing.mutants:MUTANTS.get", "--kind", "advantages"], 1, "not-the-contract"),
        (["lossfns:crossentropy"], 2, "Did you mean 'cross_entropy'?"),
        (["lossfns.testing.mutants:dpo_pair_layouts"], 2, "Did you mean 'dpo_pair_layout'?"),
        (["lossfns:cross_entropy.weigh"], 2, "'weigh'"),
        (["lossfns"], 2, "after a colon"),
        (["no_such_module:loss"], 2, "No module named 'no_such_module'"),
        (["no/such/file.py:loss"], 2, "FileNotFoundError"),
        (["lossfns:__version__"], 2, "a loss function or a factory of one"),
        ([HERE + "nll", "--like", "grop"], 2, "'grop'"),
        ([HERE + "nll", "--like", "grpo(kl=k9)"], 2, "k9"),
        ([HERE + "nll", "--like", "grpo(beta=1)"], 2, "no knob 'beta'"),
        ([HERE + "nll", "--like", "cross_entropy(weigh=open('x'))"], 2, "like"),
        ([HERE + "nll", "--like", "TensorData([1], 'int64')"], 2, "like"),
        ([HERE + "nll", "--factory"], 2, "'data'"),
    ],
    ids=lambda x: " ".join(x).replace(HERE, ":") if isinstance(x, list) else "",
)
def test_the_command_exits_0_1_or_2(
    capsys: pytest.CaptureFixture[str], args: list[str], status: int, words: str
) -> None:
    found, out, err = run(capsys, *args)
    assert found == status and words in (err if status == 2 else out), out + err
    assert (out == "") == (status == 2) and (err.startswith("lossfns: ") if status == 2 else err == "")


def test_a_kind_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "lossfns:ppo", "--kind", "rl")
    assert (status, out) == (2, "") and "one of policy, likelihood" in err and "advantages" in err


def test_a_file_of_ones_own_is_checked_from_where_one_stands(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file, and as a module in the current folder."""
    source = (
        "from lossfns import cross_entropy\nmine = cross_entropy()\ndef loss(data, lps):\n    return mine(data, lps)\n"
    )
    (tmp_path / "x.py").write_text(source)
    (tmp_path / "own_losses_for_check.py").write_text(source)
    (tmp_path / "wrong.py").write_text("loss = (")
    assert run(capsys, f"{tmp_path / 'x.py'}:loss")[0] == 0
    assert "SyntaxError" in run(capsys, f"{tmp_path / 'wrong.py'}:loss")[2]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert run(capsys, "own_losses_for_check:loss")[0] == 0


def test_strict_fails_a_fragile_loss(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, HERE + "unmasked", "-q")
    assert status == 0 and "warning, not wrong: 1 fragile" in out.splitlines()[-1] and "ok  " not in out
    assert run(capsys, HERE + "unmasked", "--strict")[0] == 1
    assert run(capsys, HERE + "unmasked", "--strict", "--skip", "poison", "--because", "finite slots")[0] == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--skip", "poison"], "1 --skip and 0 --because"),
        (["--because", "finite slots"], "0 --skip and 1 --because"),
        (["--skip", "posion", "--because", "finite slots"], "Did you mean 'poison'?"),
        (["--skip", "poison", "--because", " "], "the reason why poison is not tested"),
        (["--kind", "polcy"], "Did you mean 'policy'?"),
        (["--json", "no/such/folder/x.json"], "Make the folder first"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_options_that_do_not_say_enough_are_refused(
    capsys: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    status, out, err = run(capsys, HERE + "nll", *args)
    assert (status, out) == (2, "") and words in err, err


def test_declared_coupling_and_kind_are_options_too(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--couples", "centred over the batch", "--kind", "policy loss", "--json", "-")
    report = json.loads(run(capsys, HERE + "coupled", *args)[1])
    assert report["couples"] == "centred over the batch" and report["kind"] == "policy" and not report["guessed"]
    assert {v["law"] for v in report["verdicts"] if v["verdict"] == "skipped"} == {law.__name__ for law in COUPLED}


def test_the_list_has_every_law_and_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--list"]) == 0
    severities = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines() if len(line.split()) > 2)
    assert severities.keys() >= {*LAWS, *BUGS} and {severities[law] for law in LAWS} == {"wrong", "fragile"}
    assert main(["check", "--list", "--kind", "supervised"]) == 0
    out = capsys.readouterr().out
    assert "negative_weights" in out and "step_zero" not in out and all(bug in out for bug in BUGS)


def test_check_without_a_subject_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["check"])
    assert caught.value.code == 2 and "name a SUBJECT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("poison", ["a law of every kind", "is fragile: slots that are masked", "`where-after-exp`"]),
        ("finite-differences", ["finite_differences, a law of the kinds likelihood", "detached-term"]),
        ("agreement", ["a law of a claim"]),
        ("std-over-n", ["a bug: the standard deviation", "unsloth-zoo#832", "deviation: "]),
        ("mask_after_exp", ["mask-after-exp, a bug"]),
    ],
)
def test_explain_explains_laws_and_bugs(capsys: pytest.CaptureFixture[str], name: str, words: list[str]) -> None:
    assert main(["explain", name]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(" ".join(text.split()) in out for text in words), out


def test_explain_knows_every_law_and_bug_and_says_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    for name in (*LAWS, *BUGS):
        assert main(["explain", name]) == 0
        assert len(capsys.readouterr().out.splitlines()) >= 3, name
    assert main(["explain", "posion"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Did you mean 'poison'?" in err


def test_the_texts_of_explain_are_those_of_the_guide() -> None:
    assert explanations.main(["check"]) == 0, "python -m tools.explanations write"


def test_reports_are_written_as_json_and_junit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    as_json, as_junit = tmp_path / "report.json", tmp_path / "report.xml"
    status, out, _ = run(capsys, HERE + "half_of_nll", "--json", str(as_json), "--junit", str(as_junit))
    assert status == 1 and "most likely" in out
    parsed = json.loads(as_json.read_text(encoding="utf-8"))
    assert parsed["bug"] == "constant-factor" and parsed["subject"].endswith(":half_of_nll")
    assert ElementTree.parse(as_junit).getroot().get("tests") == str(len(parsed["verdicts"]))
    status, out, _ = run(capsys, HERE + "half_of_nll", "--json", "-")
    assert status == 1 and json.loads(out)["bug"] == "constant-factor"


# pytest


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lossfns.testing.check", "pytest"])
"""Starts processes that need not import torch again."""


def pytest_run(folder: Path, *args: str, **variables: str) -> tuple[int, str]:
    """Run pytest in an empty folder; return exit status and output."""
    said = folder / "said.txt"
    process = SERVER.Process(target=run_pytest_in, args=(folder, args, variables, said))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode, said.read_text()


def run_pytest_in(folder: Path, args: Sequence[str], variables: dict[str, str], said: Path) -> None:
    os.chdir(folder)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOSSFNS")}
    os.environ.clear()
    os.environ.update(environment | variables)
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(pytest.main(["-p", "no:cacheprovider", *args]))


CONFORMANCE = ("--pyargs", "lossfns.testing.conformance")


@pytest.mark.exhaustive
def test_conformance_is_a_test_for_each_law(tmp_path: Path) -> None:
    status, out = pytest_run(tmp_path, *CONFORMANCE, "-v", LOSSFNS_SUBJECT=HERE + "nll")
    assert status == 0 and "test_law[likelihood] PASSED" in out and "test_law[no_inert_knob] SKIPPED" in out, out


def test_conformance_fails_with_the_bug(tmp_path: Path) -> None:
    mutant = "lossfns.testing.mutants:cross_entropy_padding_in_denominator"
    status, out = pytest_run(tmp_path, *CONFORMANCE, "--lossfns-subject", mutant, "--lossfns-kind", "any")
    assert status == 1 and "Likely bug: padding-in-denominator" in out and "test_law[padding]" in out, out
    assert "likelihood" not in out


@pytest.mark.exhaustive
def test_conformance_needs_a_subject(tmp_path: Path) -> None:
    status, out = pytest_run(tmp_path, *CONFORMANCE)
    assert status in (2, 4) and "set LOSSFNS_SUBJECT=module:loss_fn" in out and "Traceback" not in out, out


def test_the_fixture_fails_with_the_table(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "from lossfns.testing import mutants\n"
        "import lossfns\n\n"
        "def test_right(check_loss):\n"
        "    assert check_loss(lossfns.cross_entropy(), strict=True, examples=0).kind == 'likelihood'\n\n"
        "def test_wrong(check_loss):\n"
        "    check_loss(mutants.cross_entropy_constant_factor, kind='likelihood', examples=0)\n"
    )
    status, out = pytest_run(tmp_path)
    assert status == 1 and "1 failed, 1 passed" in out and "most likely constant-factor" in out, out


def maxrl_of_lists(rewards: Sequence[float], groups: Sequence[Any]) -> list[float]:
    """(r − mean) / mean, 0 where the mean is not above 0, as in prime-rl."""
    means = [mean_of_group(rewards, groups, g) for g in groups]
    return [(r - m) / m if m > 0 else 0.0 for r, m in zip(rewards, means)]


def asymre_of_lists(rewards: Sequence[float], groups: Sequence[Any]) -> list[float]:
    return [r - (mean_of_group(rewards, groups, g) - 0.1) for r, g in zip(rewards, groups)]


def gpg_of_lists(rewards: Sequence[float], groups: Sequence[Any]) -> list[float]:
    """α·(r − mean) with verl's α, the batch over its rewards other than 0."""
    alpha = len(rewards) / max(sum(r != 0 for r in rewards), 1)
    return [alpha * (r - mean_of_group(rewards, groups, g)) for r, g in zip(rewards, groups)]


def opo_with_lengths(rewards: Tensor, group_ids: Tensor, response_lengths: Tensor) -> Tensor:
    same = (group_ids[:, None] == group_ids).to(rewards.dtype) * response_lengths
    return rewards - (same @ rewards) / same.sum(1)


def gdpo_of_a_matrix(rewards: Tensor, groups: Sequence[Any]) -> Tensor:
    z = torch.stack([lossfns.group_advantages(column, groups) for column in rewards.unbind(1)], 1).sum(1)
    return (z - z.mean()) / (z.std(correction=0) + 1e-6)


def whitened_returns(token_level_rewards: Tensor, response_mask: Tensor) -> Tensor:
    """REINFORCE++ without groups: the batch is its baseline."""
    returns = (token_level_rewards * response_mask).flip(1).cumsum(1).flip(1)
    seen = returns[response_mask != 0]
    return (returns - seen.mean()) * (seen.var() + 1e-8).rsqrt() * response_mask


def mean_of_group(rewards: Sequence[float], groups: Sequence[Any], group: Any) -> float:
    own = [r for r, g in zip(rewards, groups) if g == group]
    return sum(own) / len(own)


def test_no_correct_estimator_of_advantages_is_called_wrong() -> None:
    """Designs that break a law of the common ones: its laws do not apply to them, and fragile is the worst verdict."""
    names = [
        "leave_one_out",
        "opo",
        "pass_at_k",
        "maxrl",
        "gpg",
        "asymre",
        "batch",
        "reinforce_plus_plus_baseline",
        "gdpo",
    ]
    ours = [getattr(lossfns, f"{name}_advantages") for name in names]
    verls = functools.partial(lossfns.gpg_advantages, alpha="nonzero")
    strangers = [maxrl_of_lists, asymre_of_lists, gpg_of_lists, opo_with_lengths, gdpo_of_a_matrix, whitened_returns]
    for fn in (*ours, verls, *strangers):
        report = check(fn, examples=0)
        assert report.kind == "advantages", fn
        assert [(v.law, v.bug) for v in report.verdicts if v.verdict == "wrong"] == [], fn


def test_a_bug_in_the_neighbourhood_of_a_design_is_still_named() -> None:
    """A mean that is not taken off, a mean of the batch, and a constant only where rewards are equal are no designs."""

    def divided_only(rewards, groups):  # type: ignore[no-untyped-def]
        return [r / (mean_of_group(rewards, groups, g) or 1.0) for r, g in zip(rewards, groups)]

    def noisy(rewards, groups):  # type: ignore[no-untyped-def]
        plain = lossfns.group_advantages(rewards, groups, group_of_one="reward").tolist()
        return [a or 0.15 for a in plain]

    def of_the_batch(rewards, groups):  # type: ignore[no-untyped-def]
        return maxrl_of_lists(rewards, [0] * len(rewards))

    for fn, bugs in (
        (divided_only, {"not-centred"}),
        (noisy, {"constant-group-noise"}),
        (of_the_batch, {"groups-ignored"}),
    ):
        assert {v.bug for v in check(fn, examples=0).verdicts if v.verdict == "wrong"} >= bugs, fn


def test_returns_without_a_baseline_are_no_advantages() -> None:
    def returns(rewards, mask):  # type: ignore[no-untyped-def]
        return (rewards * mask).flip(1).cumsum(1).flip(1)

    with pytest.raises(LossInputError, match="expected a function of advantages, got returns without a baseline"):
        check(returns)
