"""The answers of servers with well-known bugs. A wrong answer that a server gives exactly tells which bug it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lossfns.conformance.bugs import ALL_BUGS
from lossfns.conformance.client import Row, Rows
from lossfns.conformance.expected import Config, Expected, expected, with_weights
from lossfns.errors import LossInputError
from lossfns.export.builtins import BUILTINS, builtin_loss
from lossfns.testing.planted import GENERAL_BUGS, LIKELIHOOD_BUGS, wrong_loss


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
    yield from planted(loss, config, rows, logprobs, right)


Request = tuple[str, Config, Rows]
"""A loss, its config and datums."""


def misread(loss: str, config: Config, rows: Rows, logprobs: list[np.ndarray]) -> Iterator[tuple[str, str, Request]]:
    """Yield well-known bugs, in words, with the request as which a server with the bug reads this one."""
    name = "weights" if loss == "cross_entropy" else "advantages"
    silent = rows[-1].having(**{name: 0 * rows[-1].fields[name]})
    yield "datum-ignored", "the last datum is left out", (loss, config, [*rows[:-1], silent])
    if loss == "cross_entropy":
        for bug, words, edit_weights in WEIGHTS:
            yield bug, words, (loss, config, [row.having(weights=edit_weights(row.weights)) for row in rows])
        return
    for bug, words, edit in POLICY:
        yield bug, words, (loss, config, [edit(row, lp) for row, lp in zip(rows, logprobs)])
    if config:
        yield "config-ignored", "the loss under its defaults", (loss, None, rows)
    if loss == "cispo":
        kept = [advantages(row, row.fields["advantages"] * within(row, lp, config)) for row, lp in zip(rows, logprobs)]
        yield "clip-drops-tokens", "tokens beyond the bounds are left out", (loss, config, kept)
    if "clip_low_threshold" in BUILTINS[loss].config:
        for low, high in ((0.9, 1.1), (0.8, 1.2), (0.0, 4.0), (0.8, 1.28)):
            clip = {"clip_low_threshold": low, "clip_high_threshold": high}
            bug = "config-ignored" if config else "other-defaults"
            yield bug, f"the loss clipped to {low:g} and {high:g}", (loss, clip, rows)
        clip = {"clip_low_threshold": 0.0, "clip_high_threshold": 1e6}
        yield "clip-inert", "the loss without a clip", (loss, clip, rows)
    if loss == "ppo":
        clip = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2, **(config or {}), "eps_clip_c": 3.0}
        yield "other-defaults", "ppo with a dual clip of 3", ("dapo", clip, rows)
    if "ratio_log_cap" in BUILTINS[loss].config:
        for cap in (5.0, 10.0, 20.0):
            words = f"the log-ratio is clamped to ±{cap:g}"
            yield "ratio-clamped", words, (loss, {**(config or {}), "ratio_log_cap": cap}, rows)
    bare = [row.having(sequence_ratio_mask=None) for row in rows]
    if loss == "gspo":
        yield "another-loss", "the ratio of each token in place of the sequence's", ("ppo", config, bare)
    for other in ("importance_sampling", "ppo", "cispo"):
        if other != loss:
            yield "another-loss", f"{other} in its place", (other, None, bare)
    ones = [with_weights(row, np.ones(lp.shape)) for row, lp in zip(rows, logprobs)]
    yield "another-loss", "cross_entropy with weights of 1 in its place", ("cross_entropy", None, ones)
    weighted = [with_weights(row, row.fields["advantages"]) for row in rows]
    yield "another-loss", "cross_entropy with the advantages as weights", ("cross_entropy", None, weighted)


def planted(loss: str, config: Config, rows: Rows, logprobs: list[np.ndarray], right: Expected) -> Iterator[Variant]:
    """Yield the answers of the kit's oracle with each planted bug."""
    if any(lp.ndim == 2 for lp in logprobs):
        return
    like = builtin_loss(loss, config)
    columns = {"logprobs": logprobs, "weights": [weights_of(row) for row in rows]}
    if loss != "cross_entropy":
        columns["advantages"] = [row.fields["advantages"] for row in rows]
        columns["old_logprobs"] = [row.fields["logprobs"] for row in rows]
    settings = {name: x for name, x in like.knobs.items() if name != "weigh" and x is not None}
    caps = {"log_ratio_cap": None} if "log_ratio_cap" in like.knobs else {}
    arguments: dict[str, Any] = {name: [x.tolist() for x in values] for name, values in columns.items()}
    arguments |= {**caps, **settings, "weigh": "token_sum", "denominator": 1.0}
    for bug in {**LIKELIHOOD_BUGS, **GENERAL_BUGS}:
        if bug in UNLIKELY:
            continue
        answer = wrong_loss(bug, like.name, arguments)
        if answer is not None and np.isfinite(answer[0]):
            found = Expected(answer[0], [np.array(g) for g in answer[1]], right.scale)
            if differs(found, right):
                yield Variant(bug, ALL_BUGS[bug].description, found)


