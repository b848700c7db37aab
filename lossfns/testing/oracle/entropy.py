"""Losses of the entropy of the policy in plain floats. Combinators are applied to the policy gradient −A·lp."""

from __future__ import annotations

from collections.abc import Iterator
from math import exp, floor, fsum, sqrt

from lossfns.testing.oracle.rows import Sequence, over_batch, over_tokens
from lossfns.testing.oracle.scalar import Number, ratio


@over_tokens
def eaft(s: Sequence, power: float = 1.0, entropy_scale: float = 2.995732273553991) -> Iterator[Number]:
    """−(H/s)^α·lp (Diao et al. 2026)."""
    for lp, entropy in zip(s.lp, s.entropy, strict=True):
        yield -lp * (entropy / entropy_scale) ** power


@over_tokens
def entropy_bonus(s: Sequence, entropy_coef: float = 0.01) -> Iterator[Number]:
    """−c·H. The entropies stand in the place of the logprobs: the gradient is that in H."""
    for entropy in s.lp:
        yield -entropy * entropy_coef


@over_tokens
def sampled_entropy_bonus(
    s: Sequence, entropy_coef: float = 0.01, log_ratio_cap: float | None = 20.0
) -> Iterator[Number]:
    """c·r·lp."""
    for lp, old in zip(s.lp, s.old_logprobs, strict=True):
        yield ratio(lp, old, log_ratio_cap) * lp * entropy_coef


def groups_of(batch: list[Sequence]) -> dict[float, list[Sequence]]:
    """The sequences with an active token, by the label of their group."""
    groups: dict[float, list[Sequence]] = {}
    for s in batch:
        if s.w:
            groups.setdefault(s.number("groups"), []).append(s)
    return groups


@over_batch
def with_top_entropy(batch: list[Sequence], top_quantile: float = 0.2) -> list[list[Number]]:
    """−A·lp where H is at least the (1 + ⌊ρ·(n − 1)⌋)-th largest of the n of its group, else 0 (Wang et al. 2025)."""
    least = {}
    for label, members in groups_of(batch).items():
        entropies = sorted((h for s in members for h in s.entropy), reverse=True)
        least[label] = entropies[floor(top_quantile * (len(entropies) - 1))]
    return [
        [-lp * a if h >= least[s.number("groups")] else 0.0 for lp, a, h in zip(s.lp, s.advantages, s.entropy)]
        for s in batch
    ]


@over_batch
def with_clip_b(batch: list[Sequence], mu: float = 2.5) -> list[list[Number]]:
    """−A·lp, but 0 where A < 0 and p·(H + lp) lies more than μ deviations below its mean (Wang et al. 2026)."""
    bound = {}
    for label, members in groups_of(batch).items():
        signals = [s for member in members for s in signal(member)]
        mean = fsum(signals) / len(signals)
        bound[label] = mean - mu * sqrt(fsum((s - mean) ** 2 for s in signals) / len(signals))
    return [
        [
            0.0 if a < 0 and x < bound[s.number("groups")] else -lp * a
            for lp, a, x in zip(s.lp, s.advantages, signal(s), strict=True)
        ]
        for s in batch
    ]


def signal(s: Sequence) -> list[float]:
    """p·(H + lp) at each token."""
    return [exp(lp.value) * (h + lp.value) for lp, h in zip(s.lp, s.entropy, strict=True)]
