"""Sums and means over sequences and pairs: the only code that knows tokens belong to sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from lossfns.tokens import Tokens


def sequence_sum(t: Tokens, x: Tensor) -> Tensor:
    """Σ of x over each sequence: ``[N] -> [B]``."""
    if t.lengths is None:
        return x.sum(0, keepdim=True)
    # `unsafe` skips a check that would cost a device synchronisation; the door made the lengths.
    return torch.segment_reduce(x, "sum", lengths=t.lengths, unsafe=True)


def spread(t: Tokens, y: Tensor) -> Tensor:
    """Each sequence's value at each of its tokens: ``[B] -> [N]``."""
    if t.lengths is None:
        return y.expand_as(t.logprobs)
    return torch.repeat_interleave(y, t.lengths, output_size=t.logprobs.shape[0])


def active_tokens(t: Tokens) -> Tensor:
    """How many tokens of each sequence take part: ``[B]``."""
    return sequence_sum(t, t.active.to(t.weights.dtype))


def nonempty(t: Tokens) -> Tensor:
    """``[B]`` bool: which sequences have an active token."""
    return active_tokens(t) > 0


def active_mean(t: Tokens, x: Tensor) -> Tensor:
    """Mean of x over the active tokens of each sequence, 0 where there are none: ``[N] -> [B]``."""
    return sequence_sum(t, x * t.active) / active_tokens(t).clamp(min=1)


def weighted_sum(t: Tokens, x: Tensor) -> Tensor:
    """Σ w·x over each sequence: ``[N] -> [B]``."""
    return sequence_sum(t, t.weights * x)


def weighted_mean(t: Tokens, x: Tensor) -> Tensor:
    """Σ w·x / Σ w over each sequence, 0 where it is empty: ``[N] -> [B]``."""
    return weighted_sum(t, x) / total_weight(t)


def total_weight(t: Tokens) -> Tensor:
    """Σ w of each sequence, 1 where it is empty: a divisor, ``[B]``."""
    return torch.where(nonempty(t), sequence_sum(t, t.weights), 1.0)


def chosen(y: Tensor) -> Tensor:
    """The chosen side of each pair: ``[B] -> [P]``."""
    return y[0::2]


def rejected(y: Tensor) -> Tensor:
    """The rejected side of each pair: ``[B] -> [P]``."""
    return y[1::2]
