"""Laws that compare a loss with the one that it claims to be, on any batch and on the golden vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lossfns.loss import BoundLoss, Loss
from lossfns.testing.batch import Batch
from lossfns.testing.laws.base import Law, LawBroken, LossFn, NotApplicable, Probe, assume, require, unpoisoned
from lossfns.testing.laws.knobs import generic_batches
from lossfns.testing.public import public
from lossfns.testing.vectors.library import reply_to, subject_for
from lossfns.testing.vectors.runner import VectorReport, evaluate
from lossfns.testing.vectors.vector import METHODS, Vector, load

CLAIMS = {
    "vectors": "It gives the right answer to the golden vectors of the loss that it claims to be.",
    "agreement": "It has the value and the gradient of the loss that it claims to be.",
}
"""The laws of a claim: name → statement. They are made for each claim."""


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
            unpoisoned(probe.batch),
            *generic_batches(probe.batch),
            *vary_advantages_by_token(generic_batches(probe.batch)[2]),
        ):
            result, expected = probe(batch), probe(batch, like)
            difference = probe.difference(result, expected)
            require(not difference, "another-loss", f"On this batch {difference}, of {like!r}.", batch)

    agreement.__doc__ = f"It has the value and the gradient of {like!r}."
    return agreement


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
    return vectors


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
