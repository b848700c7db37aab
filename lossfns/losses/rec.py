"""REC, the REINFORCE family with clips of Yao et al. 2025: −sg(ω)·A·lp in a region of the ratio, 0 outside.

The regularisers of the family are combinators and advantages. The squared log-ratio c·(lp − old)² is ``with_kl(rec(),
kl_beta=2 * c, kl=k2)`` with the old logprobs bound as ``ref_logprobs``. The data weights e^(A/T) belong in the
advantages: A·e^(A/T).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import Loss, Statistics
from lossfns.losses.ratio import Clip, ratio_loss
from lossfns.preset import preset
from lossfns.regions import RatioWeight, Region, one_side, two_side, unit_weight
from lossfns.segments import Level, token_level
from lossfns.statistics import OnDemand
from lossfns.tokens import Tokens
from lossfns.weigh import Weighing, token_mean


def in_region(
    region: Region, clip: Clip, weight: RatioWeight, level: Level, weigh: Weighing, log_ratio_cap: float | None
) -> Loss:
    """−sg(ω(r))·A·lp where the region keeps a token, else 0."""

    def weighted(t: Tokens, ratio: Tensor) -> Tensor:
        r = ratio.detach()
        coefficient = torch.where(region(r, t.advantages, clip), weight(r), 0)
        return eq.policy_gradient(t.logprobs, coefficient * t.advantages)

    def statistics(t: Tokens, ratio: Tensor) -> Statistics:
        return OnDemand(masked=lambda: ~region(ratio, t.advantages, clip))

    return ratio_loss(level, weighted, weigh, log_ratio_cap, statistics)


@preset
def rec(
    region: Region = one_side,
    is_weight: RatioWeight = unit_weight,
    clip: Clip = (0.8, 1.2),
    level: Level = token_level,
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
) -> Loss:
    """−sg(ω(r))·A·lp where the region keeps a token, else 0. Yao et al. 2025, arXiv:2509.24203; Trinity's "rec".

    REC-OneSide-NoIS is the default, REC-OneSide-IS has ``is_weight=ratio_weight`` (the gradient of PPO), REC-TwoSide
    has ``region=two_side``. Trinity's "gspo-one-side" is ``rec(level=geometric_level, weigh=sequence_mean)``. With
    ``clip=(0, inf)`` no token is masked.

    Args:
        region: where a token keeps its gradient: ``one_side`` or ``two_side``.
        is_weight: ω, the importance weight of a token: ``unit_weight`` or ``ratio_weight``.
        clip: bounds (low, high) of the ratio itself, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2).
        level: what the log-ratio d = lp − old is taken over: ``token_level`` (each token), ``sequence_level`` (Σ w·d
            over the sequence) or ``geometric_level`` (Σ w·d / Σ w over the sequence).
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |log r| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |log r|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        masked: share of tokens outside the region, whose loss and gradient are 0; in [0, 1].

    >>> from lossfns import geometric_level, sequence_mean
    >>> rec(level=geometric_level, weigh=sequence_mean).reads
    ('advantages', 'old_logprobs')
    """
    return in_region(region, clip, is_weight, level, weigh, log_ratio_cap)


@preset
def rec_ring(
    is_weight: RatioWeight = unit_weight,
    clip: Clip = (0.8, 1.2),
    outer_clip: Clip = (0.4, 3.0),
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
) -> Loss:
    """−sg(ω(r))·A·lp between the bounds, and beyond an outer bound from which the advantage pulls r back, else 0.

    REC-Ring of Yao et al. 2025, arXiv:2509.24203. A token keeps its gradient where low <= r <= high, where A >= 0 and r
    is at most the outer low, and where A <= 0 and r is at least the outer high.

    Args:
        is_weight: ω, the importance weight of a token: ``unit_weight`` or ``ratio_weight``.
        clip: bounds (low, high) of the ratio itself, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2).
        outer_clip: the outer bounds (low, high), 0 <= low <= 1 <= high; Trinity's epsilons of 0.6 and 2 are (0.4, 3.0).
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        masked: share of tokens outside the region, whose loss and gradient are 0; in [0, 1].

    >>> rec_ring().knobs["outer_clip"]
    (0.4, 3.0)
    """
    far_low, far_high = outer_clip

    def ring(ratio: Tensor, advantages: Tensor, clip: Clip) -> Tensor:
        far = ((advantages >= 0) & (ratio <= far_low)) | ((advantages <= 0) & (ratio >= far_high))
        return two_side(ratio, advantages, clip) | far

    return in_region(ring, clip, is_weight, token_level, weigh, log_ratio_cap)
