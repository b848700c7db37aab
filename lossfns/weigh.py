"""Weighings: how much each row counts, and what the sum is divided by.

A weighing is a pair of functions that read no logprobs: ``share(t)``, each row's coefficient within its
sequence or pair, and ``count(t)``, this batch's part of the denominator. Counts add over micro-batches
and ranks, so L = Σ share·term / Σ count is the same under any split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lossfns.checks import check_knobs
from lossfns.errors import LossInputError, did_you_mean
from lossfns.segments import chosen, nonempty, rejected, sequence_sum, spread, total_weight
from lossfns.tokens import PAIRS, TOKENS, Tokens


@dataclass(frozen=True, repr=False)
class Weighing:
    """``share(t)`` of each row and ``count(t)``, a scalar; no count: the sum is never divided."""

    name: str
    rows: str
    share: Callable[[Tokens], Tensor]
    count: Callable[[Tokens], Tensor] | None

    def __repr__(self) -> str:
        return self.name


def weights(t: Tokens) -> Tensor:
    """w: each token by its weight."""
    return t.weights


def weights_in_sequence(t: Tokens) -> Tensor:
    """w / Σ_seq w: each sequence counts 1, shared out over its tokens."""
    return t.weights / spread(t, total_weight(t))


def weight_sum(t: Tokens) -> Tensor:
    """Σ w."""
    return t.weights.sum()


def sequences(t: Tokens) -> Tensor:
    """The number of sequences with an active token."""
    return nonempty(t).sum()


def normalisable_sequences(t: Tokens) -> Tensor:
    """The same, but nan where a sequence's (signed) weights have no positive sum to divide by."""
    valid = (sequence_sum(t, t.weights) > 0) | ~nonempty(t)
    return torch.where(valid.all(), sequences(t), torch.nan)


def each_pair(t: Tokens) -> Tensor:
    """1 for each pair that has active tokens: ``[P]``."""
    has = nonempty(t)
    return (chosen(has) & rejected(has)).to(t.weights.dtype)


def pairs(t: Tokens) -> Tensor:
    """The number of pairs with active tokens."""
    return each_pair(t).sum()


token_mean = Weighing("token_mean", TOKENS, weights, weight_sum)
"""Σ w·l / Σ w: every token of the batch counts alike (DAPO, verl "token-mean")."""

sequence_mean = Weighing("sequence_mean", TOKENS, weights_in_sequence, normalisable_sequences)
"""Mean over sequences of Σ w·l / Σ_seq w (GRPO's paper, GSPO, verl "seq-mean-token-mean")."""

sequence_sum_mean = Weighing("sequence_sum_mean", TOKENS, weights, sequences)
"""Mean over sequences of Σ w·l (the hosted APIs' example losses, verl "seq-mean-token-sum")."""

token_sum = Weighing("token_sum", TOKENS, weights, None)
"""Σ w·l, never divided: the hosted services' built-ins; they or the caller normalise."""

pair_mean = Weighing("pair_mean", PAIRS, each_pair, pairs)
"""Mean over pairs."""

pair_sum = Weighing("pair_sum", PAIRS, each_pair, None)
"""Σ over pairs, never divided."""

WEIGHINGS = (token_mean, sequence_mean, sequence_sum_mean, token_sum, pair_mean, pair_sum)


def fixed_length(length: float) -> Weighing:
    """Σ w·l / (length · sequences): a constant in place of each length. Dr. GRPO, arXiv:2503.20783.

    >>> fixed_length(1024)
    fixed_length(1024)
    """
    check_knobs({"length": length})
    return Weighing(f"fixed_length({length!r})", TOKENS, weights, lambda t: length * sequences(t))


def check_weigh(weigh: object, rows: str) -> None:
    """Refuse what is no weighing, or one for other rows than the loss has."""
    fits = PAIRS if rows == PAIRS else TOKENS
    names = [w.name for w in WEIGHINGS if w.rows == fits] + ["fixed_length"] * (fits == TOKENS)
    if not isinstance(weigh, Weighing):
        hint = did_you_mean(str(weigh), names)
        raise LossInputError("weigh", f"a weighing of {fits}", repr(weigh), f"{hint} Import it from lossfns.")
    if weigh.rows != fits:
        fix = f"This loss has one row for each of its {fits}: {', '.join(names)}."
        raise LossInputError("weigh", f"a weighing of {fits}", repr(weigh), fix)
