"""Hypothesis strategies for the inputs of a loss. They need the extra ``testing``.

>>> from hypothesis import given
>>> from lossfns import ppo
>>> @given(batches(reads=("advantages", "old_logprobs")))
... def test_it_is_finite(batch):
...     loss, metrics = ppo()(batch.data(), batch.tensors())
...     assert loss.isfinite()

``batches`` draws whole batches with edge cases: fully masked sequences, zeros inside a sequence, sequences of one
token, ratios on both sides of the usual clip bounds. The other strategies draw one row or one value of a batch. All
strategies shrink towards one datum of one token with logprob −1, weight 1, advantage 1 and ratio 1. Numbers are binary
fractions with few digits, exact in float32. Impossible options raise ``InvalidArgument`` when an example is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from lossfns import datum as lossfns_sdk
from lossfns.errors import did_you_mean
from lossfns.testing.batch import Batch, Row
from lossfns.tokens import COLUMNS, DATUM_COLUMNS, LOGPROB_COLUMNS, TOKEN_COLUMNS

try:
    from hypothesis import strategies as st
    from hypothesis.errors import InvalidArgument
except ImportError as error:
    raise ImportError("lossfns.testing.strategies needs hypothesis: pip install 'lossfns[testing]'") from error

T = TypeVar("T")
Values = tuple[Any, ...]
Cell = tuple[Any, ...]
"""The numbers of one token, one for each column."""
Columns = dict[str, list[Any]]


def simplest_first(values: Iterable[float], near: float) -> Values:
    """Sort values in the order in which examples shrink: ``near`` first, then short numbers, nearest first."""
    return tuple(sorted(values, key=lambda x: (x != near, len(repr(abs(x))), abs(abs(x) - abs(near)), x < 0)))


LOGPROBS = simplest_first((-k / 8 for k in range(1, 41)), near=-1.0)
END_LOGPROBS = (0.0, -(2.0**-20), -50.0, -1e4)
"""Logprobs of certain, almost certain and impossible tokens. bfloat16 rounds only the last one."""

ADVANTAGES = simplest_first((k / 4 for k in range(-10, 11)), near=1.0)
WEIGHTS = (1.0, 0.0, 2.0, 0.5)
SIGNED_WEIGHTS = (*WEIGHTS, -1.0, -0.5)

LOG_RATIOS = simplest_first((k / 16 for k in range(-11, 12)), near=0.0)
"""Moderate log-ratios in sixteenths. Ratios of them and of their differences are 1 or at least 1e-3 off any bound."""

BOUND_LOG_RATIOS = tuple(k / 1024 for k in (-228, -229, 186, 187, 252, 253, -4 / 16, -5 / 16, 6 / 16, 7 / 16))
"""Log-ratios just inside and just outside the bounds 0.8, 1.2, 1.28, 1 − 3e-4 and 1 + 4e-4, in float32 too."""

FAR_LOG_RATIOS = (25.0, -25.0)
"""Log-ratios past the usual cap of ±20."""

ENTROPIES = simplest_first((k / 4 for k in range(13)), near=1.0)
SUM_SQUARE_PROBS = simplest_first((k / 16 for k in range(1, 17)), near=1.0)
GROUPS = (0.0, 1.0, 2.0)
REFERENCE_POINTS = simplest_first((k / 4 for k in range(9)), near=0.0)

OTHER_LOGPROBS = (*LOGPROB_COLUMNS, "teacher_logprobs")
"""The columns of other models' logprobs. They are drawn as log-ratios."""

POISONS = (math.nan, math.inf, -math.inf, 1e30)
MASKED = (False,) * 7 + (True,)
"""Whether a sequence or pair is fully masked: one in eight is."""

CALM: Mapping[str, Values] = {
    "logprobs": LOGPROBS,
    "weights": WEIGHTS,
    "advantages": ADVANTAGES,
    **dict.fromkeys(OTHER_LOGPROBS, LOG_RATIOS),
    **dict.fromkeys(("values", "old_values", "returns", "rewards"), ADVANTAGES),
    "entropy": ENTROPIES,
    "sum_square_probs": SUM_SQUARE_PROBS,
    "labels": (1.0, 0.0),
    "groups": GROUPS,
    "reference_point": REFERENCE_POINTS,
    "target_margin": REFERENCE_POINTS,
    "poison": (None, *POISONS),
}
AT_BOUNDS = {**CALM, **dict.fromkeys(OTHER_LOGPROBS, LOG_RATIOS + BOUND_LOG_RATIOS)}
EXTREME = {
    **CALM,
    "logprobs": LOGPROBS + 3 * END_LOGPROBS,  # repeated, so that they are drawn more often
    **dict.fromkeys(OTHER_LOGPROBS, LOG_RATIOS + BOUND_LOG_RATIOS + FAR_LOG_RATIOS),
}


