"""The bugs that a vector detects (its flags), and the bugs that explain a wrong reply."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lossfns.testing import oracle, planted
from lossfns.testing.bugs import BUGS
from lossfns.testing.planted import Arguments
from lossfns.testing.vectors.vector import SAMPLE_FIELDS, Answer, Vector, flatten, is_estimator, mistake, num_targets


def accepts_refused(bug: str, vector: Vector) -> bool:
    """Return whether a loss that has the bug accepts the input of a must-reject vector."""
    assert vector.error is not None
    code, field = vector.error["code"], vector.error["field"]
    if field == "clip":
        low, high = vector.config["clip"]
        # Read as epsilons, low and high give the bounds 1 − low and 1 + high, which must be valid.
        return bug == "clip-as-epsilon" and bool(0 <= 1 - low <= 1 <= 1 + high)
    return bug in (BUG_OF_REFUSAL.get(code), BUG_OF_REFUSAL.get(field))


BUG_OF_REFUSAL = {
    "length_mismatch": "silent-truncation",
    "odd_pairs": "odd-datum-dropped",
    "dual_clip": "dual-clip-below-one",
}
"""Code or field of a refusal → the bug of a loss that accepts such an input."""


def arguments(
    config: Mapping[str, Any], data: Sequence[Mapping[str, Any]], denominator: float | None = None
) -> Arguments:
    """Return the arguments of the oracle's function: the rows of each column by its name, and the settings."""
    rows = {name: [flatten(datum[name]) for datum in data] for name in data[0]}
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    # The oracle of a divergence over candidates needs to know which entries belong to one position.
    positions = {"targets": num_targets(data)} if num_targets(data) and "teacher_logprobs" in data[0] else {}
    return rows | settings | positions | {"denominator": denominator}


def sample_arguments(data: Sequence[Mapping[str, Any]]) -> Arguments:
    """Return the arguments of an estimator from its samples. A field that a sample lacks makes its list too short."""
    fields = dict.fromkeys(name for row in data for name in row)
    return {SAMPLE_FIELDS[name]: [row[name] for row in data if name in row] for name in fields}


def oracle_advantages(loss: str, config: Mapping[str, Any], data: Sequence[Mapping[str, Any]]) -> Arguments:
    """Return the arguments of an estimator of the oracle. A missing reward is nan in a vector, and None there."""
    a = sample_arguments(data) | {name: x for name, x in config.items() if name != "missing"}
    if config.get("missing") == "abstain":
        a["rewards"] = [none_if_nan(x) for x in a["rewards"]]
    return a | ({"baselines": {}} if loss == "rae_advantages" else {})


def none_if_nan(x: Any) -> Any:
    """Replace nan by None, in a number or a list of numbers."""
    if isinstance(x, list):
        return [none_if_nan(value) for value in x]
    return None if math.isnan(x) else x


def advantages_answer(result: Any) -> Answer:
    """Return what an estimator returned as an answer. RAE returns its baselines, too."""
    return {"advantages": result[0] if isinstance(result, tuple) else result}


def to_answer(answer: oracle.Loss, data: Sequence[Mapping[str, Any]]) -> Answer:
    """Return the oracle's loss as an answer, with gradients in the shape of the logprobs."""
    value, grads = answer
    k = num_targets(data)
    nested = [[row[i : i + k] for i in range(0, len(row), k)] for row in grads] if k else grads
    return {"loss": value, "grad": nested}


def wrong_answer(bug: str, vector: Vector, a: Arguments | None = None) -> Answer | None:
    """Return the answer to a vector with the bug planted in its loss, or None if that loss cannot have the bug.

    ``a`` are the arguments of the oracle, where they are known already.
    """
    if is_estimator(vector.loss):
        a = oracle_advantages(vector.loss, vector.config, vector.data)
        wrong = planted.wrong_advantages(bug, vector.loss, a)
        return wrong and advantages_answer(wrong)
    a = arguments(vector.config, vector.data, vector.denominator) if a is None else a
    answer = planted.wrong_loss(bug, vector.loss, a, num_targets(vector.data))
    return answer and to_answer(answer, vector.data)


def shows(bug: str, vector: Vector, a: Arguments | None = None) -> bool:
    """Return whether a loss that has the bug fails the vector by more than ten times the tolerance of float32.

    No bug shows at a kink, since such a vector accepts both one-sided gradients and all between them.
    """
    if vector.error is not None:
        return accepts_refused(bug, vector)
    if vector.kind == "kink":
        return False
    answer = wrong_answer(bug, vector, a)
    wide = {dtype: [10 * x for x in vector.tol["float32"]] for dtype in vector.tol}
    return answer is not None and mistake(replace(vector, tol=wide), answer, "float32") != ""


def flags(vector: Vector) -> list[str]:
    """Return every bug of the catalogue that shows on the vector."""
    a = None
    if vector.error is None and vector.advantages is None:
        a = arguments(vector.config, vector.data, vector.denominator)
    return [bug for bug in BUGS if shows(bug, vector, a)]


ORDINARY_TOLERANCE = {"float64": [1e-9, 1e-12], "float32": [1e-5, 1e-6]}
"""dtype → [rtol, atol] of most vectors. A must-reject vector has no answer and so no tolerance."""


def explains(bug: str, vector: Vector, reply: Mapping[str, Any], dtype: str) -> bool:
    """Return whether a reply equals the answer of a loss that has this bug.

    A loss that accepts a must-reject vector has the bug. ``clip-as-epsilon`` needs more, since a loss that does not
    check its bounds accepts epsilons, too: its numbers must be those of the bounds 1 − low and 1 + high.
    """
    if vector.error is not None:
        if bug != "clip-as-epsilon":
            return True
        vector = replace(vector, error=None, tol=ORDINARY_TOLERANCE)
    answer = wrong_answer(bug, vector)
    return answer is not None and not mistake(vector.with_answer(answer), reply, dtype)
