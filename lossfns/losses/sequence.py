"""Policy-gradient losses with one importance ratio for each sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import Loss, Statistics
from lossfns.losses.ratio import Clip, clip_statistics, clipped, geometric_level_by_token, ratio_loss
from lossfns.preset import preset
from lossfns.segments import geometric_level, sequence_level
from lossfns.tokens import Tokens
from lossfns.weigh import Weighing, sequence_mean, sequence_sum_mean


@preset
def gspo(
    clip: Clip = (1 - 3e-4, 1 + 4e-4),
    weigh: Weighing = sequence_mean,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> Loss:
    """−min(s·A, clip(s, low, high)·A), with one ratio s = (π/π_old)^(1/|y|) for each sequence.

    Zheng et al. 2025, arXiv:2507.18071, equation 5. The mean of the log-ratio over the sequence, log s, is
    Σ w·d / Σ w: with a mask as weights, |y| counts the active tokens. The gradient of s reaches every token.

    Args:
        clip: bounds (low, high) of s, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2).
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |log s| before the exponential, above 0; ``None`` is the paper's uncapped form.
        dual_clip: c of ``with_dual_clip``, above 1; ``None``: no dual clip.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean s, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log s| above the cap, in [0, 1].
        log_ratio_abs: mean |log s|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        clip_low: share of tokens with A < 0 and s < low, whose gradient is 0; in [0, 1].
        clip_high: share of tokens with A > 0 and s > high, whose gradient is 0; in [0, 1].
        clip_dual: share of tokens whose loss is reduced by the dual clip, in [0, 1]; only with ``dual_clip``.

    >>> gspo().knobs["weigh"]
    sequence_mean
    """
    return clipped(geometric_level, clip, weigh, log_ratio_cap, dual_clip)


@preset
def gspo_token(
    clip: Clip = (1 - 3e-4, 1 + 4e-4),
    weigh: Weighing = sequence_mean,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> Loss:
    """−min(s·A, clip(s, low, high)·A), where s has GSPO's value, and its gradient reaches only the token's own logprob.

    Zheng et al. 2025, arXiv:2507.18071, equation 13. log s = Σ w·d / Σ w over the sequence, as in ``gspo``.
    Advantages may differ by token.

    Args:
        clip: bounds (low, high) of s, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2).
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |log s| before the exponential, above 0; ``None`` is the paper's uncapped form.
        dual_clip: c of ``with_dual_clip``, above 1; ``None``: no dual clip.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean s, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log s| above the cap, in [0, 1].
        log_ratio_abs: mean |log s|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        clip_low: share of tokens with A < 0 and s < low, whose gradient is 0; in [0, 1].
        clip_high: share of tokens with A > 0 and s > high, whose gradient is 0; in [0, 1].
        clip_dual: share of tokens whose loss is reduced by the dual clip, in [0, 1]; only with ``dual_clip``.

    >>> gspo_token().reads
    ('advantages', 'old_logprobs')
    """
    return clipped(geometric_level_by_token, clip, weigh, log_ratio_cap, dual_clip)


@preset
def luspo(
    clip: Clip = (1 - 3e-4, 1 + 4e-4),
    weigh: Weighing = sequence_sum_mean,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> Loss:
    """−|y|·min(s·A, clip(s, low, high)·A) of each sequence: GSPO without its bias towards short answers.

    Liu et al. 2026, "Length-Unbiased Sequence Policy Optimization", arXiv:2602.05261. ``luspo()`` is
    ``gspo(weigh=sequence_sum_mean)``: the sum over the tokens of a sequence, which all have the same term, is the
    factor |y|. The bounds are those of ``gspo``; TRL's defaults are (0.8, 1.2).

    Args:
        clip: bounds (low, high) of s, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2).
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |log s| before the exponential, above 0; ``None`` is the paper's uncapped form.
        dual_clip: c of ``with_dual_clip``, above 1; ``None``: no dual clip.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean s, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log s| above the cap, in [0, 1].
        log_ratio_abs: mean |log s|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        clip_low: share of tokens with A < 0 and s < low, whose gradient is 0; in [0, 1].
        clip_high: share of tokens with A > 0 and s > high, whose gradient is 0; in [0, 1].
        clip_dual: share of tokens whose loss is reduced by the dual clip, in [0, 1]; only with ``dual_clip``.

    >>> luspo().knobs["weigh"]
    sequence_sum_mean
    """
    return clipped(geometric_level, clip, weigh, log_ratio_cap, dual_clip)


@preset
def rloo(
    clip: Clip = (0.8, 1.2),
    weigh: Weighing = sequence_mean,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> Loss:
    """−min(s·A, clip(s, low, high)·A), with the product s = π(y) / π_old(y) of the ratios of a sequence.

    TRL's ``RLOOTrainer``: PPO's clip on the ratio of whole sequences. On-policy it is the loss of Ahmadian et al. 2024,
    arXiv:2402.14740, which has no ratio. log s = Σ w·d. The leave-one-out baseline belongs in the advantages:
    ``leave_one_out_advantages``.

    Args:
        clip: bounds (low, high) of s, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2).
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |log s| before the exponential, above 0; ``None`` is the paper's uncapped form.
        dual_clip: c of ``with_dual_clip``, above 1; ``None``: no dual clip.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean s, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log s| above the cap, in [0, 1].
        log_ratio_abs: mean |log s|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        clip_low: share of tokens with A < 0 and s < low, whose gradient is 0; in [0, 1].
        clip_high: share of tokens with A > 0 and s > high, whose gradient is 0; in [0, 1].
        clip_dual: share of tokens whose loss is reduced by the dual clip, in [0, 1]; only with ``dual_clip``.

    >>> rloo().reads
    ('advantages', 'old_logprobs')
    """
    return clipped(sequence_level, clip, weigh, log_ratio_cap, dual_clip)


def one_sided_clip(log_ratio: Tensor, advantages: Tensor, bounds: Clip) -> Tensor:
    """min(d, log high) where A > 0, max(d, log low) where A < 0. On a bound d keeps its gradient."""
    d = log_ratio.detach()
    bounded = d.clamp(*bounds)
    return torch.where((d - bounded) * advantages > 0, bounded, log_ratio)


CLIP_OF_GMPO = (math.exp(-0.4), math.exp(0.4))
"""The paper's bounds, ±0.4 in log space."""


