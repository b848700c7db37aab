"""Policy losses with masks and trust regions in plain floats."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lossfns.testing.oracle.rows import Sequence, over_datums, over_tokens
from lossfns.testing.oracle.scalar import Number, clamp, ratio, stop

Clip = tuple[float, float]


def importance(s: Sequence, cap: float | None, behaviour: str = "old_logprobs") -> list[Number]:
    """−r·A of each token."""
    others = s.columns[behaviour]
    return [-ratio(lp, b, cap) * a for lp, b, a in zip(s.lp, others, s.advantages, strict=True)]


def clipped_terms(s: Sequence, clip: Clip, cap: float | None, dual_clip: float | None) -> Iterator[Number]:
    """−min(r·A, clip(r)·A) (Schulman et al. 2017), at most −c·A where A < 0 (Ye et al. 2020)."""
    low, high = clip
    for lp, old, a in zip(s.lp, s.old_logprobs, s.advantages, strict=True):
        r = ratio(lp, old, cap)
        loss: Number = -r * a
        if (a < 0 and float(r) < low) or (a > 0 and float(r) > high):
            loss = -float(clamp(float(r), low, high)) * a
        if dual_clip is not None and a < 0 and float(loss) > -dual_clip * a:
            loss = -dual_clip * a
        yield loss


def rises(s: Sequence, behaviour: str) -> list[float]:
    """p − p_old of each token."""
    return [math.exp(lp.value) - math.exp(old) for lp, old in zip(s.lp, s.columns[behaviour], strict=True)]


@over_tokens
def dppo_tv(
    s: Sequence, delta_low: float = 0.2, delta_high: float = 0.2, log_ratio_cap: float | None = 20.0
) -> Iterator[Number]:
    """−r·A inside the trust region of the total variation of {token, rest} (Qi et al. 2026)."""
    for term, rise, a in zip(importance(s, log_ratio_cap), rises(s, "old_logprobs"), s.advantages, strict=True):
        outside = rise > delta_high if a > 0 else rise < -delta_low
        yield 0.0 if outside else term


@over_tokens
def dppo_kl(
    s: Sequence, delta_low: float = 0.05, delta_high: float = 0.05, log_ratio_cap: float | None = 20.0
) -> Iterator[Number]:
    """−r·A inside the trust region of the KL of {token, rest} (Qi et al. 2026)."""
    for term, lp, old, a in zip(importance(s, log_ratio_cap), s.lp, s.old_logprobs, s.advantages, strict=True):
        p, q = math.exp(old), math.exp(lp.value)
        kl = p * (old - lp.value) + (1 - p) * math.log((1 - p + 1e-8) / (1 - q + 1e-8))
        outside = kl > delta_high and q > p if a > 0 else kl > delta_low and q < p
        yield 0.0 if outside else term


@over_tokens
def opsm(
    s: Sequence,
    clip: Clip = (0.8, 1.2),
    delta: float = 1e-4,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> Iterator[Number]:
    """The clipped surrogate, without what has A < 0 in a sequence that became unlikelier (DeepSeek-V3.2)."""
    fall = -float(s.mean(s.gap("old_logprobs")))
    for term, a in zip(clipped_terms(s, clip, log_ratio_cap, dual_clip), s.advantages, strict=True):
        yield 0.0 if a < 0 and fall > delta else term


def squared_gaps(s: Sequence) -> list[Number]:
    """(lp − sampler)² of each token."""
    return [gap**2 for gap in s.gap("sampler_logprobs")]


@over_tokens
def prime_dppo(
    s: Sequence,
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    adv_tau: float = 1.0,
    kl_tau: float = 1e-3,
    log_ratio_cap: float | None = 20.0,
) -> Iterator[Number]:
    """The default loss of prime-rl."""
    terms = importance(s, log_ratio_cap, "sampler_logprobs")
    for term, rise, square, a in zip(terms, rises(s, "sampler_logprobs"), squared_gaps(s), s.advantages, strict=True):
        outside = rise > delta_high if a > 0 else rise < -delta_low
        yield square * kl_tau + (0.0 if outside else term * adv_tau)


@over_tokens
def prime_symmetric(
    s: Sequence, delta: float = 0.1, adv_tau: float = 1.0, kl_tau: float = 1e-3, log_ratio_cap: float | None = 20.0
) -> Iterator[Number]:
    """The loss of prime-rl that is called "ipo" there."""
    terms = importance(s, log_ratio_cap, "sampler_logprobs")
    for term, rise, square in zip(terms, rises(s, "sampler_logprobs"), squared_gaps(s), strict=True):
        yield square * kl_tau + (0.0 if abs(rise) > delta else term * adv_tau)


@over_tokens
def prime_ref_kl(
    s: Sequence, delta_low: float = 0.2, kl_tau: float = 1e-3, log_ratio_cap: float | None = 20.0
) -> Iterator[Number]:
    """The loss of prime-rl for on-policy distillation."""
    for lp, ref, sampler, rise, square in zip(
        s.lp, s.ref_logprobs, s.sampler_logprobs, rises(s, "sampler_logprobs"), squared_gaps(s), strict=True
    ):
        term = -ratio(lp, sampler, log_ratio_cap) * (ref - stop(lp))
        yield square * kl_tau + (0.0 if rise < -delta_low else term)


@over_tokens
def ce_gppo(
    s: Sequence,
    clip: Clip = (0.8, 1.2),
    beta_low: float = 0.75,
    beta_high: float = 1.0,
    log_ratio_cap: float | None = 20.0,
) -> Iterator[Number]:
    """β·(bound/sg(r))·r·A beyond the bounds, r·A inside (Su et al. 2025). The slope of r/sg(r) in lp is 1."""
    low, high = clip
    for lp, old, a in zip(s.lp, s.old_logprobs, s.advantages, strict=True):
        r = ratio(lp, old, log_ratio_cap)
        one = lp + (1 - stop(lp))
        if a < 0 and float(r) < low:
            yield -one * (beta_low * low * a)
        elif a > 0 and float(r) > high:
            yield -one * (beta_high * high * a)
        else:
            yield -r * a


@over_tokens
def fipo(
    s: Sequence,
    clip: Clip = (0.8, 1.28),
    half_life: float = 32.0,
    weight_clip: Clip = (1.0, 1.2),
    safety_ratio: float | None = 4.0,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = 10.0,
) -> Iterator[Number]:
    """The clipped surrogate times the clipped exponential of the discounted future log-ratios (Ma et al. 2026)."""
    ratios = [float(ratio(lp, old, log_ratio_cap)) for lp, old in zip(s.lp, s.old_logprobs, strict=True)]
    d = [float(x) if dual_clip is None or r <= dual_clip else 0.0 for x, r in zip(s.gap("old_logprobs"), ratios)]
    for i, term in enumerate(clipped_terms(s, clip, log_ratio_cap, dual_clip)):
        future = math.fsum(d[j] * 0.5 ** ((s.slots[j] - s.slots[i]) / half_life) for j in range(i, len(d)))
        f = min(max(math.exp(min(future, 700.0)), weight_clip[0]), weight_clip[1])
        if safety_ratio is not None and s.advantages[i] < 0 and ratios[i] > safety_ratio:
            f = min(max(f, 0.8), 1.0)
        yield term * f


@over_datums
def a2po(s: Sequence, beta: float = 1e-3) -> Number:
    """(β₂·m − (R − V*))², m = Σ w·(lp − ref) (Brantley et al. 2025)."""
    return (s.sum(s.gap("ref_logprobs")) * beta - (s.number("rewards") - s.number("reference_point"))) ** 2
