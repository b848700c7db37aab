"""Masks and trust regions by hand: probabilities and ratios that can be redone on paper."""

import math
from random import Random
from typing import Any

import pytest
import torch
from batches import Batch, apart, call, random_batch

import lossfns
from lossfns import LossInputError, Tokens
from lossfns.losses.trust import discounted_future

LN = math.log


def tokens(p: list[float], old: list[float], advantages: list[float], column: str = "old_logprobs") -> Batch:
    """One sequence of tokens with these probabilities."""
    rows = [[LN(x) for x in p]], [[1.0] * len(p)]
    return Batch(*rows, {"advantages": [advantages], column: [[LN(x) for x in old]]})


def ratios(*sequences: tuple[list[float], float]) -> Batch:
    """Sequences by the ratios of their tokens and by their advantage. All logprobs are −2."""
    columns = {
        "advantages": [[a] * len(rs) for rs, a in sequences],
        "old_logprobs": [[-2.0 - LN(r) for r in rs] for rs, _ in sequences],
    }
    columns["sampler_logprobs"] = columns["old_logprobs"]
    return Batch([[-2.0] * len(rs) for rs, _ in sequences], [[1.0] * len(rs) for rs, _ in sequences], columns)


MOVED = tokens([0.5, 0.3, 0.1, 0.1], [0.2, 0.2, 0.4, 0.4], [1.0, 1.0, -1.0, 1.0])
"""p − p_old = 0.3, 0.1, −0.3, −0.3. The ratio 1.5 of the second is one that PPO clips."""


@pytest.mark.parametrize("loss", [lossfns.dppo_tv(), lossfns.dppo_kl()], ids=str)
def test_dppo_drops_what_leaves_the_trust_region(loss: lossfns.Loss) -> None:
    """The first rises by 0.3 with A > 0, the third falls by 0.3 with A < 0, the fourth with A > 0: −(1.5 + ¼) / 4.

    The binary KLs are 0.2·ln 0.4 + 0.8·ln 1.6 = 0.19, then 0.026, and 0.4·ln 4 + 0.6·ln(2/3) = 0.31 twice: the same two
    are above 0.05.
    """
    value, gradients, metrics = call(loss, MOVED)
    assert value == pytest.approx(-1.75 / 4)
    assert gradients == [pytest.approx([0.0, -1.5 / 4, 0.0, -0.25 / 4])]
    assert metrics["tv_masked" if loss.name == "dppo_tv" else "divergence_masked"] == 0.5


def test_the_form_of_verl_has_another_value_and_the_same_gradient() -> None:
    """−(1.5·ln 0.3 + 0.25·ln 0.1) / 4: the weight min(r, 20) is a constant."""
    for mask, preset in (
        (lossfns.with_tv_mask, lossfns.dppo_tv),
        (lossfns.with_binary_kl_mask, lossfns.dppo_kl),
    ):
        value, gradients, _ = call(mask(lossfns.cispo(clip=(0.0, 20.0))), MOVED)
        assert value == pytest.approx(-(1.5 * LN(0.3) + 0.25 * LN(0.1)) / 4)
        assert gradients == [pytest.approx(row) for row in call(preset(), MOVED)[1]]


def test_opsm_drops_a_sequence_with_a_negative_advantage_that_became_unlikely() -> None:
    """Falls: (ln 2 + 0) / 2 = 0.35, −ln 1.1 and −ln 0.9. The first is dropped, the last has A > 0: (0 + 1.1 − 0.9) / 3.

    With δ = 0.4 the first stays: its ratio 0.5 is cut to 0.8, so the mean of its tokens is 0.9.
    """
    batch = ratios(([0.5, 1.0], -1.0), ([1.1], -1.0), ([0.9], 1.0))
    value, gradients, metrics = call(lossfns.opsm(), batch)
    assert value == pytest.approx(0.2 / 3)
    assert gradients == [[0.0, 0.0], [pytest.approx(1.1 / 3)], [pytest.approx(-0.9 / 3)]]
    assert metrics["opsm_masked"] == 0.5
    assert call(lossfns.opsm(delta=0.4), batch)[0] == pytest.approx(1.1 / 3)


