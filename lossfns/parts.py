"""``Part``: a loss within a sum of losses, with a coefficient and a column of weights of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lossfns.pack import blank
from lossfns.tokens import PAIRS, SEQUENCES, Rows, Tokens


@dataclass(frozen=True)
class Part:
    """A loss within a sum of losses.

    Attributes:
        loss: a ``Loss``.
        coefficient: the number that multiplies it.
        weights: the column of the weights of this part.
    """

    loss: Any
    coefficient: float
    weights: str

    def view(self, t: Tokens) -> Tokens:
        """Return the batch as this part sees it: with its weights, and with 0 in every column where they are 0."""
        weights = t.weights if self.weights == "weights" else t.columns[self.weights]
        active = weights != 0
        columns = {name: blank(t.columns[name], active) for name in self.loss.reads if name in t.columns}
        constants = columns.keys() - set(self.loss.gradient_columns)
        columns |= {name: columns[name].detach() for name in constants}  # another part may differentiate them
        return Tokens(blank(t.logprobs, active), weights, t.lengths, columns, t.equal, t.halves, active, t.targets)


def divisor_or_one(divisor: Any) -> Any:
    """Return a denominator, or 1 where it is 0, so that a part without a row adds 0 and not 0 / 0."""
    return divisor or 1.0 if isinstance(divisor, float) else torch.where(divisor == 0, 1, divisor)


def widest_rows(kinds: Sequence[Rows]) -> Rows:
    """Return the kind of row that spans most tokens: a micro-batch that keeps these rows whole keeps all others."""
    return next((kind for kind in (PAIRS, SEQUENCES) if kind in kinds), kinds[0])
