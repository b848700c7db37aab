"""DPO and ORPO by hand."""

import math

import pytest
from batches import Batch, call

import lossfns


def pair(chosen: list[float], rejected: list[float], ref: tuple[list[float], list[float]] | None = None) -> Batch:
    rows = [[-7.0, *chosen], [-7.0, *rejected]]
    refs = [[-1.0, *r] for r in ref] if ref else [[-1.0] * len(row) for row in rows]
    return Batch(rows, [[0.0] + [1.0] * (len(row) - 1) for row in rows], {"ref_logprobs": refs})


def joined(a: Batch, b: Batch) -> Batch:
    ref = {"ref_logprobs": a.columns["ref_logprobs"] + b.columns["ref_logprobs"]}
    return Batch(a.logprobs + b.logprobs, a.weights + b.weights, ref)


def test_dpo() -> None:
    """Chosen −1 − 2 against −2 − 2: +1. Rejected −3 against −2: −1. Margin 2, β = ½: −log σ(1) = 0.31326.

    Gradient ∓β·(1 − σ(1)) at every response token.
    """
    batch = pair([-1.0, -2.0], [-3.0], ([-2.0, -2.0], [-2.0]))
    value, gradients, metrics = call(lossfns.dpo(beta=0.5), batch)
    pull = 0.5 / (1 + math.e)
    assert value == pytest.approx(math.log1p(math.exp(-1)))
    assert gradients == [pytest.approx([0.0, -pull, -pull]), pytest.approx([0.0, pull])]
    assert (metrics["margin"], metrics["reward_margin"], metrics["accuracy"]) == (2.0, 1.0, 1.0)
    assert metrics["pairs"] == 1 and metrics["sequences"] == 2


def test_dpo_at_the_reference_is_log_2_with_accuracy_one_half() -> None:
    same = pair([-1.0], [-3.0], ([-1.0], [-3.0]))
    value, _, metrics = call(lossfns.dpo(), same)
    assert value == pytest.approx(math.log(2)) and metrics["accuracy"] == 0.5


def test_swapping_the_pair_mirrors_the_loss() -> None:
    """L_swap − L = β·m, and e^−L + e^−L_swap = 1."""
    batch = pair([-1.0, -2.0], [-3.0], ([-2.0, -2.0], [-2.0]))
    value, _, metrics = call(lossfns.dpo(beta=0.5), batch)
    swapped, _, _ = call(lossfns.dpo(beta=0.5), batch.take([1, 0]))
    assert swapped - value == pytest.approx(0.5 * metrics["margin"])
    assert math.exp(-value) + math.exp(-swapped) == pytest.approx(1)


def test_half_label_smoothing_is_symmetric() -> None:
    batch = pair([-1.0, -2.0], [-3.0], ([-2.0, -2.0], [-2.0]))
    loss = lossfns.dpo(label_smoothing=0.5)
    assert call(loss, batch)[0] == pytest.approx(call(loss, batch.take([1, 0]))[0])


def test_orpo() -> None:
    """Mean logprobs ln ½ and ln ⅓: log-odds 0 and −ln 2, Δ = ln 2, σ(Δ) = ⅔.

    Value ln 2 + λ·ln 3/2. Gradients, with λ = 2: chosen −1 − 2·⅓·1/(1 − ½) = −7/3 over its 2 tokens;
    rejected 2·⅓·1/(1 − ⅓) = 1.
    """
    batch = pair([math.log(0.25), 0.0], [-math.log(3)])
    value, gradients, metrics = call(lossfns.orpo(lam=2.0), batch)
    assert value == pytest.approx(math.log(2) + 2 * math.log(1.5))
    assert gradients == [pytest.approx([0.0, -7 / 6, -7 / 6]), pytest.approx([0.0, 1.0])]
    assert metrics["log_odds_ratio"] == pytest.approx(math.log(2)) and metrics["nll"] == pytest.approx(math.log(2))


def test_orpo_of_an_even_pair_is_its_nll_and_lambda_log_2() -> None:
    value, _, metrics = call(lossfns.orpo(lam=0.3), pair([-2.0, -2.0], [-2.0]))
    assert value == pytest.approx(2 + 0.3 * math.log(2)) and metrics["accuracy"] == 0.5
    assert call(lossfns.orpo(lam=0.0), pair([-2.0], [-1.0]))[0] == pytest.approx(2.0)


def test_fractional_weights_act_as_true_weights() -> None:
    """DPO sums w·(lp − ref); ORPO averages Σ w·lp / Σ w."""
    batch = Batch([[-1.0, -3.0], [-2.0]], [[0.5, 2.0], [1.0]], {"ref_logprobs": [[-2.0, -4.0], [-2.0]]})
    assert call(lossfns.dpo(), batch)[2]["margin"] == pytest.approx(2.5)
    assert call(lossfns.orpo(lam=0.0), batch)[0] == pytest.approx(6.5 / 2.5)


def test_pairs_average_and_sum() -> None:
    one, two = pair([-1.0], [-3.0]), pair([-2.0], [-1.5])
    both = joined(one, two)
    a, b = call(lossfns.dpo(), one)[0], call(lossfns.dpo(), two)[0]
    assert call(lossfns.dpo(), both)[0] == pytest.approx((a + b) / 2)
    assert call(lossfns.dpo(weigh=lossfns.pair_sum), both)[0] == pytest.approx(a + b)


def test_a_masked_pair_is_inert_and_a_pair_with_one_side_is_refused() -> None:
    one, two = pair([-1.0], [-3.0]), pair([-2.0], [-1.5])
    both = joined(one, two)
    both.weights[2:] = [[0.0, 0.0], [0.0, 0.0]]
    for loss in (lossfns.dpo(), lossfns.orpo()):
        value, gradients, metrics = call(loss, both)
        assert value == pytest.approx(call(loss, one)[0])
        assert gradients[2:] == [[0.0, 0.0], [0.0, 0.0]] and metrics["pairs"] == 1
        both.weights[3] = [0.0, 1.0]
        with pytest.raises(lossfns.LossInputError, match=r"datum\[2\].weights: .* chosen side of pair 1"):
            call(loss, both)
        both.weights[3] = [0.0, 0.0]
