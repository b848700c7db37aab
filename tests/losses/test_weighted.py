"""Losses −c·A·lp with a mask, and their kin, by hand. The batch is that of the policy losses.

Its ratios are 1.5 and 0.5 with advantage 1, and 0.5 with advantage −1. To the sampler they are 4.5, 0.5 and 0.25.
"""

import math

import pytest
from batches import Batch, call
from test_policy import BATCH, LN

import lossfns
from lossfns import Loss

OPPOSITE = Batch(BATCH.logprobs, BATCH.weights, {**BATCH.columns, "advantages": [[9.0, -1.0, -1.0], [1.0]]})


def test_rollout_is_masks_a_token_outside_the_bounds() -> None:
    """0.25 is below 0.4: −(−4.5 − 0.5 + 0)/3; gradients −4.5/3, −0.5/3 and none."""
    value, gradients, metrics = call(lossfns.rollout_is(clip=(0.4, 5.0)), BATCH)
    assert value == pytest.approx(5 / 3)
    assert gradients == [pytest.approx([0.0, -1.5, -0.5 / 3]), [0.0]]
    assert (metrics["masked"], metrics["ratio"]) == pytest.approx((1 / 3, 5.25 / 3))
    assert "kl_sampler" in metrics and "kl_old" not in metrics


@pytest.mark.parametrize("clip", [(1.0, 1.2), (0.8, 1.0), (1.0, 1.0)])
def test_rollout_is_keeps_a_token_on_a_bound(clip: tuple[float, float]) -> None:
    """A ratio of 1, which is exact in floats, and one of ½ far below."""
    columns = {"advantages": [[1.0, 1.0]], "sampler_logprobs": [[-1.0, -2.0 + LN(2)]]}
    value, gradients, metrics = call(lossfns.rollout_is(clip=clip), Batch([[-1.0, -2.0]], [[1.0, 1.0]], columns))
    assert (value, gradients, metrics["masked"]) == (0.5, [[-0.5, 0.0]], 0.5)


def test_a_capped_ratio_has_no_gradient_for_either_sign_of_the_advantage() -> None:
    """4.5 → 2: −(2 + 0.5 − 0.25)/3; gradients 0, −0.5/3, 0.25/3. With the opposite advantages, the opposite."""
    value, gradients, metrics = call(lossfns.capped_importance_sampling(), BATCH)
    assert value == pytest.approx(-0.75)
    assert gradients == [pytest.approx([0.0, 0.0, -0.5 / 3]), pytest.approx([0.25 / 3])]
    assert metrics["bound_high"] == pytest.approx(1 / 3)
    value, gradients, _ = call(lossfns.capped_importance_sampling(), OPPOSITE)
    assert value == pytest.approx(0.75)
    assert gradients[0] == pytest.approx([0.0, 0.0, 0.5 / 3])


def test_opmd_is_a_fraction_of_reinforce() -> None:
    """τ = 0.5: (1 + 1 − 2)/3 and gradients −A/3, divided by 1.5."""
    value, gradients, metrics = call(lossfns.opmd(tau=0.5), BATCH)
    assert value == pytest.approx(0)
    assert gradients == [pytest.approx([0.0, -1 / 4.5, -1 / 4.5]), pytest.approx([1 / 4.5])]
    assert metrics["nll"] == pytest.approx(4 / 3)


@pytest.mark.parametrize(
    ("loss", "kept"),
    [
        (lossfns.rec(), (False, True, False)),
        (lossfns.rec(region=lossfns.two_side), (False, False, False)),
        (lossfns.rec(region=lossfns.two_side, clip=(0.4, 1.2)), (False, True, True)),
        (lossfns.rec(clip=(0.0, math.inf)), (True, True, True)),
        (lossfns.rec(level=lossfns.geometric_level), (True, True, False)),
        (lossfns.rec(level=lossfns.sequence_level, clip=(0.8, 1.0)), (True, True, False)),
        (lossfns.rec_ring(outer_clip=(0.6, 1.4)), (False, True, False)),
        (lossfns.rec_ring(outer_clip=(0.4, 1.4)), (False, False, False)),
    ],
    ids=repr,
)
def test_the_regions_of_rec(loss: Loss, kept: tuple[bool, ...]) -> None:
    """Gradients −A/3 of 1.5 and 0.5 with A = 1, and of 0.5 with A = −1, where the region keeps a token.

    PPO's bounds (0.8, 1.2) keep the second. Of the sequence, √0.75 = 0.87 and 0.75 are below the upper bound.
    """
    value, gradients, metrics = call(loss, BATCH)
    first, second, third = kept
    assert value == pytest.approx((first + second - 2 * third) / 3)
    assert gradients == [pytest.approx([0.0, -first / 3, -second / 3]), pytest.approx([third / 3])]
    assert metrics["masked"] == pytest.approx(1 - sum(kept) / 3)


def test_the_ring_keeps_a_far_ratio_that_the_advantage_pulls_back() -> None:
    """With A = −1, 1.5 is above the outer 1.4, and 0.5 is below the inner 0.8; with A = 1, 0.5 is below 0.6."""
    _, gradients, metrics = call(lossfns.rec_ring(outer_clip=(0.6, 1.4)), OPPOSITE)
    assert gradients == [pytest.approx([0.0, 1 / 3, 0.0]), pytest.approx([-1 / 3])]
    assert metrics["masked"] == pytest.approx(1 / 3)


def test_rec_with_importance_sampling_has_the_gradient_of_ppo() -> None:
    """The value differs: −r·A·lp has another value than −r·A."""
    for batch in (BATCH, OPPOSITE):
        value, gradients, _ = call(lossfns.rec(is_weight=lossfns.ratio_weight), batch)
        assert gradients == [pytest.approx(row) for row in call(lossfns.ppo(), batch)[1]]
    assert value != pytest.approx(call(lossfns.ppo(), OPPOSITE)[0])


def test_rec_with_the_squared_log_ratio_of_kimi() -> None:
    """with_kl adds c·d² to every token, masked or not: Trinity's k2 has no ½, so kl_beta is 2·c."""
    old = {**BATCH.columns, "ref_logprobs": BATCH.columns["old_logprobs"]}
    loss = lossfns.with_kl(lossfns.rec(), kl_beta=2 * 0.3, kl=lossfns.k2)
    value, gradients, _ = call(loss, Batch(BATCH.logprobs, BATCH.weights, old))
    near, far = LN(1.5), LN(0.5)
    assert value == pytest.approx((1 + 0.3 * (near**2 + 2 * far**2)) / 3)
    assert gradients[0] == pytest.approx([0.0, 0.6 * near / 3, (-1 + 0.6 * far) / 3])


def test_sppo_takes_the_log_ratio_where_the_ratio_is_near() -> None:
    """Only 1.5 lies within (0.6, 1.6): −ln 1.5 / 3, and its gradient is −1/3 without the ratio as a factor."""
    value, gradients, metrics = call(lossfns.sppo_token(clip=(0.6, 1.6)), BATCH)
    assert value == pytest.approx(-LN(1.5) / 3)
    assert gradients == [pytest.approx([0.0, -1 / 3, 0.0]), [0.0]]
    assert metrics["masked"] == pytest.approx(2 / 3)
