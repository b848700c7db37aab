"""Make losses from the terms of a sequence, a pair or a batch: the sums, their weights and the denominators.

The terms are a function of one ``Sequence``, of two, or of all. It sees the active tokens only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from lossfns.testing.oracle.scalar import Number, Scalar, cap, exp, gradient, total

Row = list[float]
Rows = list[Row]
Loss = tuple[float, Rows]
Oracle = Callable[..., Loss]


class Sequence:
    """The active tokens of one datum: ``s.lp``, ``s.w``, and one attribute for each column.

    Attributes:
        lp: the logprobs, which the gradient is taken in.
        w: their weights.
        slots: the position of each active token in the datum.
        columns: the values of each column at the active tokens, by name.
    """

    def __init__(self, logprobs: Row, weights: Row, columns: dict[str, Row]) -> None:
        self.slots = [t for t, w in enumerate(weights) if w != 0]
        self.lp = [Scalar(logprobs[t]) for t in self.slots]
        self.w = [weights[t] for t in self.slots]
        self.columns = {name: [row[t] for t in self.slots] for name, row in columns.items()}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["columns"][name]
        except KeyError:
            raise KeyError(name) from None

    def number(self, name: str) -> float:
        """The datum's number in a column that has one for each datum."""
        return float(max(self.columns[name]))

    def sum(self, values: Iterable[Number]) -> Scalar:
        """Σ w·x over the sequence."""
        return total(w * x for w, x in zip(self.w, values, strict=True))

    def mean(self, values: Iterable[Number]) -> Scalar:
        """Σ w·x / Σ w over the sequence."""
        return self.sum(values) / sum(self.w)

    def gap(self, name: str) -> list[Scalar]:
        """lp − column at each token."""
        return [lp - other for lp, other in zip(self.lp, self.columns[name], strict=True)]


def sequences(logprobs: Rows, weights: Rows, columns: dict[str, Rows]) -> list[Sequence]:
    """Return the sequences of a batch, including those without an active token."""
    return [
        Sequence(lp, w, {name: rows[i] for name, rows in columns.items()})
        for i, (lp, w) in enumerate(zip(logprobs, weights, strict=True))
    ]


def split(arguments: dict[str, Any]) -> tuple[dict[str, Rows], dict[str, Any]]:
    """Separate the columns, which are lists of rows, from the settings."""
    columns = {name: x for name, x in arguments.items() if isinstance(x, list)}
    return columns, {name: x for name, x in arguments.items() if name not in columns}


def finish(value: Scalar, batch: list[Sequence], weights: Rows) -> Loss:
    """Return the value, and the gradient in the shape of the weights."""
    slopes = iter(gradient(value, [lp for s in batch for lp in s.lp]))
    grads = [[0.0] * len(row) for row in weights]
    for s, row in zip(batch, grads, strict=True):
        for t in s.slots:
            row[t] = next(slopes)
    return value.value, grads


def reduce_tokens(
    terms: list[list[Number]],
    batch: list[Sequence],
    weigh: str,
    length: float | None,
    denominator: float | None,
) -> Scalar:
    """Σ share·term / D, where the share is w, or w / Σ w of the sequence for ``sequence_mean``."""
    divisor = {
        "token_mean": sum(w for s in batch for w in s.w),
        "token_sum": 1.0,
        "sequence_mean": float(sum(1 for s in batch if s.w)),
        "sequence_sum_mean": float(sum(1 for s in batch if s.w)),
        "fixed_length": (length or 0) * sum(1 for s in batch if s.w),
    }[weigh]
    if denominator is not None and weigh != "token_sum":
        divisor = denominator
    shares = [[w / sum(s.w) if weigh == "sequence_mean" else w for w in s.w] for s in batch]
    return total(
        share * term for row, values in zip(shares, terms, strict=True) for share, term in zip(row, values, strict=True)
    ) / (divisor or 1.0)


def over_batch(terms: Callable[..., list[list[Number]]]) -> Oracle:
    """Make a loss over tokens from the terms of all sequences at once: ``terms([s, ...], **settings)``.

    ``tis_cap`` and ``tis_level`` multiply each term by min(e^(old − sampler), cap), as ``with_tis`` does.
    """

    @functools.wraps(terms)
    def loss(
        *,
        logprobs: Rows,
        weights: Rows,
        weigh: str = "token_mean",
        length: float | None = None,
        denominator: float | None = None,
        tis_cap: float | None = None,
        tis_level: str = "token",
        **arguments: Any,
    ) -> Loss:
        columns, settings = split(arguments)
        batch = sequences(logprobs, weights, columns)
        rows = terms(batch, **settings)
        if tis_cap is not None:
            rows = [
                [rho * term for rho, term in zip(truncated(s, tis_cap, tis_level), row, strict=True)]
                for s, row in zip(batch, rows, strict=True)
            ]
        return finish(reduce_tokens(rows, batch, weigh, length, denominator), batch, weights)

    return loss


