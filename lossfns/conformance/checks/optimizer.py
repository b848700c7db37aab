"""AdamW: the settings of AdamParams, as far as logprobs show them."""

from __future__ import annotations

import math

import numpy as np

from lossfns.conformance.base import Check, Finding, worst
from lossfns.conformance.bench import Act, Bench, Gradient, Vector, difference
from lossfns.conformance.checks.algebra import times
from lossfns.conformance.client import EPS
from lossfns.conformance.rows import BATCH

RATE = 2e-3
"""The learning rate of ordinary steps of AdamW: each weight moves by about as much."""

DEFAULTS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-12}
"""The defaults of AdamParams."""

DESCENT = {"beta1": 0.0, "beta2": 0.0, "eps": EPS}
"""Settings with which AdamW is plain gradient descent."""


def no_moments(bench: Bench) -> Finding:
    """A client that is created from a state without its optimizer has no moments."""
    momentum = {"beta1": 0.9, "beta2": 0.0, "eps": EPS}
    found = bench.effect(Gradient(BATCH), Gradient(times(-1)), rate=10 * bench.facts.rate * EPS, adam=momentum)
    return bench.none(found, "a step with beta1 0.9 and no gradient")


def rate_counts(bench: Bench) -> Finding:
    """Half the learning rate at twice the weights is the same step."""
    return bench.same(bench.effect(Gradient(times(2)), rate=0.5), bench.effect(Gradient(BATCH)),
        "half the rate at twice the weights")  # fmt: skip


def first_step(bench: Bench) -> Finding:
    """The first step of AdamW with a small eps does not depend on the gradient's size."""
    small, large = (bench.effect(Gradient(times(x)), rate=RATE, adam=DEFAULTS) for x in (1, 4))
    return bench.same(large, small, "the first step at four times the weights")


def two_steps(bench: Bench, beta1: float, beta2: float) -> Finding:
    """Compare steps with a gradient g and with none: together they are one step that is longer by ``ratio``.

    The second step has the moments β1·(1 − β1)·g and β2·(1 − β2)·g². Divided by 1 − β1² and 1 − β2² they are
    β1·g / (1 + β1) and β2·g² / (1 + β2), whose quotient is the sign of g times ``ratio``.
    """
    betas = {"beta1": beta1, "beta2": beta2, "eps": 1e-12}
    ratio = beta1 / (1 + beta1) * math.sqrt((1 + beta2) / beta2)
    first = Act(f"step{betas}", lambda trainer: trainer.step(learning_rate=RATE, **betas))
    # Weights that cancel leave a gradient of 0, up to rounding, and not no gradient.
    found = bench.effect(Gradient(BATCH), first, Gradient(BATCH), Gradient(times(-1)), rate=RATE, adam=betas)
    expected = bench.effect(Gradient(BATCH), rate=RATE * (1 + ratio), adam=betas)
    return bench.same(found, expected, f"a step and one without a gradient, betas {beta1:g} and {beta2:g}")


def moments(bench: Bench) -> Finding:
    """The second step of AdamW has the moments of the first, with bias correction."""
    return worst([two_steps(bench, 0.9, 0.95), two_steps(bench, 0.5, 0.5)])


def clip_off(bench: Bench) -> Finding:
    """A gradient below grad_clip_norm is not clipped, and none is where it is 0."""
    plain = bench.effect(Gradient(BATCH))
    return worst([
        bench.same(descent(bench, grad_clip_norm=0.0), plain, "grad_clip_norm 0, and left out"),
        bench.same(descent(bench, grad_clip_norm=1e9), plain, "grad_clip_norm 1e9, and left out"),
    ])  # fmt: skip


def descent(bench: Bench, weights: float = 1.0, rate: float = 1.0, **adam: float) -> Vector:
    """Return the effect of a step of gradient descent with other settings beside it."""
    return bench.effect(Gradient(times(weights)), rate=rate * bench.facts.rate * EPS, adam=DESCENT | adam)


def clip_norm(bench: Bench) -> Finding:
    """A gradient above grad_clip_norm is scaled to this norm: its direction stays, its size does not count."""
    tiny = 1e-3
    plain = bench.effect(Gradient(BATCH))
    short = np.linalg.norm(descent(bench, rate=1 / tiny, grad_clip_norm=tiny))
    # A step as long as the unclipped one: weights in half precision do not feel much shorter ones.
    longer = float(np.clip(np.linalg.norm(plain) / short if short else 1.0, 1.0, 1e3)) / tiny
    one, three = (descent(bench, weights=w, rate=longer, grad_clip_norm=tiny) for w in (1.0, 3.0))
    unclipped = Finding(max(0.0, 0.5 - difference(descent(bench, grad_clip_norm=tiny), plain)), 0.0, bench.noise,
        "grad_clip_norm of 0.001 leaves the step as it is")  # fmt: skip
    return worst([unclipped, bench.same(three, one, "clipped gradients of one and of three times the weights")])


def weight_decay(bench: Bench) -> Finding:
    """Weight decay is decoupled: rate · weight_decay of each weight, whatever the gradient."""
    none = (Gradient(BATCH), Gradient(times(-1)))
    rate = bench.facts.rate * EPS
    decay = 0.05 / rate
    slow, fast = (bench.effect(*none, rate=rate * x, adam={**DESCENT, "weight_decay": decay / x}) for x in (0.5, 1.0))
    moved = float(abs(fast).max())
    visible = Finding(
        max(0.0, 1e-4 - moved), 0.0, bench.noise, f"a decay by 5 % moves no logprob by more than {moved:.2g}"
    )
    return worst([visible, bench.same(slow, fast, "half the rate at twice the decay")])


def settings_do_not_stick(bench: Bench) -> Finding:
    """Settings belong to their step alone."""
    odd = Act("odd-step", lambda trainer: trainer.step(learning_rate=1e-9, beta1=0.0, beta2=0.0, eps=EPS,
        weight_decay=0.5, grad_clip_norm=1e-6))  # fmt: skip
    return bench.same(bench.effect(Gradient(BATCH), odd, Gradient(BATCH)), bench.effect(Gradient(BATCH)),
        "a step after one with other settings")  # fmt: skip


EFFECTS = ("gradient-descent",)

FIRST = (Check.of(clip_off, "clip-ignored", needs=EFFECTS),)
"""The check on which all effects rely: they are measured without a clip."""

CHECKS = (
    Check.of(no_moments, "optimizer-kept", needs=(*EFFECTS, "create-from-state")),
    Check.of(rate_counts, "adam-settings", needs=EFFECTS),
    Check.of(first_step, "adam-settings", needs=EFFECTS),
    Check.of(moments, "adam-bias", needs=EFFECTS),
    Check.of(settings_do_not_stick, "adam-settings", "full", needs=EFFECTS),
    Check.of(clip_norm, "clip-ignored", "full", needs=EFFECTS),
    Check.of(weight_decay, "decay-wrong", "full", needs=EFFECTS),
)