def test_opsm_may_compare_with_the_sampler() -> None:
    """The old policy is the current one, and the sampler had made both tokens twice as likely."""
    batch = ratios(([0.5, 0.5], -1.0))
    batch.columns["old_logprobs"] = batch.logprobs
    loss = lossfns.with_opsm(lossfns.ppo(), behaviour="sampler_logprobs")
    assert call(loss, batch)[0] == 0 and call(lossfns.with_opsm(lossfns.ppo()), batch)[0] == 1
    with pytest.raises(LossInputError, match="behaviour"):
        lossfns.with_opsm(lossfns.ppo(), behaviour="ref_logprobs")


def test_vaco_keeps_the_tokens_that_return_to_the_old_policy() -> None:
    """Mean |r − 1| = (0.5 + 0.1) / 2 = 0.3. With A > 0 the ratio 1.5 moves away and is dropped: −0.9 / 2."""
    batch = ratios(([1.5, 0.9], 1.0))
    value, gradients, metrics = call(lossfns.with_vaco_mask(lossfns.importance_sampling(), delta=0.2), batch)
    assert value == pytest.approx(-0.45) and gradients == [pytest.approx([0.0, -0.45])]
    assert metrics["vaco_masked"] == 0.5
    assert call(lossfns.with_vaco_mask(lossfns.importance_sampling(), delta=0.4), batch)[0] == pytest.approx(-1.2)


@pytest.mark.parametrize("mask", ["with_tv_mask", "with_binary_kl_mask", "with_opsm"])
def test_a_mask_comes_before_the_penalty(mask: str) -> None:
    """A KL penalty holds masked tokens too."""
    with pytest.raises(LossInputError, match="ref_logprobs"):
        getattr(lossfns, mask)(lossfns.grpo())


def test_ce_gppo_keeps_a_bounded_gradient_beyond_the_bounds() -> None:
    """−1.2 for r = 1.5 and A = 1, 0.75·0.8 = 0.6 for r = 0.5 and A = −1; inside 1.5 and −2·0.5: their sum is −0.1.

    Gradients are the same numbers, since each term is a constant times r, or times r/sg(r), whose slope in lp is 1.
    """
    value, gradients, metrics = call(
        lossfns.ce_gppo(), ratios(([1.5], 1.0), ([0.5], -1.0), ([1.5], -1.0), ([0.5], 2.0))
    )
    assert value == pytest.approx(-0.1 / 4)
    assert [g for (g,) in gradients] == pytest.approx([-1.2 / 4, 0.6 / 4, 1.5 / 4, -1.0 / 4])
    assert (metrics["beyond_low"], metrics["beyond_high"]) == (0.25, 0.25)


def test_fipo_weighs_a_token_by_what_follows() -> None:
    """With γ = ½ and d = (0, ln 1.21, 0): the sums are ln 1.1, ln 1.21 and 0, and f = 1.1, 1.2 (a bound) and 1.

    −(1.1 + 1.2·1.21 + 1) / 3. With A = −1 and a safety ratio of 1.2 the second f is 1.
    """
    batch = ratios(([1.0, 1.21, 1.0], 1.0))
    value, gradients, metrics = call(lossfns.fipo(half_life=1.0), batch)
    assert value == pytest.approx(-3.552 / 3)
    assert gradients == [pytest.approx([-1.1 / 3, -1.452 / 3, -1.0 / 3])]
    assert metrics["influence"] == pytest.approx(1.1)
    batch.columns["advantages"] = [[-1.0] * 3]
    assert call(lossfns.fipo(half_life=1.0, safety_ratio=1.2), batch)[0] == pytest.approx((1.1 + 1.21 + 1) / 3)
    # A token beyond the dual clip adds nothing to the sums.
    assert call(lossfns.fipo(half_life=1.0, dual_clip=1.2), batch)[2]["influence"] == 1


