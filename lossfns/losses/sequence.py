"""Policy-gradient losses with one importance ratio for each sequence."""

from __future__ import annotations

from lossfns.loss import Loss, preset
from lossfns.losses.ratio import Clip, clipped, geometric_level_by_token
from lossfns.segments import geometric_level
from lossfns.weigh import Weighing, sequence_mean


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
