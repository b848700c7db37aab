"""Rewards of sequences and links of margins in plain floats, by the names that losses have for them."""

from __future__ import annotations

import math
from collections.abc import Callable

from lossfns.testing.oracle.rows import Sequence
from lossfns.testing.oracle.scalar import Number, Scalar, cap, exp, expm1, log, log_sigmoid, relu, sigmoid, straight


def log_ratio(s: Sequence) -> Scalar:
    return s.sum(s.gap("ref_logprobs"))


def alpha_reward(alpha: float) -> Callable[[Sequence], Scalar]:
    """(1 − u^−α)/α of the α-divergence (Wang et al. 2023), the exponent capped at ±20."""
    return lambda s: (1 - exp(-cap(log_ratio(s) * alpha, 20.0))) / alpha


def log_odds_mean(s: Sequence) -> Scalar:
    """log(p / (1 − p)) at log p = the mean (Hong et al. 2024), the value of 1 − p at least 1e-15."""
    a = s.mean(s.lp)
    rest = -expm1(a)
    return a - log(straight(max(float(rest), 1e-15), rest))


REWARDS: dict[str, Callable[[Sequence], Scalar]] = {
    "log_ratio_sum": log_ratio,
    "log_ratio_mean": lambda s: s.mean(s.gap("ref_logprobs")),
    "logprob_sum": lambda s: s.sum(s.lp),
    "logprob_mean": lambda s: s.mean(s.lp),
    "log_odds_mean": log_odds_mean,
    "forward_kl_reward": alpha_reward(1.0),
    "js_reward": lambda s: log_sigmoid(log_ratio(s)) + math.log(2),
}

LINKS: dict[str, Callable[[Scalar], Number]] = {
    "logistic_link": lambda h: -log_sigmoid(h),
    "hinge_link": lambda h: relu(1 - h),
    "squared_link": lambda h: (1 - h) ** 2,
    "exponential_link": lambda h: exp(-cap(h, 20.0)),
    "truncated_quadratic_link": lambda h: relu(1 - h) ** 2,
    "savage_link": lambda h: sigmoid(-h) ** 2,
}


def smoothed(link: str, h: Scalar, label_smoothing: float) -> Number:
    """(1−ε)·f(h) + ε·f(−h)."""
    return LINKS[link](h) * (1 - label_smoothing) + LINKS[link](-h) * label_smoothing
