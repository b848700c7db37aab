"""The losses of prime-rl: −r·A masked by probabilities, plus the squared log-ratio to the sampler at every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import Loss, Statistics
from lossfns.losses.masks import Mask, probability_change, within_tv
from lossfns.losses.ratio import ratio_loss
from lossfns.preset import preset
from lossfns.segments import token_level
from lossfns.statistics import OnDemand
from lossfns.tokens import Tokens
from lossfns.weigh import Weighing, token_mean

SAMPLER = "sampler_logprobs"
"""The column of the policy that sampled, which the ratio divides by."""


def masked_with_penalty(
    advantage: Callable[[Tokens], Tensor],
    kept: Mask,
    kl_tau: float,
    weigh: Weighing,
    log_ratio_cap: float | None,
) -> Loss:
    """−r·A where the mask is True, else 0, plus τ·(lp − sampler)² at every token, with r = exp(lp − sampler)."""

    def surrogate(t: Tokens, ratio: Tensor) -> Tensor:
        term = torch.where(kept(t), eq.surrogate(ratio, advantage(t)), 0)
        return term + kl_tau * (t.logprobs - t.sampler_logprobs).square()

    def statistics(t: Tokens, ratio: Tensor) -> Statistics:
        return OnDemand(tv_masked=lambda: ~kept(t))

    return ratio_loss(token_level, surrogate, weigh, log_ratio_cap, statistics, behaviour=SAMPLER)


@preset
def prime_dppo(
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    adv_tau: float = 1.0,
    kl_tau: float = 1e-3,
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
) -> Loss:
    """−α·r·A + τ·(lp − sampler)², without −α·r·A where p − p_sampler > δ_high and A > 0, or < −δ_low and A <= 0.

    The default loss of prime-rl: the mask of ``dppo_tv`` (arXiv:2602.04879), and the squared log-ratio of Kimi K2.5
    (arXiv:2602.02276), which has no ½ and applies to masked tokens too. r = exp(lp − sampler), p = e^lp.

    Args:
        delta_low: δ_low, a finite number above 0.
        delta_high: δ_high, a finite number above 0.
        adv_tau: α, a finite number above 0.
        kl_tau: τ, a finite number of at least 0.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − sampler| before the exponential, above 0; ``None`` is prime-rl's uncapped form.

    Reads ``advantages`` and ``sampler_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − sampler|, in nats.
        kl_sampler: k3 estimate of KL(sampler‖π) by token, in nats, at least 0.
        tv_masked: share of tokens that the mask drops, in [0, 1].

    >>> prime_dppo().reads
    ('advantages', 'sampler_logprobs')
    """
    return masked_with_penalty(
        lambda t: adv_tau * t.advantages,
        lambda t: within_tv(t, SAMPLER, delta_low, delta_high),
        kl_tau,
        weigh,
        log_ratio_cap,
    )


@preset
def prime_symmetric(
    delta: float = 0.1,
    adv_tau: float = 1.0,
    kl_tau: float = 1e-3,
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
) -> Loss:
    """−α·r·A + τ·(lp − sampler)², without −α·r·A where |p − p_sampler| > δ, whatever the sign of A.

    prime-rl calls it "ipo". It is not the preference loss IPO. r = exp(lp − sampler), p = e^lp.

    Args:
        delta: δ, a finite number above 0.
        adv_tau: α, a finite number above 0.
        kl_tau: τ, a finite number of at least 0.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − sampler| before the exponential, above 0; ``None`` is prime-rl's uncapped form.

    Reads ``advantages`` and ``sampler_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − sampler|, in nats.
        kl_sampler: k3 estimate of KL(sampler‖π) by token, in nats, at least 0.
        tv_masked: share of tokens that the mask drops, in [0, 1].

    >>> prime_symmetric(delta=0.2).knobs["delta"]
    0.2
    """
    return masked_with_penalty(
        lambda t: adv_tau * t.advantages,
        lambda t: probability_change(t, SAMPLER).abs() <= delta,
        kl_tau,
        weigh,
        log_ratio_cap,
    )


@preset
def prime_ref_kl(
    delta_low: float = 0.2,
    kl_tau: float = 1e-3,
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 5.0,
) -> Loss:
    """−r·sg(ref − lp) + τ·(lp − sampler)², without the first term where p − p_sampler < −δ_low.

    On-policy distillation in prime-rl ("ref_kl"): a policy gradient whose advantage at each token is ref − lp, so that
    its expectation is the gradient of KL(π‖ref). The reference is the teacher. r = exp(lp − sampler), p = e^lp.

    Args:
        delta_low: δ_low, a finite number above 0.
        kl_tau: τ, a finite number of at least 0.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − sampler| before the exponential, above 0; ``None`` is prime-rl's uncapped form.
            The default is lower than in other losses, because the advantage ref − lp is unbounded.

    Reads ``ref_logprobs`` and ``sampler_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − sampler|, in nats.
        kl_sampler: k3 estimate of KL(sampler‖π) by token, in nats, at least 0.
        tv_masked: share of tokens that the mask drops, in [0, 1].

    >>> prime_ref_kl().reads
    ('ref_logprobs', 'sampler_logprobs')
    """
    loss = masked_with_penalty(
        lambda t: t.ref_logprobs - t.logprobs.detach(),
        lambda t: probability_change(t, SAMPLER) >= -delta_low,
        kl_tau,
        weigh,
        log_ratio_cap,
    )
    return replace(loss, reads=("ref_logprobs", SAMPLER))
