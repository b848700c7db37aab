"""Preference losses by hand: one pair with rewards c = 1.5 and r = −1, and two pairs for losses of groups."""

import math
from random import Random
from typing import Any

import pytest
import torch
from batches import Batch, apart, call, derived_case, random_batch

import lossfns
from lossfns import LossInputError, Reward, datum_from_tokens, kto_reference_point, pair_from_tokens
from lossfns.loss import Loss
from lossfns.margins import LINKS, REWARDS
from lossfns.testing.oracle import rewards as oracle_rewards


def s(x: float) -> float:
    """σ(x)."""
    return 1 / (1 + math.exp(-x))


def f(x: float) -> float:
    """−log σ(x)."""
    return math.log1p(math.exp(-x))


def dot(x: float) -> float:
    """σ′(x)."""
    return s(x) * s(-x)


def pair(**columns: float) -> Batch:
    """Chosen: −1 and −0.5 against −2 and −1. Rejected: −3 against −2. The first slot of both sides is masked."""
    more = {name: [[x] * 3, [x] * 2] for name, x in columns.items()}
    ref = {"ref_logprobs": [[-1.0, -2.0, -1.0], [-1.0, -2.0]]}
    return Batch([[-7.0, -1.0, -0.5], [-7.0, -3.0]], [[0.0, 1.0, 1.0], [0.0, 1.0]], ref | more)


E = math.e
S, T = s(1), s(-1)
M_JS = math.log(s(1.5) / s(-1))
H_CHI = 0.1 * (E**1.5 + 1.5 - 1 / E + 1)
H_ALPHA = 0.1 * (E**3 - E**0.75)

