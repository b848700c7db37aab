"""Preference losses on a reference in plain floats: one term for each pair, from its rewards c and r."""

from __future__ import annotations

from lossfns.testing.oracle.rewards import LINKS, REWARDS, smoothed
from lossfns.testing.oracle.rows import Sequence, over_pairs
from lossfns.testing.oracle.scalar import Number, Scalar, cap, clamp, exp, log, log_sigmoid, relu, sigmoid, stop


def log_ratio(s: Sequence) -> Scalar:
    """Σ w·(lp − ref)."""
    return s.sum(s.gap("ref_logprobs"))


def margin(c: Sequence, r: Sequence, reward: str) -> Scalar:
    """The reward of the chosen minus that of the rejected side."""
    return REWARDS[reward](c) - REWARDS[reward](r)


# One margin


@over_pairs
def dpo_norm(c: Sequence, r: Sequence, beta: float = 5.0, label_smoothing: float = 0.0) -> Number:
    """−(1−ε)·log σ(βm) − ε·log σ(−βm), m of means over tokens (Lambert et al. 2024)."""
    return smoothed("logistic_link", margin(c, r, "log_ratio_mean") * beta, label_smoothing)


@over_pairs
def ipo(c: Sequence, r: Sequence, beta: float = 0.1, reward: str = "log_ratio_sum") -> Number:
    """(m − 1/(2β))² (Azar et al. 2023)."""
    return (margin(c, r, reward) - 1 / (2 * beta)) ** 2


@over_pairs
def hinge(c: Sequence, r: Sequence, beta: float = 0.1, reward: str = "log_ratio_sum") -> Number:
    """max(0, 1 − βm) (Zhao et al. 2023)."""
    return relu(1 - margin(c, r, reward) * beta)


@over_pairs
def robust_dpo(
    c: Sequence, r: Sequence, beta: float = 0.1, flip_rate: float = 0.1, reward: str = "log_ratio_sum"
) -> Number:
    """((1−ε)·l(m) − ε·l(−m)) / (1 − 2ε), l = −log σ(β·) (Chowdhury et al. 2024)."""
    h = margin(c, r, reward) * beta
    return (-log_sigmoid(h) * (1 - flip_rate) + log_sigmoid(-h) * flip_rate) / (1 - 2 * flip_rate)


@over_pairs
def exo(c: Sequence, r: Sequence, beta: float = 0.1, epsilon: float = 1e-3, reward: str = "log_ratio_sum") -> Number:
    """KL(q ‖ (1−ε, ε)) with q = (σ(βm), σ(−βm)) (Ji et al. 2024)."""
    h = margin(c, r, reward) * beta
    won = sigmoid(h) * (log_sigmoid(h) - float(log(1 - epsilon)))
    return won + sigmoid(-h) * (log_sigmoid(-h) - float(log(epsilon)))


@over_pairs
def gpo(
    c: Sequence,
    r: Sequence,
    link: str = "truncated_quadratic_link",
    beta: float = 0.1,
    reward: str = "log_ratio_sum",
) -> Number:
    """f(βm) (Tang et al. 2024)."""
    return LINKS[link](margin(c, r, reward) * beta)


@over_pairs
def discopop(
    c: Sequence, r: Sequence, beta: float = 0.05, discopop_tau: float = 0.05, reward: str = "log_ratio_sum"
) -> Number:
    """(1 − σ(h/τ))·(−log σ(h)) + σ(h/τ)·e⁻ʰ, h = βm (Lu et al. 2024)."""
    h = margin(c, r, reward) * beta
    # σ(h/τ)·e⁻ʰ = exp(log σ(h/τ) − h), which no factor of 0·∞ spoils.
    return exp(log_sigmoid(h / discopop_tau) - h) - sigmoid(-h / discopop_tau) * log_sigmoid(h)


@over_pairs
def spo(c: Sequence, r: Sequence, beta: float = 0.1, reward: str = "log_ratio_sum") -> Number:
    """−SiLU(βm)."""
    h = margin(c, r, reward) * beta
    return -(h * sigmoid(h))


@over_pairs
def focal_po(c: Sequence, r: Sequence, beta: float = 0.1, gamma: float = 0.05, reward: str = "log_ratio_sum") -> Number:
    """−p^γ·log p, p = σ(βm) (Liu et al. 2025)."""
    log_p = log_sigmoid(margin(c, r, reward) * beta)
    return -(exp(log_p * gamma) * log_p)


@over_pairs
def f_dpo(c: Sequence, r: Sequence, beta: float = 0.1, reward: str = "js_reward") -> Number:
    """−log σ(β·(f′(u_w) − f′(u_l))) (Wang et al. 2023)."""
    return -log_sigmoid(margin(c, r, reward) * beta)


@over_pairs
def chi_po(
    c: Sequence,
    r: Sequence,
    beta: float = 0.1,
    reward_bound: float | None = None,
    log_ratio_cap: float | None = 20.0,
) -> Number:
    """−log σ(clip(β·(φ(u_w) − φ(u_l)), ±2R)), φ(u) = u + log u (Huang et al. 2024)."""

    def phi(s: Sequence) -> Scalar:
        return exp(cap(log_ratio(s), log_ratio_cap)) + log_ratio(s)

    h = (phi(c) - phi(r)) * beta
    return -log_sigmoid(h if reward_bound is None else clamp(h, -2 * reward_bound, 2 * reward_bound))


# Each side for itself


