"""The loss of a value head in plain floats."""

from __future__ import annotations

from collections.abc import Iterator

from lossfns.testing.oracle.rows import Sequence, over_tokens
from lossfns.testing.oracle.scalar import Number


@over_tokens
def value_loss(s: Sequence, value_clip: float | None = 0.2) -> Iterator[Number]:
    """½·max((v − R)², (clip(v, v_old ± c) − R)²) (Schulman et al., baselines/ppo2)."""
    for i, (v, target) in enumerate(zip(s.lp, s.returns, strict=True)):
        free = (v - target) * (v - target) * 0.5
        if value_clip is None:
            yield free
            continue
        moved = v.value - s.old_values[i]
        bound = s.old_values[i] + max(-value_clip, min(moved, value_clip))
        clipped = 0.5 * (bound - target) ** 2  # a constant beyond the bounds
        yield clipped if abs(moved) > value_clip and clipped > free.value else free