BY_HAND: list[tuple[Loss, float, float, float]] = [
    # m = 2.5, and h = β·m = 1 where β = 0.4
    (lossfns.ipo(beta=0.25), 0.25, 1.0, -1.0),  # (2.5 − 2)², slope 2·½: beyond its target, the margin is reduced
    (lossfns.hinge(beta=0.2), 0.5, -0.2, 0.2),  # 1 − ½
    (lossfns.hinge(beta=0.5), 0.0, 0.0, 0.0),  # 1 − 1.25 is below 0
    # (¾·f(1) − ¼·f(−1)) / ½ with f(−1) = f(1) + 1; slope (−¾·T − ¼·S) / ½
    (lossfns.robust_dpo(beta=0.4, flip_rate=0.25), f(1) - 0.5, -0.4 * (0.5 + T), 0.4 * (0.5 + T)),
    # Slope of the KL in h: S·T·(log(S/¾) − log(T/¼)), where log(S/T) = 1
    (
        lossfns.exo(beta=0.4, epsilon=0.25),
        S * math.log(S / 0.75) + T * math.log(T / 0.25),
        0.4 * S * T * (1 - math.log(3)),
        -0.4 * S * T * (1 - math.log(3)),
    ),
    (lossfns.gpo(beta=0.2), 0.25, -0.2, 0.2),  # (1 − ½)², slope −2·½·β
    (
        lossfns.discopop(beta=0.4, discopop_tau=1.0),
        T * f(1) + S / E,
        0.4 * (-S * T * f(1) - T * T + S * T / E - S / E),
        -0.4 * (-S * T * f(1) - T * T + S * T / E - S / E),
    ),
    (lossfns.spo(beta=0.4), -S, -0.4 * (S + S * T), 0.4 * (S + S * T)),
    (lossfns.focal_po(beta=0.4, gamma=1.0), S * f(1), 0.4 * S * T * (f(1) - 1), -0.4 * S * T * (f(1) - 1)),
    (lossfns.f_dpo(beta=1.0), f(M_JS), -s(-M_JS) * s(-1.5), s(-M_JS) * s(1)),  # d log σ(x)/dx = σ(−x)
    (lossfns.chi_po(beta=0.1), f(H_CHI), -0.1 * s(-H_CHI) * (E**1.5 + 1), 0.1 * s(-H_CHI) * (1 / E + 1)),
    (lossfns.chi_po(beta=0.1, reward_bound=0.25), f(0.5), 0.0, 0.0),  # h is clamped to 2·¼
    (lossfns.nca(beta=1.0), f(1.5) + f(-1.5) / 2 + f(1) / 2, -s(-1.5) + s(1.5) / 2, T / 2),
    (lossfns.bco_pair(beta=1.0), f(1.5) + f(1), -s(-1.5), T),
    (lossfns.sppo_hard(beta=0.5), 0.25, 1.0, 0.0),  # (1.5 − 1)² + (−1 + 1)²
    (lossfns.apo_zero(beta=1.0), s(-1.5) + s(-1), -dot(1.5), dot(1)),
    (lossfns.apo_down(beta=1.0), s(1.5) + s(-2.5), dot(1.5) - dot(2.5), dot(2.5)),
    (lossfns.cal_dpo(beta=0.5), f(2.5) + 0.25, 1 - s(-2.5), s(-2.5)),
    (lossfns.c2_dpo(beta=0.4, lam=2.0), f(1) + 0.5, 2 - 0.4 * T, 2 + 0.4 * T),  # 2·(1.5 − 1)², slope 4·½
    (lossfns.dpop(beta=0.4, lam=2.0), f(1), -0.4 * T, 0.4 * T),  # c is above 0
    (lossfns.odpo(beta=0.4), math.log(2), -0.2, 0.2),  # h − 1 = 0
    (lossfns.r_dpo(beta=0.4, alpha=1.0), f(2), -0.4 * s(-2), 0.4 * s(-2)),  # h + (2 − 1)
    (lossfns.minor_dpo(beta=0.4), f(0.6), -0.4 * s(-0.6), 0.0),  # 0.4·(1.5 − 0)
    (lossfns.dpo_shift(beta=0.4, lam=0.5), f(0.8), -0.4 * s(-0.8), 0.2 * s(-0.8)),  # 0.4·(1.5 + ½)
    (lossfns.bpo(beta=0.4, balance=0.5), f(0.2), 0.0, 0.2 * s(-0.2)),  # min(1.5, ½·1)
    # Σp² = ½: v_c = e^(−0.75)·2, v_r = e^(−3)·2
    (lossfns.wpo(beta=0.4), 4 * E**-3.75 * f(1), -1.6 * E**-3.75 * T, 1.6 * E**-3.75 * T),
    # Without a reference: sums −1.5 and −3, means −0.75 and −3. The slope of a mean is over the 2 chosen tokens.
    (lossfns.simpo(beta=2.0, gamma=1.0), f(3.5), -s(-3.5), 2 * s(-3.5)),  # 2·2.25 − 1
    (
        lossfns.alphapo(beta=0.1, gamma=0.0, reward_alpha=1.0),
        f(H_ALPHA),
        -0.05 * s(-H_ALPHA) * E**0.75,
        0.1 * s(-H_ALPHA) * E**3,
    ),
    (lossfns.cpo(beta=0.4, nll_weight=2.0), f(0.6) + 3, -0.4 * s(-0.6) - 2, 0.4 * s(-0.6)),
    (lossfns.cpo(beta=0.4, nll=lossfns.logprob_mean), f(0.6) + 0.75, -0.4 * s(-0.6) - 0.5, 0.4 * s(-0.6)),
    # Length-normalised: m = 0.75 + 1
    (lossfns.dpo_norm(beta=1.0), f(1.75), -s(-1.75) / 2, s(-1.75)),
    (lossfns.ipo(beta=0.5, reward=lossfns.log_ratio_mean), 0.5625, 0.75, -1.5),  # (1.75 − 1)²
    (lossfns.ipo(beta=0.5, reward=lossfns.logprob_mean), 1.5625, 1.25, -2.5),  # (2.25 − 1)²
    # Scores: s_c = −1.5, s_r = −3; λ·(−4.5)², slope 2·λ·(−4.5)
    (lossfns.bradley_terry(), f(1.5), -s(-1.5), s(-1.5)),
    (lossfns.bradley_terry(center_weight=0.1), f(1.5) + 2.025, -s(-1.5) - 0.9, s(-1.5) - 0.9),
    (lossfns.bradley_terry_margin(center_weight=0.1), f(0.5) + 2.025, -s(-0.5) - 0.9, s(-0.5) - 0.9),
]


