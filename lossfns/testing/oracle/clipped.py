"""Losses with PPO's clip in plain floats."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lossfns.testing.oracle.rows import Sequence, over_tokens
from lossfns.testing.oracle.scalar import Number, Scalar, exp, ratio

Clip = tuple[float, float]
CLIP_OF_GMPO = (math.exp(-0.4), math.exp(0.4))


def clipped_ratio(r: Scalar, advantage: float, clip: Clip, dual_clip: float | None) -> Number:
    """−min(r·A, clip(r)·A), and at most −c·A where A < 0."""
    bound = min(max(float(r), clip[0]), clip[1])
    term = -r * advantage if float(r) * advantage <= bound * advantage else -bound * advantage
    if dual_clip is not None and advantage < 0:
        return term if float(term) <= -dual_clip * advantage else -dual_clip * advantage
    return term


@over_tokens
def bnpo(
    s: Sequence, clip: Clip = (0.8, 1.2), dual_clip: float | None = None, log_ratio_cap: float | None = 20.0
) -> Iterator[Number]:
    """PPO's clip, averaged over the tokens of the call (TRL)."""
    for lp, old, advantage in zip(s.lp, s.old_logprobs, s.advantages, strict=True):
        yield clipped_ratio(ratio(lp, old, log_ratio_cap), advantage, clip, dual_clip)


@over_tokens
def dr_grpo(
    s: Sequence, clip: Clip = (0.8, 1.2), dual_clip: float | None = None, log_ratio_cap: float | None = 20.0
) -> Iterator[Number]:
    """PPO's clip; the constant length comes from the weighing (Liu et al. 2025)."""
    for lp, old, advantage in zip(s.lp, s.old_logprobs, s.advantages, strict=True):
        yield clipped_ratio(ratio(lp, old, log_ratio_cap), advantage, clip, dual_clip)


@over_tokens
def luspo(
    s: Sequence,
    clip: Clip = (1 - 3e-4, 1 + 4e-4),
    dual_clip: float | None = None,
    log_ratio_cap: float | None = 20.0,
) -> Iterator[Number]:
    """PPO's clip on the geometric mean of the ratios of a sequence (Liu et al. 2026)."""
    r = ratio(s.mean(s.gap("old_logprobs")), 0.0, log_ratio_cap)
    for advantage in s.advantages:
        yield clipped_ratio(r, advantage, clip, dual_clip)


@over_tokens
def rloo(
    s: Sequence, clip: Clip = (0.8, 1.2), dual_clip: float | None = None, log_ratio_cap: float | None = 20.0
) -> Iterator[Number]:
    """PPO's clip on the product of the ratios of a sequence (TRL)."""
    r = ratio(s.sum(s.gap("old_logprobs")), 0.0, log_ratio_cap)
    for advantage in s.advantages:
        yield clipped_ratio(r, advantage, clip, dual_clip)


@over_tokens
def gmpo(s: Sequence, clip: Clip = CLIP_OF_GMPO, log_ratio_cap: float | None = 20.0) -> Iterator[Number]:
    """−A·Π r^(w/Σw), each r cut to the bound that PPO's clip has for its advantage (Zhao et al. 2025)."""
    logs: list[Number] = []
    for d, advantage in zip(s.gap("old_logprobs"), s.advantages, strict=True):
        if advantage > 0 and float(exp(d)) > clip[1]:
            logs.append(math.log(clip[1]))
        elif advantage < 0 and float(exp(d)) < clip[0]:
            logs.append(math.log(clip[0]))
        else:
            logs.append(d)
    mean = ratio(s.mean(logs), 0.0, log_ratio_cap)
    for advantage in s.advantages:
        yield -mean * advantage
