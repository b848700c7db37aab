"""Sums and means over sequences and pairs. No other module knows which tokens belong to which sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lossfns.tokens import Tokens, to_dtype

Level = Callable[[Tokens, Tensor], Tensor]
"""A function ``(t, log_ratio [N]) -> [N]``: for each token its own log-ratio, or the log-ratio of its sequence."""


def sequence_sum(t: Tokens, x: Tensor) -> Tensor:
    """Σ x over each sequence: ``[N] -> [B]``."""
    if t.lengths is None:
        return x.sum(0, keepdim=True)
    if t.equal:
        return by_sequence(t, x).sum(1)
    # `unsafe` skips a check that would cost a device synchronisation; lengths from the door are valid.
    return torch.segment_reduce(x, "sum", lengths=t.lengths, unsafe=True)


def by_sequence(t: Tokens, x: Tensor) -> Tensor:
    """View x as one row for each sequence, where all sequences are equally long: ``[N] -> [B, N / B]``."""
    return x.view(t.sequences, x.shape[0] // t.sequences)


def to_tokens(t: Tokens, y: Tensor) -> Tensor:
    """Repeat each sequence's value over its tokens: ``[B] -> [N]``."""
    if t.lengths is None:
        return y.expand_as(t.logprobs)
    if t.equal:
        return y[:, None].expand_as(by_sequence(t, t.weights)).flatten()
    return torch.repeat_interleave(y, t.lengths, output_size=t.logprobs.shape[0])


def active_counts(t: Tokens) -> Tensor:
    """Number of active tokens of each sequence: ``[B]``."""
    return sequence_sum(t, to_dtype(t.active, t.weights.dtype))


def nonempty(t: Tokens) -> Tensor:
    """``[B]`` bool: True where a sequence has an active token."""
    return active_counts(t) > 0


def sequence_value(t: Tokens, x: Tensor) -> Tensor:
    """The one value that x has at the active tokens of each sequence, 0 where there are none: ``[N] -> [B]``.

    It is for columns with one number for each datum, such as a label. Where the caller gave a row for each datum, it
    takes the maximum, since a mean would round.
    """
    given = [number for column, number in t.by_datum if column is x]
    return given[0] if given else sequence_maximum(t, x)


def given_numbers(t: Tokens) -> dict[str, Tensor]:
    """The numbers ``[B]`` of the columns that came as one number for each datum, by name."""
    return {name: number for name, x in t.columns.items() for column, number in t.by_datum if column is x}


def with_numbers(t: Tokens, numbers: Mapping[str, Tensor]) -> Tokens:
    """Return the batch with more columns, of which ``numbers`` has one number ``[B]`` for each datum."""
    if not numbers:
        return t
    present = nonempty(t)
    by_datum = {name: torch.where(present, y, 0) for name, y in numbers.items()}
    columns = {name: torch.where(t.active, to_tokens(t, y), 0) for name, y in by_datum.items()}
    return replace(t, columns={**t.columns, **columns}, by_datum=[(columns[name], y) for name, y in by_datum.items()])


def sequence_maximum(t: Tokens, x: Tensor) -> Tensor:
    """The largest x of the active tokens of each sequence, 0 where there are none: ``[N] -> [B]``."""
    masked = torch.where(t.active, x, -torch.inf)
    if t.lengths is None:
        maximum = masked.amax(0, keepdim=True)
    elif t.equal:
        maximum = by_sequence(t, masked).amax(1)
    else:
        maximum = torch.segment_reduce(masked, "max", lengths=t.lengths, unsafe=True)
    return torch.where(maximum == -torch.inf, 0, maximum)  # of no token at all


def weighted_sum(t: Tokens, x: Tensor) -> Tensor:
    """Σ w·x over each sequence: ``[N] -> [B]``."""
    return sequence_sum(t, t.weights * x)


def weighted_mean(t: Tokens, x: Tensor) -> Tensor:
    """Σ w·x / Σ w over each sequence, 0 where it is empty: ``[N] -> [B]``."""
    return weighted_sum(t, x) / weight_divisor(t)


