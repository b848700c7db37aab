"""KL penalties: the plain-float oracle, numbers by hand, the formulas of other frameworks, and exact expectations."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import kl as page
import pytest
import torch
from batches import Batch, Case, apart, call, random_batch
from rollout_oracle import penalised_ppo
from torch import Tensor

import lossfns
from lossfns import LossInputError, Tokens, k1, k2, k3, ppo, with_kl
from lossfns.combine import penalty
from lossfns.kl import (
    KL,
    binary_kl,
    binary_tv,
    k1_plus,
    k3_plus,
    k3_uncapped,
    k_abs,
    k_squared,
    log_ratio_capped,
    straight_through,
    swapped,
    value_capped,
)
from lossfns.rollout import TokenWeight, detached, ratio_to, score_function
from lossfns.testing.enumeration import divergences, example_policy, expectation, identify
from lossfns.testing.oracle.kl import ESTIMATORS, WEIGHTS

RATIO = ratio_to("old_logprobs")
OUR_WEIGHTS = {"none": None, "ratio": RATIO, "detached": detached(RATIO), "score_function": score_function}


def settings() -> Iterator[Case]:
    """Every estimator with every weight, and caps and columns in turn."""
    for i, name in enumerate(ESTIMATORS):
        for j, weight in enumerate(WEIGHTS):
            knobs: dict[str, Any] = {"kl_beta": 0.3, "kl_cap": (None, 1.5)[(i + j) % 2]}
            knobs["kl_to"] = ("ref_logprobs", "old_logprobs", "sampler_logprobs")[(i + 2 * j) % 3]
            limit = {"log_ratio_cap": 2.0} if (i + j) % 4 == 3 else {}
            kl = log_ratio_capped(getattr(lossfns, name), 2.0) if limit else getattr(lossfns, name)
            loss = with_kl(ppo(), kl=kl, kl_weight=OUR_WEIGHTS[weight], **knobs)
            names = {"weigh": "token_mean", "kl": name, "kl_weight": weight}
            yield Case(loss, penalised_ppo, knobs | names | limit)


@pytest.mark.filterwarnings("ignore:k1 in a loss", "ignore:the mean .log-ratio. is")
def test_every_penalty_equals_the_oracle() -> None:
    for seed, case in enumerate(settings()):
        for batch in (random_batch(Random(seed)), random_batch(Random(seed + 100), longest=2)):
            value, gradients, _ = call(case.loss, batch)
            assert apart([value, gradients], list(case.expected(batch))) < 1e-12, case
            single = call(case.loss, batch, dtype=torch.float32)
            largest = max(abs(x) for row in gradients for x in row)
            if largest < 1e3:  # a ratio of e²⁰ times e²⁰ has no digits to spare in float32
                assert apart([single[0], single[1]], [value, gradients]) < 2e-5, case


ONE = Batch(
    [[-2.0]], [[1.0]], {"advantages": [[0.0]], "old_logprobs": [[-2.0 - math.log(2)]], "ref_logprobs": [[-1.0]]}
)
"""d = lp − ref = −1 and r = 2, without a reward."""


@pytest.mark.filterwarnings("ignore:k1 in a loss")
@pytest.mark.parametrize(
    ("kl", "weight", "value", "slope"),
    [
        (k_abs, None, 1.0, -1.0),
        (k_squared, None, 1.0, -2.0),
        (k1_plus, None, -1.0, -1.0),
        (k3_plus, None, math.e - 2, -1.0),
        (k3_uncapped, None, math.e - 2, 1 - math.e),
        (k1, RATIO, -2.0, 2 * (1 - 1)),  # r·(1 + d)
        (k2, RATIO, 1.0, 2 * (-1 + 0.5)),  # r·(d + d²/2)
        (k3, RATIO, 2 * (math.e - 2), 2 * (1 - math.e + math.e - 2)),
        (k3, detached(RATIO), 2 * (math.e - 2), 2 * (1 - math.e)),
        (k3, score_function, math.e - 2, 1 - math.e + math.e - 2),
        (swapped(k3), None, math.exp(-1) + 1 - 1, math.exp(-1) - 1),  # exp(d) − d − 1
    ],
)
def test_by_hand(kl: KL, weight: TokenWeight | None, value: float, slope: float) -> None:
    """d = −1 and r = 2; β = 1, one token."""
    got, gradients, metrics = call(with_kl(ppo(), 1.0, kl, weight), ONE)
    assert (got, gradients[0][0]) == pytest.approx((value, slope))
    assert metrics["kl_ref"] == pytest.approx(value)


def test_the_cap_bounds_the_weighted_estimator_and_stops_its_gradient() -> None:
    """k3 = e − 2 = 0.72 is below 1, and 2·k3 = 1.44 above."""
    assert call(with_kl(ppo(), 1.0, k3, kl_cap=1.0), ONE)[:2] == call(with_kl(ppo(), 1.0, k3), ONE)[:2]
    assert call(with_kl(ppo(), 1.0, k3, RATIO, kl_cap=1.0), ONE)[:2] == (1.0, [[0.0]])
    assert call(with_kl(ppo(), 1.0, k1, RATIO, kl_cap=1.0), ONE)[:2] == (-1.0, [[0.0]])


def test_an_uncapped_k3_that_overflows_is_refused_and_with_a_cap_is_the_cap_without_a_gradient() -> None:
    far = Batch([[-200.0]], [[1.0]], {"advantages": [[0.0]], "old_logprobs": [[-200.0]], "ref_logprobs": [[-1.0]]})
    with pytest.raises(LossInputError):
        call(with_kl(ppo(), 1.0, k3_uncapped), far, dtype=torch.float32)
    assert call(with_kl(ppo(), 1.0, k3_uncapped, kl_cap=10.0), far, dtype=torch.float32)[:2] == (10.0, [[0.0]])
    assert call(with_kl(ppo(), 1.0, k3), far)[0] == pytest.approx(math.expm1(20) - 20)


def test_binary_divergences_by_hand() -> None:
    """p = ½, q = ¼: ½·ln 2 + ½·ln(½ / ¾), and ¼. Equal policies have 0, also at p = 1."""
    lp, ref = torch.tensor([0.5, 1.0]).double().log(), torch.tensor([0.25, 1.0]).double().log()
    assert binary_kl(lp, ref).tolist() == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.0])
    assert binary_tv(lp, ref).tolist() == pytest.approx([0.25, 0.0])


def verl(lp: Tensor, ref: Tensor, name: str) -> Tensor:
    """kl_penalty of verl 0.9.1, trainer/ppo/core_algos.py."""
    base = name.rstrip("+")
    x = (ref - lp).clamp(-20, 20)
    forward = {"k1": lp - ref, "abs": (lp - ref).abs(), "k2": 0.5 * (lp - ref).square()}
    forward["k3"] = (x.exp() - x - 1).clamp(-10, 10)
    if base == name or base == "k2":
        return forward[base]
    backward = 0.5 * (lp - ref).square()
    return backward - backward.detach() + forward[base].detach()


def nemo(lp: Tensor, ref: Tensor, weight: Tensor) -> Tensor:
    """calculate_kl of NeMo-RL, algorithms/utils.py, with k3 and the default clamps."""
    logr = ref - lp
    x = logr.clamp(-20, 20)
    weight = torch.where(logr == x, weight, weight.detach())
    return (weight * (x.exp() - 1 - x)).clamp(-10, 10)


@pytest.mark.filterwarnings("ignore:k1 in a loss", "ignore:the mean .log-ratio. is")
def test_the_penalties_of_other_frameworks() -> None:
    """β = 1 without a reward: value and gradient of the token mean. One token is 25 nats away, one 5 (above a cap)."""
    lp = torch.tensor([-1.0, -2.0, -0.5, -30.0, -7.0, -0.25], dtype=torch.float64)
    ref = torch.tensor([-1.5, -1.0, -0.5, -5.0, -2.0, -3.0], dtype=torch.float64)
    old = torch.tensor([-1.25, -2.5, -0.5, -29.0, -6.5, -0.5], dtype=torch.float64)
    trl = ratio_to("old_logprobs", None)
    x = lambda p: ref - p  # noqa: E731
    theirs: list[tuple[Any, dict[str, Any]]] = [
        (lambda p: verl(p, ref, "k1"), {"kl": k1}),
        (lambda p: verl(p, ref, "abs"), {"kl": k_abs}),
        (lambda p: verl(p, ref, "k2"), {"kl": k2}),
        (lambda p: verl(p, ref, "k3"), {"kl": k3, "kl_cap": 10.0}),
        (lambda p: verl(p, ref, "k1+"), {"kl": k1_plus}),
        (lambda p: verl(p, ref, "k3+"), {"kl": straight_through(value_capped(k3, 10.0), k2)}),
        (lambda p: nemo(p, ref, (p - p.detach()).exp()), {"kl": k3, "kl_weight": score_function, "kl_cap": 10.0}),
        # TRL 1.16, grpo_trainer.py: per_token_kl * coef_1, both with a gradient and without a clamp
        (lambda p: (x(p).exp() - x(p) - 1) * (p - old).exp(), {"kl": k3_uncapped, "kl_weight": trl}),
        # slime, ppo_utils.py: low_var_kl with --use-unbiased-kl
        (
            lambda p: ((p - old).exp() * (x(p).exp() - 1 - x(p))).clamp(-10, 10),
            {"kl": k3_uncapped, "kl_weight": trl, "kl_cap": 10.0},
        ),
        # open-instruct: every estimator of a difference clamped to ±40; number 3 is the ratio times k1
        (lambda p: (p - ref).clamp(-40, 40).square() / 2, {"kl": log_ratio_capped(k2, 40.0)}),
        (
            lambda p: torch.expm1(-(p - ref).clamp(-40, 40)) + (p - ref).clamp(-40, 40),
            {"kl": log_ratio_capped(k3_uncapped, 40.0)},
        ),
        (lambda p: (p - old).exp() * (p - ref), {"kl": k1, "kl_weight": trl}),
    ]
    for formula, knobs in theirs:
        p = lp.clone().requires_grad_()
        expected = formula(p).mean()
        expected.backward()
        columns = {"advantages": [[0.0] * 6], "old_logprobs": [old.tolist()], "ref_logprobs": [ref.tolist()]}
        value, gradients, _ = call(with_kl(ppo(), 1.0, **knobs), Batch([lp.tolist()], [[1.0] * 6], columns))
        assert apart([value, gradients], [expected.item(), [p.grad.tolist()]]) < 1e-12, knobs


def test_verls_k3_plus_has_its_value_cap_only_in_the_value() -> None:
    """verl caps the value of "k3+" at 10 and keeps the gradient of k2; ``kl_cap`` would stop the gradient, too."""
    p, ref = torch.tensor(-7.0, dtype=torch.float64, requires_grad=True), torch.tensor(-2.0, dtype=torch.float64)
    theirs, ours = verl(p, ref, "k3+"), k3_plus(p, ref)
    capped = straight_through(value_capped(k3, 10.0), k2)(p, ref)
    assert (theirs.item(), capped.item(), ours.item()) == (10.0, 10.0, pytest.approx(math.exp(5) - 6))
    slopes = [torch.autograd.grad(x, p)[0].item() for x in (theirs, capped, ours)]
    assert slopes == [-5.0, -5.0, -5.0]


# Exact expectations


def estimator(kl: KL, weight: TokenWeight | None = None, to: str = "ref_logprobs") -> Any:
    """The penalty of ``with_kl`` for one outcome, whose tokens come from the old policy, which is the sampler."""

    def of_outcome(lp: Tensor, ref: Tensor, sampler: Tensor) -> Tensor:
        columns = {"ref_logprobs": ref, "old_logprobs": sampler, "sampler_logprobs": sampler}
        return penalty(Tokens(lp, torch.ones_like(lp), None, columns), kl, weight, None, to)

    return of_outcome


REVERSE, FORWARD, NONE, ZERO = "KL(π‖ref)", "KL(ref‖π)", "none of these", "0"
CLAIMS: list[tuple[KL, TokenWeight | None, tuple[str, str], tuple[str, str]]] = [
    (k1, None, (REVERSE, ZERO), (NONE, "−1·KL(sampler‖π)")),
    (k2, None, (NONE, REVERSE), (NONE, NONE)),
    (k3, None, (REVERSE, FORWARD), (NONE, NONE)),
    (k3_uncapped, None, (REVERSE, FORWARD), (NONE, NONE)),
    (k_abs, None, (NONE, "Σ|π − ref|"), (NONE, NONE)),
    (k_squared, None, (NONE, "2·KL(π‖ref)"), (NONE, NONE)),
    (k1_plus, None, (REVERSE, REVERSE), (NONE, NONE)),
    (k3_plus, None, (REVERSE, REVERSE), (NONE, NONE)),
    (k1, RATIO, (REVERSE, REVERSE), (REVERSE, REVERSE)),
    (k3, RATIO, (REVERSE, REVERSE), (REVERSE, REVERSE)),
    (k2, RATIO, (NONE, NONE), (NONE, NONE)),
    (k1, detached(RATIO), (REVERSE, ZERO), (REVERSE, ZERO)),
    (k2, detached(RATIO), (NONE, REVERSE), (NONE, REVERSE)),
    (k3, detached(RATIO), (REVERSE, FORWARD), (REVERSE, FORWARD)),
    (k1_plus, detached(RATIO), (REVERSE, REVERSE), (REVERSE, REVERSE)),
    (k3_plus, detached(RATIO), (REVERSE, REVERSE), (REVERSE, REVERSE)),
    (k1, score_function, (REVERSE, REVERSE), (NONE, NONE)),
    (k3, score_function, (REVERSE, REVERSE), (NONE, NONE)),
]
TO_SAMPLER: list[tuple[KL, TokenWeight | None, tuple[str, str]]] = [
    (k_squared, None, (NONE, NONE)),
    (k3, None, (NONE, NONE)),
    (swapped(k3), None, ("KL(sampler‖π)", "KL(sampler‖π)")),
    (k3, RATIO, ("KL(π‖sampler)", "KL(π‖sampler)")),
    (k2, detached(RATIO), (NONE, "KL(π‖sampler)")),
]


def test_the_gradient_of_every_estimator_belongs_to_the_divergence_that_it_says() -> None:
    """To 1e-12, on- and off-policy. ``page.verdicts`` refuses a difference between one step and a tree of two."""
    rows = {(row.kl.__name__, repr(row.weight), row.to): tuple(map(tuple, page.verdicts(row))) for row in page.ROWS}
    assert len(rows) == len(page.ROWS) == len(CLAIMS) + len(TO_SAMPLER)
    for kl, weight, on_policy, off_policy in CLAIMS:
        assert rows[kl.__name__, repr(weight), "ref_logprobs"] == (on_policy, off_policy), (kl.__name__, weight)
    for kl, weight, off_policy in TO_SAMPLER:
        assert rows[kl.__name__, repr(weight), "sampler_logprobs"][1] == off_policy, (kl.__name__, weight)


def test_the_page_is_what_the_program_writes() -> None:
    path = Path(__file__).parents[1] / "docs" / "kl.md"
    assert path.read_text() == page.render(), "python -m tools.kl write"


def test_the_exact_divergences_of_two_tokens_are_closed_forms() -> None:
    """∂KL(π‖ref)/∂z_i = π_i·(d_i − KL), ∂KL(ref‖π)/∂z_i = π_i − ref_i, by hand from the softmax."""
    policy, ref = example_policy(0, vocabulary=3), example_policy(1, vocabulary=3)
    p, q = (x.logits[0].detach().softmax(0).tolist() for x in (policy, ref))
    kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q))
    exact = divergences(policy, ref, policy)
    assert exact["KL(π‖ref)"].value == pytest.approx(kl, abs=1e-15)
    pulls = [a * (math.log(a / b) - kl) for a, b in zip(p, q)]
    assert exact["KL(π‖ref)"].gradient.tolist() == pytest.approx(pulls, abs=1e-15)
    assert exact["KL(ref‖π)"].gradient.tolist() == pytest.approx([a - b for a, b in zip(p, q)], abs=1e-15)
    assert exact["KL(ref‖π)"].value == pytest.approx(math.fsum(b * math.log(b / a) for a, b in zip(p, q)), abs=1e-15)


def test_a_penalty_over_tokens_does_not_reach_the_prefixes_and_one_over_sequences_does() -> None:
    """(Σd)²/2 of a sequence has the gradient of the KL of sequences; Σ d²/2 of its tokens has not."""
    of_sequence = lambda lp, ref, sampler: ((lp - ref).sum().square() / 2 / len(lp)).expand_as(lp)  # noqa: E731
    assert identify(of_sequence, steps=2).gradient == "KL(π‖ref) of sequences"
    assert identify(estimator(k2), steps=2).gradient == "KL(π‖ref)"
    policy, ref = example_policy(0, steps=2), example_policy(1, steps=2)
    exact = divergences(policy, ref, policy)
    by_token, by_sequence = exact["KL(π‖ref)"], exact["KL(π‖ref) of sequences"]
    assert by_token.value == pytest.approx(by_sequence.value, abs=1e-14)
    assert (by_token.gradient - by_sequence.gradient).abs().max() > 0.01


def test_a_wrong_estimator_gets_no_divergence_and_a_wrong_shape_a_message() -> None:
    assert identify(lambda lp, ref, sampler: (lp - ref).square() * 0.51).gradient == NONE
    assert identify(lambda lp, ref, sampler: k3(lp, ref).detach()) == (REVERSE, ZERO)
    assert identify(lambda lp, ref, sampler: -k2(lp, ref)).gradient == "−1·KL(π‖ref)"
    with pytest.raises(LossInputError, match="estimator: expected one number for each of 2 tokens, got shape"):
        identify(lambda lp, ref, sampler: lp.sum(), steps=2)
    for knobs in ({"steps": 0}, {"vocabulary": 2}, {"steps": 1.5}):
        with pytest.raises(LossInputError):
            identify(estimator(k2), **knobs)  # type: ignore[arg-type]


def test_the_expectation_is_a_sum_over_outcomes() -> None:
    """−lp of two tokens with probabilities p and 1 − p: the entropy, with the expected gradient 0."""
    policy = example_policy(3, vocabulary=2)
    p = policy.logits[0].detach().softmax(0).tolist()
    found = expectation(lambda lp, ref, sampler: -lp, policy, policy, policy)
    assert found.value == pytest.approx(-math.fsum(x * math.log(x) for x in p), abs=1e-15)
    assert found.gradient.abs().max() < 1e-15


# Order and messages


def test_a_penalty_comes_last_and_only_once_to_the_reference() -> None:
    to_sampler = with_kl(ppo(), 0.1, k_squared, kl_to="sampler_logprobs")
    assert to_sampler.reads == ("advantages", "old_logprobs", "sampler_logprobs")
    both = with_kl(lossfns.with_tis(ppo()), 0.1, k_squared, kl_to="sampler_logprobs")
    assert with_kl(both, 0.1).reads == ("advantages", "old_logprobs", "sampler_logprobs", "ref_logprobs")
    for build in (
        lambda: lossfns.with_tis(with_kl(ppo(), 0.1, kl_to="old_logprobs")),
        lambda: lossfns.with_dual_clip(to_sampler),
        lambda: lossfns.with_rollout_weight(to_sampler, lossfns.rollout.ratio()),
        lambda: with_kl(with_kl(ppo(), 0.1), 0.1, kl_to="old_logprobs"),
    ):
        with pytest.raises(LossInputError, match="Apply with_kl last"):
            build()


def test_every_row_of_a_table_has_the_cells_of_its_head() -> None:
    """A bar within a cell, as in |d|, ends it: the rest of the row is not shown."""
    root, tables = Path(__file__).parents[1], 0
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text = re.sub(r"(?ms)^```.*?^```", "", path.read_text(encoding="utf-8"))
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            rows = table.splitlines()
            bars = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
            uneven = [row for row, count in zip(rows, bars, strict=True) if count != bars[0]]
            assert not uneven, (path.name, uneven)
            tables += 1
    assert tables > 20