def test_one_pair() -> None:
    """Value, and the gradient at each token of the chosen (c) and of the rejected side (r)."""
    batch = pair(target_margin=1.0, sum_square_probs=0.5, groups=0.0)
    for loss, value, slope_c, slope_r in BY_HAND:
        result, gradients, _ = call(loss, batch)
        assert apart(result, value) < 1e-12, loss
        assert apart(gradients, [[0.0, slope_c, slope_c], [0.0, slope_r]]) < 1e-12, loss


def test_the_statistics_of_a_pair() -> None:
    metrics = call(lossfns.hinge(beta=0.5), pair())[2]
    names = ("margin", "reward_margin", "chosen_reward", "rejected_reward", "accuracy")
    assert [metrics[name] for name in names] == [2.5, 1.25, 0.75, -0.5, 1.0]
    assert call(lossfns.orpo(lam=0.5), pair())[2]["chosen_reward"] == 0.5 * -0.75
    assert call(lossfns.wpo(), pair(sum_square_probs=0.5))[2]["pair_weight"] == pytest.approx(4 * E**-3.75)
    assert call(lossfns.cpo(), pair())[2]["nll"] == 1.5


def test_dpop_penalises_a_chosen_side_below_the_reference() -> None:
    """Sides exchanged: c = −1, r = 1.5, h = 0.4·(−1 − 1.5 − 2·1) = −1.8; a chosen token counts 1 + λ times."""
    value, gradients, _ = call(lossfns.dpop(beta=0.4, lam=2.0), pair().take([1, 0]))
    assert value == pytest.approx(f(-1.8))
    assert apart(gradients, [[0.0, -1.2 * s(1.8)], [0.0, 0.4 * s(1.8), 0.4 * s(1.8)]]) < 1e-12


def test_ld_dpo_counts_the_tail_of_the_longer_side_less() -> None:
    """c = 1 + ½·0.5 = 1.25, so h = 0.4·2.25 = 0.9; the second chosen token has half the gradient of the first."""
    value, gradients, _ = call(lossfns.ld_dpo(beta=0.4, ld_alpha=0.5), pair())
    g = 0.4 * s(-0.9)
    assert value == pytest.approx(f(0.9)) and apart(gradients, [[0.0, -g, -g / 2], [0.0, g]]) < 1e-12


# Groups


def pairs(*rewards: tuple[float, float, float, float], labels: tuple[float, ...], **columns: float) -> Batch:
    """Pairs of one token on each side: (lp, ref) of the chosen, then of the rejected side."""
    sides = [side for a, b, c, d in rewards for side in ((a, b), (c, d))]
    more = {name: [[x]] * len(sides) for name, x in columns.items()}
    groups = {"groups": [[label] for label in labels for _ in range(2)]}
    ref = {"ref_logprobs": [[ref] for _, ref in sides]}
    return Batch([[lp] for lp, _ in sides], [[1.0]] * len(sides), ref | groups | more)


CROSSED = ((-1.5, -3.0, -3.0, -2.0), (-1.0, -1.0, -1.0, -2.0))
"""x = 1.5 and 0, y = −1 and 1: policy and reference rank the two pairs in opposite order. m = 2.5 and −1."""


