"""Laws of likelihood losses −Σ w·lp / D, which are linear in the logprobs and accept weights of both signs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lossfns.testing.laws.base import (
    LossFn,
    Probe,
    assume,
    fragile,
    reads_only_mask,
    require,
    shifted,
    unpoisoned,
    wrong,
)
from lossfns.testing.laws.policy import check_scale, unequal_weights_batch


@wrong("the gradient of −w·lp does not depend on lp")
def linear(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The gradient does not depend on the logprobs, and that of each of K targets is proportional to its weight."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unequal_weights_batch(probe)
    gradients = probe(batch).gradients
    after = probe(batch.having(logprobs=shifted(batch.logprobs, [(0, 0)], -1.0))).gradients
    bug = "not-likelihood"
    if batch.targets:
        sums = [math.fsum(gradients[0][i : i + batch.targets]) for i in range(0, len(gradients[0]), batch.targets)]
        # Over a softmax of the K targets alone, the gradients of a position sum to 0.
        if probe.close([1.0, *sums], [1.0] + [0.0] * len(sums)):
            bug = "renormalised-targets"
    seen = f"With weights {batch.weights} the gradients are {gradients}; they change with the logprobs."
    require(probe.close(after, gradients), bug, seen, batch)
    if batch.targets:
        factors = [-g / w for g, w in zip(gradients[0], batch.weights[0])]
        by_target = [factors[k :: batch.targets] for k in range(batch.targets)]
        equal_over_positions = all(probe.close(row, [row[0]] * len(row)) for row in by_target)
        transposed = equal_over_positions and not probe.close(factors, [factors[0]] * len(factors))
        seen = f"The gradients divided by the weights are {by_target} for the first, second, … target."
        require(not transposed, "targets-transposed", seen, batch)


@wrong("the gradient of −Σ w·lp / D is −w / D")
def likelihood(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The gradient is −w / D."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unequal_weights_batch(probe)
    if reads_only_mask(probe):  # a mask holds no fractions
        batch = batch.having(weights=[[1.0] * len(row) for row in batch.weights])
    gradients = probe(batch).gradients
    assume(any(g != 0 for row in gradients for g in row), "there is no gradient")
    seen = f"With weights {batch.weights} the gradients are {gradients}."
    require(gradients[0][0] < 0, "sign-flipped", seen, batch)
    factors = [[-g / w for g, w in zip(gs, ws)] for gs, ws in zip(gradients, batch.weights)]
    if not all(probe.close(row, [row[0]] * len(row)) for row in factors):
        squared = [[-g / w**2 for g, w in zip(gs, ws)] for gs, ws in zip(gradients, batch.weights)]
        twice = all(probe.close(row, [row[0]] * len(row)) for row in squared)
        require(False, "weights-squared" if twice else "weights-binarised", seen, batch)
    check_scale(probe, batch)


@fragile("weights are negative only where gradients are sent as weights")
def negative_weights(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A negative weight makes its token less likely: the two-pass protocol sends gradients as weights."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume(not reads_only_mask(probe), "it reads a mask, which holds no negative numbers")
    batch = unequal_weights_batch(probe)
    weights = [[-0.25 if j == 1 else w for j, w in enumerate(row)] for row in batch.weights]
    signed = unpoisoned(batch).having(weights=weights)
    gradients = probe(signed).gradients
    assume(gradients[0][0] != 0, "its first token has no gradient")
    seen = f"With weights {weights[0]} the gradients are {gradients[0]}."
    kept = probe.close(gradients[0][1] / gradients[0][0], -0.25 / weights[0][0])
    require(kept, "negative-weights-lost", seen, signed)
