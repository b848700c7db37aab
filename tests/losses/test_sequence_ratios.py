"""Losses with one ratio for each sequence, and with a constant length, by hand. The batch is that of the policy losses.

Its ratios are 1.5 and 0.5 with advantage 1, and 0.5 with advantage −1.
"""

import math

import pytest
from batches import Batch, call
from test_policy import BATCH, LN

import lossfns


def test_dr_grpo_divides_by_one_length_for_each_sequence() -> None:
    """ppo's terms 1.2, 0.5 and −0.8, over 2 sequences of length 4: −0.9 / 8; the one gradient is −0.5 / 8."""
    value, gradients, metrics = call(lossfns.dr_grpo(weigh=lossfns.fixed_length(4)), BATCH)
    assert value == pytest.approx(-0.9 / 8)
    assert gradients == [pytest.approx([0.0, 0.0, -0.5 / 8]), [0.0]]
    assert metrics["denominator"] == 8


def test_bnpo_divides_each_call_by_its_own_tokens() -> None:
    """Terms 1.2 and 0.5, and −0.8: alone −1.7/2 and 0.8; as parts of one batch of 3 tokens −1.7/3 and 0.8/3."""
    parts = [BATCH.take([0]), BATCH.take([1])]
    assert [call(lossfns.bnpo(), part)[0] for part in parts] == pytest.approx([-0.85, 0.8])
    assert [call(lossfns.bnpo(), part, denominator=3.0)[0] for part in parts] == pytest.approx([-1.7 / 3, 0.8 / 3])


def test_luspo_weighs_a_sequence_by_its_length() -> None:
    """s₁ = √0.75, s₂ = ½, unclipped: −(2·s₁ − s₂)/2. Each of two tokens has ∂s₁ = s₁/2, so −s₁/2; the last 0.5/2."""
    s = math.sqrt(0.75)
    value, gradients, _ = call(lossfns.luspo(clip=(0.0, 10.0)), BATCH)
    assert value == pytest.approx(-(2 * s - 0.5) / 2)
    assert gradients == [pytest.approx([0.0, -s / 2, -s / 2]), pytest.approx([0.25])]


def test_rloo_clips_the_product_of_the_ratios() -> None:
    """s₁ = 1.5·0.5 = 0.75 with A = 1 is not clipped, s₂ = 0.5 with A = −1 is, to 0.8: −(0.75 − 0.8)/2.

    Each token of the first sequence has ∂s₁ = s₁, over 2 sequences.
    """
    value, gradients, metrics = call(lossfns.rloo(), BATCH)
    assert value == pytest.approx(0.025)
    assert gradients == [pytest.approx([0.0, -0.375, -0.375]), [0.0]]
    assert metrics["ratio"] == pytest.approx((0.75 * 2 + 0.5) / 3)
    assert (metrics["clip_low"], metrics["clip_high"]) == pytest.approx((1 / 3, 0))


def test_gmpo_clips_each_ratio_before_the_geometric_mean() -> None:
    """1.5 → 1.2, since A > 0, and 0.5 stays: s₁ = √0.6. With A < 0, 0.5 → 0.8 = s₂. −(√0.6 − 0.8)/2.

    Only the ratio that is not clipped has a gradient: −s₁/2 over 2 sequences.
    """
    s = math.sqrt(0.6)
    value, gradients, metrics = call(lossfns.gmpo(clip=(0.8, 1.2)), BATCH)
    assert value == pytest.approx(-(s - 0.8) / 2)
    assert gradients == [pytest.approx([0.0, 0.0, -s / 4]), [0.0]]
    assert metrics["ratio"] == pytest.approx((2 * s + 0.8) / 3)
    assert (metrics["clip_low"], metrics["clip_high"]) == pytest.approx((1 / 3, 1 / 3))


def test_gmpo_has_the_bounds_of_its_paper_and_of_verl() -> None:
    """verl's ±0.2 in log space, on ratios e^0.3 and e^−0.3 with A = 1: −e^((0.2 − 0.3)/2). The paper's ±0.4: −1."""
    columns = {"advantages": [[1.0, 1.0]], "old_logprobs": [[-1.3, -0.7]]}
    batch = Batch([[-1.0, -1.0]], [[1.0, 1.0]], columns)
    assert call(lossfns.gmpo(clip=(math.exp(-0.2), math.exp(0.2))), batch)[0] == pytest.approx(-math.exp(-0.05))
    assert call(lossfns.gmpo(), batch)[0] == pytest.approx(-1)
    assert lossfns.gmpo().knobs["clip"] == pytest.approx((0.670, 1.492), abs=5e-4)


def test_gmpo_without_a_lower_bound() -> None:
    """−(√0.6 − 0.5)/2: log 0 is −∞, and nothing is below it."""
    assert call(lossfns.gmpo(clip=(0.0, 1.2)), BATCH)[0] == pytest.approx(-(math.sqrt(0.6) - 0.5) / 2)


