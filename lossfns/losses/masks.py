"""Masks: losses without the tokens at which the policy has moved too far, and combinators that mask any loss.

A masked token has loss 0 and no gradient. It still counts in the denominator, which reads no logprobs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lossfns import terms as eq
from lossfns.combine import check_wrappable
from lossfns.loss import Loss, Statistics
from lossfns.losses.policy import importance_sampling
from lossfns.losses.ratio import Clip, clipped
from lossfns.preset import preset
from lossfns.segments import to_tokens, token_level, weighted_mean
from lossfns.statistics import OnDemand
from lossfns.tokens import Tokens
from lossfns.weigh import Weighing, sequence_mean, token_mean

Mask = Callable[[Tokens], Tensor]
"""A function ``t -> [N]`` bool: True at the tokens that stay. It has no gradient."""

COMPLEMENT_EPS = 1e-8
"""The constant that DPPO's authors add to 1 − p in the binary KL, which is then finite up to p = 1."""


def with_mask(loss: Loss, kept: Mask, name: str, *reads: str) -> Loss:
    """l where the mask is True, else 0. The statistic ``name`` is the share of tokens that the mask drops."""

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        term, statistics = loss.terms(t)
        keep = kept(t)
        return torch.where(keep, term, 0), statistics | OnDemand(**{name: lambda: ~keep})

    return replace(loss, reads=tuple(dict.fromkeys((*loss.reads, *reads))), terms=terms)


def probability_change(t: Tokens, behaviour: str) -> Tensor:
    """p − p_old of the sampled token."""
    return t.logprobs.detach().exp() - t.columns[behaviour].exp()


def within_tv(t: Tokens, behaviour: str, low: float, high: float) -> Tensor:
    """p − p_old <= high where A > 0, else p − p_old >= −low."""
    change = probability_change(t, behaviour)
    return torch.where(t.advantages > 0, change <= high, change >= -low)


