"""The answers that a service's built-in losses should give, by the losses of this library, and well-known wrong ones.

A wrong answer that the server gives exactly tells which bug it has.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossfns.backend.engine.builtins import bind_builtin
from lossfns.conformance import formulas
from lossfns.conformance.client import Row, Rows
from lossfns.datum import Datum, ModelInput, TensorData
from lossfns.errors import LossInputError, LossWarning
from lossfns.export.builtins import BUILTINS, CLIP
from lossfns.loss import BoundLoss

Config = Mapping[str, Any] | None


class Expected(NamedTuple):
    """The value of a loss, and its gradient with respect to the logprobs of each datum."""

    value: float
    gradients: list[np.ndarray]
    scale: float
    """The size of the terms that the value adds up, for relative errors."""

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
    return Expected(float(value.detach()), gradients, size_of(gradients, logprobs))


def size_of(gradients: list[np.ndarray], logprobs: list[np.ndarray]) -> float:
    """Return Σ |∂L/∂lp|·(|lp| + 1), which bounds the size of the terms that a loss adds up."""
    return sum(float((np.abs(g) * (np.abs(lp) + 1)).sum()) for g, lp in zip(gradients, logprobs))


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
    yield from wrong_terms(loss, config, rows, logprobs)
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

    def edited(edit: Callable[[Row, np.ndarray], Row]) -> Request:
        return loss, config, [edit(row, lp) for row, lp in zip(rows, logprobs)]

    if loss == "cross_entropy":
        for bug, words, edit_weights in WEIGHTS:
            yield bug, words, edited(lambda row, lp, e=edit_weights: row.having(weights=e(row.weights)))  # type: ignore[misc]
        return
    settings = {name: x for name, x in formulas.settings(loss).items() if x is not None} | dict(config or {})
    low, high = (settings.get(name, bound) for name, bound in zip(CLIP, (0.0, np.inf)))
    for bug, words, edit in (*POLICY, *(SEQUENCE if loss == "gspo" else ())):
        yield bug, words, edited(edit)
    if config:
        yield "config-ignored", "the loss under its defaults", (loss, None, rows)
    if loss == "dro":
        yield "half-missing", "the penalty without its half", (loss, {"beta": 2 * settings["beta"]}, rows)
        yield "penalty-gated", "the penalty without tokens of advantage 0", edited(without_idle_tokens)
    if loss == "cispo":
        within = lambda row, lp: advantages(row, row.fields["advantages"] * bounded(row, lp, low, high))  # noqa: E731
        yield "clip-drops-tokens", "the loss without the tokens beyond its bounds", edited(within)
    if CLIP.keys() <= BUILTINS[loss].config.keys():
        if config:
            clip = dict(zip(CLIP, (max(0.0, 1 - low), 1 + high)))
            yield "clip-as-epsilon", "the loss with its thresholds as epsilons", (loss, clip, rows)
        for bounds in ((0.9, 1.1), (0.8, 1.2), (0.0, 4.0), (0.8, 1.28)):
            bug, words = "config-ignored" if config else "other-defaults", "the loss clipped to {:g} and {:g}"
            yield bug, words.format(*bounds), (loss, dict(zip(CLIP, bounds)), rows)
        yield "clip-inert", "the loss without a clip", (loss, dict(zip(CLIP, (0.0, 1e6))), rows)
    bare = [row.having(sequence_ratio_mask=None) for row in rows]
    for other in ("importance_sampling", "ppo", "cispo"):
        if other != loss:
            yield "another-loss", f"{other} in its place", (other, None, bare)
    if loss == "gspo":
        yield "another-loss", "ppo in its place, with the ratio of each token", ("ppo", config, bare)
    ones = [with_weights(row, np.ones(lp.shape)) for row, lp in zip(rows, logprobs)]
    yield "another-loss", "cross_entropy with weights of 1 in its place", ("cross_entropy", None, ones)
    weighted = [with_weights(row, row.fields["advantages"]) for row in rows]
    yield "another-loss", "cross_entropy with the advantages as weights", ("cross_entropy", None, weighted)


TERMS: dict[str, tuple[tuple[str, str, Callable[..., Tensor]], ...]] = {
    "importance_sampling": (
        ("ratio-clamped", "the ratio kept within 0.01 and 100", lambda r, A, low, high: -r.clamp(0.01, 100) * A),
        ("ratio-clamped", "the log-ratio kept within ±20", lambda r, A, low, high: -r.log().clamp(-20, 20).exp() * A),
        ("ratio-not-exponentiated", "the log-ratio in place of the ratio", lambda r, A, low, high: -r.log() * A),
    ),
    "ppo": (
        ("clip-without-min", "the clipped ratio alone", lambda r, A, low, high: -r.clamp(low, high) * A),
        ("clip-max-for-min", "max in place of min",
            lambda r, A, low, high: -torch.maximum(r * A, r.clamp(low, high) * A)),
        ("other-defaults", "the loss with a dual clip of 3", lambda r, A, low, high: -torch.where(
            A < 0, torch.maximum(torch.minimum(r * A, r.clamp(low, high) * A), 3 * A),
            torch.minimum(r * A, r.clamp(low, high) * A))),
    ),
}  # fmt: skip
"""Loss → wrong terms of a token, of its ratio, its advantage and the bounds."""


def wrong_terms(loss: str, config: Config, rows: Rows, logprobs: list[np.ndarray]) -> Iterator[Variant]:
    """Yield the answers of formulas that are wrong in one place."""
    settings = formulas.settings(loss) | dict(config or {})
    bounds = [settings.get(name) for name in CLIP]
    for bug, words, term in TERMS.get(loss, ()):
        leaves = [torch.tensor(lp, dtype=torch.float64, requires_grad=True) for lp in logprobs]
        fields = [[torch.tensor(row.fields[name], dtype=torch.float64) for name in ("logprobs", "advantages")]
                  for row in rows]  # fmt: skip
        value = sum((term((lp - q).exp(), A, *bounds).sum() for lp, (q, A) in zip(leaves, fields)), torch.zeros(()))
        gradients = [g.numpy() for g in torch.autograd.grad(value, leaves)]
        yield Variant(bug, words, Expected(value.item(), gradients, size_of(gradients, logprobs)))


def bounded(row: Row, lp: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return which tokens have a ratio within the bounds."""
    ratio = np.exp(lp - row.fields["logprobs"])
    within: np.ndarray = (ratio >= low) & (ratio <= high)
    return within


