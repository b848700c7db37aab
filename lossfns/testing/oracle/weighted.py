"""Losses −c·A·lp with a constant c, or of lp − old, in plain floats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lossfns.testing.oracle.rows import Sequence, over_tokens
from lossfns.testing.oracle.scalar import Number, Scalar, exp, ratio, stop
from lossfns.testing.oracle.scalar import cap as capped

Clip = tuple[float, float]


def leveled(s: Sequence, level: str, log_ratios: list[Scalar]) -> list[Scalar]:
    """The log-ratio of each token, or at each token that of its sequence: Σ w·d, or Σ w·d / Σ w."""
    if level == "token_level":
        return log_ratios
    return [s.sum(log_ratios) if level == "sequence_level" else s.mean(log_ratios)] * len(s.lp)


@over_tokens
def gpg(s: Sequence) -> Iterator[Number]:
    """−A·lp (Chu et al. 2025)."""
    for lp, advantage in zip(s.lp, s.advantages, strict=True):
        yield -lp * advantage


@over_tokens
def opmd(s: Sequence, tau: float = 1.0) -> Iterator[Number]:
    """−A·lp / (1 + τ) (Trinity's OPMD)."""
    for lp, advantage in zip(s.lp, s.advantages, strict=True):
        yield -lp * advantage / (1 + tau)


def weighted(s: Sequence, coefficients: Iterable[Number]) -> Iterator[Number]:
    """−sg(c)·A·lp."""
    for lp, c, advantage in zip(s.lp, coefficients, s.advantages, strict=True):
        yield -lp * (stop(c) * advantage)


@over_tokens
def cispo_sequence(s: Sequence, clip: Clip = (0.0, 4.0), log_ratio_cap: float | None = 20.0) -> Iterator[Number]:
    """−sg(clip(s))·A·lp with the geometric mean s of the ratios of a sequence (TRL)."""
    r = float(ratio(s.mean(s.gap("old_logprobs")), 0.0, log_ratio_cap))
    return weighted(s, [min(max(r, clip[0]), clip[1])] * len(s.lp))


@over_tokens
def rollout_is(s: Sequence, clip: Clip = (0.8, 1.2), log_ratio_cap: float | None = 20.0) -> Iterator[Number]:
    """−sg(r)·A·lp with r = π / π_sampler inside the bounds, 0 outside (IcePop)."""
    ratios = [float(ratio(lp, q, log_ratio_cap)) for lp, q in zip(s.lp, s.sampler_logprobs, strict=True)]
    return weighted(s, [r if clip[0] <= r <= clip[1] else 0.0 for r in ratios])


@over_tokens
def capped_importance_sampling(s: Sequence, cap: float = 2.0, log_ratio_cap: float | None = 20.0) -> Iterator[Number]:
    """−min(π / π_sampler, cap)·A (flashinfer)."""
    for lp, q, advantage in zip(s.lp, s.sampler_logprobs, s.advantages, strict=True):
        r = ratio(lp, q, log_ratio_cap)
        yield -(r if r <= cap else cap) * advantage


@over_tokens
def topr(s: Sequence, level: str = "sequence_level", log_ratio_cap: float | None = 20.0) -> Iterator[Number]:
    """−A·lp where A > 0, else −sg(min(r, 1))·A·lp (Le Roux et al. 2025)."""
    ratios = [float(ratio(d, 0.0, log_ratio_cap)) for d in leveled(s, level, s.gap("old_logprobs"))]
    return weighted(s, [1.0 if a > 0 else min(r, 1.0) for r, a in zip(ratios, s.advantages, strict=True)])


@over_tokens
def vespo(
    s: Sequence,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
    log_ratio_cap: float | None = 20.0,
) -> Iterator[Number]:
    """−sg(e^λ·sᵏ·e^(−λ·s))·A·lp with the product s of the ratios of a sequence (Shen et al. 2026)."""
    log_s = float(capped(s.sum(s.gap("old_logprobs")), log_ratio_cap))

    def phi(k: float, decay: float) -> float:
        return float(exp(k * log_s + decay * (1 - float(exp(log_s)))))

    return weighted(s, [phi(k_pos, lambda_pos) if a >= 0 else phi(k_neg, lambda_neg) for a in s.advantages])


def inside(region: str, r: float, advantage: float, clip: Clip) -> bool:
    """Whether PPO's clip (one side), or the bounds alone (two sides), keep the gradient."""
    two_side = region == "two_side"
    return not ((r > clip[1] and (two_side or advantage > 0)) or (r < clip[0] and (two_side or advantage < 0)))


@over_tokens
def rec(
    s: Sequence,
    region: str = "one_side",
    is_weight: str = "unit_weight",
    clip: Clip = (0.8, 1.2),
    level: str = "token_level",
    log_ratio_cap: float | None = 20.0,
) -> Iterator[Number]:
    """−sg(1 or r)·A·lp in the region, 0 outside (Yao et al. 2025)."""
    ratios = [float(ratio(d, 0.0, log_ratio_cap)) for d in leveled(s, level, s.gap("old_logprobs"))]
    kept = [inside(region, r, a, clip) for r, a in zip(ratios, s.advantages, strict=True)]
    return weighted(s, [(1.0 if is_weight == "unit_weight" else r) if k else 0.0 for r, k in zip(ratios, kept)])


@over_tokens
def rec_ring(
    s: Sequence,
    is_weight: str = "unit_weight",
    clip: Clip = (0.8, 1.2),
    outer_clip: Clip = (0.4, 3.0),
    log_ratio_cap: float | None = 20.0,
) -> Iterator[Number]:
    """−sg(1 or r)·A·lp inside the bounds, and beyond the outer bound that the advantage pulls back from."""
    coefficients = []
    for d, advantage in zip(s.gap("old_logprobs"), s.advantages, strict=True):
        r = float(ratio(d, 0.0, log_ratio_cap))
        low = advantage >= 0 and r <= outer_clip[0]
        high = advantage <= 0 and r >= outer_clip[1]
        kept = clip[0] <= r <= clip[1] or low or high
        coefficients.append((1.0 if is_weight == "unit_weight" else r) if kept else 0.0)
    return weighted(s, coefficients)


@over_tokens
def kimi15(s: Sequence, tau: float = 0.1) -> Iterator[Number]:
    """−A·lp + ½τ(lp − old)² (Kimi k1.5)."""
    for lp, old, advantage in zip(s.lp, s.old_logprobs, s.advantages, strict=True):
        yield -lp * advantage + (lp - old) ** 2 * (tau / 2)


@over_tokens
def sppo_token(s: Sequence, clip: Clip = (1 / 1.3, 1.3), log_ratio_cap: float | None = 20.0) -> Iterator[Number]:
    """−A·(lp − old) inside the bounds, 0 outside (Trinity's sPPO)."""
    for lp, old, advantage in zip(s.lp, s.old_logprobs, s.advantages, strict=True):
        yield -(lp - old) * advantage if clip[0] <= ratio(lp, old, log_ratio_cap) <= clip[1] else 0.0
