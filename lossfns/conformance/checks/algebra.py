"""Gradients of cross_entropy add up: over datums, requests and weights, and nothing else leaves one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lossfns.conformance.base import Check, Finding, Inconclusive, require, worst
from lossfns.conformance.bench import Act, Bench, Gradient
from lossfns.conformance.checks.outputs import apart
from lossfns.conformance.client import EPS, Answer, Row, Trainer
from lossfns.conformance.rows import BATCH, tokens


def times(factor: float, rows: tuple[Row, ...] = BATCH) -> list[Row]:
    """Return the datums with their weights multiplied."""
    return [row.having(weights=factor * row.weights) for row in rows]


def loss_falls(bench: Bench) -> Finding:
    """A step on cross_entropy makes the trained tokens more likely."""
    moved, weights = bench.effect(Gradient(BATCH)), np.concatenate([row.weights for row in BATCH])
    gain = float(moved[: len(weights)] @ weights)
    return Finding(max(0.0, -gain), 0.0, bench.noise, f"Σ w·Δlp is {gain:.3g} after a step")


def calls_add_up(bench: Bench) -> Finding:
    """Gradients of several forward_backward add up until the step."""
    split = bench.effect(*(Gradient([row]) for row in BATCH))
    whole, last = bench.effect(Gradient(BATCH)), bench.effect(Gradient(BATCH[-1:]))
    bug = "accumulation-lost" if bench.same(split, last, "").holds else ""
    return bench.same(split, whole, "a datum at a time, and the batch at once", bug)


def tokens_add_up(bench: Bench) -> Finding:
    """The gradient of a token does not depend on which other tokens of its datum have a weight."""
    halves = [
        [row.having(weights=row.weights * (np.arange(len(row.weights)) % 2 == k)) for row in BATCH] for k in (0, 1)
    ]
    return bench.same(bench.effect(*map(Gradient, halves)), bench.effect(Gradient(BATCH)),
        "every other token in one request, the rest in another, and all at once")  # fmt: skip


def order_of_datums(bench: Bench) -> Finding:
    """The order of the datums does not matter."""
    return bench.same(bench.effect(Gradient(BATCH[::-1])), bench.effect(Gradient(BATCH)),
        "the batch in the reverse order")  # fmt: skip


def linear_in_weights(bench: Bench) -> Finding:
    """Three times the weights at a third of the rate is the same step."""
    once = bench.effect(Gradient(BATCH))
    finding = bench.same(bench.effect(Gradient(times(3)), rate=1 / 3), once,
        "three times the weights at a third of the rate")  # fmt: skip
    if finding.holds or bench.same(bench.effect(*[Gradient(BATCH)] * 3, rate=1 / 3), once, "").holds:
        return finding
    # Three requests have three times the gradient, whatever is made of the weights: the step has lost its size.
    return replace(finding, bug="adam-settings")


def fractions_count(bench: Bench) -> Finding:
    """Weights are real numbers: a datum of weight 2 is the datum twice."""
    row = BATCH[1]
    heavy = row.having(weights=2 * row.weights)
    found = bench.effect(Gradient([heavy, BATCH[0]]))
    return bench.same(found, bench.effect(Gradient([row, row, BATCH[0]])), "weights of 2, and the datum twice",
        "weights-binarised")  # fmt: skip


def duplicates_count(bench: Bench) -> Finding:
    """A datum that comes twice counts twice."""
    row = BATCH[0]
    return bench.same(bench.effect(Gradient([row, row])), bench.effect(Gradient([row]), rate=2.0),
        "a datum twice, and once at twice the rate")  # fmt: skip


def weights_cancel(bench: Bench) -> Finding:
    """Weights and their negatives cancel."""
    return bench.none(bench.effect(Gradient(BATCH), Gradient(times(-1))), "weights and their negatives")


def mixed_signs(bench: Bench) -> Finding:
    """Negative weights count with their sign, beside positive ones in one datum."""
    signs = [row.having(weights=row.weights * np.resize([1.0, -1.0, 0.5], row.weights.shape)) for row in BATCH]
    positive = [row.having(weights=np.maximum(row.weights, 0)) for row in signs]
    negative = [row.having(weights=np.minimum(row.weights, 0)) for row in signs]
    whole, split = bench.effect(Gradient(signs)), bench.effect(Gradient(positive), Gradient(negative))
    return bench.same(whole, split, "weights of both signs, and in two requests")


def forward_is_pure(bench: Bench) -> Finding:
    """forward leaves no gradient and changes nothing."""
    asks = Act("forward-batch", lambda trainer: trainer.forward(times(-2)))
    return bench.same(bench.effect(asks, Gradient(BATCH), asks), bench.effect(Gradient(BATCH)),
        "a step with forward requests before it, and without")  # fmt: skip


def step_clears_gradients(bench: Bench) -> Finding:
    """optim_step clears the gradient."""
    still = Act("step-0", lambda trainer: trainer.step(learning_rate=1e-12 * EPS * bench.facts.rate, beta1=0.0,
        beta2=0.0, eps=EPS))  # fmt: skip
    found = bench.effect(Gradient(BATCH[:1]), still, Gradient(BATCH[1:]))
    kept = bench.same(found, bench.effect(Gradient(BATCH)), "").holds
    return bench.same(found, bench.effect(Gradient(BATCH[1:])), "a gradient after another step, and alone",
        "gradient-kept" if kept else "adam-settings")  # fmt: skip


def masked_targets(bench: Bench) -> Finding:
    """A target of weight 0 has no effect."""
    others = [
        row.having(target_tokens=np.where(row.weights == 0, tokens(8, len(row.weights)), row.fields["target_tokens"]))
        for row in BATCH
    ]
    return bench.same(bench.effect(Gradient(others)), bench.effect(Gradient(BATCH)), "other targets at weight 0")


def masked_datum(bench: Bench) -> Finding:
    """A datum whose weights are all 0 changes nothing."""
    empty = BATCH[0].having(weights=0 * BATCH[0].weights)
    loss = bench.idle().forward([empty, *BATCH[1:]]).metrics.get("loss:sum", 0.0)
    require(bool(np.isfinite(loss)), f"the loss beside a datum of weight 0 is {loss}")
    return bench.same(bench.effect(Gradient([empty, *BATCH[1:]])), bench.effect(Gradient(BATCH[1:])),
        "beside a datum of weight 0, and without it")  # fmt: skip


def targets_trained(bench: Bench) -> Finding:
    """The gradient is that of target_tokens, not of the next input token."""
    row = BATCH[1].having(weights=BATCH[1].weights * (np.arange(len(BATCH[1].weights)) < len(BATCH[1].weights) - 1))
    other = row.having(target_tokens=tokens(9, len(row.weights)))  # the last target has no next input token
    effect, own = bench.effect(Gradient([other])), bench.effect(Gradient([row]))
    alike = float(np.linalg.norm(effect - own) / np.linalg.norm(own))
    return Finding(max(0.0, 0.1 - alike), 0.0, bench.noise, "other targets at the same inputs give the same step")


def batches_add_up(bench: Bench) -> Finding:
    """A batch of many datums is the sum of its datums."""
    many = [BATCH[i % 3].having(weights=BATCH[i % 3].weights / 8) for i in range(24)]
    return bench.same(bench.effect(Gradient(many)), bench.effect(Gradient(BATCH)),
        "24 datums with an eighth of the weights, and 3")  # fmt: skip


def chunked_batch(bench: Bench) -> Finding:
    """A batch that the SDK sends in several chunks is the batch sent at once.

    The largest chunk is a setting of the SDK's client. It is not public.
    """

    def in_chunks(trainer: Trainer) -> Answer:
        holder: Any = getattr(trainer.client, "holder", None)
        config: Any = getattr(holder, "_client_config", None)
        if not hasattr(config, "fwdbwd_max_chunk_len"):
            raise Inconclusive("this version of the SDK has no such setting")
        holder._client_config = config.model_copy(update={"fwdbwd_max_chunk_len": 1})
        try:
            return trainer.forward_backward(BATCH)
        finally:
            holder._client_config = config

    logprobs = in_chunks(bench.idle()).logprobs
    require(len(logprobs) == len(BATCH), f"{len(logprobs)} records for {len(BATCH)} datums in chunks")
    return worst([
        apart(logprobs, bench.start_logprobs(BATCH), "logprobs of a batch in chunks, and at once"),
        bench.same(bench.effect(Act("chunks", in_chunks)), bench.effect(Gradient(BATCH)), "in chunks, and at once"),
    ])  # fmt: skip


EFFECTS = ("gradient-descent",)

CHECKS = tuple(
    Check.of(run, bug, level, needs=EFFECTS)
    for run, bug, level in (
        (linear_in_weights, "weights-ignored", "core"),
        (loss_falls, "sign-flipped", "core"),
        (calls_add_up, "gradient-averaged", "core"),
        (tokens_add_up, "gradient-averaged", "core"),
        (order_of_datums, "order-dependent", "core"),
        (batches_add_up, "gradient-averaged", "full"),
        (chunked_batch, "chunks-misread", "full"),
        (fractions_count, "gradient-averaged", "core"),
        (duplicates_count, "gradient-averaged", "core"),
        (weights_cancel, "negative-weights-lost", "core"),
        (mixed_signs, "negative-weights-lost", "core"),
        (forward_is_pure, "forward-has-gradient", "core"),
        (step_clears_gradients, "gradient-kept", "core"),
        (targets_trained, "targets-ignored", "core"),
        (masked_targets, "mask-missing", "core"),
        (masked_datum, "empty-sequence-nan", "core"),
    )
)
