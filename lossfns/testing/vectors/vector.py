"""Golden vectors: a loss, its settings, its inputs and the right answer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from lossfns.errors import LossInputError, did_you_mean
from lossfns.testing.batch import Batch

FOLDER = Path(__file__).parent.parent / "data"

SCHEMA, SUITE = "lossfns-vectors/1", "2026.11"
"""The version of the file format, and the version of the contents."""

LEDGER = "ids.json"
"""The file of every id that was ever assigned."""

METHODS = tuple(
    dict.fromkeys(name.rpartition("-")[0] for name in json.loads((FOLDER / LEDGER).read_text(encoding="utf-8"))["ids"])
)
"""The losses and estimators that have vectors, in the order of their first ids."""


def is_estimator(name: str) -> bool:
    """Return whether a method computes advantages. Its data are then samples, not datums."""
    return name.endswith("_advantages")


ESTIMATORS = tuple(filter(is_estimator, METHODS))
"""The estimators of advantages among them."""

SAMPLE_LABELS = {"group": "groups", "role": "roles", "episode": "episodes", "state": "states"}
SAMPLE_NUMBERS = {"reward": "rewards", "length": "lengths", "greedy_reward": "greedy_rewards", "rewards": "rewards"}
SAMPLE_FIELDS = {**SAMPLE_NUMBERS, **SAMPLE_LABELS}
"""Field of a sample → argument of the estimators. A sample has a reward, or a list of R rewards."""

Answer = Mapping[str, Any]
"""``{"loss", "grad"}`` or ``{"advantages"}``, with plain floats; a refusal has ``"error"``."""


@dataclass(frozen=True)
class Vector:
    """Inputs and the right answer. Numbers are floats; ``nan`` and ``inf`` are strings in the file.

    Attributes:
        kind: ``valid``, ``edge``, ``kink`` (two gradients are right) or ``must-reject`` (the input is refused).
        config: every setting of the loss; none is left at a default.
        flags: the bugs of ``BUGS`` that give another answer.
        data: one mapping for each datum: its ``logprobs``, ``weights`` and side columns, all of one shape; or for each
            sample, with fields of ``SAMPLE_FIELDS``.
        denominator: the number to divide by instead of the batch's own count, for a chunk of a larger batch.
        expected, grad: L and ∂L/∂logprobs; ``advantages`` for an estimator; ``error`` for must-reject.
        grad_alternatives: at a kink, the gradients of the other side.
        metrics: the number of ``tokens`` that count and the ``denominator``; both are optional in a reply.
        tol: dtype → (rtol, atol); see ``mistake``.
    """

    id: str
    loss: str
    kind: str
    config: Mapping[str, Any]
    flags: tuple[str, ...]
    comment: str
    data: Sequence[Mapping[str, Any]]
    denominator: float | None = None
    expected: float | None = None
    grad: list[Any] | None = None
    grad_alternatives: list[list[Any]] = field(default_factory=list)
    advantages: list[float] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    tol: Mapping[str, Sequence[float]] = field(default_factory=dict)
    tol_reason: str = ""
    error: Mapping[str, Any] | None = None

    @property
    def batch(self) -> Batch:
        """The data as a ``Batch``, without the denominator. The data must be well formed."""
        rows = {name: [flatten(datum[name]) for datum in self.data] for name in self.data[0]}
        logprobs, weights = rows.pop("logprobs"), rows.pop("weights")
        return Batch(logprobs, weights, rows, num_targets(self.data))

    @property
    def request(self) -> dict[str, Any]:
        """The request of the protocol."""
        request = {"id": self.id, "loss": self.loss, "config": self.config, "data": self.data}
        encoded: dict[str, Any] = encode(
            request if self.denominator is None else request | {"denominator": self.denominator}
        )
        return encoded

    @property
    def answer(self) -> Answer:
        """The right answer, as the protocol defines a reply."""
        if self.error is not None:
            return {"error": self.error}
        if self.advantages is not None:
            return {"advantages": self.advantages}
        return {"loss": self.expected, "grad": self.grad}

    def with_answer(self, answer: Answer) -> Vector:
        """Return the vector with another answer in place of the right one."""
        if "advantages" in answer:
            return replace(self, advantages=answer["advantages"])
        return replace(self, expected=answer["loss"], grad=answer["grad"], grad_alternatives=[])


def load(loss: str | None = None) -> list[Vector]:
    """Return the vectors of one loss, or of all losses.

    >>> vector = load("dpo")[0]
    >>> vector.id, sorted(vector.batch.columns)
    ('dpo-0001', ['ref_logprobs'])
    """
    if loss is not None and loss not in METHODS:
        hint = did_you_mean(loss, METHODS)
        raise LossInputError("loss", "a loss that has vectors", repr(loss), hint)
    return [vector for name in METHODS if loss in (None, name) for vector in read(FOLDER / f"{name}.json")]


@cache
def read(path: Path) -> tuple[Vector, ...]:
    """Read the vectors of one file."""
    return tuple(vectors(json.loads(path.read_text(encoding="utf-8"))))


def vectors(file: Mapping[str, Any]) -> Iterator[Vector]:
    """Yield the vectors in the contents of one file."""
    for group in file["groups"]:
        for test in group["tests"]:
            fields = {name: value for name, value in decode(test).items() if name not in ("loss", "flags")}
            yield Vector(
                loss=file["loss"],
                config=group["config"],
                flags=tuple(test["flags"]),
                **fields | ({"expected": test["loss"]} if "loss" in test else {}),
            )


NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def decode(x: Any) -> Any:
    """Replace the strings nan, inf and -inf by numbers, except in ids, comments and labels."""
    if isinstance(x, dict):
        texts = ("id", "comment", *SAMPLE_LABELS)
        return {name: value if name in texts else decode(value) for name, value in x.items()}
    if isinstance(x, list):
        return [decode(value) for value in x]
    return NUMBERS.get(x, x) if isinstance(x, str) else x


def encode(x: Any) -> Any:
    """Replace nan and infinities by strings, because JSON has neither. The inverse of ``decode``."""
    if isinstance(x, Mapping):
        return {name: encode(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [encode(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return "nan" if math.isnan(x) else "inf" if x > 0 else "-inf"
    return x


def flatten(x: Any) -> list[Any]:
    """Return the leaves of a nested list in order."""
    return [leaf for part in x for leaf in flatten(part)] if isinstance(x, (list, tuple)) else [x]


def num_targets(data: Sequence[Mapping[str, Any]]) -> int:
    """Return K where logprobs are ``[N, K]``, else 0."""
    first = next((datum["logprobs"] for datum in data if datum.get("logprobs")), [0.0])
    return len(first[0]) if isinstance(first[0], list) else 0


def mistake(vector: Vector, reply: Mapping[str, Any], dtype: str = "float64") -> str:
    """Return the mistake in a reply in words, with the error and its tolerance; empty if the reply is right.

    A number x agrees with the right y if |x − y| <= atol·s + rtol·|y|. For the loss and for advantages s = 1. For the
    gradient s is its largest absolute value, so a gradient that is 0 everywhere must be exactly 0.
    """
    if reply.get("unsupported"):
        both = {"loss", "grad", "advantages", "error"} & reply.keys()
        return "an answer and 'unsupported' at once" if both else "unsupported"
    if vector.error is not None:
        return "" if "error" in reply else f"accepted what must be refused ({vector.error['code']})"
    if "error" in reply:
        return f"refused: {reply['error']}"
    if vector.advantages is not None:
        return mismatch("advantages", reply.get("advantages"), vector.advantages, vector.tol[dtype])
    wrong = mismatch("loss", reply.get("loss"), vector.expected, vector.tol[dtype])
    wrong = wrong or gradient_mistake(vector, reply.get("grad"), vector.tol[dtype])
    metrics = reply.get("metrics", {})
    known = [name for name in vector.metrics if isinstance(metrics, Mapping) and name in metrics]
    return wrong or next(
        filter(None, (mismatch(k, metrics[k], vector.metrics[k], vector.tol[dtype]) for k in known)), ""
    )


def gradient_mistake(vector: Vector, grad: Any, tol: Sequence[float]) -> str:
    """Return the mistake in a gradient. At a kink any gradient between the one-sided ones is right."""
    rtol, atol = tol
    sides = [vector.grad, *vector.grad_alternatives]
    scale = max((abs(y) for y in flatten(sides) if math.isfinite(y)), default=0.0)
    if not vector.grad_alternatives:
        return mismatch("grad", grad, vector.grad, (rtol, atol * scale))
    if nested_shape(grad) != nested_shape(vector.grad):
        return mismatch("grad", grad, vector.grad, tol)
    for i, (x, *ys) in enumerate(zip(flatten(grad), *map(flatten, sides))):
        slack = atol * scale + rtol * max(map(abs, ys))
        if not min(ys) - slack <= parse_number(x) <= max(ys) + slack:
            return f"grad entry {i} is {x}, not between {min(ys):.9g} and {max(ys):.9g}"
    return ""


def mismatch(name: str, x: Any, y: Any, tol: Sequence[float]) -> str:
    """Return where a number or nested list x differs from y by more than atol + rtol·|y|; empty if nowhere."""
    if isinstance(y, list):
        if not isinstance(x, (list, tuple)):
            return f"{name} is {format_number(x)}, not a list of {len(y)}"
        if len(x) != len(y):
            return f"{name} has {len(x)} entries, not {len(y)}"
        return next(filter(None, (mismatch(f"{name}[{i}]", u, v, tol) for i, (u, v) in enumerate(zip(x, y)))), "")
    value, (rtol, atol) = parse_number(x), tol
    slack = atol + rtol * abs(y)
    if value == y or abs(value - y) <= slack or (math.isnan(y) and math.isnan(value)):
        return ""
    return f"{name} is {format_number(x)}, not {y:.9g}: off by {abs(value - y):.2g}, tolerance {slack:.2g}"


def parse_number(x: Any) -> float:
    """Return a number of a reply as a float; nan for anything else."""
    if isinstance(x, str):
        return NUMBERS.get(x, math.nan)
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        return math.nan
    try:
        return float(x)
    except OverflowError:  # an integer beyond the largest float
        return math.inf if x > 0 else -math.inf


def format_number(x: Any) -> str:
    """Return a value of a reply as short text."""
    return f"{x:.9g}" if isinstance(x, float) else "missing" if x is None else f"{x!r}"[:40]


def nested_shape(x: Any) -> Any:
    """Return the nested lengths of a list."""
    return [nested_shape(part) for part in x] if isinstance(x, (list, tuple)) else None