@preset
def gmpo(
    clip: Clip = CLIP_OF_GMPO,
    weigh: Weighing = sequence_mean,
    log_ratio_cap: float | None = 20.0,
) -> Loss:
    """−s·A, where s is the geometric mean over the sequence of ratios that are clipped one by one.

    Zhao et al. 2025, "Geometric-Mean Policy Optimization", arXiv:2507.20673. The ratio of a token is limited to
    ``high`` where A > 0 and to ``low`` where A < 0, and then log s = Σ w·log r / Σ w. verl calls it "geo_mean" and
    takes its bounds in log space from the settings of PPO: (e^−0.2, e^0.2); TRL's are the paper's. Both average over
    sequences.

    Args:
        clip: bounds (low, high) of the ratio of a token, 0 <= low <= 1 <= high; the paper's ±0.4 in log space are
            (e^−0.4, e^0.4).
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |log s| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean s, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log s| above the cap, in [0, 1].
        log_ratio_abs: mean |log s|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        clip_low: share of tokens with A < 0 and r < low, whose ratio is set to ``low``; in [0, 1].
        clip_high: share of tokens with A > 0 and r > high, whose ratio is set to ``high``; in [0, 1].

    >>> gmpo(clip=(0.8, 1.25)).knobs["weigh"]
    sequence_mean
    """
    low, high = clip
    bounds = (math.log(low) if low else -math.inf, math.log(high))

    def clipped_mean(t: Tokens, log_ratio: Tensor) -> Tensor:
        return geometric_level(t, one_sided_clip(log_ratio, t.advantages, bounds))

    def statistics(t: Tokens, ratio: Tensor) -> Statistics:
        return clip_statistics(t, (t.logprobs - t.old_logprobs).detach(), bounds)

    return ratio_loss(clipped_mean, lambda t, s: eq.surrogate(s, t.advantages), weigh, log_ratio_cap, statistics)
