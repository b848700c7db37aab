"""Policy-gradient losses in plain floats."""

from __future__ import annotations

from collections.abc import Iterator

from lossfns.testing.oracle.rows import Sequence, over_tokens
from lossfns.testing.oracle.scalar import Number, ratio, sigmoid


@over_tokens
def sapo(
    s: Sequence, tau_pos: float = 1.0, tau_neg: float = 1.05, log_ratio_cap: float | None = 20.0
) -> Iterator[Number]:
    """−(4/τ)·σ(τ·(r − 1))·A (Gao et al. 2025)."""
    for lp, old, advantage in zip(s.lp, s.old_logprobs, s.advantages, strict=True):
        tau = tau_pos if advantage > 0 else tau_neg
        yield sigmoid((ratio(lp, old, log_ratio_cap) - 1) * tau) * (-4 / tau * advantage)
