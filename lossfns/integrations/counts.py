"""The denominator of a loss, from the counts that a trainer has of its whole batch."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from lossfns.errors import LossInputError
from lossfns.loss import BoundLoss
from lossfns.weigh import length_count, pair_count, sequence_count, sequence_count_or_nan, weight_sum

UNITS: dict[Any, str] = {
    weight_sum: "tokens",
    sequence_count: "sequences",
    sequence_count_or_nan: "sequences",
    pair_count: "pairs",
}
"""The unit that each count of a weighing adds up."""


def whole_batch(bound: BoundLoss, **counts: Any) -> float:
    """Return the denominator of a loss for a batch of which the trainer has these counts.

    Args:
        bound: the loss.
        counts: numbers, or tensors of one number, by unit: ``tokens``, ``sequences`` or ``pairs``. They are of all
            micro-batches and ranks that the trainer adds up. A count of 0 becomes 1: the loss is then 0.

    Raises:
        LossInputError: if the loss is divided by something else, or is a raw sum, which a trainer would scale.

    >>> from lossfns import fixed_length, ppo
    >>> whole_batch(ppo().bind(), tokens=12), whole_batch(ppo(weigh=fixed_length(8)).bind(), tokens=12, sequences=2)
    (12.0, 16.0)
    """
    count: Any = bound.loss.count
    length = count.keywords["length"] if isinstance(count, partial) and count.func is length_count else None
    unit = UNITS.get(count) if length is None else "sequences"
    if unit not in counts:
        got = "a sum that is never divided" if count is None else f"one divided by {unit or 'a count of its own'}"
        expected, name = f"a loss divided by {' or '.join(counts)}, which the trainer counts", bound.loss.name
        raise LossInputError("loss", expected, got, "Choose another weigh=.", loss=name)
    given = counts[unit]
    if given is None or (isinstance(given, Tensor) and given.numel() != 1):
        got = "None" if given is None else f"shape {tuple(given.shape)}, of DataParallel"
        fix = "Give the trainer labels to count, and start one process for each GPU, with torchrun."
        raise LossInputError(unit, "the trainer's count", got, fix, loss=bound.loss.name)
    return (length or 1.0) * (float(given) or 1.0)
