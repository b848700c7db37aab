"""The page of equations: truth tables, hand-derived numbers, and the exact expectation over a small vocabulary."""

import math

import pytest
import torch
from torch import Tensor

from lossfns import terms as eq


def slope(fn, x: float) -> tuple[float, float]:
    """Value and derivative of a function of one number."""
    t = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    y = fn(t)
    y.backward()
    return y.item(), t.grad.item()


A_POSITIVE, A_NEGATIVE = 2.0, -2.0
BELOW, INSIDE, ABOVE = 0.5, 1.1, 1.5


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        (BELOW, A_POSITIVE, -1.0, -2.0),  # −0.5·2: below the bound, but the minimum is the unclipped side
        (INSIDE, A_POSITIVE, -2.2, -2.0),
        (ABOVE, A_POSITIVE, -2.4, 0.0),  # −1.2·2: clipped
        (BELOW, A_NEGATIVE, 1.6, 0.0),  # 0.8·2: clipped
        (INSIDE, A_NEGATIVE, 2.2, 2.0),
        (ABOVE, A_NEGATIVE, 3.0, 2.0),
        (1.2, A_POSITIVE, -2.4, -2.0),  # on a bound the gradient flows
        (0.8, A_NEGATIVE, 1.6, 2.0),
        (ABOVE, 0.5, -0.6, 0.0),  # a small advantage has a sign too
        (BELOW, -0.5, 0.4, 0.0),
        (ABOVE, 0.0, 0.0, 0.0),
        (math.inf, A_POSITIVE, -2.4, 0.0),  # an overflow is above the bound too
        (math.inf, A_NEGATIVE, math.inf, 2.0),
    ],
)
def test_clip_truth_table(ratio: float, advantage: float, value: float, gradient: float) -> None:
    a = torch.tensor(advantage, dtype=torch.float64)
    got = slope(lambda r: eq.clipped_surrogate(r, a, (0.8, 1.2)), ratio)
    assert got == pytest.approx((value, gradient), abs=1e-15)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        (2.0, -1.0, 2.0, 1.0),  # below c = 3: untouched
        (5.0, -1.0, 3.0, 0.0),  # min(5, 3)
        (5.0, 1.0, -1.2, 0.0),  # A > 0: PPO's own clip, never the dual one
    ],
)
def test_dual_clip_truth_table(ratio: float, advantage: float, value: float, gradient: float) -> None:
    a = torch.tensor(advantage, dtype=torch.float64)
    got = slope(lambda r: eq.dual_clipped(eq.clipped_surrogate(r, a, (0.8, 1.2)), a, 3.0), ratio)
    assert got == pytest.approx((value, gradient), abs=1e-15)


def test_dual_clip_leaves_a_token_without_advantage_as_it_is() -> None:
    """At A = 0 the bound −c·A is 0: a loss of 1 there is no cost of a bad token, and keeps value and gradient."""
    zero = torch.tensor(0.0, dtype=torch.float64)
    assert slope(lambda loss: eq.dual_clipped(loss, zero, 3.0), 1.0) == (1.0, 1.0)


@pytest.mark.parametrize("advantage", [A_POSITIVE, A_NEGATIVE])
@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.8), (0.8, 0.8), (1.1, 1.1), (1.2, 1.2), (1.5, 1.2)])
def test_a_bounded_weight_keeps_the_gradient_of_every_token(ratio: float, weight: float, advantage: float) -> None:
    """At lp = −3 the loss is 3·w·A and its slope −w·A, on either side of either bound."""
    r = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    a = torch.tensor(advantage, dtype=torch.float64)
    got = slope(lambda lp: eq.weighted_policy_gradient(lp, r, a, (0.8, 1.2)), -3.0)
    assert got == pytest.approx((3 * weight * advantage, -weight * advantage), abs=1e-15)
    assert r.grad is None


def test_the_ratio_gives_the_weight_of_a_policy_gradient_no_gradient_of_its_own() -> None:
    """lp in the ratio too: d/dlp of −sg(exp(lp + 1))·lp is −exp(lp + 1) alone, not the (1 + lp)-fold of it."""
    one = torch.tensor(1.0, dtype=torch.float64)
    got = slope(lambda lp: eq.weighted_policy_gradient(lp, (lp + 1).exp(), one, (0.0, math.inf)), -3.0)
    assert got == pytest.approx((3 * math.exp(-2), -math.exp(-2)))


