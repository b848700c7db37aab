"""The right answer to the inputs of a vector, from the oracle, with its tolerance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lossfns.testing import oracle
from lossfns.testing.planted import Arguments
from lossfns.testing.vectors.flags import advantages_answer, arguments, oracle_advantages, to_answer
from lossfns.testing.vectors.vector import Answer, flatten, is_estimator

FLOAT32 = 2.0**-24
"""Half a unit in the last place of 1."""


def correct_answer(
    loss: str, config: Mapping[str, Any], data: Sequence[Mapping[str, Any]], denominator: float | None = None
) -> Answer:
    """Return the oracle's answer in the shape of the data."""
    if is_estimator(loss):
        return advantages_answer(getattr(oracle, loss)(**oracle_advantages(loss, config, data)))
    return to_answer(getattr(oracle, loss)(**arguments(config, data, denominator)), data)


def count_tokens(a: Arguments) -> int:
    """Return the number of tokens that count."""
    return sum(len(oracle.active(row)) for row in a["weights"])


def tolerance(answer: Answer, a: Arguments) -> tuple[dict[str, list[float]], str]:
    """Return dtype → [rtol, atol], and the reason for a larger atol in float32, or "".

    If every logprob and every ratio is rounded by half a unit in the last place, the loss changes by up to
    2⁻²⁴·Σ |g|·(|lp| + 1[ratio]). Where the terms of a loss nearly cancel, this is more than the usual tolerance.
    """
    tol, reason = {"float64": [1e-9, 1e-12], "float32": [1e-5, 1e-6]}, ""
    if "loss" not in answer:
        return tol, reason
    g, lp, ratio = flatten(answer["grad"]), flatten(a["logprobs"]), float("old_logprobs" in a)
    noise = 4 * FLOAT32 * sum(abs(x) * (abs(y) + ratio) for x, y in zip(g, lp) if x != 0)
    if noise > 1e-6 + 1e-5 * abs(answer["loss"]):
        tol["float32"][1] = float(f"{noise:.1e}")
        reason = f"terms cancel: 4·2⁻²⁴·Σ|g|(|lp| + 1[ratio]) = {noise:.1e}"
    return tol, reason


def round_significant(x: Any, count: int = 12) -> Any:
    """Round numbers to ``count`` digits: more than any tolerance needs, and the same with any maths library."""
    if isinstance(x, Mapping):
        return {name: round_significant(value, count) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [round_significant(value, count) for value in x]
    return float(f"{x:.{count}g}") + 0.0 if isinstance(x, float) and math.isfinite(x) else x