def weight_divisor(t: Tokens) -> Tensor:
    """Σ w of each sequence, or 1 where the sequence is empty, so that it can divide: ``[B]``."""
    return torch.where(nonempty(t), sequence_sum(t, t.weights), 1.0)


def chosen(t: Tokens, y: Tensor) -> Tensor:
    """The chosen side of each pair: ``[B] -> [P]``."""
    return y[: len(y) // 2] if t.halves else y[0::2]


def rejected(t: Tokens, y: Tensor) -> Tensor:
    """The rejected side of each pair: ``[B] -> [P]``."""
    return y[len(y) // 2 :] if t.halves else y[1::2]


def both_sides(t: Tokens, y: Tensor) -> Tensor:
    """Repeat each pair's value for its two sides: ``[P] -> [B]``."""
    return torch.cat([y, y]) if t.halves else torch.stack([y, y], 1).flatten()


def positions(t: Tokens) -> Tensor:
    """For each token the number of active tokens of its sequence up to and including it: ``[N]``."""
    if t.equal:
        return by_sequence(t, t.active).cumsum(1, dtype=torch.int32).flatten()
    counts = active_counts(t).long()
    return t.active.cumsum(0) - to_tokens(t, counts.cumsum(0) - counts)


def tokens_after(t: Tokens) -> Tensor:
    """For each token the number of tokens that follow in its sequence: ``[N]``."""
    if t.equal:
        ones = by_sequence(t, torch.ones_like(t.weights))
        return (ones.sum(1, keepdim=True) - ones.cumsum(1)).flatten()
    ones = torch.ones_like(t.weights, dtype=torch.float64)
    return to_tokens(t, sequence_sum(t, ones).cumsum(0)) - ones.cumsum(0)


def token_level(t: Tokens, log_ratio: Tensor) -> Tensor:
    """Each token's own log-ratio: ``[N] -> [N]``."""
    return log_ratio


def sequence_level(t: Tokens, log_ratio: Tensor) -> Tensor:
    """Σ w·d over the sequence, repeated at each token: the log of the product of its ratios, each to the power w.

    A weight of 2 counts a token twice, as in the sums of ``dpo``; with a mask it is the plain product.
    """
    return to_tokens(t, weighted_sum(t, log_ratio))


def geometric_level(t: Tokens, log_ratio: Tensor) -> Tensor:
    """Σ w·d / Σ w over the sequence, repeated at each token: the log of the weighted geometric mean of its ratios."""
    return to_tokens(t, weighted_mean(t, log_ratio))


def maximum_level(t: Tokens, x: Tensor) -> Tensor:
    """The largest x of the active tokens of the sequence, repeated at each token: ``[N] -> [N]``."""
    return to_tokens(t, sequence_maximum(t, x))


def group_index(labels: Tensor) -> Tensor:
    """The place of each row's label among the sorted labels of all rows: ``[M] -> [M]``, equal for equal labels."""
    return torch.searchsorted(labels.sort().values, labels)


def group_sum(labels: Tensor, y: Tensor) -> Tensor:
    """Σ y over all rows of the same label, repeated at each of these rows: ``[M] -> [M]``.

    A row is a sequence or a pair, and ``labels`` are its numbers of the column ``groups``.
    """
    return slot_sum(group_index(labels), y)


def slot_sum(slot: Tensor, y: Tensor) -> Tensor:
    """``group_sum`` of rows whose groups have these places, those of ``group_index``: ``[M] -> [M]``."""
    return torch.zeros_like(y).index_add(0, slot, y)[slot]


def group_labels(t: Tokens) -> Tensor:
    """The label of each sequence's group: ``[B]``. An empty sequence has label 0, so y must be 0 there."""
    return sequence_value(t, t.groups)


def over_group(t: Tokens, x: Tensor) -> Tensor:
    """Σ x over all tokens of the group of each token's sequence: ``[N] -> [N]``. x is 0 at inactive tokens."""
    return to_tokens(t, group_sum(group_labels(t), sequence_sum(t, x)))