def test_aot_compares_margins_of_the_same_rank() -> None:
    """x sorted is 0, 1.5, y is −1, 1: z = 0 + 1 of the second pair, 1.5 − 1 of the first. In two groups it is DPO."""
    value, gradients, _ = call(lossfns.aot(beta=1.0), pairs(*CROSSED, labels=(0, 0)))
    assert value == pytest.approx((f(0.5) + f(1)) / 2)
    assert apart([row[0] for row in gradients], [-s(-0.5) / 2, s(-0.5) / 2, -s(-1) / 2, s(-1) / 2]) < 1e-12
    apart_groups = pairs(*CROSSED, labels=(0, 1))
    assert call(lossfns.aot(beta=1.0), apart_groups)[0] == pytest.approx((f(2.5) + f(-1)) / 2)


def test_aot_unpaired_compares_rewards_of_the_same_rank() -> None:
    """c = 1.5 and −0.5, r = −1 and 0.5: z = −0.5 + 1 = ½ and 1.5 − 0.5 = 1, each with a side of both pairs."""
    crossed = pairs((-1.5, -3.0, -3.0, -2.0), (-1.5, -1.0, -1.5, -2.0), labels=(0, 0))
    value, gradients, _ = call(lossfns.aot_unpaired(beta=1.0), crossed)
    assert value == pytest.approx((f(0.5) + f(1)) / 2)
    assert apart([row[0] for row in gradients], [-s(-1) / 2, s(-0.5) / 2, -s(-0.5) / 2, s(-1) / 2]) < 1e-12


def test_dr_dpo_gives_a_pair_the_share_of_its_likelihood() -> None:
    """β′ = 1: −log((σ(2.5) + σ(−1)) / 2), whose slope in m of a pair is −σ′(m) / Σσ."""
    value, gradients, _ = call(lossfns.dr_dpo(beta=1.0), pairs(*CROSSED, labels=(0, 0)))
    both = s(2.5) + s(-1)
    assert value == pytest.approx(-math.log(both / 2))
    assert (
        apart([row[0] for row in gradients], [-dot(2.5) / both, dot(2.5) / both, -dot(1) / both, dot(1) / both]) < 1e-12
    )


def test_beta_dpo_has_the_beta_of_its_group() -> None:
    """Mean m = ¾, M₀ = ¼: b = 0.4·(1 + 2·½) = 0.8. Far below M₀ it is b_min."""
    loss = lossfns.beta_dpo(beta=0.4, alpha=2.0)
    value, gradients, metrics = call(loss, pairs(*CROSSED, labels=(0, 0), reference_point=0.25))
    assert value == pytest.approx((f(2.0) + f(-0.8)) / 2) and metrics["beta_used"] == pytest.approx(0.8)
    assert gradients[0] == [pytest.approx(-0.4 * s(-2.0))]
    assert call(loss, pairs(*CROSSED, labels=(0, 0), reference_point=9.0))[2]["beta_used"] == pytest.approx(1e-3)


def test_alpha_dpo_asks_more_of_pairs_that_left_the_reference() -> None:
    """x = 2.5 and −1: z = ±1.75 / (1.75·√2 + 10⁻⁶). u = 1.5 and 0, γ = ½, α = √2: h = 1.5 − ½ − 1 and 0 − ½ + 1."""
    loss = lossfns.alpha_dpo(beta=1.0, gamma=0.5, alpha=math.sqrt(2))
    value, gradients, _ = call(loss, pairs(*CROSSED, labels=(0, 0)))
    z = math.sqrt(2) * 1.75 / (1.75 * math.sqrt(2) + 1e-6)
    assert value == pytest.approx((f(1 - z) + f(-0.5 + z)) / 2, rel=1e-12)
    assert gradients[0] == [pytest.approx(-s(z - 1) / 2)]


