"""What every loss computes on: the tokens of a batch laid end to end.

Shape legend, used in every docstring:

    B  sequences of the batch, one per datum
    N  tokens of the batch (one sequence has the length of its ``target_tokens``)
    K  candidate targets of one position; ``[N, K]`` is laid out row-major as N·K entries
    P  pairs: sequences 2i (chosen) and 2i + 1 (rejected), P = B / 2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

TOKENS, TARGETS, PAIRS = "tokens", "targets", "pairs"
"""What one row of a loss is: a token, one of K candidate targets of a position, or a preference pair."""

LOGPROB_COLUMNS = ("old_logprobs", "ref_logprobs", "sampler_logprobs")
COLUMNS = ("weights", "advantages", *LOGPROB_COLUMNS)
"""The column vocabulary; a loss of your own may read others."""

DATUM_FIELDS = {"old_logprobs": ("old_logprobs", "logprobs")}
"""Where a datum keeps a column, if not under its own name: Tinker calls the old logprobs ``logprobs``."""


class _OnPolicy:
    def __repr__(self) -> str:
        return "ON_POLICY"

    def __reduce__(self) -> str:
        return "ON_POLICY"  # a copy is the same object


ON_POLICY = _OnPolicy()
"""Bind as ``old_logprobs``: the old policy is the current one, so the ratio is exp(lp − sg(lp)) = 1."""


@dataclass(frozen=True)
class Tokens:
    """A packed batch: ``t.logprobs``, ``t.weights`` and one attribute for each column, all ``[N]``.

    ``active`` ``[N]`` says which tokens take part: those whose weight is not 0.
    ``lengths`` ``[B]`` says where sequences end; ``None`` means that all N tokens are one sequence.
    Slots of weight 0 hold 0 in every column.
    """

    logprobs: Tensor
    weights: Tensor
    lengths: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    active: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "active", self.weights != 0)

    def __getattr__(self, name: str) -> Tensor:
        columns: Mapping[str, Tensor] = self.__dict__.get("columns", {})
        if name not in columns:
            raise AttributeError(f"Tokens has no column {name!r}; a loss names the columns it uses in `reads`")
        return columns[name]


class FlatLogprobs(list[Tensor]):
    """A ``logprobs_list`` cut from one flat tensor."""

    def __init__(self, flat: Tensor, shapes: Sequence[Sequence[int]]) -> None:
        self.flat = flat
        parts = torch.split(flat, [prod(shape) for shape in shapes])
        super().__init__(part if len(shape) == 1 else part.view(*shape) for part, shape in zip(parts, shapes))