UNLIKELY = ("low-precision", "mean-of-means", "epsilon-in-denominator", "inert-knob")
"""Bugs whose answers are near the right one, or whose name says less than that of another bug with the same answer."""


def weights_of(row: Row) -> np.ndarray:
    """Return the weights of a row's tokens: those of cross_entropy, the mask of gspo, or ones."""
    fields = row.fields
    found: np.ndarray = fields.get("weights", fields.get("sequence_ratio_mask", np.ones(len(row.tokens))))
    return found


def within(row: Row, lp: np.ndarray, config: Config) -> np.ndarray:
    """Return which tokens have a ratio within the bounds of cispo."""
    low, high = builtin_loss("cispo", config).knobs["clip"]
    ratio = np.exp(lp - row.fields["logprobs"])
    kept: np.ndarray = (ratio >= low) & (ratio <= high)
    return kept


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
    ("target-dropped", "the last token is left out", lambda w: np.where(np.arange(len(w)) < len(w) - 1, w, 0)),
    ("target-dropped", "the first token that counts is left out", lambda w: without_first(w)),
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


def old_of(row: Row) -> np.ndarray:
    return row.fields["logprobs"]


def clamped(log_ratio: np.ndarray) -> np.ndarray:
    bounded: np.ndarray = np.clip(log_ratio, np.log(0.01), np.log(100.0))
    return bounded


def without_first(weights: np.ndarray) -> np.ndarray:
    """Return weights without the first that is not 0."""
    counted = np.flatnonzero(weights)
    return np.where(np.arange(len(weights)) == (counted[0] if len(counted) else -1), 0, weights)


POLICY: tuple[tuple[str, str, Callable[[Row, np.ndarray], Row]], ...] = (
    ("old-logprobs-inert", "the ratio is always 1", lambda row, lp: old(row, lp)),
    ("ratio-inverted", "the ratio is exp(old − new)", lambda row, lp: old(row, 2 * lp - row.fields["logprobs"])),
    ("advantage-sign-lost", "advantages lose their sign",
        lambda row, lp: advantages(row, np.abs(row.fields["advantages"]))),
    ("advantage-inert", "all advantages are 1",
        lambda row, lp: advantages(row, np.sign(np.abs(row.fields["advantages"])))),
    ("advantages-pooled", "advantages are replaced by their mean",
        lambda row, lp: advantages(row, np.where(row.fields["advantages"] != 0, row.fields["advantages"].mean(), 0))),
    ("ratio-clamped", "the ratio is clamped to [0.01, 100]", lambda row, lp: old(row, lp - clamped(lp - old_of(row)))),
    ("target-dropped", "the last token is left out",
        lambda row, lp: advantages(row, np.where(np.arange(len(lp)) < len(lp) - 1, row.fields["advantages"], 0))),
    ("padding-in-sequence-ratio", "the log-ratio of a sequence is divided by all of its positions",
        lambda row, lp: old(row, lp - weights_of(row).mean() * (lp - old_of(row)))),
    ("frame-shift", "advantages are one token late",
        lambda row, lp: advantages(row, np.roll(row.fields["advantages"], 1)) if "sequence_ratio_mask" not in row.fields
        else row),
    ("frame-shift", "old logprobs are one token late", lambda row, lp: old(row, np.roll(row.fields["logprobs"], 1))),
)  # fmt: skip
"""Wrong readings of the fields of a policy loss."""