def test_cispo_with_one_ratio_for_each_sequence() -> None:
    """√0.75 → 0.7, twice, and ½: −(−0.7 − 0.7 + 0.5·2)/3; gradients −0.7/3 and 0.5/3."""
    value, gradients, metrics = call(lossfns.cispo_sequence(clip=(0.0, 0.7)), BATCH)
    assert value == pytest.approx(0.4 / 3)
    assert gradients == [pytest.approx([0.0, -0.7 / 3, -0.7 / 3]), pytest.approx([0.5 / 3])]
    assert (metrics["bound_low"], metrics["bound_high"]) == pytest.approx((0, 2 / 3))


def test_cispo_with_the_absolute_cap_of_trl() -> None:
    """epsilon_high = 0.2 caps each ratio here: −0.2·(−1 − 1 + 2)/3; gradients −0.2·A/3."""
    value, gradients, metrics = call(lossfns.cispo(clip=(0.0, 0.2)), BATCH)
    assert value == pytest.approx(0)
    assert gradients == [pytest.approx([0.0, -0.2 / 3, -0.2 / 3]), pytest.approx([0.2 / 3])]
    assert metrics["bound_high"] == 1


def test_the_weights_of_vespo() -> None:
    """s₁ = 0.75 with A = 1: φ₁ = 0.75²·e^(3·0.25). s₂ = 0.5 with A = −1: φ₂ = 0.5³·e^(2·0.5).

    −(−2·φ₁ + 2·φ₂)/3, since lp is −1 twice and −2; gradients −φ₁/3 and φ₂/3.
    """
    up, down = 0.75**2 * math.exp(0.75), 0.125 * math.e
    value, gradients, metrics = call(lossfns.vespo(), BATCH)
    assert value == pytest.approx((2 * up - 2 * down) / 3)
    assert gradients == [pytest.approx([0.0, -up / 3, -up / 3]), pytest.approx([down / 3])]
    assert metrics["coefficient"] == pytest.approx((2 * up + down) / 3)


@pytest.mark.filterwarnings("ignore:.*log-ratio.*")
@pytest.mark.parametrize("cap", [20.0, None])
def test_a_far_sequence_has_no_weight_in_vespo(cap: float | None) -> None:
    """φ(s) → 0 for s = e^899, which is inf in floats, and for s = e^−899."""
    columns = {"advantages": [[1.0], [-1.0]], "old_logprobs": [[-900.0], [-1.0]]}
    batch = Batch([[-1.0], [-900.0]], [[1.0], [1.0]], columns)
    value, gradients, metrics = call(lossfns.vespo(log_ratio_cap=cap), batch)
    assert value == pytest.approx(0, abs=1e-20) and metrics["coefficient"] == pytest.approx(0, abs=1e-20)
    assert [x for row in gradients for x in row] == pytest.approx([0, 0], abs=1e-20)


def test_topr_tapers_the_negative_sequence_alone() -> None:
    """1 where A > 0, and min(0.5, 1): (1 + 1 − 0.5·2)/2; gradients −1/2, −1/2 and 0.5/2."""
    value, gradients, metrics = call(lossfns.topr(), BATCH)
    assert value == pytest.approx(0.5)
    assert gradients == [pytest.approx([0.0, -0.5, -0.5]), pytest.approx([0.25])]
    assert metrics["coefficient"] == pytest.approx(2.5 / 3)


def test_topr_takes_the_ratio_of_the_sequence_as_in_the_paper_or_of_each_token_as_in_trinity() -> None:
    """All advantages −1: the product is 0.75 at both tokens; by token 1.5 → 1, and 0.5. Over 2 sequences."""
    negative = [[-1.0, -1.0, -1.0], [-1.0]]
    batch = Batch(BATCH.logprobs, BATCH.weights, {**BATCH.columns, "advantages": negative})
    assert call(lossfns.topr(), batch)[1][0] == pytest.approx([0.0, 0.375, 0.375])
    assert call(lossfns.topr(level=lossfns.token_level), batch)[1][0] == pytest.approx([0.0, 0.5, 0.25])


def test_the_samplers_logprobs_bound_as_old_make_vespo_correct_for_both() -> None:
    """π / π_sampler of the second sequence is 0.5·0.5: φ = 0.25³·e^(2·0.75), as TRL folds the correction in."""
    batch = Batch(BATCH.logprobs, BATCH.weights, {**BATCH.columns, "old_logprobs": BATCH.columns["sampler_logprobs"]})
    assert call(lossfns.vespo(), batch)[1][1] == pytest.approx([0.25**3 * math.exp(1.5) / 3])
    assert batch.columns["old_logprobs"][1] == pytest.approx([-2.0 + 2 * LN(2)])
