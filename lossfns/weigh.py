"""Weighings: how much each row counts, and what the sum over rows is divided by.

A weighing is a pair of functions that read no logprobs: ``share(t)``, the coefficient of each row within its
sequence or pair, and ``count(t)``, this batch's part of the denominator. Counts add over micro-batches and
ranks, so L = Σ share·term / Σ count is the same under any split of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lossfns.checks import check_knobs
from lossfns.errors import LossInputError, did_you_mean
from lossfns.segments import chosen, nonempty, rejected, sequence_sum, to_tokens, weight_divisor
from lossfns.spellings import WEIGHINGS_ELSEWHERE
from lossfns.tokens import PAIRS, SEQUENCES, TARGETS, TOKENS, Rows, Tokens, to_dtype


@dataclass(frozen=True, repr=False)
class Weighing:
    """A named pair of functions of a packed batch.

    Attributes:
        name: the name that ``repr`` shows.
        rows: the kind of row that it weighs.
        share: ``t -> coefficient of each row``.
        count: ``t -> this batch's part of the denominator``, a scalar; ``None`` for a sum that is never divided.
    """

    name: str
    rows: Rows
    share: Callable[[Tokens], Tensor]
    count: Callable[[Tokens], Tensor] | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", Rows.of(self.rows))
        if not callable(self.share) or not (self.count is None or callable(self.count)):
            got = f"{self.share!r} and {self.count!r}"
            fix = "count=None is a sum that is never divided."
            raise LossInputError("share, count", "functions of a packed batch", got, fix)

    def __repr__(self) -> str:
        return self.name


def weights(t: Tokens) -> Tensor:
    """Weight w of each token: ``[N]``."""
    return t.weights


def weights_in_sequence(t: Tokens) -> Tensor:
    """w / Σ_seq w of each token, so that every sequence counts 1: ``[N]``."""
    return t.weights / to_tokens(t, weight_divisor(t))


def weight_sum(t: Tokens) -> Tensor:
    """Σ w over the batch."""
    return t.weights.sum()


def sequence_count(t: Tokens) -> Tensor:
    """Number of sequences with an active token."""
    return nonempty(t).sum()


def length_count(t: Tokens, length: float) -> Tensor:
    """length · the number of sequences with an active token."""
    return length * sequence_count(t)


def sequence_count_or_nan(t: Tokens) -> Tensor:
    """Number of sequences with an active token; nan if the weights of such a sequence sum to 0 or less.

    Weights of a plain likelihood may be negative. The loss refuses a batch whose count is nan.
    """
    valid = (sequence_sum(t, t.weights) > 0) | ~nonempty(t)
    return torch.where(valid.all(), sequence_count(t), torch.nan)


def sequence_active(t: Tokens) -> Tensor:
    """1 for each sequence with an active token, else 0: ``[B]``."""
    return nonempty(t).to(t.weights.dtype)


def pair_active(t: Tokens) -> Tensor:
    """1 for each pair with active tokens on both sides, else 0: ``[P]``."""
    has_active = nonempty(t)
    return (chosen(t, has_active) & rejected(t, has_active)).to(t.weights.dtype)


def pair_count(t: Tokens) -> Tensor:
    """Number of pairs with active tokens on both sides."""
    return pair_active(t).sum()


def by_position(weigh: Weighing) -> Weighing:
    """Weigh the positions of a loss over K targets as ``weigh`` weighs tokens, whatever K is.

    The weight of a position is the mean weight of its active entries. Each of them has the position's share, divided by
    their number, so that Σ share·term over the entries is share·term of the position where all have its term.
    """
    check_weigh(weigh, TARGETS)

    def share(t: Tokens) -> Tensor:
        active = to_dtype(t.active.view(-1, t.targets), t.weights.dtype)
        of_entry = weigh.share(positions(t))[:, None] / active.sum(1, keepdim=True).clamp(min=1)
        return (of_entry * active).flatten()

    def count(t: Tokens) -> Tensor:
        assert weigh.count is not None
        return weigh.count(positions(t))

    return Weighing(weigh.name, TOKENS, share, None if weigh.count is None else count)


def positions(t: Tokens) -> Tokens:
    """Return the N / K positions of a batch with K targets, with their weights alone."""
    check_targets(t)
    weights = t.weights.view(-1, t.targets)
    active = to_dtype(t.active.view(-1, t.targets), weights.dtype)
    mean = weights.sum(1) / active.sum(1).clamp(min=1)
    lengths = None if t.lengths is None else t.lengths // t.targets
    return Tokens(torch.zeros_like(mean), mean, lengths, equal=t.equal)


def check_targets(t: Tokens) -> None:
    """Refuse a batch whose positions have different numbers of targets."""
    if isinstance(t.targets, int) and t.targets < 1:
        fix = "Pad the candidates to one K, with weight 0."
        raise LossInputError("target_tokens", "rows [N, K], with the same K for all datums", "others", fix)


token_mean = Weighing("token_mean", TOKENS, weights, weight_sum)
"""Σ w·l / Σ w: every token of the batch counts alike (DAPO, verl "token-mean")."""

sequence_mean = Weighing("sequence_mean", TOKENS, weights_in_sequence, sequence_count_or_nan)
"""Mean over sequences of Σ w·l / Σ_seq w (GRPO's paper, GSPO, verl "seq-mean-token-mean")."""

sequence_sum_mean = Weighing("sequence_sum_mean", TOKENS, weights, sequence_count)
"""Mean over sequences of Σ w·l (the hosted APIs' example losses, verl "seq-mean-token-sum")."""

token_sum = Weighing("token_sum", TOKENS, weights, None)
"""Σ w·l, never divided, like the built-in losses of the hosted services. The service or the caller divides."""

pair_mean = Weighing("pair_mean", PAIRS, pair_active, pair_count)
"""Mean over pairs."""

pair_sum = Weighing("pair_sum", PAIRS, pair_active, None)
"""Σ over pairs, never divided."""

datum_mean = Weighing("datum_mean", SEQUENCES, sequence_active, sequence_count)
"""Mean over datums with an active token, for losses with one term for each datum (unpaired preference, rewards)."""

datum_sum = Weighing("datum_sum", SEQUENCES, sequence_active, None)
"""Σ over datums with an active token, never divided."""

WEIGHINGS = (token_mean, sequence_mean, sequence_sum_mean, token_sum, pair_mean, pair_sum, datum_mean, datum_sum)


def fixed_length(length: float) -> Weighing:
    """Σ w·l / (length · sequences): one constant in place of each sequence's length. Dr. GRPO, arXiv:2503.20783.

    Args:
        length: a finite number above 0, such as the largest number of tokens of a completion.

    >>> fixed_length(1024)
    fixed_length(1024)
    """
    check_knobs({"length": length})
    return Weighing(f"fixed_length({length!r})", TOKENS, weights, partial(length_count, length=length))


def check_weigh(weigh: object, rows: Rows) -> None:
    """Refuse anything that is not a weighing of this kind of row. Targets are weighed as tokens."""
    kind = TOKENS if rows.per_token else rows
    names = [w.name for w in WEIGHINGS if w.rows is kind] + (["fixed_length"] if kind is TOKENS else [])
    if isinstance(weigh, str) and weigh.startswith("fixed_length"):
        fix = "It takes a length, so it has no name alone: pass weigh=fixed_length(1024)."
        raise LossInputError("weigh", f"a weighing of {kind}", repr(weigh), fix)
    if not isinstance(weigh, Weighing):
        theirs = WEIGHINGS_ELSEWHERE.get(str(weigh), "")
        hint = f"Did you mean {theirs!r}?" if theirs in names else did_you_mean(str(weigh), names)
        raise LossInputError("weigh", f"a weighing of {kind}", repr(weigh), f"{hint} Import it from lossfns.")
    if weigh.rows is not kind:
        fix = f"This loss has rows that are {kind}. Use one of: {', '.join(names)}."
        raise LossInputError("weigh", f"a weighing of {kind}", repr(weigh), fix)