def logprobs(*, min_length: int = 1, max_length: int = 8, extremes: bool = True) -> st.SearchStrategy[Row]:
    """Rows of logprobs from −5 to below 0; with ``extremes`` also 0, almost 0, −50 and −1e4."""
    return rows_of((EXTREME if extremes else CALM)["logprobs"], min_length, max_length)


def log_ratios(*, min_length: int = 1, max_length: int = 8, extremes: bool = True) -> st.SearchStrategy[Row]:
    """Rows of log-ratios within ±0.7 and away from every clip bound; with ``extremes`` also at the bounds and ±25."""
    return rows_of((EXTREME if extremes else CALM)["old_logprobs"], min_length, max_length)


def advantages(*, min_length: int = 1, max_length: int = 8, per_token: bool = True) -> st.SearchStrategy[Row]:
    """Rows of advantages of both signs and 0. Without ``per_token``, all entries of a row are equal."""
    rows = rows_of(ADVANTAGES, min_length, max_length)
    return rows if per_token else rows.map(lambda row: row[:1] * len(row))


def weights(*, min_length: int = 1, max_length: int = 8, signed: bool = False) -> st.SearchStrategy[Row]:
    """Rows of weights: 0, 1, 2, 0.5, and with ``signed`` negative ones. A row may be all 0."""
    return rows_of(SIGNED_WEIGHTS if signed else WEIGHTS, min_length, max_length)


def rows_of(values: Values, min_length: int, max_length: int) -> st.SearchStrategy[Row]:
    """Rows of these values."""
    return st.lists(st.sampled_from(values), min_size=min_length, max_size=max_length)


def lengths(*, min_sequences: int = 1, max_sequences: int = 5, max_length: int = 8) -> st.SearchStrategy[list[int]]:
    """Lists of sequence lengths, each at least 1."""
    return st.lists(st.integers(1, max_length), min_size=min_sequences, max_size=max_sequences)


