"""Preference losses on single datums in plain floats."""

from __future__ import annotations

from lossfns.testing.oracle.rows import Sequence, over_datums
from lossfns.testing.oracle.scalar import Number, log_sigmoid, sigmoid


@over_datums
def kto(s: Sequence, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Number:
    """λ·(1 − σ(±β·(m − z₀))), m = Σ w·(lp − ref) (Ethayarajh et al. 2024)."""
    m, z0 = s.sum(s.gap("ref_logprobs")), s.number("reference_point")
    if s.number("labels") == 1:
        return (1 - sigmoid((m - z0) * beta)) * desirable_weight
    return (1 - sigmoid((z0 - m) * beta)) * undesirable_weight


@over_datums
def bco(s: Sequence, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Number:
    """−λ·log σ(±β·(m − z)), m = Σ w·(lp − ref) (Jung et al. 2024)."""
    m, z = s.sum(s.gap("ref_logprobs")), s.number("reference_point")
    if s.number("labels") == 1:
        return -log_sigmoid((m - z) * beta) * desirable_weight
    return -log_sigmoid((z - m) * beta) * undesirable_weight


@over_datums
def sppo(s: Sequence, beta: float = 0.1) -> Number:
    """(m − (P − ½)/β)², m = Σ w·(lp − ref) (Wu et al. 2024)."""
    return (s.sum(s.gap("ref_logprobs")) - (s.number("rewards") - 0.5) / beta) ** 2
