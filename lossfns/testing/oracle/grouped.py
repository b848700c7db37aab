"""Preference losses that compare the pairs of a group, in plain floats."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lossfns.testing.oracle.preference import log_ratio
from lossfns.testing.oracle.rewards import smoothed
from lossfns.testing.oracle.rows import Oracle, Sequence, over_all_pairs
from lossfns.testing.oracle.scalar import Number, Scalar, exp, log, log_sigmoid, stop, total

Pair = tuple[Sequence, Sequence]


def over_groups(terms: Callable[..., list[Number]]) -> Oracle:
    """Make a loss over pairs from the terms of the pairs of one group."""

    def of_all(pairs: list[Pair], **settings: Any) -> list[Number]:
        groups: dict[float, list[Pair]] = {}
        for pair in pairs:
            groups.setdefault(pair[0].number("groups"), []).append(pair)
        return [term for group in groups.values() for term in terms(group, **settings)]

    of_all.__doc__ = terms.__doc__
    return over_all_pairs(of_all)


def plain(s: Sequence, name: str) -> float:
    """Σ w·column."""
    return math.fsum(w * x for w, x in zip(s.w, s.columns[name], strict=True))


@over_groups
def aot(group: list[Pair], beta: float = 0.1, label_smoothing: float = 0.0) -> list[Number]:
    """l(sort(logits) − sort(logits of ref)) (Melnyk et al. 2024, paired)."""
    policy = sorted((c.sum(c.lp) - r.sum(r.lp) for c, r in group), key=float)
    reference = sorted(plain(c, "ref_logprobs") - plain(r, "ref_logprobs") for c, r in group)
    return [smoothed("logistic_link", (x - y) * beta, label_smoothing) for x, y in zip(policy, reference, strict=True)]


@over_groups
def aot_unpaired(group: list[Pair], beta: float = 0.1, label_smoothing: float = 0.0) -> list[Number]:
    """l(sort(c) − sort(r)) (Melnyk et al. 2024, unpaired)."""
    chosen = sorted((log_ratio(c) for c, _ in group), key=float)
    rejected = sorted((log_ratio(r) for _, r in group), key=float)
    return [smoothed("logistic_link", (x - y) * beta, label_smoothing) for x, y in zip(chosen, rejected, strict=True)]


@over_groups
def dr_dpo(group: list[Pair], beta: float = 0.1, beta_prime: float = 1.0) -> list[Number]:
    """−β′·log mean exp(log σ(βm) / β′), for each pair of the group (Wu et al. 2024)."""
    xs = [log_sigmoid((log_ratio(c) - log_ratio(r)) * beta) / beta_prime for c, r in group]
    largest = max(float(x) for x in xs)
    value = (log(total(exp(x - largest) for x in xs) / len(xs)) + largest) * -beta_prime
    return [value] * len(group)


@over_groups
def beta_dpo(group: list[Pair], beta: float = 0.1, alpha: float = 0.6, min_beta: float = 1e-3) -> list[Number]:
    """−log σ(b·m), b = β·(1 + α·(mean m − M₀)) (Wu et al. 2024)."""
    margins = [log_ratio(c) - log_ratio(r) for c, r in group]
    mean = stop(total(margins)) / len(group)
    baselines = [c.number("reference_point") for c, _ in group]
    betas = [max(min_beta, beta * (1 + alpha * (mean - m0))) for m0 in baselines]
    return [-log_sigmoid(m * b) for m, b in zip(margins, betas, strict=True)]


@over_groups
def alpha_dpo(group: list[Pair], beta: float = 2.0, gamma: float = 1.0, alpha: float = 0.1) -> list[Number]:
    """−log σ(βu − γ − α·sg(z)), z the standardised margin against the reference (Wu et al. 2024)."""
    gaps = [stop(c.mean(c.gap("ref_logprobs")) - r.mean(r.gap("ref_logprobs"))) for c, r in group]
    mean = math.fsum(gaps) / len(gaps)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in gaps) / max(len(gaps) - 1, 1))

    def term(c: Sequence, r: Sequence, gap: float) -> Scalar:
        u = c.mean(c.lp) - r.mean(r.lp)
        return -log_sigmoid(u * beta - gamma - alpha * (gap - mean) / (std + 1e-6))

    return [term(c, r, gap) for (c, r), gap in zip(group, gaps, strict=True)]
