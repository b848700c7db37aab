"""Policy-gradient losses −sg(c)·A·lp, whose coefficient c is a function of the importance ratio."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import Loss, Statistics
from lossfns.losses.ratio import Clip, bound_statistics, ratio_loss
from lossfns.preset import make_loss, preset
from lossfns.segments import Level, geometric_level, sequence_level, token_level
from lossfns.statistics import OnDemand
from lossfns.tokens import Tokens
from lossfns.weigh import Weighing, sequence_sum_mean, token_mean


def clipped_weight(level: Level, clip: Clip, weigh: Weighing, log_ratio_cap: float | None) -> Loss:
    """−sg(clip(r, low, high))·A·lp, with r of each token or of its sequence."""

    def weighted(t: Tokens, ratio: Tensor) -> Tensor:
        return eq.weighted_policy_gradient(t.logprobs, ratio, t.advantages, clip)

    return ratio_loss(level, weighted, weigh, log_ratio_cap, partial(bound_statistics, clip=clip))


@preset
def cispo(clip: Clip = (0.0, 4.0), weigh: Weighing = token_mean, log_ratio_cap: float | None = 20.0) -> Loss:
    """−sg(clip(r, low, high))·A·lp: the bounds limit the coefficient of lp, and no token loses its gradient.

    MiniMax 2025, arXiv:2506.13585. As in the paper, the default has only an upper bound.

    Args:
        clip: bounds (low, high) of the ratio itself, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2). Where
            low is 0, high may be any number above 0, such as TRL's (0.0, 0.2).
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        bound_low: share of tokens with r < low, whose coefficient is set to ``low``; in [0, 1].
        bound_high: share of tokens with r > high, whose coefficient is set to ``high``; in [0, 1].

    >>> cispo(clip=(0.0, 5.0))
    cispo(clip=(0.0, 5.0), weigh=token_mean, log_ratio_cap=20.0)
    """
    return clipped_weight(token_level, clip, weigh, log_ratio_cap)


@preset
def cispo_sequence(clip: Clip = (0.0, 4.0), weigh: Weighing = token_mean, log_ratio_cap: float | None = 20.0) -> Loss:
    """−sg(clip(s, low, high))·A·lp: CISPO with one ratio s = (π/π_old)^(1/|y|) for each sequence, as in GSPO.

    TRL's "cispo" with ``importance_sampling_level="sequence"``. log s = Σ w·d / Σ w over the sequence.

    Args:
        clip: bounds (low, high) of s, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2). Where
            low is 0, high may be any number above 0, such as TRL's (0.0, 0.2).
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |log s| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean s, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log s| above the cap, in [0, 1].
        log_ratio_abs: mean |log s|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        bound_low: share of tokens with s < low, whose coefficient is set to ``low``; in [0, 1].
        bound_high: share of tokens with s > high, whose coefficient is set to ``high``; in [0, 1].

    >>> cispo_sequence(clip=(0.0, 0.2)).knobs["clip"]
    (0.0, 0.2)
    """
    return clipped_weight(geometric_level, clip, weigh, log_ratio_cap)


@preset
def rollout_is(clip: Clip = (0.8, 1.2), weigh: Weighing = token_mean, log_ratio_cap: float | None = 20.0) -> Loss:
    """−sg(r)·A·lp where low <= r <= high, else 0, with r = π / π_sampler: IcePop's mask as a loss of its own.

    GLM-5 and SkyRL's "rollout_is": the ratio to the sampler corrects for the update and for the sampler's mismatch at
    once. The mask is that of IcePop, arXiv:2510.18855. It keeps a token on a bound, which SkyRL drops.

    Args:
        clip: bounds (low, high) of the ratio itself, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2).
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − sampler| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads ``advantages`` and ``sampler_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − sampler|, in nats.
        kl_sampler: k3 estimate of KL(sampler‖π) by token, in nats, at least 0.
        masked: share of tokens with r outside the bounds, whose loss and gradient are 0; in [0, 1].

    >>> rollout_is().reads
    ('advantages', 'sampler_logprobs')
    """
    low, high = clip

    def inside(ratio: Tensor) -> Tensor:
        return (ratio >= low) & (ratio <= high)

    def weighted(t: Tokens, ratio: Tensor) -> Tensor:
        r = ratio.detach()
        return eq.policy_gradient(t.logprobs, torch.where(inside(r), r, 0) * t.advantages)

    def statistics(t: Tokens, ratio: Tensor) -> Statistics:
        return OnDemand(masked=lambda: ~inside(ratio))

    return ratio_loss(token_level, weighted, weigh, log_ratio_cap, statistics, behaviour="sampler_logprobs")


@preset
def capped_importance_sampling(
    cap: float = 2.0, weigh: Weighing = token_mean, log_ratio_cap: float | None = 20.0
) -> Loss:
    """−min(r, cap)·A with r = π / π_sampler: above the cap the gradient is 0, whatever the sign of A.

    The "policy" loss of flashinfer's chunked head, which sums over tokens: ``weigh=token_sum``. PPO's clip keeps the
    gradient of a token with A < 0 and a large ratio, and ``cispo`` that of every token.

    Args:
        cap: the largest ratio, a finite number above 0.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − sampler| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads ``advantages`` and ``sampler_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − sampler|, in nats.
        kl_sampler: k3 estimate of KL(sampler‖π) by token, in nats, at least 0.
        bound_high: share of tokens with r > cap, whose gradient is 0; in [0, 1].

    >>> capped_importance_sampling().reads
    ('advantages', 'sampler_logprobs')
    """

    def truncated(t: Tokens, ratio: Tensor) -> Tensor:
        r = ratio.detach()
        return eq.surrogate(torch.where(r > cap, r.clamp(max=cap), ratio), t.advantages)

    def statistics(t: Tokens, ratio: Tensor) -> Statistics:
        return OnDemand(bound_high=lambda: ratio > cap)

    return ratio_loss(token_level, truncated, weigh, log_ratio_cap, statistics, behaviour="sampler_logprobs")


@preset
def topr(
    level: Level = sequence_level, weigh: Weighing = sequence_sum_mean, log_ratio_cap: float | None = 20.0
) -> Loss:
    """−A·lp where A > 0, −sg(min(r, 1))·A·lp where A <= 0. Le Roux et al. 2025, arXiv:2503.14286, equation 8.

    Tapered off-policy REINFORCE: an answer with A > 0 is learned as in supervised training. The gradient of an answer
    with A <= 0 fades as the policy makes it less likely. In the paper r = π(y) / π_old(y) is the product over the
    sequence; Trinity and ROLL take the ratio of each token, ``level=token_level``. The advantages are the paper's
    rewards, with or without a baseline.

    Args:
        level: what the log-ratio d = lp − old is taken over: ``sequence_level`` (Σ w·d over the sequence),
            ``token_level`` (each token) or ``geometric_level`` (Σ w·d / Σ w over the sequence).
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |log r| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |log r|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        coefficient: mean coefficient of A·lp, in (0, 1].

    >>> topr().knobs["level"].__name__
    'sequence_level'
    """

    def coefficient(t: Tokens, ratio: Tensor) -> Tensor:
        return torch.where(t.advantages > 0, 1, ratio.clamp(max=1))

    def tapered(t: Tokens, ratio: Tensor) -> Tensor:
        return eq.policy_gradient(t.logprobs, coefficient(t, ratio.detach()) * t.advantages)

    def statistics(t: Tokens, ratio: Tensor) -> Statistics:
        return OnDemand(coefficient=lambda: coefficient(t, ratio))

    return ratio_loss(level, tapered, weigh, log_ratio_cap, statistics)


@preset
def vespo(
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
) -> Loss:
    """−sg(φ(s))·A·lp with φ(s) = sᵏ·e^(λ·(1 − s)), and the product s = π(y) / π_old(y) of the ratios of a sequence.

    Shen et al. 2026, "Variational Sequence-Level Soft Policy Optimization", arXiv:2602.10693. φ(1) = 1, and φ has its
    maximum at s = k / λ. The defaults are TRL's. If TRL corrects for the sampler, its s is relative to the sampler:
    bind the sampler's logprobs as ``old_logprobs``. TRL clamps log s to [log 1e-8, 20], and the log-ratio of each token
    to ±20.

    Args:
        k_pos: the power k where A >= 0, a finite number of at least 0.
        lambda_pos: the decay λ where A >= 0, a finite number above 0.
        k_neg: the power k where A < 0, a finite number of at least 0.
        lambda_neg: the decay λ where A < 0, a finite number above 0.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |log s| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean s, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log s| above the cap, in [0, 1].
        log_ratio_abs: mean |log s|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        coefficient: mean φ(s), at least 0.

    >>> vespo().knobs["lambda_pos"]
    3.0
    """

    def phi(t: Tokens) -> Tensor:
        d = eq.cap(sequence_level(t, (t.logprobs - t.old_logprobs).detach()), log_ratio_cap)
        positive = t.advantages >= 0
        k = eq.select(positive, k_pos, k_neg, like=d)
        decay = eq.select(positive, lambda_pos, lambda_neg, like=d)
        return (k * d - decay * torch.expm1(d)).exp()

    def reshaped(t: Tokens, ratio: Tensor) -> Tensor:
        return eq.policy_gradient(t.logprobs, phi(t) * t.advantages)

    def statistics(t: Tokens, ratio: Tensor) -> Statistics:
        return OnDemand(coefficient=lambda: phi(t))

    return ratio_loss(sequence_level, reshaped, weigh, log_ratio_cap, statistics)


@preset
def opmd(tau: float = 1.0, weigh: Weighing = token_mean) -> Loss:
    """−A·lp / (1 + τ): Trinity's form of online policy mirror descent. Yao et al. 2025, arXiv:2509.24203.

    The factor 1 / (1 + τ) takes the place of a regularisation towards the sampling policy. The advantages are rewards
    minus the mean of the group: ``group_advantages(..., scale="none")``.

    Args:
        tau: τ, the strength of the regularisation, a finite number above 0.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.

    Reads ``advantages``. Statistics, means over active tokens:

        nll: mean −lp, in nats, at least 0.

    >>> opmd(tau=0.5)
    opmd(tau=0.5, weigh=token_mean)
    """

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        return eq.policy_gradient(t.logprobs, t.advantages) / (1 + tau), OnDemand(nll=lambda: -t.logprobs.detach())

    return make_loss(terms, ("advantages",), weigh)
