"""Losses of the importance ratio r = exp(lp − old): the parts that the policy presets share."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor

from lossfns import terms as eq
from lossfns.combine import with_dual_clip
from lossfns.loss import Loss, Statistics
from lossfns.preset import make_loss
from lossfns.segments import Level, geometric_level
from lossfns.statistics import OnDemand
from lossfns.tokens import Tokens
from lossfns.weigh import Weighing

Clip = tuple[float, float]
"""Bounds (low, high) of the ratio itself."""
Surrogate = Callable[[Tokens, Tensor], Tensor]
"""A function ``(t, ratio [N]) -> loss of each token [N]``."""
RatioStatistics = Callable[[Tokens, Tensor], Statistics]
"""A function ``(t, ratio [N]) -> statistics of each token``."""


def geometric_level_by_token(t: Tokens, log_ratio: Tensor) -> Tensor:
    """Mean over the sequence, as in ``geometric_level``, with the gradient of each token's own log-ratio."""
    return eq.straight_through(geometric_level(t, log_ratio), log_ratio)


def ratio_loss(
    level: Level,
    surrogate: Surrogate,
    weigh: Weighing,
    log_ratio_cap: float | None,
    more_statistics: RatioStatistics = lambda t, ratio: OnDemand(),
    behaviour: str = "old_logprobs",
    signal: str = "advantages",
) -> Loss:
    """surrogate(t, r) of each token, with r = exp(d) and d = the capped log-ratio of the token or its sequence.

    ``behaviour`` is the column with the logprobs of the policy that the ratio divides by, and ``signal`` is the column
    that the surrogate reads.
    """

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        log_ratio = t.logprobs - t.columns[behaviour]
        d = level(t, log_ratio)
        r = eq.importance_ratio(d, log_ratio_cap)
        cap = math.inf if log_ratio_cap is None else log_ratio_cap
        statistics = OnDemand(
            ratio=r.detach,
            ratio_capped=lambda: d.detach().abs() > cap,
            log_ratio_abs=lambda: d.detach().abs(),
            **{f"kl_{behaviour.removesuffix('_logprobs')}": lambda: eq.k3_of(log_ratio.detach())},
        )
        return surrogate(t, r), statistics | more_statistics(t, r.detach())

    return make_loss(terms, (signal, behaviour), weigh)


def clip_statistics(t: Tokens, ratio: Tensor, clip: Clip) -> Statistics:
    """Masks of tokens whose gradient a bound removes: r < low with A < 0, and r > high with A > 0."""
    low, high = clip
    return OnDemand(
        clip_low=lambda: (t.advantages < 0) & (ratio < low),
        clip_high=lambda: (t.advantages > 0) & (ratio > high),
    )


def bound_statistics(t: Tokens, ratio: Tensor, clip: Clip) -> Statistics:
    """Masks of tokens whose weight a bound limits: r < low, and r > high, for any advantage."""
    low, high = clip
    return OnDemand(bound_low=lambda: ratio < low, bound_high=lambda: ratio > high)


def clipped(level: Level, clip: Clip, weigh: Weighing, log_ratio_cap: float | None, dual_clip: float | None) -> Loss:
    """−min(r·A, clip(r, low, high)·A), with a dual clip unless ``dual_clip`` is None."""

    def surrogate(t: Tokens, ratio: Tensor) -> Tensor:
        return eq.clipped_surrogate(ratio, t.advantages, clip)

    statistics = partial(clip_statistics, clip=clip)
    return with_dual_clip(ratio_loss(level, surrogate, weigh, log_ratio_cap, statistics), dual_clip)