@pytest.mark.parametrize(
    ("d", "advantage", "value", "gradient"),
    [
        (0.0, 2.0, 6.0, -2.0),
        (1.0, 2.0, 6.25, -1.5),  # −(2·−3 − ½·½·1) and −2 + ½·1
        (-1.0, 2.0, 6.25, -2.5),  # below the old policy the penalty pulls up as well
        (3.0, 0.0, 2.25, 1.5),  # without a reward it still pulls back
        (4.0, 2.0, 10.0, 0.0),  # where β·d = A, reward and penalty are even
    ],
)
def test_direct_reward_by_hand(d: float, advantage: float, value: float, gradient: float) -> None:
    """β = ½, lp = −3."""
    old, a = torch.tensor(-3.0 - d, dtype=torch.float64), torch.tensor(advantage, dtype=torch.float64)
    assert slope(lambda lp: eq.direct_reward(lp, old, a, 0.5), -3.0) == pytest.approx((value, gradient))


def test_the_cap_has_no_gradient_beyond_it() -> None:
    assert slope(lambda d: eq.cap(d, 20.0), 19.0) == (19.0, 1.0)
    assert slope(lambda d: eq.cap(d, 20.0), 20.0) == (20.0, 1.0)
    assert slope(lambda d: eq.cap(d, 20.0), -25.0) == (-20.0, 0.0)
    assert slope(lambda d: eq.cap(d, None), -25.0) == (-25.0, 1.0)


def test_straight_through_takes_the_value_of_one_and_the_gradient_of_the_other() -> None:
    assert slope(lambda x: eq.straight_through(x * x, 3 * x), 2.0) == (4.0, 3.0)


def test_importance_weight_is_a_bounded_constant() -> None:
    x = torch.tensor([0.0, math.log(1.5), 3.0, 90.0], dtype=torch.float64, requires_grad=True)
    weight = eq.importance_weight(x, 2.0)
    assert weight.tolist() == pytest.approx([1.0, 1.5, 2.0, 2.0])
    assert not weight.requires_grad


def test_importance_weight_without_a_bound_of_its_own_stops_at_the_cap_of_the_log_ratio() -> None:
    x = torch.tensor([90.0, 19.0], dtype=torch.float64)
    assert eq.importance_weight(x, math.inf).tolist() == pytest.approx([math.exp(20), math.exp(19)])


def test_kl_estimators_by_hand() -> None:
    """lp − ref = ln 2, so x = ref − lp = −ln 2: k1 = 0.6931, k2 = 0.2402, k3 = ½ + ln 2 − 1 = 0.1931."""
    lp, ref = torch.tensor(-1.0, dtype=torch.float64), torch.tensor(-1.0 - math.log(2), dtype=torch.float64)
    assert eq.k1(lp, ref).item() == pytest.approx(math.log(2))
    assert eq.k2(lp, ref).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert eq.k3(lp, ref).item() == pytest.approx(math.log(2) - 0.5)
    assert slope(lambda x: eq.k3(x, ref), -1.0)[1] == pytest.approx(1 - 0.5)  # 1 − exp(ref − lp)
    assert eq.k3(lp, lp).item() == 0


def softmaxes() -> tuple[Tensor, Tensor]:
    logits = torch.tensor([0.3, -1.2, 0.9, 0.0, -0.4], dtype=torch.float64, requires_grad=True)
    return logits, torch.tensor([-0.5, 0.4, 0.1, 1.0, -1.0], dtype=torch.float64).log_softmax(0)


def expected_gradient(penalty, weight_by_ratio: bool = False) -> Tensor:
    """Σ_y π(y)·∇penalty(y): the gradient a loss gets in expectation over on-policy samples, exactly."""
    logits, ref = softmaxes()
    lp = logits.log_softmax(0)
    terms = penalty(lp, ref)
    if weight_by_ratio:
        terms = terms * (lp - lp.detach()).exp()
    (lp.detach().exp() * terms).sum().backward()
    return logits.grad