def test_pairs_that_do_not_count_are_in_no_group() -> None:
    """A masked pair has the label 0 of the first pair, and neither changes its rank, mean or size."""
    alone = pairs(*CROSSED, labels=(0, 1), reference_point=0.5)
    masked = pairs(*CROSSED, (-5.0, -1.0, -1.0, -9.0), labels=(0, 1, 0), reference_point=0.5)
    masked.weights[4:] = [[0.0], [0.0]]
    for loss in (lossfns.aot(), lossfns.aot_unpaired(), lossfns.dr_dpo(), lossfns.beta_dpo(), lossfns.alpha_dpo()):
        value, gradients, _ = call(loss, masked)
        assert (value, gradients[:4]) == call(loss, alone)[:2], loss
        assert gradients[4:] == [[0.0], [0.0]], loss


# Parts, and losses that are others


def test_every_reward_and_link_equals_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    alphas = {f"alpha_reward({a})": (lossfns.alpha_reward(a), oracle_rewards.alpha_reward(a)) for a in (0.5, 2.0)}
    for name, (_, theirs) in alphas.items():
        monkeypatch.setitem(oracle_rewards.REWARDS, name, theirs)
    for seed in range(3):
        batch = random_batch(Random(seed), pairs=True)
        for reward in (*REWARDS.values(), *(ours for ours, _ in alphas.values())):
            case = derived_case(lossfns.gpo(link=lossfns.savage_link, reward=reward))
            value, gradients, _ = call(case.loss, batch)
            assert apart([value, *gradients], [*case.expected(batch)][:1] + case.expected(batch)[1]) < 1e-12, reward
        for link in LINKS.values():
            case = derived_case(lossfns.gpo(link=link, beta=0.7))
            value, gradients, _ = call(case.loss, batch)
            assert apart([value, *gradients], [*case.expected(batch)][:1] + case.expected(batch)[1]) < 1e-12, link


def test_losses_that_are_others() -> None:
    """What the docstrings say of the relation of two losses, on random pairs."""
    g, r = lossfns, lossfns.log_ratio_sum
    twins: list[tuple[Loss, float, Loss]] = [
        (g.gpo(link=g.logistic_link), 1, g.dpo()),
        (g.gpo(link=g.hinge_link), 1, g.hinge()),
        (g.gpo(link=g.squared_link, beta=0.2), 4 * 0.01, g.ipo(beta=0.1)),
        (g.f_dpo(reward=r), 1, g.dpo()),
        (g.f_dpo(reward=g.alpha_reward(1.0)), 1, g.f_dpo(reward=g.forward_kl_reward)),
        (g.gpo(link=g.logistic_link, reward=g.log_ratio_mean, beta=5.0), 1, g.dpo_norm()),
        (g.ld_dpo(ld_alpha=1.0), 1, g.dpo()),
        (g.dpo_shift(lam=1.0), 1, g.dpo()),
        (g.robust_dpo(flip_rate=0.0), 1, g.dpo()),
        (g.focal_po(gamma=0.0), 1, g.dpo()),
        (g.c2_dpo(lam=0.0), 1, g.dpo()),
        (g.r_dpo(alpha=0.0), 1, g.dpo()),
        (g.cpo(reward=g.logprob_mean, nll_weight=0.0, beta=2.0), 1, g.simpo(gamma=0.0)),
        (g.cpo(reward=r, nll_weight=0.0), 1, g.dpo()),
        (g.sppo_hard(), 2, g.sppo()),
        (g.bco_pair(), 2, g.bco()),
        (g.apo_zero(), 2, g.kto()),
    ]
    for seed in range(3):
        batch = random_batch(Random(seed), pairs=True)
        for name, sides in (("labels", (1.0, 0.0)), ("rewards", (1.0, 0.0)), ("reference_point", (0.0, 0.0))):
            batch.columns[name] = [[sides[i % 2]] * len(row) for i, row in enumerate(batch.logprobs)]
        for loss, factor, other in twins:
            value, gradients, _ = call(loss, batch)
            theirs, their_gradients, _ = call(other, batch)
            scaled = [[factor * x for x in row] for row in their_gradients]
            assert apart([value, *gradients], [factor * theirs, *scaled]) < 1e-12, loss


