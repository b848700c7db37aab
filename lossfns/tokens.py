"""The packed batch on which every loss computes: the tokens of all sequences, end to end.

Shape legend, used in every docstring:

    B  sequences of the batch, one for each datum
    N  tokens of the batch (a sequence has the length of its ``target_tokens``)
    K  candidate targets of one position; ``[N, K]`` is laid out row-major as N·K entries
    P  pairs: sequences 2i (chosen) and 2i + 1 (rejected), P = B / 2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NoReturn

import torch
from torch import Tensor

from lossfns.errors import LossInputError, did_you_mean, show


class Rows(StrEnum):
    """The kind of row that a loss sums over: a token, one of K targets of a position, a pair, or a sequence.

    >>> Rows.PAIRS == "pairs", Rows.PAIRS.datums, Rows.TARGETS.rank, Rows.SEQUENCES.unit
    (True, 2, 2, 'datums')
    """

    TOKENS = "tokens"
    TARGETS = "targets"
    PAIRS = "pairs"
    SEQUENCES = "sequences"

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        raise LossInputError("rows", "a kind of row", show(value), did_you_mean(value, map(str, cls)))

    @classmethod
    def of(cls, value: object) -> Rows:
        """Return the kind of row of this name. Refuse anything else."""
        return cls(value) if isinstance(value, str) else cls._missing_(value)

    @property
    def rank(self) -> int:
        """Number of dimensions of one datum's logprobs: 1, or 2 if a position has K targets."""
        return 2 if self is Rows.TARGETS else 1

    @property
    def datums(self) -> int:
        """Number of datums that one row spans. A micro-batch must not separate them."""
        return 2 if self is Rows.PAIRS else 1

    @property
    def per_token(self) -> bool:
        """Whether terms have one entry for each of the N (or N·K) entries of the batch."""
        return self in (Rows.TOKENS, Rows.TARGETS)

    @property
    def unit(self) -> str:
        """Name of the metric that counts the active rows."""
        return {Rows.PAIRS: "pairs", Rows.SEQUENCES: "datums"}.get(self, "tokens")


TOKENS, TARGETS, PAIRS, SEQUENCES = Rows

LOGPROB_COLUMNS = ("old_logprobs", "ref_logprobs", "sampler_logprobs")
MODEL_COLUMNS = ("entropy", "sum_square_probs")
"""Outputs of the current model besides the logprobs: the entropy −Σ p·log p of the distribution at each token, in nats,
and Σ p² over its vocabulary. Whoever computes the logprobs supplies them, with their graph."""

COLUMNS = ("weights", "advantages", *LOGPROB_COLUMNS)
"""The names of the usual columns. A loss of your own may read others."""

TOKEN_COLUMNS = (*MODEL_COLUMNS, "teacher_logprobs", "values", "old_values", "returns")
"""More columns by token, which few losses read."""

DATUM_COLUMNS = ("groups", "labels", "rewards", "reference_point", "target_margin")
"""The columns with one number for each datum. In ``Tokens`` the number stands at each token of the datum, and
``segments.sequence_value(t, t.rewards)`` returns it once for each datum. Labels are 1
(desirable, right) or 0, groups are whole numbers, and both sides of a pair are of one group."""

DATUM_FIELDS = {"old_logprobs": ("old_logprobs", "logprobs")}
"""Fields of a datum that may hold a column, in order of preference. Tinker calls the old logprobs ``logprobs``."""


class _OnPolicy:
    def __repr__(self) -> str:
        return "ON_POLICY"

    def __reduce__(self) -> str:
        return "ON_POLICY"  # pickle and copy look this name up in the module: a copy is the same object


ON_POLICY = _OnPolicy()
"""Bind as ``old_logprobs`` if the old policy is the current one: the ratio is then exp(lp − sg(lp)) = 1."""


@dataclass(frozen=True)
class Tokens:
    """A packed batch: ``t.logprobs``, ``t.weights`` and one attribute for each column, all ``[N]``.

    Attributes:
        logprobs: ``[N]`` logprobs of the targets, with their graph.
        weights: ``[N]`` weights of the tokens.
        lengths: ``[B]`` tokens of each sequence. ``None``: all N tokens are one sequence.
        columns: the other columns by name, each ``[N]``.
        equal: whether all sequences are equally long, as the rows of a padded batch are.
        halves: whether the chosen sides of all pairs come first, then the rejected ones. Otherwise they alternate.
        active: ``[N]`` bool, True where the weight is not 0.
        targets: K, the candidate targets of a position. The N entries are then those of N / K positions.
        by_datum: of each column that came as one number for each datum, the tensor in ``columns`` and the numbers
            ``[B]``. ``segments.sequence_value`` looks them up.

    Every column holds 0 where ``active`` is False.
    """

    logprobs: Tensor
    weights: Tensor
    lengths: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    equal: bool = False
    halves: bool = False
    active: Tensor = None  # type: ignore[assignment]  # __post_init__ sets it
    targets: int = 1
    by_datum: Sequence[tuple[Tensor, Tensor]] = ()

    def __post_init__(self) -> None:
        if self.active is None:
            object.__setattr__(self, "active", self.weights != 0)

    @property
    def sequences(self) -> int:
        """B, the number of sequences."""
        return 1 if self.lengths is None else self.lengths.shape[0]

    @property
    def scores(self) -> Tensor:
        """``[N]`` the outputs of a value head or a reward head, which such a loss takes in place of logprobs."""
        return self.logprobs

    @property
    def ends(self) -> Tensor:
        """``[B]`` the index after the last token of each sequence."""
        return torch.tensor([len(self.weights)]) if self.lengths is None else self.lengths.cumsum(0)

    def __getattr__(self, name: str) -> Tensor:
        columns: Mapping[str, Tensor] = self.__dict__.get("columns", {})
        if name not in columns:
            raise AttributeError(f"Tokens has no column {name!r}; a loss names the columns it uses in `reads`")
        return columns[name]


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to a floating point dtype. A bool is read as a byte, which torch converts five times faster in eager."""
    as_byte = x.dtype is torch.bool and not torch.compiler.is_compiling()
    return (x.view(torch.uint8) if as_byte else x).to(dtype)