def poisons() -> st.SearchStrategy[float]:
    """Values that must not leak from a masked slot: nan, both infinities, and 1e30, which overflows in products."""
    return st.sampled_from(POISONS)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """dtypes of a model's logprobs."""
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
    """Batches that every loss over these columns accepts: at least one token is active, and no logprob is above 0.

    Args:
        reads: the columns besides ``weights``, as a ``Loss`` names them. ``groups``, ``labels`` and the other columns
            with one number for each datum have it at each token; in pairs, both sides have the same number.
        pairs: sequences 2i and 2i + 1 form a pair. Both have active tokens, or neither has.
        targets: K for logprobs ``[N, K]``, with K targets at each position; 0 for ``[N]``.
        signed: weights may be negative. Their sum may be 0 or less, which no mean can divide by.
        per_token: advantages may differ within a sequence; in half of the batches they do not.
        extremes: log-ratios may lie at clip bounds and past ±20, logprobs at 0 and −1e4. Without it, logprobs lie in
            [−5, −0.05] and log-ratios within ±0.7 and away from the bounds, so that finite differences work.
        poison: slots of weight 0 may hold nan, ±inf or 1e30 in logprobs and every column.
        min_sequences, max_sequences: limits of the number of datums, which is even for pairs.
        max_length: the largest number of positions of a sequence.
    """
    check_columns(reads)
    check_counts(targets=targets)
    check_counts(minimum=1, min_sequences=min_sequences, max_sequences=max_sequences, max_length=max_length)
    check_rows(pairs, targets, signed)
    sides = 2 if pairs else 1
    minimum, maximum = -(-min_sequences // sides), max_sequences // sides
    if minimum > maximum:
        parity = "even " if pairs else ""
        raise InvalidArgument(f"min_sequences={min_sequences}, max_sequences={max_sequences}: no {parity}number fits")

    # Half of the batches have no far log-ratio, because one ratio of e²⁰ would hide errors in all others.
    values = draw(st.sampled_from((AT_BOUNDS, EXTREME))) if extremes else CALM
    values = {**values, "weights": SIGNED_WEIGHTS} if signed else values
    names = ("logprobs", "weights", *reads)
    if poison:
        names += ("poison",)
    cell = st.tuples(*[st.sampled_from(values[name]) for name in names])
    positions = lists_of(st.tuples(*[cell] * max(targets, 1)), 1, max_length)
    units = draw(lists_of(st.tuples(st.sampled_from(MASKED), *[positions] * sides), minimum, maximum))
    by_token = per_token and draw(st.booleans())

    masks = [masked for masked, *_ in units]
    masks[0] = masks[0] and not all(masks)  # at least one token must be active
    sequences = [row for (_, *unit), masked in zip(units, masks) for row in build_unit(names, unit, masked, by_token)]
    rows = {name: [row[name] for row in sequences] for name in ("logprobs", "weights", *reads)}
    return Batch(rows.pop("logprobs"), rows.pop("weights"), rows, targets)


def datums(*, sdk: Any = lossfns_sdk, **options: Any) -> st.SearchStrategy[list[Any]]:
    """Lists of datums that hold their columns. ``sdk`` is the module of their classes, such as ``tinker``.

    The options are those of ``batches``. Use ``batches`` if you need the logprobs too.
    """
    return batches(**options).map(lambda batch: batch.data(sdk))


def check_columns(reads: Sequence[str]) -> None:
    """Refuse columns that cannot be drawn."""
    known = [name for name in (*COLUMNS, *TOKEN_COLUMNS, *DATUM_COLUMNS) if name != "weights"]
    if isinstance(reads, str):
        raise InvalidArgument(f"reads={reads!r} is a string: write ({reads!r},)")
    for name in reads:
        if name not in known:
            raise InvalidArgument(f"reads={reads!r}: no column {name!r} to draw. {did_you_mean(str(name), known)}")
    if len(set(reads)) < len(reads):
        raise InvalidArgument(f"reads={reads!r} names a column twice")


def check_counts(*, minimum: int = 0, **counts: int) -> None:
    """Refuse counts that are not integers of at least ``minimum``."""
    for name, count in counts.items():
        if type(count) is not int or count < minimum:
            raise InvalidArgument(f"{name}={count!r}: expected an integer of at least {minimum}")


def check_rows(pairs: bool, targets: int, signed: bool) -> None:
    """Refuse options that no loss combines."""
    if pairs and targets:
        raise InvalidArgument(f"pairs=True with targets={targets}: the tokens of a pair have one target each")
    if pairs and signed:
        raise InvalidArgument("pairs=True with signed=True: no loss over pairs takes negative weights")


def lists_of(element: st.SearchStrategy[T], minimum: int, maximum: int) -> st.SearchStrategy[list[T]]:
    """Lists that draw their length before their elements, so that shrinking can remove any element as a whole."""
    return st.integers(minimum, maximum).flatmap(lambda n: st.lists(element, min_size=n, max_size=n))


def build_unit(
    names: Sequence[str], sides: Sequence[Iterable[Iterable[Cell]]], masked: bool, by_token: bool
) -> list[Columns]:
    """Return the rows of one sequence, or of the two sides of a pair."""
    rows = [build_sequence(names, side, masked, by_token) for side in sides]
    for name in set(names) & set(DATUM_COLUMNS):
        for row in rows:
            row[name] = rows[0][name][:1] * len(row[name])
    return [apply_poison(row) if "poison" in row else row for row in rows]


def build_sequence(names: Sequence[str], positions: Iterable[Iterable[Cell]], masked: bool, by_token: bool) -> Columns:
    """Return the rows of one sequence.

    For the columns of other policies, a cell holds the log-ratio d, and the row holds lp − d. The logprob lp is lowered
    until no lp − d is above 0.
    """
    cells = [cell for position in positions for cell in position]
    row = {name: list(values) for name, values in zip(names, zip(*cells))}
    if masked:
        row["weights"] = [0.0] * len(cells)
    elif not any(row["weights"]):
        row["weights"][0] = 1.0
    if "advantages" in row and not by_token:
        row["advantages"] = row["advantages"][:1] * len(cells)
    ratios = {
        name: list(map(feasible_log_ratio, row["logprobs"], row[name])) for name in names if name in OTHER_LOGPROBS
    }
    row["logprobs"] = [min([lp, *map(highest_logprob, ds)]) for lp, *ds in zip(row["logprobs"], *ratios.values())]
    return row | {name: other_logprobs(row["logprobs"], ds) for name, ds in ratios.items()}


def feasible_log_ratio(logprob: float, log_ratio: float) -> float:
    """Return the log-ratio, or its absolute value for a logprob close to 0, which then need not be lowered."""
    return log_ratio if logprob < -0.1 else abs(log_ratio)


def highest_logprob(log_ratio: float) -> float:
    """Return the highest logprob, in eighths, for which lp − d is below 0."""
    return 0.0 if log_ratio >= 0 else math.floor(8 * log_ratio - 1) / 8


def other_logprobs(logprobs: Row, log_ratios: Row) -> Row:
    """Return lp − d in float32."""
    return list(np.subtract(logprobs, log_ratios).astype(np.float32).tolist())


def apply_poison(row: Columns) -> Columns:
    """Fill each slot of weight 0 with its poison, if it has one. Numbers of a datum stay."""
    slots = list(zip(row["weights"], row["poison"]))
    filled = {name: [x if w or p is None else p for x, (w, p) in zip(xs, slots)] for name, xs in row.items()}
    return {**filled, **{name: row[name] for name in ("weights", *DATUM_COLUMNS) if name in row}}
