"""A loss under test that is given the columns which few losses read, besides those of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lossfns.loss import BoundLoss, Loss
from lossfns.tokens import DATUM_COLUMNS

NUMBERS = {
    "rewards": 1.0,
    "reference_point": 0.0,
    "target_margin": 0.0,
    "entropy": 1.0,
    "sum_square_probs": 0.5,
    "values": 0.25,
    "old_values": 0.25,
    "returns": 1.0,
    "teacher_logprobs": float(np.log(0.25)),
}
"""Column → its number for every datum and token."""


@dataclass(frozen=True)
class CompletedLoss(BoundLoss):
    """A loss that reads the columns of its kind from the datums, and gets the others from here if a datum lacks them.

    Their numbers are the same for all datums, so that order, splits and masked tokens do not matter. A teacher of one
    token has the logprobs of the datum's reference.

    Attributes:
        others: the names of these columns.
        one_group: whether all datums have one label of ``groups``, and labels 1 and 0 in turns. Otherwise each datum,
            or each pair, is a group of its own: the loss must then obey every law, and does not couple the batch.
    """

    others: tuple[str, ...] = ()
    one_group: bool = False

    def __call__(self, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        columns = {name: [self.row(name, *datum) for datum in enumerate(data)] for name in self.others}
        bound = BoundLoss(self.loss, {**self.columns, **columns}, self.divisor, self.align, self.grad_l1)
        return bound(data, logprobs_list)

    def row(self, name: str, i: int, datum: Any) -> Any:
        """Return the number of datum i, or its row."""
        fields = datum.loss_fn_inputs
        if name in fields:
            return fields[name]
        if name == "groups":
            return 0 if self.one_group else i // self.loss.rows.datums
        if name == "labels":
            return 1 - i % 2
        if name == "teacher_logprobs" and "ref_logprobs" in fields and self.loss.rows.rank == 1:
            return fields["ref_logprobs"]
        number = NUMBERS.get(name, 0.5)
        return number if name in DATUM_COLUMNS else np.full(fields["weights"].to_numpy().shape, number, np.float32)


def completed(loss_fn: Any, columns: Sequence[str]) -> Any:
    """Return a loss of this library's form with the columns that it reads and that are not among these.

    Return any other subject as it is.
    """
    bound = BoundLoss(loss_fn) if isinstance(loss_fn, Loss) else loss_fn
    if not isinstance(bound, BoundLoss):
        return loss_fn
    others = tuple(name for name in bound.loss.reads if name not in (*columns, *bound.columns))
    if not others:
        return loss_fn
    return CompletedLoss(bound.loss, bound.columns, bound.divisor, bound.align, bound.grad_l1, others=others)
