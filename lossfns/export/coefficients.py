"""The coefficient with which each token's term enters a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from lossfns.errors import LossInputError, show
from lossfns.export.datums import as_bound, pack_share
from lossfns.loss import BoundLoss, Loss
from lossfns.segments import to_tokens
from lossfns.tokens import Rows, Tokens


def token_coefficients(
    loss: Loss | BoundLoss, data: Sequence[Any], micro_batches: Sequence[Sequence[int]] | None = None
) -> list[Tensor]:
    """Return share / denominator at each token: L is the sum of these coefficients times the terms.

    Args:
        loss: a loss, with its side columns bound or in the datums. It may have a denominator bound.
        data: B datums.
        micro_batches: a partition of the datums' indices into n parts. Then each part is divided by its own count and
            by n, as loops do that average the means of their micro-batches. None: one denominator for the whole batch,
            whose coefficients are the same under any partition.

    Returns:
        For each datum the coefficients ``[N]`` (or ``[N, K]``), 0 at masked tokens. In a loss over pairs or sequences,
        each active token has the coefficient of its row.

    Raises:
        LossInputError: if a call of the loss would refuse the datums, or if ``micro_batches`` is no partition of them.

    >>> from lossfns import datum_from_tokens, cross_entropy
    >>> data = [datum_from_tokens(range(n), prompt_length=1) for n in (2, 4)]
    >>> [x.tolist() for x in token_coefficients(cross_entropy(), data)]
    [[0.25], [0.25, 0.25, 0.25]]
    >>> [[round(c, 3) for c in x.tolist()] for x in token_coefficients(cross_entropy(), data, [[0], [1]])]
    [[0.5], [0.167, 0.167, 0.167]]
    """
    bound = as_bound(loss)
    if micro_batches is None:
        return coefficients_of(bound, data)
    check_partition(micro_batches, len(data), bound.loss.rows)
    of_datum: dict[int, Tensor] = {}
    for part in micro_batches:
        columns = {name: [column[i] for i in part] for name, column in bound.columns.items()}
        rows = coefficients_of(replace(bound, columns=columns), [data[i] for i in part])
        of_datum |= dict(zip(part, (row / len(micro_batches) for row in rows)))
    return [of_datum[i] for i in range(len(data))]


def coefficients_of(bound: BoundLoss, data: Sequence[Any]) -> list[Tensor]:
    """Return share / denominator at each token of one batch."""
    t, share, shapes = pack_share(bound, data)
    of_tokens = torch.where(t.active, at_tokens(t, share, bound.loss.rows), 0)
    rows = torch.split(of_tokens, [prod(shape) for shape in shapes])
    return [row.reshape(tuple(shape)) for row, shape in zip(rows, shapes)]


def at_tokens(t: Tokens, share: Tensor, rows: Rows) -> Tensor:
    """Repeat the share of a row at its tokens: ``[rows] -> [N]``."""
    return share if rows.per_token else to_tokens(t, share.repeat_interleave(rows.datums))


def check_partition(micro_batches: Any, count: int, rows: Rows) -> None:
    """Refuse anything but lists of indices that hold each datum once, and keep pairs together."""
    parts = [list(part) for part in micro_batches] if isinstance(micro_batches, (list, tuple)) else []
    whole_pairs = all(part[i] + 1 == part[i + 1] for part in parts for i in range(0, len(part) - 1, 2))
    if sorted(i for part in parts for i in part) != list(range(count)) or not all(parts):
        fix = "Two halves of four datums are [[0, 1], [2, 3]]."
        raise LossInputError("micro_batches", f"a partition of the indices 0 to {count - 1}", show(micro_batches), fix)
    if rows.datums > 1 and not (whole_pairs and all(len(part) % 2 == 0 for part in parts)):
        fix = "Keep datums 2i and 2i + 1 in one part."
        raise LossInputError("micro_batches", "parts of whole pairs", show(micro_batches), fix)
