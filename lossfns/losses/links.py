"""Preference losses whose link or reward is not that of DPO."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import Loss
from lossfns.losses.pairs import of_margin, pair_loss
from lossfns.margins import (
    REFERENCE,
    Link,
    Reward,
    js_reward,
    log_ratio_sum,
    logistic_link,
    truncated_quadratic_link,
)
from lossfns.preset import preset
from lossfns.tokens import Tokens
from lossfns.weigh import Weighing, pair_mean


@preset
def gpo(
    link: Link = truncated_quadratic_link,
    beta: float = 0.1,
    reward: Reward = log_ratio_sum,
    weigh: Weighing = pair_mean,
) -> Loss:
    """f(β·m), with f = max(0, 1 − h)² or another ``link``, and m the reward of the chosen minus the rejected side:
    Σ w·(lp − ref), or ``reward``.

    Tang et al. 2024 (generalised preference optimisation), arXiv:2402.05749, table 1. With ``logistic_link`` it is
    ``dpo``, with ``hinge_link`` it is ``hinge``, and with ``squared_link`` and twice the β it is ``ipo`` times 4β².

    Args:
        link: f: ``logistic_link``, ``hinge_link``, ``squared_link``, ``exponential_link``,
            ``truncated_quadratic_link``, ``savage_link``, or a function of your own of the tensor β·m.
        beta: β, a finite number above 0.
        reward: the reward of a side: ``log_ratio_sum``, ``log_ratio_mean``, ``forward_kl_reward``, ``js_reward``,
            ``alpha_reward(α)``, one without a reference such as ``logprob_mean``, or a ``Reward`` of your own.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``. Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = gpo(beta=0.25).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # (1 − 0.25 · 2)²
    0.25
    """
    return pair_loss(of_margin(link, beta), reward, beta, weigh)


@preset
def discopop(
    beta: float = 0.05,
    discopop_tau: float = 0.05,
    reward: Reward = log_ratio_sum,
    weigh: Weighing = pair_mean,
) -> Loss:
    """−(1 − σ(h/τ))·log σ(h) + σ(h/τ)·exp(−h), with h = β·m and m the reward of the chosen minus the rejected side:
    Σ w·(lp − ref), or ``reward``.

    Lu et al. 2024 (DiscoPOP, the log-ratio modulated loss), arXiv:2406.08414, equation 5.

    Args:
        beta: β, a finite number above 0.
        discopop_tau: τ, above 0 and at most 1.
        reward: the reward of a side: ``log_ratio_sum``, ``log_ratio_mean``, ``forward_kl_reward``, ``js_reward``,
            ``alpha_reward(α)``, one without a reference such as ``logprob_mean``, or a ``Reward`` of your own.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``. Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = discopop(beta=0.5, discopop_tau=1.0).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # −(1 − σ(1))·log σ(1) + σ(1)·exp(−1)
    0.3532
    """

    def modulated(m: Tensor) -> Tensor:
        h = beta * m
        # σ(h/τ)·exp(−h) as one exponential: for large −h it is 0·inf as a product.
        return (F.logsigmoid(h / discopop_tau) - h).exp() - torch.sigmoid(-h / discopop_tau) * F.logsigmoid(h)

    return pair_loss(of_margin(modulated), reward, beta, weigh)


@preset
def spo(beta: float = 0.1, reward: Reward = log_ratio_sum, weigh: Weighing = pair_mean) -> Loss:
    """−h·σ(h), with h = β·m and m the reward of the chosen minus the rejected side: Σ w·(lp − ref), or ``reward``.

    "SPO: Self preference optimization with self regularization", Findings of EMNLP 2025: −SiLU in place of log σ. At h
    = −1.28 its gradient changes sign: a pair with a lower h is pushed further in the wrong direction.

    Args:
        beta: β, a finite number above 0.
        reward: the reward of a side: ``log_ratio_sum``, ``log_ratio_mean``, ``forward_kl_reward``, ``js_reward``,
            ``alpha_reward(α)``, one without a reference such as ``logprob_mean``, or a ``Reward`` of your own.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``. Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = spo(beta=0.5).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # −σ(1)
    -0.7311
    """
    return pair_loss(of_margin(lambda m: -F.silu(beta * m)), reward, beta, weigh)


@preset
def focal_po(
    beta: float = 0.1,
    gamma: float = 0.05,
    reward: Reward = log_ratio_sum,
    weigh: Weighing = pair_mean,
) -> Loss:
    """−σ(h)^γ·log σ(h), with h = β·m and m the reward of the chosen minus the rejected side: Σ w·(lp − ref), or
    ``reward``.

    Liu et al. 2025 (FocalPO), arXiv:2501.06645. The factor σ(h)^γ has a gradient, as in the focal loss. It gives more
    weight to pairs that are ranked right. At γ = 0 the loss is ``dpo``.

    Args:
        beta: β, a finite number above 0.
        gamma: γ, a finite number of at least 0.
        reward: the reward of a side: ``log_ratio_sum``, ``log_ratio_mean``, ``forward_kl_reward``, ``js_reward``,
            ``alpha_reward(α)``, one without a reference such as ``logprob_mean``, or a ``Reward`` of your own.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``. Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = focal_po(beta=0.5, gamma=1.0).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # −σ(1)·log σ(1)
    0.229
    """

    def focal(m: Tensor) -> Tensor:
        log_p = F.logsigmoid(beta * m)
        return -(gamma * log_p).exp() * log_p

    return pair_loss(of_margin(focal), reward, beta, weigh)


@preset
def f_dpo(beta: float = 0.1, reward: Reward = js_reward, weigh: Weighing = pair_mean) -> Loss:
    """−log σ(β·(f′(u_c) − f′(u_r))), with u = exp(Σ w·(lp − ref)) of the chosen (c) and rejected (r) side, and f′(u) =
    log(2u / (1 + u)) of the Jensen-Shannon divergence, or ``reward``.

    Wang et al. 2023 (f-DPO), arXiv:2309.16240, equation 8. With ``log_ratio_sum``, the reverse KL, it is ``dpo``. In
    the statistics c and r are f′(u) of the two sides.

    Args:
        beta: β, a finite number above 0.
        reward: f′(u): ``js_reward``, ``forward_kl_reward``, ``alpha_reward(α)`` or ``log_ratio_sum``.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``. Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = f_dpo().padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # −log σ(0.1·(log(2 / (1 + 1/e)) − log(2 / (1 + e))))
    0.6444
    """
    return pair_loss(of_margin(logistic_link, beta), reward, beta, weigh)


@preset
def chi_po(
    beta: float = 0.1,
    reward_bound: float | None = None,
    weigh: Weighing = pair_mean,
    log_ratio_cap: float | None = 20.0,
) -> Loss:
    """−log σ(β·(φ(d_c) − φ(d_r))), with φ(d) = exp(d) + d and d = Σ w·(lp − ref) of the chosen (c) and rejected (r)
    side.

    Huang et al. 2024 (χPO), arXiv:2407.13399, equation 9. The exponential adds a χ² divergence to the regularisation.
    In the statistics c and r are φ(d) of the two sides.

    Args:
        beta: β, a finite number above 0.
        reward_bound: R, a finite number above 0: the argument of σ is clamped to ±2R, and has no gradient beyond.
            ``None`` leaves out this clip of the paper.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.
        log_ratio_cap: bound of |d| before the exponential, above 0; ``None``: no bound.

    Reads ``ref_logprobs``. Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = chi_po().padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # −log σ(0.1·(e − 1/e + 2))
    0.4991
    """

    def mixed(t: Tokens) -> Tensor:
        d = log_ratio_sum(t)
        return d + eq.importance_ratio(d, log_ratio_cap)

    def bounded(h: Tensor) -> Tensor:
        return logistic_link(eq.cap(h, None if reward_bound is None else 2 * reward_bound))

    return pair_loss(of_margin(bounded, beta), Reward("mixed", mixed, REFERENCE), beta, weigh)
