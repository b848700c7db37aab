"""Sums of losses in plain floats: Σ c·N/D, each part over the tokens of its own weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lossfns.testing.oracle.rows import Loss, Oracle, Rows, Sequence, over_pairs
from lossfns.testing.oracle.scalar import Number


class Part(NamedTuple):
    """A part of a sum.

    Attributes:
        oracle: the oracle of its loss.
        coefficient: c.
        weights: the name of the column of its weights.
        reads: the columns that its oracle reads besides.
        settings: the settings of its oracle.
    """

    oracle: Oracle
    coefficient: float
    weights: str
    reads: tuple[str, ...] = ()
    settings: Mapping[str, Any] = {}


@over_pairs
def chosen_nll(chosen: Sequence, rejected: Sequence) -> Number:
    """−Σ w·lp / Σ w of the chosen side (Pang et al. 2024)."""
    return -chosen.mean(chosen.lp)


def sum_losses(
    parts: Mapping[str, Part],
    *,
    logprobs: Rows,
    columns: Mapping[str, Rows],
    denominators: Mapping[str, float] | None = None,
) -> Loss:
    """Σ c·N/D: the value, and the gradient of each token. ``columns`` holds the weights of every part."""
    value, gradients = 0.0, [[0.0] * len(row) for row in logprobs]
    for name, part in parts.items():
        weights = columns[part.weights]
        if not any(w != 0 for row in weights for w in row):
            continue
        given = {column: columns[column] for column in part.reads}
        whole = {} if denominators is None else {"denominator": denominators[name]}
        own, slopes = part.oracle(logprobs=logprobs, weights=weights, **given, **part.settings, **whole)
        value += part.coefficient * own
        gradients = [
            [g + part.coefficient * x for g, x in zip(row, more, strict=True)]
            for row, more in zip(gradients, slopes, strict=True)
        ]
    return value, gradients