def test_orpo_is_the_sum_of_its_parts() -> None:
    """λ times the odds ratio alone, and the likelihood: TRL's ORPO takes the latter over other tokens."""
    batch = random_batch(Random(1), pairs=True)
    odds = lossfns.cpo(beta=1.0, nll_weight=0.0, reward=lossfns.log_odds_mean)
    nll = lossfns.cpo(nll=lossfns.logprob_mean), lossfns.cpo(nll_weight=0.0)
    likelihood = call(nll[0], batch)[0] - call(nll[1], batch)[0]
    assert call(lossfns.orpo(lam=0.3), batch)[0] == pytest.approx(0.3 * call(odds, batch)[0] + likelihood, rel=1e-12)


def test_robust_dpo_under_flipped_labels_is_dpo_of_clean_ones_on_average() -> None:
    loss, clean, flipped = lossfns.robust_dpo(beta=0.4, flip_rate=0.2), pair(), pair().take([1, 0])
    assert 0.8 * call(loss, clean)[0] + 0.2 * call(loss, flipped)[0] == pytest.approx(call(lossfns.dpo(0.4), clean)[0])


def test_limits() -> None:
    """AlphaPO at a small α is SimPO, and Dr. DPO with a large β′ is DPO."""
    batch = random_batch(Random(2), pairs=True)
    assert call(lossfns.alphapo(reward_alpha=1e-7), batch)[0] == pytest.approx(
        call(lossfns.simpo(), batch)[0], rel=1e-5
    )
    batch.columns["groups"] = [[0.0] * len(row) for row in batch.logprobs]
    assert call(lossfns.dr_dpo(beta_prime=1e8), batch)[0] == pytest.approx(call(lossfns.dpo(), batch)[0], rel=1e-6)


# Single datums and steps


def test_unpaired() -> None:
    """m = 1.5 and −1, z = ½, labels 1 and 0. BCO: (f(2·1) + 3·f(2·1.5)) / 2. SPPO: ((1.5 − 1)² + (−1 + 2)²) / 2."""
    batch = pair(reference_point=0.5)
    batch.columns |= {"labels": [[1.0] * 3, [0.0] * 2], "rewards": [[0.75] * 3, [0.0] * 2]}
    value, gradients, metrics = call(lossfns.bco(beta=2.0, undesirable_weight=3.0), batch)
    assert value == pytest.approx((f(2) + 3 * f(3)) / 2) and metrics["accuracy"] == 1.0
    assert apart(gradients, [[0.0, -s(-2), -s(-2)], [0.0, 3 * s(-3)]]) < 1e-12
    value, gradients, metrics = call(lossfns.sppo(beta=0.25), batch)
    assert value == pytest.approx((0.25 + 1) / 2) and metrics["log_ratio"] == 0.25
    assert apart(gradients, [[0.0, 0.5, 0.5], [0.0, 1.0]]) < 1e-12


def test_process_reward() -> None:
    """Steps with scores 1, −1 and 2 and targets 1, 0 and ¼: f(1) twice, then ¼·f(2) + ¾·f(−2)."""
    batch = Batch([[1.0, 9.0, -1.0], [2.0]], [[1.0, 0.0, 1.0], [1.0]], {"returns": [[1.0, 9.0, 0.0], [0.25]]})
    value, gradients, metrics = call(lossfns.process_reward(), batch)
    assert value == pytest.approx((2 * f(1) + 0.25 * f(2) + 0.75 * f(-2)) / 3)
    assert apart(gradients, [[-T / 3, 0.0, T / 3], [(s(2) - 0.25) / 3]]) < 1e-12
    assert metrics["accuracy"] == pytest.approx(2 / 3)


def test_the_reference_point_of_kto() -> None:
    """Mean of 1.5 and −1, each over the tokens with a weight; at least 0."""
    batch = pair()
    rows = batch.logprobs, batch.columns["ref_logprobs"], batch.weights
    assert kto_reference_point(*rows) == 0.25
    assert kto_reference_point(*(row[1:] for row in rows)) == 0.0
    for wrong in (([], [], []), (rows[0], rows[1], [[1.0]]), (rows[0], [[-1.0], [-1.0, -1.0]], rows[2])):
        with pytest.raises(LossInputError, match="rows of equal lengths"):
            kto_reference_point(*wrong)


