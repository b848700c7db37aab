"""The answers that a service's built-in losses should give, by the losses of this library, and well-known wrong ones.

A wrong answer that the server gives exactly tells which bug it has.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from lossfns.backend.engine.builtins import bind_builtin
from lossfns.conformance.client import Row, Rows
from lossfns.datum import Datum, ModelInput, TensorData
from lossfns.errors import LossInputError, LossWarning
from lossfns.export.builtins import BUILTINS
from lossfns.loss import BoundLoss

Config = Mapping[str, Any] | None


class Expected(NamedTuple):
    """The value of a loss, and its gradient with respect to the logprobs of each datum."""

    value: float
    gradients: list[np.ndarray]
    scale: float
    """A bound of the size of the value: Σ |∂L/∂lp · lp| and Σ |terms|, for relative errors."""

    def as_cross_entropy(self, rows: Rows) -> list[Row]:
        """Return datums whose cross_entropy has this gradient: its weights are −∂L/∂lp."""
        return [with_weights(row, -g) for row, g in zip(rows, self.gradients)]


def with_weights(row: Row, weights: np.ndarray) -> Row:
    """Return the datum of a cross-entropy: targets and weights alone."""
    return Row(row.tokens, {"target_tokens": row.fields["target_tokens"]}).having(weights=weights)


def as_datum(row: Row) -> Datum:
    """Return a row as a datum of this library."""
    fields = {name: TensorData.from_numpy(x) for name, x in row.fields.items()}
    return Datum(ModelInput.from_ints(list(row.tokens)), fields)


def differentiate(loss: BoundLoss, rows: Rows, logprobs: list[np.ndarray]) -> Expected:
    """Return value and gradient of a loss at these logprobs, in float64."""
    leaves = [torch.tensor(lp, dtype=torch.float64, requires_grad=True) for lp in logprobs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossWarning)
        value, _ = loss([as_datum(row) for row in rows], leaves)
    value.backward()  # type: ignore[no-untyped-call]
    gradients = [np.zeros(lp.shape) if lp.grad is None else lp.grad.numpy() for lp in leaves]
    scale = sum(float(np.abs(g * lp).sum()) + float(np.abs(g).sum()) for g, lp in zip(gradients, logprobs))
    return Expected(float(value.detach()), gradients, scale)


def expected(loss: str, config: Config, rows: Rows, logprobs: list[np.ndarray]) -> Expected:
    """Return value and gradient of a service's built-in loss at these logprobs."""
    multi = any(row.fields["target_tokens"].ndim == 2 for row in rows)
    bound = bind_builtin(loss, config, [as_datum(row) for row in rows], multi_target=multi)
    return differentiate(bound, rows, logprobs)


class Variant(NamedTuple):
    """A wrong answer: the bug that gives it, in words, and the answer."""

    bug: str
    words: str
    answer: Expected


def variants(loss: str, config: Config, rows: Rows, logprobs: list[np.ndarray]) -> Iterator[Variant]:
    """Yield the answers that servers with a well-known bug give, where they differ from the right one."""
    right = expected(loss, config, rows, logprobs)
    for name, n in counts(rows).items():
        yield Variant("loss-not-summed", f"the sum divided by the number of {name}", scaled(right, 1 / n))
    yield Variant("sign-flipped", "the loss with the other sign", scaled(right, -1.0))
    for bug, words, request in misread(loss, config, rows, logprobs):
        try:
            answer = expected(*request, logprobs)
        except LossInputError:
            continue  # an old logprob that is read from another place may be above 0
        if differs(answer, right):
            yield Variant(bug, words, answer)


Request = tuple[str, Config, Rows]
"""A loss, its config and datums."""


