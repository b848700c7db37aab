"""The checks, in the order of diagnosis: the first one that fails is the likeliest to name the defect."""

from __future__ import annotations

from lossfns.conformance.base import Check
from lossfns.conformance.checks import (
    algebra,
    custom,
    failures,
    gradients,
    optimizer,
    outputs,
    sampling,
    state,
    targets,
    values,
    vectors,
)

CHECKS: tuple[Check, ...] = (
    *outputs.CHECKS,
    *values.CHECKS,
    *state.START,
    *optimizer.FIRST,
    *algebra.CHECKS,
    *gradients.CHECKS,
    *targets.CHECKS,
    *optimizer.CHECKS,
    *state.CHECKS,
    *failures.CHECKS,
    *custom.CHECKS,
    *sampling.CHECKS,
    *vectors.CHECKS,
)
"""All checks."""