# Inputs


def test_a_pair_from_tokens_is_its_two_datums() -> None:
    chosen, rejected = pair_from_tokens([5, 6], [7, 8], [9, 10, 11], max_length=4)
    expected: Any = [datum_from_tokens(ids, prompt_length=2) for ids in ([5, 6, 7, 8], [5, 6, 9, 10])]
    for ours, theirs in zip((chosen, rejected), expected):
        for name in ("target_tokens", "weights"):
            assert ours.loss_fn_inputs[name].data == theirs.loss_fn_inputs[name].data
    with pytest.raises(LossInputError, match="chosen: expected"):
        pair_from_tokens([5], "text", [6])  # type: ignore[arg-type]


def test_a_reward_of_your_own() -> None:
    """It names the columns that it reads. Anything but a Reward is refused."""
    own = Reward("own", lambda t: lossfns.logprob_sum(t) - lossfns.logprob_sum(t).detach(), ("entropy",))
    assert lossfns.ipo(reward=own).reads == ("entropy",) and "reward=own" in repr(lossfns.ipo(reward=own))
    assert lossfns.hinge(reward="log_ratio_mean").knobs["reward"] is lossfns.log_ratio_mean  # type: ignore[arg-type]
    assert lossfns.cpo(reward=lossfns.log_ratio_sum).reads == ("ref_logprobs",)
    for knobs in ({"reward": "log_ratio_means"}, {"reward": lambda t: t.logprobs}, {"nll": None}):
        with pytest.raises(LossInputError, match="a reward such as log_ratio_mean"):
            lossfns.cpo(**knobs)  # type: ignore[arg-type]


def test_far_margins_are_finite_in_float32() -> None:
    """Sides of 4 tokens at −10⁴ and 0, each way round, with the largest β of the tests."""
    rows = [[-1e4] * 4, [0.0] * 4]
    for order in ([0, 1], [1, 0]):
        ref = {"ref_logprobs": [[-1.0] * 4] * 2, "groups": [[0.0] * 4] * 2, "target_margin": [[1.0] * 4] * 2}
        more = {"sum_square_probs": [[0.5] * 4] * 2, "reference_point": [[0.0] * 4] * 2}
        batch = Batch([rows[i] for i in order], [[1.0] * 4] * 2, ref | more)
        for name in (
            "discopop",
            "chi_po",
            "gpo",
            "exo",
            "dr_dpo",
            "beta_dpo",
            "alpha_dpo",
            "alphapo",
            "wpo",
            "focal_po",
        ):
            for loss in (getattr(lossfns, name)(), getattr(lossfns, name)(beta=5.0)):
                value, gradients, _ = call(loss, batch, torch.float32)
                assert math.isfinite(value) and all(math.isfinite(g) for row in gradients for g in row), loss


def test_the_reference_point_of_padded_tensors_and_of_numbers_that_are_none() -> None:
    """A nan at a token with a weight would be max(0, nan) = 0. The content of a masked slot has no effect."""
    lp, ref = torch.tensor([[-1.0, -2.0], [-3.0, math.nan]]), torch.tensor([[-2.0, -2.5], [-3.25, 0.0]])
    assert kto_reference_point(lp, ref, torch.tensor([[1, 1], [1, 0]])) == 0.875
    wrong: tuple[Any, ...] = (
        (lp, ref, torch.ones(2, 2)),
        (lp, ref[:1], lp),
        ([], [], []),
        (0.0, 1.0, 2.0),
        (None,) * 3,
    )
    for rows in (*wrong, (torch.ones(2),) * 3, ([["x"]],) * 3):
        with pytest.raises(LossInputError):
            kto_reference_point(*rows)