def kl_gradient(direction: str) -> Tensor:
    logits, ref = softmaxes()
    lp = logits.log_softmax(0)
    kl = (lp.exp() * (lp - ref)).sum() if direction == "reverse" else (ref.exp() * (ref - lp)).sum()
    kl.backward()
    return logits.grad


def test_which_kl_each_estimators_gradient_belongs_to() -> None:
    """k1: nothing. k2: reverse KL(π‖ref). k3: forward KL(ref‖π). Ratio-weighted k3: reverse KL again."""
    torch.testing.assert_close(expected_gradient(eq.k1), torch.zeros(5, dtype=torch.float64), atol=1e-15, rtol=0)
    torch.testing.assert_close(expected_gradient(eq.k2), kl_gradient("reverse"))
    torch.testing.assert_close(expected_gradient(eq.k3), kl_gradient("forward"))
    torch.testing.assert_close(expected_gradient(eq.k3, weight_by_ratio=True), kl_gradient("reverse"))
    assert not torch.allclose(kl_gradient("forward"), kl_gradient("reverse"))


def test_kl_values_are_unbiased() -> None:
    logits, ref = softmaxes()
    lp = logits.detach().log_softmax(0)
    exact = (lp.exp() * (lp - ref)).sum()
    torch.testing.assert_close((lp.exp() * eq.k1(lp, ref)).sum(), exact)
    torch.testing.assert_close((lp.exp() * eq.k3(lp, ref)).sum(), exact)


def test_k3_is_constant_past_its_cap() -> None:
    value, gradient = slope(lambda x: eq.k3(x, torch.tensor(0.0, dtype=torch.float64)), -30.0)
    assert value == pytest.approx(math.expm1(20) - 20) and gradient == 0


def test_preference_by_hand() -> None:
    """β·m = 1: −log σ(1) = log(1 + e⁻¹) = 0.31326; with ε = 0.25, ¾·0.31326 + ¼·1.31326 = 0.56326."""
    m = torch.tensor(2.0, dtype=torch.float64)
    assert eq.preference(m, 0.5, 0.0).item() == pytest.approx(math.log1p(math.exp(-1)))
    assert eq.preference(m, 0.5, 0.25).item() == pytest.approx(math.log1p(math.exp(-1)) + 0.25)
    assert eq.preference(m * 0, 0.5, 0.25).item() == pytest.approx(math.log(2))


def test_log_odds_by_hand() -> None:
    """p = ¼: log(¼ / ¾) = −log 3, and its slope in log p is 1 / (1 − p) = 4/3."""
    assert slope(eq.log_odds, math.log(0.25)) == pytest.approx((-math.log(3), 4 / 3))


def test_log_odds_of_certainty_are_those_of_the_floor() -> None:
    """At p = 1 the odds are 1 / 1e-15, so log(1e15) = 34.538776; the slope is 1 + p / 1e-15."""
    assert slope(eq.log_odds, 0.0) == pytest.approx((34.538776394910684, 1e15), rel=1e-12)


@pytest.mark.parametrize("a", [-1e-15 * 2, -1e-12, -1e-6, -1e-3, -0.7, -5.0, -800.0])
def test_log_odds_keeps_its_precision_where_p_is_near_1_and_near_0(a: float) -> None:
    value, gradient = slope(eq.log_odds, a)
    q = -math.expm1(a)
    assert value == pytest.approx(a - math.log(q), rel=1e-14)
    assert gradient == pytest.approx(1 + math.exp(a) / q, rel=1e-14)


def test_the_odds_ratio_has_its_exact_gradient_where_the_chosen_response_is_certain() -> None:
    """At p_w = 1 the loss −log σ(Δ) has the gradient −p_l / (1 − p_l) in log p_w; here p_l = e⁻²."""
    p = math.exp(-2)
    rejected = eq.log_odds(torch.tensor(-2.0, dtype=torch.float64))
    value, gradient = slope(lambda a: eq.odds_ratio(eq.log_odds(a) - rejected), 0.0)
    assert value == pytest.approx(0.0, abs=1e-14)
    assert gradient == pytest.approx(-p / (1 - p), rel=1e-12)
