"""Policy losses with a trust region of another kind than PPO's clip."""

from __future__ import annotations

import torch
from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import Loss, preset
from lossfns.losses.ratio import ratio_loss
from lossfns.segments import token_level
from lossfns.tokens import Tokens
from lossfns.weigh import Weighing, sequence_mean


def soft_gate(ratio: Tensor, advantages: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    """−(4/τ)·σ(τ·(r − 1))·A, with τ = τ_pos where A > 0, else τ_neg."""
    tau = eq.select(advantages > 0, tau_pos, tau_neg, like=advantages)
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages


@preset
def sapo(
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    weigh: Weighing = sequence_mean,
    log_ratio_cap: float | None = 20.0,
) -> Loss:
    """−(4/τ)·σ(τ·(r − 1))·A: a soft gate in place of the clip. Gao et al. 2025, arXiv:2511.20347.

    On-policy the slope in r is A, as in PPO. It falls smoothly on both sides of 1, the faster the higher the
    temperature τ.

    Args:
        tau_pos: τ where A > 0, a finite number above 0.
        tau_neg: τ where A <= 0, a finite number above 0.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.

    >>> sapo().knobs["tau_neg"]
    1.05
    """

    def gated(t: Tokens, ratio: Tensor) -> Tensor:
        return soft_gate(ratio, t.advantages, tau_pos, tau_neg)

    return ratio_loss(token_level, gated, weigh, log_ratio_cap)