def without_idle_tokens(row: Row, lp: np.ndarray) -> Row:
    """Return a row whose tokens of advantage 0 have the ratio 1, and so no penalty."""
    return old(row, np.where(row.fields["advantages"] == 0, lp, row.fields["logprobs"]))


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
    ("target-dropped", "the last target is dropped", lambda w: w * (np.arange(len(w)) < len(w) - 1)),
    ("target-dropped", "the first target is dropped", lambda w: w * (np.arange(len(w)) != np.flatnonzero(w)[0])),
)
"""Wrong readings of the weights of cross_entropy."""


def old(row: Row, values: np.ndarray) -> Row:
    return row.having(logprobs=values)


def advantages(row: Row, values: np.ndarray) -> Row:
    return row.having(advantages=values)


def pooled(row: Row, values: np.ndarray) -> Row:
    """Return a row whose tokens all have the same advantage, within the mask if there is one."""
    return advantages(row, values * row.fields.get("sequence_ratio_mask", np.ones_like(values)))


POLICY: tuple[tuple[str, str, Callable[[Row, np.ndarray], Row]], ...] = (
    ("old-logprobs-inert", "the ratio is always 1", lambda row, lp: old(row, lp)),
    ("ratio-inverted", "the ratio is exp(old − new)", lambda row, lp: old(row, 2 * lp - row.fields["logprobs"])),
    ("advantage-sign-lost", "advantages lose their sign",
        lambda row, lp: advantages(row, np.abs(row.fields["advantages"]))),
    ("advantage-inert", "all advantages are 1",
        lambda row, lp: advantages(row, np.sign(np.abs(row.fields["advantages"])))),
    ("advantages-pooled", "advantages are replaced by their mean over the datum",
        lambda row, lp: pooled(row, np.full(lp.shape, row.fields["advantages"].mean()))),
    ("advantages-pooled", "advantages are replaced by their mean over the tokens that have one",
        lambda row, lp: advantages(row, (row.fields["advantages"] != 0) * row.fields["advantages"].sum()
            / np.count_nonzero(row.fields["advantages"]))),
    ("frame-shift", "advantages are one token early",
        lambda row, lp: pooled(row, np.append(row.fields["advantages"][1:], 0))),
    ("frame-shift", "old logprobs are one token late", lambda row, lp: old(row, np.roll(row.fields["logprobs"], 1))),
    ("target-dropped", "the last target is dropped",
        lambda row, lp: advantages(row, row.fields["advantages"] * (np.arange(len(lp)) < len(lp) - 1))),
)  # fmt: skip
"""Wrong readings of the fields of a policy loss."""


def by_share(row: Row, lp: np.ndarray) -> Row:
    """Return a row whose log-ratio is multiplied by the share of the tokens in the mask."""
    return old(row, lp - (lp - row.fields["logprobs"]) * row.fields["sequence_ratio_mask"].mean())


SEQUENCE: tuple[tuple[str, str, Callable[[Row, np.ndarray], Row]], ...] = (
    ("padding-in-sequence-ratio", "the mean log-ratio divides by all positions", by_share),
    ("padding-in-sequence-ratio", "the mean log-ratio is of all positions",
        lambda row, lp: row.having(sequence_ratio_mask=np.ones_like(lp))),
    ("ratio-product", "the ratio is the product over the tokens, not their geometric mean",
        lambda row, lp: old(row, lp - (lp - row.fields["logprobs"]) * row.fields["sequence_ratio_mask"].sum())),
)  # fmt: skip
"""Wrong readings of the sequence ratio of gspo."""
