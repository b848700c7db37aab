"""Hypothesis strategies for what a loss reads; needs the extra ``testing``.

>>> from hypothesis import given
>>> from lossfns import ppo
>>> @given(batches(reads=("advantages", "old_logprobs")))
... def test_it_is_finite(batch):
...     loss, metrics = ppo()(batch.data(), batch.tensors())
...     assert loss.isfinite()

``batches`` draws whole batches and puts the edges into them on purpose: fully masked sequences, zeros inside a
sequence, sequences of one token, ratios on both sides of the usual clip bounds. The other strategies draw one row,
or one value, of what batches are made of. All shrink towards one datum of one token with logprob −1, weight 1,
advantage 1 and ratio 1. Numbers are binary fractions with few digits, exact in float32. What cannot be drawn raises
``InvalidArgument``, when it is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from lossfns import datum as ours
from lossfns.errors import did_you_mean
from lossfns.testing.batch import Batch, Row
from lossfns.tokens import COLUMNS, LOGPROB_COLUMNS

try:
    from hypothesis import strategies as st
    from hypothesis.errors import InvalidArgument
except ImportError as error:
    raise ImportError("lossfns.testing.strategies needs hypothesis: pip install 'lossfns[testing]'") from error

T = TypeVar("T")
Values = tuple[Any, ...]
Cell = tuple[Any, ...]
"""What stands at one token: a number for each column."""
Columns = dict[str, list[Any]]


def plainest(values: Iterable[float], near: float) -> Values:
    """``near`` itself, then short numbers, nearest first: the order in which examples shrink."""
    return tuple(sorted(values, key=lambda x: (x != near, len(repr(abs(x))), abs(abs(x) - abs(near)), x < 0)))


LOGPROBS = plainest((-k / 8 for k in range(1, 41)), near=-1.0)
END_LOGPROBS = (0.0, -(2.0**-20), -50.0, -1e4)
"""Certain, almost certain, and what no model samples. Of all logprobs here bfloat16 rounds the last alone."""

ADVANTAGES = plainest((k / 4 for k in range(-10, 11)), near=1.0)
WEIGHTS = (1.0, 0.0, 2.0, 0.5)
SIGNED_WEIGHTS = (*WEIGHTS, -1.0, -0.5)

LOG_RATIOS = plainest((k / 16 for k in range(-11, 12)), near=0.0)
"""Calm ones. Sixteenths and their differences are 0, or a ratio at least 1e-3 away from every usual bound."""

BOUND_LOG_RATIOS = tuple(k / 1024 for k in (-228, -229, 186, 187, 252, 253, -4 / 16, -5 / 16, 6 / 16, 7 / 16))
"""Just inside and just outside of 0.8, 1.2, 1.28, 1 − 3e-4 and 1 + 4e-4; float32 tells the sides apart."""

FAR_LOG_RATIOS = (25.0, -25.0)
"""Past the usual cap of ±20."""

POISONS = (math.nan, math.inf, -math.inf, 1e30)
MASKED = (False,) * 7 + (True,)

CALM: Mapping[str, Values] = {
    "logprobs": LOGPROBS,
    "weights": WEIGHTS,
    "advantages": ADVANTAGES,
    **dict.fromkeys(LOGPROB_COLUMNS, LOG_RATIOS),
    "poison": (None, *POISONS),
}
AT_BOUNDS = {**CALM, **dict.fromkeys(LOGPROB_COLUMNS, LOG_RATIOS + BOUND_LOG_RATIOS)}
EXTREME = {
    **CALM,
    "logprobs": LOGPROBS + 3 * END_LOGPROBS,
    **dict.fromkeys(LOGPROB_COLUMNS, LOG_RATIOS + BOUND_LOG_RATIOS + FAR_LOG_RATIOS),
}


def logprobs(*, min_length: int = 1, max_length: int = 8, extremes: bool = True) -> st.SearchStrategy[Row]:
    """Rows of logprobs from −5 to below 0; with ``extremes`` also 0, almost 0, −50 and −1e4."""
    return rows_of((EXTREME if extremes else CALM)["logprobs"], min_length, max_length)


def log_ratios(*, min_length: int = 1, max_length: int = 8, extremes: bool = True) -> st.SearchStrategy[Row]:
    """Rows of log-ratios within ±0.7 and off every clip bound; with ``extremes`` also at the bounds and ±25."""
    return rows_of((EXTREME if extremes else CALM)["old_logprobs"], min_length, max_length)


def advantages(*, min_length: int = 1, max_length: int = 8, per_token: bool = True) -> st.SearchStrategy[Row]:
    """Rows of advantages of both signs, 0 among them; without ``per_token`` one number all along the row."""
    rows = rows_of(ADVANTAGES, min_length, max_length)
    return rows if per_token else rows.map(lambda row: row[:1] * len(row))


def weights(*, min_length: int = 1, max_length: int = 8, signed: bool = False) -> st.SearchStrategy[Row]:
    """Rows of weights: 1, 0, fractional ones, and with ``signed`` negative ones. All of a row may be 0."""
    return rows_of(SIGNED_WEIGHTS if signed else WEIGHTS, min_length, max_length)


def rows_of(values: Values, min_length: int, max_length: int) -> st.SearchStrategy[Row]:
    return st.lists(st.sampled_from(values), min_size=min_length, max_size=max_length)


def lengths(*, min_sequences: int = 1, max_sequences: int = 5, max_length: int = 8) -> st.SearchStrategy[list[int]]:
    """The lengths of a batch's sequences, each at least 1."""
    return st.lists(st.integers(1, max_length), min_size=min_sequences, max_size=max_sequences)