def misread(loss: str, config: Config, rows: Rows, logprobs: list[np.ndarray]) -> Iterator[tuple[str, str, Request]]:
    """Yield well-known bugs, in words, with the request as which a server with the bug reads this one."""
    if loss == "cross_entropy":
        for bug, words, edit_weights in WEIGHTS:
            yield bug, words, (loss, config, [row.having(weights=edit_weights(row.weights)) for row in rows])
        return
    for bug, words, edit in POLICY:
        yield bug, words, (loss, config, [edit(row, lp) for row, lp in zip(rows, logprobs)])
    if config:
        yield "config-ignored", "the loss under its defaults", (loss, None, rows)
    if "clip_low_threshold" in BUILTINS[loss].config:
        for low, high in ((0.9, 1.1), (0.8, 1.2), (0.0, 4.0), (0.8, 1.28)):
            clip = {"clip_low_threshold": low, "clip_high_threshold": high}
            bug = "config-ignored" if config else "other-defaults"
            yield bug, f"the loss clipped to {low:g} and {high:g}", (loss, clip, rows)
        clip = {"clip_low_threshold": 0.0, "clip_high_threshold": 1e6}
        yield "clip-inert", "the loss without a clip", (loss, clip, rows)
    bare = [row.having(sequence_ratio_mask=None) for row in rows]
    for other in ("importance_sampling", "ppo", "cispo"):
        if other != loss:
            yield "another-loss", f"{other} in its place", (other, None, bare)
    ones = [with_weights(row, np.ones(lp.shape)) for row, lp in zip(rows, logprobs)]
    yield "another-loss", "cross_entropy with weights of 1 in its place", ("cross_entropy", None, ones)
    weighted = [with_weights(row, row.fields["advantages"]) for row in rows]
    yield "another-loss", "cross_entropy with the advantages as weights", ("cross_entropy", None, weighted)


def counts(rows: Rows) -> dict[str, float]:
    """Return the numbers by which a mean may divide, by name."""
    columns = [row.fields["weights"] if "weights" in row.fields else row.fields["advantages"] for row in rows]
    numbers = {
        "datums": len(rows),
        "tokens": sum(x.size for x in columns),
        "tokens that count": sum(int(np.count_nonzero(x)) for x in columns),
        "weights": sum(float(row.weights.sum()) for row in rows if "weights" in row.fields),
    }
    return {name: float(n) for name, n in numbers.items() if n not in (0, 1)}


def scaled(answer: Expected, factor: float) -> Expected:
    return Expected(factor * answer.value, [factor * g for g in answer.gradients], abs(factor) * answer.scale)


def differs(a: Expected, b: Expected) -> bool:
    """Return whether two answers differ by more than a server may round."""
    gap = sum(float(np.abs(x - y).sum()) for x, y in zip(a.gradients, b.gradients))
    size = sum(float(np.abs(x).sum()) for x in b.gradients)
    return abs(a.value - b.value) > 1e-3 * b.scale or gap > 1e-3 * size


WEIGHTS: tuple[tuple[str, str, Callable[[np.ndarray], np.ndarray]], ...] = (
    ("weights-ignored", "all weights are 1", np.ones_like),
    ("weights-binarised", "weights are a mask", lambda w: (w != 0).astype(float)),
    ("negative-weights-lost", "negative weights are 0", lambda w: np.maximum(w, 0)),
    ("negative-weights-lost", "weights lose their sign", np.abs),
    ("weights-squared", "weights are applied twice", lambda w: w * w),
    ("frame-shift", "weights are one token late", lambda w: np.roll(w, 1)),
    ("frame-shift", "weights are one token early", lambda w: np.roll(w, -1)),
)
"""Wrong readings of the weights of cross_entropy."""


def old(row: Row, values: np.ndarray) -> Row:
    return row.having(logprobs=values)


def advantages(row: Row, values: np.ndarray) -> Row:
    return row.having(advantages=values)


POLICY: tuple[tuple[str, str, Callable[[Row, np.ndarray], Row]], ...] = (
    ("old-logprobs-inert", "the ratio is always 1", lambda row, lp: old(row, lp)),
    ("ratio-inverted", "the ratio is exp(old − new)", lambda row, lp: old(row, 2 * lp - row.fields["logprobs"])),
    ("advantage-sign-lost", "advantages lose their sign",
        lambda row, lp: advantages(row, np.abs(row.fields["advantages"]))),
    ("advantage-inert", "all advantages are 1",
        lambda row, lp: advantages(row, np.sign(np.abs(row.fields["advantages"])))),
    ("advantages-pooled", "advantages are replaced by their mean",
        lambda row, lp: advantages(row, np.where(row.fields["advantages"] != 0, row.fields["advantages"].mean(), 0))),
    ("frame-shift", "advantages are one token late",
        lambda row, lp: advantages(row, np.roll(row.fields["advantages"], 1)) if "sequence_ratio_mask" not in row.fields
        else row),
    ("frame-shift", "old logprobs are one token late", lambda row, lp: old(row, np.roll(row.fields["logprobs"], 1))),
)  # fmt: skip
"""Wrong readings of the fields of a policy loss."""