def over_tokens(terms: Callable[..., Iterable[Number]]) -> Oracle:
    """Make a loss over tokens from the terms of one sequence: ``terms(s, **settings)`` gives one for each token."""

    def of_batch(batch: list[Sequence], **settings: Any) -> list[list[Number]]:
        return [list(terms(s, **settings)) if s.w else [] for s in batch]

    return functools.wraps(terms)(over_batch(of_batch))


def truncated(s: Sequence, limit: float, level: str) -> Row:
    """min(e^x, limit) at each token, with x = old − sampler of the token, or Σ w·x or Σ w·x / Σ w of its sequence."""
    gaps = [old - sampler for old, sampler in zip(s.old_logprobs, s.sampler_logprobs, strict=True)]
    if level != "token" and gaps:
        gap_of_sequence = float(s.sum(gaps) if level == "sequence" else s.mean(gaps))
        gaps = [gap_of_sequence] * len(gaps)
    return [min(float(exp(cap(gap, 20.0))), limit) for gap in gaps]


def over_pairs(term: Callable[..., Number]) -> Oracle:
    """Make a loss over pairs from ``term(chosen, rejected, **settings)``."""

    def of_pairs(pairs: list[tuple[Sequence, Sequence]], **settings: Any) -> list[Number]:
        return [term(chosen, rejected, **settings) for chosen, rejected in pairs]

    return functools.wraps(term)(over_all_pairs(of_pairs))


def over_all_pairs(terms: Callable[..., list[Number]]) -> Oracle:
    """Make a loss over pairs from the terms of all pairs with two active sides."""

    @functools.wraps(terms)
    def loss(
        *,
        logprobs: Rows,
        weights: Rows,
        weigh: str = "pair_mean",
        length: float | None = None,
        denominator: float | None = None,
        **arguments: Any,
    ) -> Loss:
        columns, settings = split(arguments)
        batch = sequences(logprobs, weights, columns)
        pairs = [pair for pair in zip(batch[::2], batch[1::2], strict=True) if all(s.w for s in pair)]
        divisor = 1.0 if weigh == "pair_sum" else len(pairs) if denominator is None else denominator
        return finish(total(terms(pairs, **settings)) / (divisor or 1.0), batch, weights)

    return loss


def over_datums(term: Callable[..., Number]) -> Oracle:
    """Make a loss with one term for each datum from ``term(s, **settings)``."""

    def of_datums(batch: list[Sequence], **settings: Any) -> list[Number]:
        return [term(s, **settings) for s in batch]

    return functools.wraps(term)(over_all_datums(of_datums))


def over_all_datums(terms: Callable[..., list[Number]]) -> Oracle:
    """Make a loss with one term for each datum from the terms of all datums with an active token."""

    @functools.wraps(terms)
    def loss(
        *,
        logprobs: Rows,
        weights: Rows,
        weigh: str = "datum_mean",
        length: float | None = None,
        denominator: float | None = None,
        **arguments: Any,
    ) -> Loss:
        columns, settings = split(arguments)
        batch = sequences(logprobs, weights, columns)
        counted = [s for s in batch if s.w]
        divisor = 1.0 if weigh == "datum_sum" else len(counted) if denominator is None else denominator
        return finish(total(terms(counted, **settings)) / (divisor or 1.0), batch, weights)

    return loss


def over_positions(name: str, term: Callable[..., Number]) -> Oracle:
    """Make a loss over positions with K candidates each, from the term of a position.

    The term is ``term(logprobs, columns, **settings)``, of the active candidates.

    A position counts as a token whose weight is the mean weight of its active candidates.
    """

    def loss(
        *,
        logprobs: Rows,
        weights: Rows,
        targets: int,
        weigh: str = "token_mean",
        length: float | None = None,
        denominator: float | None = None,
        **arguments: Any,
    ) -> Loss:
        columns, settings = split(arguments)
        batch = sequences(logprobs, weights, columns)
        terms: list[list[Number]] = []
        by_position = []
        for s in batch:
            entries: dict[int, list[int]] = {}
            for i, slot in enumerate(s.slots):
                entries.setdefault(slot // targets, []).append(i)
            rows = list(entries.values())
            terms.append(
                [
                    term([s.lp[i] for i in row], {n: [x[i] for i in row] for n, x in s.columns.items()}, **settings)
                    for row in rows
                ]
            )
            of_positions = Sequence([], [], {})
            of_positions.w = [sum(s.w[i] for i in row) / len(row) for row in rows]
            by_position.append(of_positions)
        return finish(reduce_tokens(terms, by_position, weigh, length, denominator), batch, weights)

    loss.__name__ = loss.__qualname__ = name
    return loss
