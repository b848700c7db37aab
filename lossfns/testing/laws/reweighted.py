"""Laws of re-weighted likelihood −Σ w·c(p)·lp / D, such as focal loss and DFT: sign, share, and the size of c."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lossfns.testing.laws.base import (
    LossFn,
    Probe,
    assume,
    fragile,
    is_described_as,
    reads_only_mask,
    require,
    uniform_batch,
    wrong,
)
from lossfns.testing.laws.settings import setting_named

LIKELY_TO_UNLIKELY = (-0.01, -0.1, -0.5, -1.5, -3.0, -8.0, -30.0)


def token_gradient(probe: Probe, logprob: float) -> float:
    """Return the gradient of a single token of weight 1."""
    return probe(uniform_batch(probe.batch, logprobs=logprob)).gradients[0][0]


def slope_of_token(probe: Probe, logprob: float, step: float = 1e-4) -> float:
    """Return the slope of the value of a single token of weight 1."""
    up, down = (probe(uniform_batch(probe.batch, logprobs=logprob + by)).value for by in (step, -step))
    return (up - down) / (2 * step)


@wrong("a token that is trained must not become less likely")
def raises(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Descent makes a token of positive weight no less likely, whatever its probability."""
    probe = Probe.of(loss_fn, data, logprobs)
    gradients = {lp: token_gradient(probe, lp) for lp in LIKELY_TO_UNLIKELY}
    size = max(map(abs, gradients.values()))
    assume(size > 0, "there is no gradient")
    lowered = [lp for lp, g in gradients.items() if g > 1e-6 * size]
    if not lowered:
        return
    seen = f"A token of weight 1 has the gradient {gradients[lowered[0]]:g} at logprob {lowered[0]:g}"
    raised = [lp for lp, g in gradients.items() if g < -1e-6 * size]
    require(bool(raised), "sign-flipped", f"{seen}, and it is positive at the others.")
    require(False, "missing-stop-gradient", f"{seen} and {gradients[raised[0]]:g} at {raised[0]:g}.")


@wrong("a token's weight is its share of the loss")
def proportional(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Among equal tokens of a sequence, the gradient is in proportion to the weight."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume(not reads_only_mask(probe), "it reads a mask, which holds no fractions")
    weights, width = (1.0, 0.5, 2.0), probe.batch.targets or 1
    batch = uniform_batch(probe.batch, length=len(weights))
    batch = batch.having(
        weights=[[w * x for w, x in zip((w for w in weights for _ in range(width)), batch.weights[0])]]
    )
    row = probe(batch).gradients[0][::width]
    assume(row[0] != 0, "there is no gradient")
    shares = [g / row[0] for g in row]
    seen = f"With weights {list(weights)} of equal tokens the gradients are {row}."
    require(not probe.close(shares, [w * w for w in weights]), "weights-squared", seen)
    require(probe.close(shares, weights), "weights-binarised", seen)


@fragile("a weighing may grow with the loss by design; one token of logprob −1e4 then outweighs a batch")
def bounded(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The factor of an unlikely token is bounded: its gradient is at most ten times that of a token of p = 1/e."""
    probe = Probe.of(loss_fn, data, logprobs)
    usual = abs(token_gradient(probe, -1.0))
    assume(usual != 0, "there is no gradient")
    for lp in (-8.0, -30.0, -1e3):
        g = token_gradient(probe, lp)
        seen = f"At logprob {lp:g} the gradient is {g:g}, at −1 its size is {usual:g}."
        require(abs(g) <= 10 * usual, "factor-unbounded", seen)


@wrong("the factor of focal loss is (1 − p)^γ")
def focal(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A loss called focal has the factor (1 − p)^γ, as a constant or with its gradient."""
    probe = Probe.of(loss_fn, data, logprobs)
    found = setting_named(loss_fn, "gamma", "focal_gamma", "focusing")
    assume(is_described_as(loss_fn, "focal"), "it is not called focal")
    points = (-0.1, -0.7, -2.0)
    unlikely = token_gradient(probe, -30.0)
    assume(unlikely != 0, "an unlikely token has no gradient")
    factors = [token_gradient(probe, lp) / unlikely for lp in points]
    assume(not probe.close(factors, [1.0] * 3), "it divides by its own weights")
    gammas = [float(found[1])] if found else [k / 4 for k in range(1, 25)]
    fits = [focal_factors(gamma, points, detached) for gamma in gammas for detached in (True, False)]
    shown = [round(f, 4) for f in factors]
    seen = f"At logprobs {points} the gradients are {shown} times that of an unlikely token, not (1 − p)^γ"
    right = any(probe.close(factors, fit, scale=10) for fit in fits)
    require(right, "focal-factor", f"{seen} with γ = {gammas[0]:g}." if found else f"{seen} with any γ up to 6.")


def focal_factors(gamma: float, logprobs: Sequence[float], detached: bool) -> list[float]:
    """Return the gradient of −(1 − p)^γ·lp by that of −lp, with the factor as a constant or not."""
    factors = []
    for lp in logprobs:
        p = math.exp(lp)
        inner = 0.0 if detached else gamma * (1 - p) ** (gamma - 1) * p * lp
        factors.append((1 - p) ** gamma - inner)
    return factors


@wrong("the gradient is that of the value, or of the value with its factor held constant")
def consistent(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The gradient of a token is the slope of its loss −c·lp, or −c if the factor c is a constant."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume(probe.dtype == torch.float64, "the loss computes in float32")
    assume(not probe.batch.targets, "it has several targets at each position")
    points = (-0.3, -1.0, -2.5)
    gradients = [token_gradient(probe, lp) for lp in points]
    values = [probe(uniform_batch(probe.batch, logprobs=lp)).value for lp in points]
    slopes = [slope_of_token(probe, lp) for lp in points]
    readings: tuple[Callable[[], bool], ...] = (
        lambda: probe.close(gradients, slopes, scale=100),
        lambda: probe.close(values, [g * lp for g, lp in zip(gradients, points)]),  # c is a constant
        lambda: probe.close([v / lp for v, lp in zip(values, points)], [values[0] / points[0]] * 3),  # it reports −lp
    )
    seen = f"At logprobs {points} the loss of a token is {values}, its slope {slopes} and its gradient {gradients}."
    require(any(reading() for reading in readings), "detached-term", seen)