def poisons() -> st.SearchStrategy[float]:
    """What must not leak from an inactive slot: nan, both infinities, and a finite number that overflows."""
    return st.sampled_from(POISONS)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """The dtypes in which a model may give its logprobs."""
    return st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16))


@st.composite
def batches(
    draw: st.DrawFn,
    *,
    reads: Sequence[str] = ("advantages", "old_logprobs", "ref_logprobs"),
    pairs: bool = False,
    targets: int = 0,
    signed: bool = False,
    per_token: bool = True,
    extremes: bool = True,
    poison: bool = False,
    min_sequences: int = 1,
    max_sequences: int = 5,
    max_length: int = 8,
) -> Batch:
    """Batches that every loss over such rows accepts: some token is active, and no logprob is above 0.

    Args:
        reads: the columns besides ``weights``, as a ``Loss`` names them.
        pairs: sequences 2i and 2i + 1 belong together: both have active tokens, or neither has.
        targets: K candidate targets for each position; 0 for one target, and rows without that axis.
        signed: weights may be negative. Their sum may be 0 or less, by which no mean can divide.
        per_token: advantages may differ within a sequence; in half of the batches they do not.
        extremes: log-ratios lie at clip bounds and past ±20, logprobs at 0 and −1e4. Without: logprobs in
            [−5, −0.05], log-ratios within ±0.7 and off the bounds, as finite differences need it.
        poison: slots of weight 0 may hold nan, ±inf or 1e30, in logprobs and every column.
        min_sequences, max_sequences: how many datums; in pairs, an even number within these limits.
        max_length: the most positions that a sequence has.
    """
    check_columns(reads)
    check_counts(targets=targets)
    check_counts(least=1, min_sequences=min_sequences, max_sequences=max_sequences, max_length=max_length)
    check_rows(pairs, targets, signed)
    sides = 2 if pairs else 1
    fewest, most = -(-min_sequences // sides), max_sequences // sides
    if fewest > most:
        parity = "even " if pairs else ""
        raise InvalidArgument(f"min_sequences={min_sequences}, max_sequences={max_sequences}: no {parity}number fits")

    # In half of the batches no log-ratio is far: one ratio of e²⁰ drowns what may be wrong with all others.
    values = draw(st.sampled_from((AT_BOUNDS, EXTREME))) if extremes else CALM
    values = {**values, "weights": SIGNED_WEIGHTS} if signed else values
    names = ("logprobs", "weights", *reads, *["poison"] * poison)
    cell = st.tuples(*[st.sampled_from(values[name]) for name in names])
    positions = sized(st.tuples(*[cell] * max(targets, 1)), 1, max_length)
    units = draw(sized(st.tuples(st.sampled_from(MASKED), *[positions] * sides), fewest, most))
    by_token = per_token and draw(st.booleans())

    masks = [masked for masked, *_ in units]
    masks[0] = masks[0] and not all(masks)
    made = [sequence(names, side, masked, by_token) for (_, *unit), masked in zip(units, masks) for side in unit]
    rows = {name: [row[name] for row in made] for name in ("logprobs", "weights", *reads)}
    return Batch(rows.pop("logprobs"), rows.pop("weights"), rows, targets)


def datums(*, sdk: Any = ours, **options: Any) -> st.SearchStrategy[list[Any]]:
    """Lists of datums that carry their columns, of ours or of another SDK: ``sdk=tinker``.

    The options are those of ``batches``, which draws the logprobs as well.
    """
    return batches(**options).map(lambda batch: batch.data(sdk))


def check_columns(reads: Sequence[str]) -> None:
    known = [name for name in COLUMNS if name != "weights"]
    if isinstance(reads, str):
        raise InvalidArgument(f"reads={reads!r} is a string: write ({reads!r},)")
    for name in reads:
        if name not in known:
            raise InvalidArgument(f"reads={reads!r}: no column {name!r} to draw. {did_you_mean(str(name), known)}")
    if len(set(reads)) < len(reads):
        raise InvalidArgument(f"reads={reads!r} names a column twice")


def check_counts(*, least: int = 0, **counts: int) -> None:
    for name, count in counts.items():
        if type(count) is not int or count < least:
            raise InvalidArgument(f"{name}={count!r} is no whole number of at least {least}")


def check_rows(pairs: bool, targets: int, signed: bool) -> None:
    if pairs and targets:
        raise InvalidArgument(f"pairs=True with targets={targets}: the tokens of a pair have one target each")
    if pairs and signed:
        raise InvalidArgument("pairs=True with signed=True: no loss over pairs takes negative weights")


def sized(element: st.SearchStrategy[T], least: int, most: int) -> st.SearchStrategy[list[T]]:
    """Lists that draw their length before their elements: shrinking can then take any element out in one piece."""
    return st.integers(least, most).flatmap(lambda n: st.lists(element, min_size=n, max_size=n))


def sequence(names: Sequence[str], positions: Iterable[Iterable[Cell]], masked: bool, by_token: bool) -> Columns:
    """The rows of one sequence. Where rows hold old = lp − d, cells hold d; lp gives way, so that old stays below 0."""
    cells = [cell for position in positions for cell in position]
    row = {name: list(values) for name, values in zip(names, zip(*cells))}
    if masked:
        row["weights"] = [0.0] * len(cells)
    elif not any(row["weights"]):
        row["weights"][0] = 1.0
    if "advantages" in row and not by_token:
        row["advantages"] = row["advantages"][:1] * len(cells)
    ratios = {name: list(map(feasible, row["logprobs"], row[name])) for name in names if name in LOGPROB_COLUMNS}
    row["logprobs"] = [min([lp, *map(highest, ds)]) for lp, *ds in zip(row["logprobs"], *ratios.values())]
    row |= {name: behind(row["logprobs"], ds) for name, ds in ratios.items()}
    return poisoned(row) if "poison" in row else row


def feasible(logprob: float, log_ratio: float) -> float:
    """The log-ratio; its size, at a logprob of almost 0, above which nothing lies."""
    return log_ratio if logprob < -0.1 else abs(log_ratio)


def highest(log_ratio: float) -> float:
    """The highest logprob, in eighths, whose partner at this log-ratio lies below 0."""
    return 0.0 if log_ratio >= 0 else math.floor(8 * log_ratio - 1) / 8


def behind(logprobs: Row, log_ratios: Row) -> Row:
    """lp − d, in float32."""
    return list(np.subtract(logprobs, log_ratios).astype(np.float32).tolist())


def poisoned(row: Columns) -> Columns:
    """Each slot of weight 0 filled with its poison, if it drew one."""
    slots = list(zip(row["weights"], row["poison"]))
    filled = {name: [x if w or p is None else p for x, (w, p) in zip(xs, slots)] for name, xs in row.items()}
    return {**filled, "weights": row["weights"]}
