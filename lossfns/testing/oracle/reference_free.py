"""Preference losses without a reference, and losses of reward models, in plain floats."""

from __future__ import annotations

from collections.abc import Iterator

from lossfns.testing.oracle.rewards import REWARDS, smoothed
from lossfns.testing.oracle.rows import Sequence, over_pairs, over_tokens
from lossfns.testing.oracle.scalar import Number, Scalar, cap, exp, log_sigmoid, softplus


@over_pairs
def simpo(c: Sequence, r: Sequence, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> Number:
    """−log σ(β·(mean lp_w − mean lp_l) − γ) (Meng et al. 2024)."""
    return smoothed("logistic_link", (c.mean(c.lp) - r.mean(r.lp)) * beta - gamma, label_smoothing)


@over_pairs
def alphapo(
    c: Sequence,
    r: Sequence,
    beta: float = 2.0,
    gamma: float = 1.0,
    reward_alpha: float = 0.25,
    label_smoothing: float = 0.0,
    log_ratio_cap: float | None = 20.0,
) -> Number:
    """SimPO with the reward (1 − p^−α)/α, log p the mean (Gupta et al. 2025)."""

    def reward(s: Sequence) -> Scalar:
        return (1 - exp(cap(s.mean(s.lp) * -reward_alpha, log_ratio_cap))) / reward_alpha

    return smoothed("logistic_link", (reward(c) - reward(r)) * beta - gamma, label_smoothing)


@over_pairs
def cpo(
    c: Sequence,
    r: Sequence,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    label_smoothing: float = 0.0,
    link: str = "logistic_link",
    reward: str = "logprob_sum",
    nll: str = "logprob_sum",
) -> Number:
    """f(β·(lp_w − lp_l)) − λ·lp_w (Xu et al. 2024)."""
    h = (REWARDS[reward](c) - REWARDS[reward](r)) * beta
    return smoothed(link, h, label_smoothing) - REWARDS[nll](c) * nll_weight


@over_pairs
def bradley_terry(c: Sequence, r: Sequence, center_weight: float = 0.0) -> Number:
    """−log σ(s_w − s_l) + λ·(s_w + s_l)² (Ouyang et al. 2022)."""
    x, y = c.sum(c.lp), r.sum(r.lp)
    return -log_sigmoid(x - y) + (x + y) ** 2 * center_weight


@over_pairs
def bradley_terry_margin(c: Sequence, r: Sequence, center_weight: float = 0.0) -> Number:
    """−log σ(s_w − s_l − Δ) + λ·(s_w + s_l)² (Touvron et al. 2023)."""
    x, y = c.sum(c.lp), r.sum(r.lp)
    return -log_sigmoid(x - y - c.number("target_margin")) + (x + y) ** 2 * center_weight


@over_tokens
def process_reward(s: Sequence) -> Iterator[Number]:
    """−y·log σ(s) − (1−y)·log σ(−s) (Lightman et al. 2023)."""
    for score, y in zip(s.lp, s.returns, strict=True):
        yield softplus(-score) * y + softplus(score) * (1 - y)