def binary_kl_with_eps(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) of two events: p·log(p/q) + (1 − p)·log((1 − p)/(1 − q)), with 1e-8 added to 1 − p and 1 − q."""
    p, q = log_p.exp(), log_q.exp()
    return p * (log_p - log_q) + (1 - p) * ((1 - p + COMPLEMENT_EPS) / (1 - q + COMPLEMENT_EPS)).log()


def within_binary_kl(t: Tokens, low: float, high: float) -> Tensor:
    """Not (KL > high and p > p_old) where A > 0, else not (KL > low and p < p_old)."""
    lp, old = t.logprobs.detach(), t.old_logprobs
    kl = binary_kl_with_eps(old, lp)
    return torch.where(t.advantages > 0, (kl <= high) | (lp <= old), (kl <= low) | (lp >= old))


@preset
def with_tv_mask(loss: Loss, delta_low: float = 0.2, delta_high: float = 0.2) -> Loss:
    """l, or 0 where p − p_old > δ_high and A > 0, and where p − p_old < −δ_low and A <= 0. p is the probability e^lp.

    The mask of ``dppo_tv`` over any loss. verl's form of ``dppo_tv`` is ``with_tv_mask(cispo(clip=(0.0, 20.0)))``.

    Args:
        loss: a loss over tokens that reads ``advantages``. Apply ``with_kl`` after, so that the penalty is not masked.
        delta_low: δ_low, a finite number above 0.
        delta_high: δ_high, a finite number above 0.

    Reads ``advantages`` and ``old_logprobs`` besides the columns of the loss. Its statistics are those of the loss, and

        tv_masked: share of active tokens that the mask drops, in [0, 1].

    >>> from lossfns import cispo
    >>> with_tv_mask(cispo(clip=(0.0, 20.0))).reads
    ('advantages', 'old_logprobs')
    """
    check_wrappable(loss, "ref_logprobs")
    kept = lambda t: within_tv(t, "old_logprobs", delta_low, delta_high)  # noqa: E731
    return with_mask(loss, kept, "tv_masked", "advantages", "old_logprobs")


@preset
def with_binary_kl_mask(loss: Loss, delta_low: float = 0.05, delta_high: float = 0.05) -> Loss:
    """l, or 0 where D > δ_high, p > p_old and A > 0, and where D > δ_low, p < p_old and A <= 0. D is a binary KL.

    The mask of ``dppo_kl`` over any loss. verl's form of ``dppo_kl`` is ``with_binary_kl_mask(cispo(clip=(0.0,
    20.0)))``.

    Args:
        loss: a loss over tokens that reads ``advantages``. Apply ``with_kl`` after, so that the penalty is not masked.
        delta_low: δ_low, a finite number above 0, in nats.
        delta_high: δ_high, a finite number above 0, in nats.

    Reads ``advantages`` and ``old_logprobs`` besides the columns of the loss. Its statistics are those of the loss, and

        divergence_masked: share of active tokens that the mask drops, in [0, 1].

    >>> from lossfns import ppo
    >>> with_binary_kl_mask(ppo(), delta_high=0.1).knobs["delta_high"]
    0.1
    """
    check_wrappable(loss, "ref_logprobs")
    kept = lambda t: within_binary_kl(t, delta_low, delta_high)  # noqa: E731
    return with_mask(loss, kept, "divergence_masked", "advantages", "old_logprobs")


@preset
def with_opsm(loss: Loss, delta: float = 1e-4, behaviour: str = "old_logprobs") -> Loss:
    """l, or 0 where A < 0 and Σ w·(old − lp) / Σ w > δ over the sequence: off-policy sequence masking.

    DeepSeek-AI 2025, arXiv:2512.02556, equations 8 and 9. A sequence that the policy has made less likely, on average
    by more than δ for each token, is not pushed down further. The report gives no δ; 1e-4 is that of slime.

    Args:
        loss: a loss over tokens that reads ``advantages``. Apply ``with_kl`` after, so that the penalty is not masked.
        delta: δ, a finite number above 0, in nats for each token.
        behaviour: the column of the policy that sampled: ``"old_logprobs"``, or ``"sampler_logprobs"`` if the sampler's
            logprobs differ from those that the trainer computed.

    Reads ``advantages`` and the column ``behaviour`` besides those of the loss. Its statistics are those of the loss,
    and

        opsm_masked: share of active tokens that the mask drops, in [0, 1].

    >>> from lossfns import grpo, ppo, with_kl
    >>> with_kl(with_opsm(ppo()), kl_beta=0.01).reads
    ('advantages', 'old_logprobs', 'ref_logprobs')
    """
    check_wrappable(loss, "ref_logprobs")

    def kept(t: Tokens) -> Tensor:
        fall = weighted_mean(t, t.columns[behaviour] - t.logprobs.detach())
        return (t.advantages >= 0) | (to_tokens(t, fall) <= delta)

    return with_mask(loss, kept, "opsm_masked", "advantages", behaviour)


@preset
def with_vaco_mask(loss: Loss, delta: float, behaviour: str = "old_logprobs") -> Loss:
    """l, or 0 where A·(lp − old) > 0 and Σ w·|r − 1| / Σ w > δ over the sequence, with r = exp(lp − old).

    Honari et al. 2026, arXiv:2603.01365 (VACO). In a sequence that is too far from the old policy, only the tokens that
    bring it nearer are kept. This is the mask of open-instruct, which has no ½ in the total variation. open-instruct
    takes the ratio of the old policy to the sampler. |lp − old| is capped at 20.

    Args:
        loss: a loss over tokens that reads ``advantages``. Apply ``with_kl`` after, so that the penalty is not masked.
        delta: δ, a finite number above 0.
        behaviour: the column of the policy that sampled: ``"old_logprobs"``, or ``"sampler_logprobs"`` if the sampler's
            logprobs differ from those that the trainer computed.

    Reads ``advantages`` and the column ``behaviour`` besides those of the loss. Its statistics are those of the loss,
    and

        vaco_masked: share of active tokens that the mask drops, in [0, 1].

    >>> from lossfns import ppo
    >>> with_vaco_mask(ppo(), delta=0.2).knobs["delta"]
    0.2
    """
    check_wrappable(loss, "ref_logprobs")

    def kept(t: Tokens) -> Tensor:
        d = eq.cap(t.logprobs.detach() - t.columns[behaviour], eq.KL_LOG_RATIO_CAP)
        return (t.advantages * d <= 0) | (to_tokens(t, weighted_mean(t, d.expm1().abs())) <= delta)

    return with_mask(loss, kept, "vaco_masked", "advantages", behaviour)


@preset
def dppo_tv(
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
) -> Loss:
    """−r·A, or 0 where p − p_old > δ_high and A > 0, and where p − p_old < −δ_low and A <= 0. Qi et al. 2026.

    DPPO with the binary total variation (arXiv:2602.04879). The trust region bounds how far the probability p = e^lp of
    the sampled token moves, in place of its ratio: a rare token may change by a large factor. The old policy is the one
    that sampled: bind the sampler's logprobs as ``old_logprobs``. This is SkyRL's form; verl's is
    ``with_tv_mask(cispo(clip=(0.0, 20.0)))``, whose weight min(r, 20) has no gradient. Below the bound of 20 both have
    the same gradient.

    Args:
        delta_low: δ_low, a finite number above 0.
        delta_high: δ_high, a finite number above 0.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        tv_masked: share of tokens that the mask drops, in [0, 1].

    >>> dppo_tv(delta_high=0.15).knobs["delta_high"]
    0.15
    """
    return with_tv_mask(importance_sampling(weigh, log_ratio_cap), delta_low, delta_high)


@preset
def dppo_kl(
    delta_low: float = 0.05,
    delta_high: float = 0.05,
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
) -> Loss:
    """−r·A, or 0 where D > δ_high, p > p_old and A > 0, and where D > δ_low, p < p_old and A <= 0. Qi et al. 2026.

    DPPO with the binary KL D = p_old·log(p_old/p) + (1 − p_old)·log((1 − p_old)/(1 − p)) (arXiv:2602.04879), with 1e-8
    added to 1 − p and 1 − p_old. See ``dppo_tv`` for the old policy and for verl's form.

    Args:
        delta_low: δ_low, a finite number above 0, in nats.
        delta_high: δ_high, a finite number above 0, in nats.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        divergence_masked: share of tokens that the mask drops, in [0, 1].

    >>> dppo_kl().reads
    ('advantages', 'old_logprobs')
    """
    return with_binary_kl_mask(importance_sampling(weigh, log_ratio_cap), delta_low, delta_high)


@preset
def opsm(
    clip: Clip = (0.8, 1.2),
    delta: float = 1e-4,
    weigh: Weighing = sequence_mean,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> Loss:
    """−min(r·A, clip(r, low, high)·A), or 0 where A < 0 and Σ w·(old − lp) / Σ w > δ. DeepSeek-AI 2025.

    GRPO's clip with off-policy sequence masking, arXiv:2512.02556, equations 8 and 9; see ``with_opsm``, which masks
    any loss. Add the report's penalty with ``with_kl``.

    Args:
        clip: bounds (low, high) of the ratio itself, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2).
        delta: δ, a finite number above 0, in nats for each token.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.
        dual_clip: c of ``with_dual_clip``, above 1; ``None``: no dual clip.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        clip_low: share of tokens with A < 0 and r < low, whose gradient is 0; in [0, 1].
        clip_high: share of tokens with A > 0 and r > high, whose gradient is 0; in [0, 1].
        clip_dual: share of tokens whose loss is reduced by the dual clip, in [0, 1]; only with ``dual_clip``.
        opsm_masked: share of tokens that the mask drops, in [0, 1].

    >>> opsm(delta=0.01).knobs["delta"]
    0.01
    """
    return with_opsm(clipped(token_level, clip, weigh, log_ratio_cap, dual_clip), delta)