@pytest.mark.parametrize("half_life", [0.25, 3.0, 1000.0])
def test_a_discounted_sum_ends_with_its_sequence(half_life: float) -> None:
    lengths = [3, 1, 70, 5]
    x = torch.randn(sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = discounted_future(Tokens(x, torch.ones_like(x), torch.tensor(lengths)), x, half_life)
    expected = []
    for row in torch.split(x, lengths):
        for i in range(len(row)):
            expected.append(sum(0.5 ** ((j - i) / half_life) * row[j].item() for j in range(i, len(row))))
    assert apart(found.tolist(), expected) < 1e-14


def test_the_losses_of_prime_add_a_penalty_at_every_token() -> None:
    """p − p_sampler = 0.3 and 0.08, ratios 2.5 and 1.4: the first is dropped, and both have 0.1·(ln r)²."""
    batch = tokens([0.5, 0.28], [0.2, 0.2], [1.0, 1.0], "sampler_logprobs")
    for loss in (
        lossfns.prime_dppo(adv_tau=2.0, kl_tau=0.1),
        lossfns.prime_symmetric(adv_tau=2.0, kl_tau=0.1),
    ):
        value, gradients, metrics = call(loss, batch)
        assert value == pytest.approx((0.1 * LN(2.5) ** 2 + 0.1 * LN(1.4) ** 2 - 2.8) / 2)
        assert gradients == [pytest.approx([0.2 * LN(2.5) / 2, (0.2 * LN(1.4) - 2.8) / 2])]
        assert metrics["tv_masked"] == 0.5
    batch.columns["advantages"] = [[-1.0, -1.0]]  # a rise with A < 0 leaves only the symmetric region
    assert call(lossfns.prime_dppo(), batch)[2]["tv_masked"] == 0
    assert call(lossfns.prime_symmetric(), batch)[2]["tv_masked"] == 0.5


def test_prime_distils_by_a_policy_gradient() -> None:
    """A = ln(0.6 / 0.3) = ln 2 and r = 1.5. The second token fell by 0.3 and keeps its penalty alone."""
    batch = tokens([0.3, 0.1], [0.2, 0.4], [0.0, 0.0], "sampler_logprobs")
    batch.columns["ref_logprobs"] = [[LN(0.6), LN(0.6)]]
    value, gradients, _ = call(lossfns.prime_ref_kl(kl_tau=0.1), batch)
    assert value == pytest.approx((0.1 * LN(1.5) ** 2 - 1.5 * LN(2) + 0.1 * LN(4) ** 2) / 2)
    assert gradients == [pytest.approx([(0.2 * LN(1.5) - 1.5 * LN(2)) / 2, -0.2 * LN(4) / 2])]


def test_a2po_fits_the_log_ratio_to_the_optimal_advantage() -> None:
    """(0.5·(0.4 + 0.6) − (1 − 0.25))² = 0.0625; the gradient is 2·(−0.25)·0.5 at both tokens."""
    columns: dict[str, Any] = {"ref_logprobs": [[-1.4, -2.6]], "rewards": [[1.0] * 2], "reference_point": [[0.25] * 2]}
    value, gradients, metrics = call(lossfns.a2po(beta=0.5), Batch([[-1.0, -2.0]], [[1.0, 1.0]], columns))
    assert value == pytest.approx(0.0625) and gradients == [pytest.approx([-0.25, -0.25])]
    assert (metrics["log_ratio"], metrics["advantage"]) == pytest.approx((1.0, 0.75))


def test_masked_combinators_equal_their_presets() -> None:
    """On a random batch: opsm is with_opsm(ppo), and dppo_tv is with_tv_mask(importance_sampling)."""
    batch = random_batch(Random(4))
    mean = lossfns.sequence_mean
    for preset, made in (
        (lossfns.opsm(), lossfns.with_opsm(lossfns.ppo(weigh=mean))),
        (lossfns.dppo_tv(weigh=mean), lossfns.with_tv_mask(lossfns.importance_sampling(weigh=mean))),
    ):
        assert call(preset, batch)[:2] == call(made, batch)[:2]
