"""KL penalties in plain floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from lossfns.testing.oracle.rows import Sequence, over_tokens
from lossfns.testing.oracle.scalar import Number, Scalar, absolute, cap, exp, ratio, stop, straight


def k3(d: Scalar, limit: float | None) -> Number:
    """eˣ − x − 1 with x = −d (Schulman 2020)."""
    x = cap(-d, limit)
    return exp(x) - x - 1


ESTIMATORS: dict[str, Callable[[Scalar], Number]] = {
    "k1": lambda d: d,
    "k2": lambda d: d * d * 0.5,
    "k3": lambda d: k3(d, 20.0),
    "k3_uncapped": lambda d: k3(d, None),
    "k_abs": absolute,
    "k_squared": lambda d: d * d,
    "k1_plus": lambda d: straight(d, d * d * 0.5),
    "k3_plus": lambda d: straight(k3(d, 20.0), d * d * 0.5),
}
"""Estimators of d = lp − ref by name."""

WEIGHTS: dict[str, Callable[[Scalar, float], Number]] = {
    "none": lambda lp, old: 1.0,
    "ratio": lambda lp, old: ratio(lp, old, 20.0),
    "detached": lambda lp, old: stop(ratio(lp, old, 20.0)),
    "score_function": lambda lp, old: exp(lp - stop(lp)),
}
"""Factors of an estimator by name."""


@over_tokens
def kl_penalty(
    s: Sequence,
    kl: str = "k3",
    kl_weight: str = "none",
    kl_cap: float | None = None,
    kl_to: str = "ref_logprobs",
    log_ratio_cap: float = math.inf,
) -> Iterator[Number]:
    """clamp(weight·KL(lp, ref), ±cap), where |lp − ref| is capped first."""
    for lp, old, other in zip(s.lp, s.old_logprobs, getattr(s, kl_to), strict=True):
        d = cap(lp - other, log_ratio_cap)
        estimate = ESTIMATORS[kl](d if isinstance(d, Scalar) else Scalar(d))
        yield cap(WEIGHTS[kl_weight](lp, old) * estimate, kl_cap)
