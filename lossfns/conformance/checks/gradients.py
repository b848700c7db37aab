"""Gradients of built-in losses: equal to that of cross_entropy with the weights −∂L/∂logprob."""

from __future__ import annotations

import time
from functools import partial

import numpy as np

from lossfns.conformance.base import Check, Finding, Inconclusive
from lossfns.conformance.bench import Bench, Gradient
from lossfns.conformance.checks.values import CASES, Case
from lossfns.conformance.client import plain_sgd
from lossfns.conformance.expected import expected
from lossfns.conformance.rows import BATCH
from lossfns.conformance.wrong import variants

MOST_SPREAD = 0.2
"""The largest difference between the slopes of two short steps from which the slope at 0 can be told."""


def gradient(case: Case, bench: Bench) -> Finding:
    """Compare the effect of a loss with that of cross_entropy with its gradient as weights."""
    rows = case.rows(bench)
    logprobs = bench.start_logprobs(rows)
    right = expected(case.loss, case.config, rows, logprobs)
    found = bench.effect(Gradient(rows, case.loss, case.config))
    finding = bench.same(found, bench.effect(Gradient(right.as_cross_entropy(rows))), f"a step on {case.words}")
    if finding.holds:
        return finding
    for wrong in variants(case.loss, case.config, rows, logprobs):
        if bench.connection.deadline - time.monotonic() < 5 * bench.facts.seconds:
            break  # the rest of the time belongs to the answer
        if bench.same(found, bench.effect(Gradient(wrong.answer.as_cross_entropy(rows))), "").holds:
            return Finding(finding.error, finding.tolerance, finding.noise,
                f"{finding.seen}; as if {wrong.words}", wrong.bug)  # fmt: skip
    return finding


def gradient_norm(bench: Bench) -> Finding:
    """The loss falls by rate · ‖gradient‖² where a step reports the norm of the gradient.

    This is the only check that sees a constant factor of all gradients.
    """

    def fall(rate: float) -> tuple[float, float]:
        trainer = bench.fresh()
        trainer.forward_backward(BATCH)
        metrics = trainer.step(**plain_sgd(rate))
        norm = next((x for key, x in metrics.items() if "grad_norm" in key), None)
        if norm is None:
            raise Inconclusive(f"optim_step reports no grad_norm, but {', '.join(sorted(metrics)) or 'nothing'}")
        moved = bench.probe(trainer) - np.asarray(bench.facts.baseline)
        weights = np.concatenate([row.weights for row in BATCH])
        return float(weights @ moved[: len(weights)]) / rate, float(norm)

    rate = bench.facts.rate / 16
    (coarse, norm), (fine, _), (finest, _) = fall(rate), fall(rate / 2), fall(rate / 4)
    found = (8 * finest - 6 * fine + coarse) / 3  # Richardson: terms of first and second order cancel
    ratio = found / norm**2 if norm else np.nan
    spread = abs(2 * finest - 3 * fine + coarse) / norm**2 if norm else np.nan  # 0 for exact weights and short steps
    if spread > MOST_SPREAD:
        raise Inconclusive(f"the fall of the loss by short steps varies by {spread:.0%}: weights in half precision?")
    return Finding(abs(ratio - 1), 0.05 + 2 * spread, bench.noise,
        f"the loss falls by {ratio:.3g} times rate·grad_norm², grad_norm {norm:.4g}")  # fmt: skip


CHECKS = (
    *(
        Check(f"gradient-{case.name}", f"The gradient of {case.words} is that of its formula.", "value-not-gradient",
            partial(gradient, case), case.level,
            needs=(f"offers-{case.loss.replace('_', '-')}", "gradient-descent"))
        for case in CASES if case.loss != "cross_entropy"
    ),
    Check.of(gradient_norm, "gradient-scale", "full", needs=("gradient-descent",)),
)  # fmt: skip
