"""Policy losses that compare the tokens or datums of a group, in plain floats."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

from lossfns.testing.oracle.rows import Sequence, over_all_datums, over_batch
from lossfns.testing.oracle.scalar import Number, absolute, exp, log, total
from lossfns.testing.oracle.trust import Clip, clipped_terms, importance

Place = tuple[int, int]  # a sequence and a token of it


def by_group(batch: list[Sequence]) -> list[list[Sequence]]:
    """The sequences with an active token, group by group."""
    groups: dict[float, list[Sequence]] = {}
    for s in batch:
        if s.w:
            groups.setdefault(s.number("groups"), []).append(s)
    return list(groups.values())


def places_by_group(batch: list[Sequence]) -> list[list[Place]]:
    """The tokens of each group."""
    index = {id(s): i for i, s in enumerate(batch)}
    return [[(index[id(s)], j) for s in group for j in range(len(s.w))] for group in by_group(batch)]


def covariances(batch: list[Sequence], places: list[Place]) -> dict[Place, float]:
    """(A − mean A)·(lp − mean lp) over the tokens of a group."""
    a = {(i, j): batch[i].advantages[j] for i, j in places}
    lp = {(i, j): batch[i].lp[j].value for i, j in places}
    mean_a, mean_lp = (math.fsum(x.values()) / len(places) for x in (a, lp))
    return {place: float32((a[place] - mean_a) * (lp[place] - mean_lp)) for place in places}


def float32(x: float) -> float:
    """The number as float32 holds it. In a group of two tokens both have the same covariance, but for rounding."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


def largest(x: dict[Place, float], share: float, size: int) -> set[Place]:
    """The places of the largest numbers, a share of ``size`` but at least one; none that ties with one left out."""
    count = max(1, math.floor(share * size))
    ranked = sorted(x, key=lambda place: -x[place])
    cut = x[ranked[count]] if len(ranked) > count else -math.inf
    return {place for place in ranked[:count] if x[place] > cut}


def where(rows: list[list[Number]], dropped: Callable[[Place], bool]) -> list[list[Number]]:
    return [[0.0 if dropped((i, j)) else term for j, term in enumerate(row)] for i, row in enumerate(rows)]


@over_batch
def clip_cov(
    batch: list[Sequence],
    clip: Clip = (0.8, 1.2),
    fraction: float = 2e-4,
    cov_bounds: Clip = (1.0, 5.0),
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> list[list[Number]]:
    """The clipped surrogate, without the tokens of largest covariance (Cui et al. 2025)."""
    dropped: set[Place] = set()
    for places in places_by_group(batch):
        candidates = {}
        for (i, j), c in covariances(batch, places).items():
            s = batch[i]
            r = math.exp(min(s.lp[j].value - s.old_logprobs[j], 700.0))
            is_clipped = (s.advantages[j] < 0 and r < clip[0]) or (s.advantages[j] > 0 and r > clip[1])
            if cov_bounds[0] < c < cov_bounds[1] and not is_clipped:
                candidates[i, j] = c
        dropped |= largest(candidates, fraction, len(places))
    rows = [list(clipped_terms(s, clip, log_ratio_cap, dual_clip)) for s in batch]
    return where(rows, dropped.__contains__)


@over_batch
def kl_cov(
    batch: list[Sequence], fraction: float = 2e-4, kl_coef: float = 1.0, log_ratio_cap: float | None = 20.0
) -> list[list[Number]]:
    """−r·A, plus |lp − old| at the tokens of largest covariance (Cui et al. 2025)."""
    rows = [importance(s, log_ratio_cap) for s in batch]
    for places in places_by_group(batch):
        for i, j in largest(covariances(batch, places), fraction, len(places)):
            rows[i][j] = rows[i][j] + absolute(batch[i].lp[j] - batch[i].old_logprobs[j]) * kl_coef
    return rows


@over_batch
def m2po(
    batch: list[Sequence],
    threshold: float = 0.04,
    clip: Clip = (0.8, 1.2),
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> list[list[Number]]:
    """The clipped surrogate, without the tokens farthest from the sampler (Zheng et al. 2025, AReaL)."""
    dropped: set[Place] = set()
    for places in places_by_group(batch):
        m = {(i, j): (batch[i].old_logprobs[j] - batch[i].sampler_logprobs[j]) ** 2 for i, j in places}
        kept = sorted(places, key=m.__getitem__)
        while kept and math.fsum(m[place] for place in kept) / len(kept) > threshold:
            kept.pop()
        cut = min((m[place] for place in set(places) - set(kept)), default=math.inf)
        dropped |= {place for place in places if m[place] >= cut}
    rows = [list(clipped_terms(s, clip, log_ratio_cap, dual_clip)) for s in batch]
    return where(rows, dropped.__contains__)


@over_all_datums
def real(datums: list[Sequence], tau: float = 0.5) -> list[Number]:
    """log(1 + Σ₊ e^(−s/τ)) + log(1 + Σ₋ e^(s/τ)) for each datum of a group (Zhai et al. 2026)."""
    loss_of: dict[float, Number] = {}
    for group in by_group(datums):
        right = [s.mean(s.gap("old_logprobs")) for s in group if s.number("labels") == 1]
        wrong = [s.mean(s.gap("old_logprobs")) for s in group if s.number("labels") != 1]
        both = bool(right and wrong)
        sums = [total([1.0, *(exp(x / by) for x in side)]) for side, by in ((right, -tau), (wrong, tau))]
        loss_of[group[0].number("groups")] = log(sums[0]) + log(sums[1]) if both else 0.0
    return [loss_of[s.number("groups")] for s in datums]
