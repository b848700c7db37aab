"""The equations that losses share: functions of tensors, all of one shape.

Symbols: lp current, old, ref logprobs; d = log-ratio, r = exp(d) ratio; A advantages; sg = stop-gradient.
These functions do not check, mask or reduce. The door (``pack``) checks and masks, and ``evaluate`` reduces.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KL_LOG_RATIO_CAP = 20.0
"""Bound of |ref − lp| in k3. Since k3 grows exponentially with it, one token could otherwise overflow a batch."""

SAFE_EXPONENT = 88.0
"""Largest whole number whose exp is finite in float32."""

ONE_MINUS_P_FLOOR = 1e-15
"""Smallest 1 − p in the log-odds. It is below the rounding of any float logprob near 0."""


def select(condition: Tensor, x: float, y: float, like: Tensor) -> Tensor:
    """x where the condition holds, else y, in the dtype of ``like``. Numbers alone would be rounded to float32."""
    return torch.full_like(like, x).where(condition, y)


def nll(logprobs: Tensor) -> Tensor:
    """Negative log-likelihood, −lp."""
    return -logprobs


def cap(log_ratio: Tensor, limit: float | None) -> Tensor:
    """Clamp d to ±limit, with gradient 0 beyond. ``None`` leaves d as it is.

    On ±limit the gradient flows. ``clamp`` has a slower backward pass, and stops it there since PyTorch 2.15.
    """
    if limit is None:
        return log_ratio
    if not isinstance(log_ratio, Tensor):  # torch.fx traces, and there is no dtype
        return log_ratio.clamp(-limit, limit)
    # The gradient of hardtanh stops on its bounds: they are the next floats beyond, and the value is set to ±limit.
    bound = limit * (1 + torch.finfo(log_ratio.dtype).eps)
    capped = F.hardtanh(log_ratio, -bound, bound)
    F.hardtanh_(capped.detach(), -limit, limit)
    return capped


def importance_ratio(log_ratio: Tensor, limit: float | None) -> Tensor:
    """r = exp(d), with d clamped to ±limit. Where exp overflows, r is inf and has gradient 0.

    Without this, the gradient of a clipped token would be 0·inf = nan, although its loss is finite.
    """
    d = cap(log_ratio, limit)
    if limit is not None and limit <= SAFE_EXPONENT:
        return d.exp()
    overflows = d.detach().exp().isinf()
    return torch.where(overflows, torch.inf, torch.where(overflows, 0, d).exp())


def policy_gradient(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """−A·lp. Williams 1992, "Simple statistical gradient-following algorithms"."""
    return -advantages * logprobs


def surrogate(ratio: Tensor, advantages: Tensor) -> Tensor:
    """−r·A: importance-weighted policy gradient."""
    return -ratio * advantages


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip: tuple[float, float]) -> Tensor:
    """−min(r·A, clip(r, low, high)·A). Schulman et al. 2017 (arXiv:1707.06347), equation 7.

    The minimum is clip(r, low, high)·A, without gradient, where r > high and A > 0, and where r < low and A < 0; else
    it is r·A. On a bound the gradient flows, whereas that of ``clamp`` stops there since PyTorch 2.15.
    """
    r = ratio.detach()
    clipped = r.clamp(*clip)
    beyond = (r - clipped) * advantages > 0
    return -(advantages * torch.where(beyond, clipped, ratio))


def weighted_policy_gradient(logprobs: Tensor, ratio: Tensor, advantages: Tensor, clip: tuple[float, float]) -> Tensor:
    """−sg(clip(r, low, high))·A·lp. MiniMax 2025 (arXiv:2506.13585).

    The bounds limit the weight of a token. Unlike in PPO, a token outside the bounds keeps its gradient.
    """
    low, high = clip
    return policy_gradient(logprobs, ratio.detach().clamp(low, high) * advantages)


def direct_reward(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, beta: float) -> Tensor:
    """−(A·lp − ½β(lp − old)²) of each token. Richemond et al. 2024 (arXiv:2405.19107) sum over the sequence first."""
    return policy_gradient(logprobs, advantages) + beta * k2(logprobs, old_logprobs)


def dual_clipped(loss: Tensor, advantages: Tensor, c: float) -> Tensor:
    """min(loss, −c·A) where A < 0, else loss. Ye et al. 2020 (arXiv:1912.09729), equation 5."""
    return torch.where(advantages < 0, torch.minimum(loss, -c * advantages), loss)


def straight_through(value: Tensor, gradient: Tensor) -> Tensor:
    """sg(value) + gradient − sg(gradient): the value of one tensor with the gradient of the other."""
    return value.detach() + (gradient - gradient.detach())


def importance_weight(log_weight: Tensor, limit: float) -> Tensor:
    """min(exp(d), limit), without gradient: truncated importance sampling (Ionides 2008)."""
    return cap(log_weight, KL_LOG_RATIO_CAP).exp().clamp(max=limit).detach()


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """lp − ref: unbiased for KL(π‖ref) as a value; as a loss its expected gradient is 0, so it is no penalty.

    Estimators k1, k2, k3: Schulman 2020, "Approximating KL divergence".
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(lp − ref)²/2: on-policy, its expected gradient is that of the reverse KL(π‖ref)."""
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(x) − x − 1 with x = ref − lp: unbiased and never negative as a value.

    On-policy, its expected gradient is that of the forward KL(ref‖π); multiplied by the ratio r (with
    gradient) it becomes that of the reverse KL(π‖ref). |x| is capped at 20.
    """
    return k3_of(ref_logprobs - logprobs)


def k3_of(x: Tensor) -> Tensor:
    """exp(x) − x − 1 of a log-ratio x, which is first capped at ±20."""
    x = cap(x, KL_LOG_RATIO_CAP)
    e = torch.expm1(x)
    if not isinstance(x, Tensor):  # torch.fx traces, and services refuse a graph that changes tensors in place
        return e - x
    return x.neg_().add_(e)  # in the memory of x, which no gradient needs


def preference(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """−(1−ε)·log σ(β·m) − ε·log σ(−β·m). Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; ε: Mitchell 2023, cDPO."""
    h = beta * margin
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def log_one_minus(a: Tensor) -> Tensor:
    """log(1 − eᵃ) for a = log p. Value and gradient are finite up to p = 1.

    The value of 1 − p has a floor, but its gradient stays −p.
    """
    one_minus_p = -torch.expm1(a)
    return straight_through(one_minus_p.clamp(min=ONE_MINUS_P_FLOOR), one_minus_p).log()


def log_odds(a: Tensor) -> Tensor:
    """log(p / (1 − p)) = a − log(1 − eᵃ) for a = log p.

    Where p_chosen = 1, the loss −log σ(Δ) still has its exact gradient −p_rejected / (1 − p_rejected).
    """
    return a - log_one_minus(a)


def odds_ratio(log_odds_ratio: Tensor) -> Tensor:
    """−log σ(Δ), Δ the log odds ratio. Hong et al. 2024 (arXiv:2403.07691), equation 7."""
    return -F.logsigmoid(log_odds_ratio)
