"""Laws that compare a loss with the one that it claims to be, on any batch and on the golden vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lossfns.kl import k3_uncapped
from lossfns.loss import BoundLoss, Loss
from lossfns.terms import k3
from lossfns.testing.batch import Batch
from lossfns.testing.laws.base import (
    Law,
    LawBroken,
    LossFn,
    NotApplicable,
    Outcome,
    Probe,
    assume,
    require,
    unpoisoned,
    with_severity,
)
from lossfns.testing.laws.knobs import generic_batches
from lossfns.testing.public import LIBRARY, public
from lossfns.testing.settings import with_settings
from lossfns.testing.vectors.library import reply_to, subject_for
from lossfns.testing.vectors.runner import VectorReport, evaluate
from lossfns.testing.vectors.vector import METHODS, Vector, load


class Claim(NamedTuple):
    """A law of a claim: what it says, the verdict on a loss that breaks it, and why."""

    says: str
    severity: str
    why: str


UNLIKE = "its results are not those of the loss that it claims to be"
CLAIMS = {
    "vectors": Claim(
        "It gives the right answer to the golden vectors of the loss that it claims to be.", "wrong", UNLIKE
    ),
    "agreement": Claim("It has the value and the gradient of the loss that it claims to be.", "wrong", UNLIKE),
    "small_weights": Claim(
        "It agrees with the loss that it claims to be also where the weights of a batch add up to less than 1.",
        "fragile",
        "masks of 0 and 1 never add up to less than 1, but fractional weights may",
    ),
}
"""The laws of a claim by their names. They are made for each claim."""


def claim_of(subject: Any, loss_fn: LossFn) -> Loss | None:
    """Return the loss of this library that a subject is, or claims to be by an attribute ``like``."""
    result = loss_fn.loss if isinstance(loss_fn, BoundLoss) else loss_fn
    like = result if isinstance(result, Loss) else getattr(subject, "like", None)
    return like if isinstance(like, Loss) else None


def agreement(like: Loss) -> Law:
    """Return the law that a loss has the value and the gradient of ``like``."""

    def agreement(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
        probe = Probe.of(loss_fn, data, logprobs)
        for batch in (
            with_weights_of_at_least_one(unpoisoned(probe.batch)),
            *generic_batches(probe.batch),
            *vary_advantages_by_token(generic_batches(probe.batch)[2]),
        ):
            result = probe(batch)
            difference = probe.difference(result, probe(batch, like))
            if difference:
                seen = f"On this batch {difference}, of {like!r}.{hint_at_caps(probe, result, like)}"
                raise LawBroken("another-loss", seen, batch)

    agreement.__doc__ = f"It has the value and the gradient of {like!r}."
    return with_severity(CLAIMS["agreement"].severity, CLAIMS["agreement"].why, agreement)


def with_weights_of_at_least_one(batch: Batch) -> Batch:
    """Return the batch with its weights doubled until those of each sequence that has any add up to at least 1.

    Masks of 0 and 1 do. Below 1 the law ``small_weights`` compares: many losses divide by ``mask.sum().clamp(min=1)``.
    """
    sums = [math.fsum(map(abs, row)) for row in batch.weights]
    factor = 2.0 ** max((math.ceil(-math.log2(total)) for total in sums if 0 < total < 1), default=0)
    return batch.having(weights=[[factor * w for w in row] for row in batch.weights])


def hint_at_caps(probe: Probe, found: Outcome, like: Loss) -> str:
    """Return in words that an outcome is that of ``like`` without its caps, or "" if it is not."""
    uncapped = without_caps(like)
    if found.batch is None or repr(uncapped) == repr(like):
        return ""
    try:
        same = not probe.difference(found, probe(found.batch, uncapped))
    except LawBroken:  # it overflows
        return ""
    return f" It agrees with {uncapped!r}: only the caps of large log-ratios differ." if same else ""


def without_caps(like: Loss) -> Loss:
    """Return a loss whose log-ratios have no cap, where the loss is a preset or made from one.

    >>> from lossfns import grpo
    >>> without_caps(grpo(kl_beta=0.04))
    grpo(clip=(0.8, 1.2), kl_beta=0.04, kl=k3_uncapped, weigh=token_mean, log_ratio_cap=None, dual_clip=None)
    """
    if like.name not in vars(LIBRARY):
        return like
    settings: dict[str, Any] = {n: without_caps(x) for n, x in like.knobs.items() if isinstance(x, Loss)}
    if "log_ratio_cap" in like.knobs:
        settings["log_ratio_cap"] = None
    if like.knobs.get("kl") is k3:
        settings["kl"] = k3_uncapped
    return with_settings(like, **settings) if settings else like


def small_weights(like: Loss) -> Law:
    """Return the law that a loss has the value and the gradient of ``like`` if the weights add up to less than 1."""

    def small_weights(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
        probe = Probe.of(loss_fn, data, logprobs)
        whole = generic_batches(probe.batch)[2]
        small = whole.having(weights=[[w / 16 for w in row] for row in whole.weights])
        assume(not probe.difference(probe(whole), probe(whole, like)), "it is another loss, whatever the weights")
        difference = probe.difference(probe(small), probe(small, like))
        total = math.fsum(w for row in small.weights for w in row)
        seen = (
            f"With weights that add up to {total:g}, {difference}, of {like!r}; with 16 times the weights they agree."
        )
        require(not difference, "epsilon-in-denominator", seen, small)

    small_weights.__doc__ = f"It agrees with {like!r} also where the weights of a batch add up to less than 1."
    return with_severity(CLAIMS["small_weights"].severity, CLAIMS["small_weights"].why, small_weights)


def vary_advantages_by_token(batch: Batch) -> Iterator[Batch]:
    """Yield the batch with a different advantage at each token, if it has advantages."""
    if "advantages" in batch.columns:
        rows = [[a * (1 + j / 4) for j, a in enumerate(row)] for row in batch.columns["advantages"]]
        yield batch.having(advantages=rows)


def matching_vectors(subject: Any, like: Loss) -> list[Vector]:
    """Return the golden vectors that a subject must pass.

    A preset must pass all vectors of its name. Any other subject must pass the vectors with the settings of ``like``
    that are neither refusals nor chunks.
    """
    if like.name not in METHODS:
        return []
    vectors = load(like.name)
    if subject is public(like.name):
        return vectors
    return [v for v in vectors if v.denominator is None and v.error is None and repr(subject_for(v).loss) == repr(like)]


def vectors_law(subject: Any, like: Loss, matched: Sequence[Vector]) -> Law:
    """Return the law that a loss gives the right answer to these golden vectors."""

    def vectors(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
        assume(bool(matched), "no vectors have its settings")
        dtype = str(logprobs[0].dtype).removeprefix("torch.")
        preset = subject is public(like.name)
        replies = {v.id: reply_to(v, dtype) if preset else reply_of(loss_fn, v, logprobs[0].dtype) for v in matched}
        report = VectorReport(repr(like), dtype, [evaluate(v, replies[v.id], dtype, ()) for v in matched])
        if report.ok:
            return
        first = report.failures[0]
        likely_bugs = [bug.flag for bug in report.likely()] or ["another-loss"]
        seen = f"{len(report.failures)} of {len(matched)} golden vectors fail, first {first.vector.id}"
        raise LawBroken(likely_bugs[0], f"{seen} ({first.vector.comment}): {first.wrong}.")

    vectors.__doc__ = (
        f"It gives the right answer to the {len(matched)} golden vectors of {like.name} with its settings."
    )
    return with_severity(CLAIMS["vectors"].severity, CLAIMS["vectors"].why, vectors)


def reply_of(loss_fn: LossFn, vector: Vector, dtype: torch.dtype) -> Mapping[str, Any]:
    """Return a contract function's reply to a vector, as the protocol defines it."""
    data, logprobs = vector.batch.data(), vector.batch.tensors(dtype)
    try:
        loss, _ = loss_fn(data, logprobs)
        loss.backward()  # type: ignore[no-untyped-call]
    except NotApplicable:
        raise
    except Exception as error:
        return {"error": {"message": str(error)}}
    return {"loss": loss.item(), "grad": [None if lp.grad is None else lp.grad.tolist() for lp in logprobs]}