@over_pairs
def nca(c: Sequence, r: Sequence, beta: float = 0.1) -> Number:
    """−log σ(βc) − ½·log σ(−βc) − ½·log σ(−βr) (Chen et al. 2024)."""
    x, y = log_ratio(c) * beta, log_ratio(r) * beta
    return -log_sigmoid(x) - (log_sigmoid(-x) + log_sigmoid(-y)) * 0.5


@over_pairs
def bco_pair(c: Sequence, r: Sequence, beta: float = 0.1) -> Number:
    """−log σ(βc) − log σ(−βr) (Jung et al. 2024, without a shift)."""
    return -log_sigmoid(log_ratio(c) * beta) - log_sigmoid(-(log_ratio(r) * beta))


@over_pairs
def sppo_hard(c: Sequence, r: Sequence, beta: float = 0.1) -> Number:
    """(c − 1/(2β))² + (r + 1/(2β))² (Wu et al. 2024)."""
    return (log_ratio(c) - 0.5 / beta) ** 2 + (log_ratio(r) + 0.5 / beta) ** 2


@over_pairs
def apo_zero(c: Sequence, r: Sequence, beta: float = 0.1) -> Number:
    """1 − σ(βc) + σ(βr) (D'Oosterlinck et al. 2024)."""
    return 1 - sigmoid(log_ratio(c) * beta) + sigmoid(log_ratio(r) * beta)


@over_pairs
def apo_down(c: Sequence, r: Sequence, beta: float = 0.1) -> Number:
    """σ(βc) + 1 − σ(β(c − r)) (D'Oosterlinck et al. 2024)."""
    return sigmoid(log_ratio(c) * beta) + 1 - sigmoid((log_ratio(c) - log_ratio(r)) * beta)


@over_pairs
def cal_dpo(c: Sequence, r: Sequence, beta: float = 0.1, lam: float = 1.0) -> Number:
    """−log σ(c − r) + λ·((c − 1/(2β))² + (r + 1/(2β))²) (Xiao et al. 2024)."""
    x, y = log_ratio(c), log_ratio(r)
    return -log_sigmoid(x - y) + ((x - 0.5 / beta) ** 2 + (y + 0.5 / beta) ** 2) * lam


@over_pairs
def c2_dpo(c: Sequence, r: Sequence, beta: float = 0.1, lam: float = 2e-4) -> Number:
    """−log σ(β(c − r)) + λ·(c + r)² (arXiv:2502.17507)."""
    x, y = log_ratio(c), log_ratio(r)
    return -log_sigmoid((x - y) * beta) + (x + y) ** 2 * lam


# Shifted margins


@over_pairs
def dpop(c: Sequence, r: Sequence, beta: float = 0.3, lam: float = 50.0) -> Number:
    """−log σ(β(c − r − λ·max(0, −c))) (Pal et al. 2024)."""
    x = log_ratio(c)
    return -log_sigmoid((x - log_ratio(r) - relu(-x) * lam) * beta)


@over_pairs
def odpo(c: Sequence, r: Sequence, beta: float = 0.1) -> Number:
    """−log σ(βm − Δ) (Amini et al. 2024)."""
    return -log_sigmoid((log_ratio(c) - log_ratio(r)) * beta - c.number("target_margin"))


@over_pairs
def r_dpo(c: Sequence, r: Sequence, beta: float = 0.1, alpha: float = 0.01) -> Number:
    """−log σ(βm + α|y_w| − α|y_l|) (Park et al. 2024)."""
    return -log_sigmoid((log_ratio(c) - log_ratio(r)) * beta + alpha * (len(c.lp) - len(r.lp)))


@over_pairs
def ld_dpo(c: Sequence, r: Sequence, beta: float = 0.1, ld_alpha: float = 0.5) -> Number:
    """DPO in which the tokens past the shorter side's length count α times (Liu et al. 2024)."""
    common = min(len(c.lp), len(r.lp))

    def desensitised(s: Sequence) -> Scalar:
        return s.sum(gap if i < common else gap * ld_alpha for i, gap in enumerate(s.gap("ref_logprobs")))

    return -log_sigmoid((desensitised(c) - desensitised(r)) * beta)


@over_pairs
def minor_dpo(c: Sequence, r: Sequence, beta: float = 0.1) -> Number:
    """−log σ(β(c − max(0, r))) (Xie et al. 2024)."""
    return -log_sigmoid((log_ratio(c) - relu(log_ratio(r))) * beta)


@over_pairs
def dpo_shift(c: Sequence, r: Sequence, beta: float = 0.1, lam: float = 0.95) -> Number:
    """−log σ(β(c − λr)) (Yang et al. 2025)."""
    return -log_sigmoid((log_ratio(c) - log_ratio(r) * lam) * beta)


@over_pairs
def bpo(c: Sequence, r: Sequence, beta: float = 0.1, balance: float = 0.3) -> Number:
    """−log σ(β·min(c, −αr)) (Sun et al. 2025)."""
    x, y = log_ratio(c), -(log_ratio(r) * balance)
    return -log_sigmoid((x if x <= y else y) * beta)


@over_pairs
def wpo(c: Sequence, r: Sequence, beta: float = 0.1) -> Number:
    """−sg(v_w·v_l)·log σ(βm), v = exp(mean of lp − log Σp²) (Zhou et al. 2024)."""

    def likeness(s: Sequence) -> Scalar:
        return exp(s.mean(lp - log(square) for lp, square in zip(s.lp, s.sum_square_probs, strict=True)))

    return -log_sigmoid((log_ratio(c) - log_ratio(r)) * beta) * stop(likeness(c) * likeness(r))
