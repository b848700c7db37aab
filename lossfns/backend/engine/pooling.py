"""Embeddings: the hidden states of a sequence, pooled into one vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lossfns.devices import to_device

Pool = Callable[[Tensor, Sequence[int]], Tensor]
"""``pool(hidden [N, D], lengths)`` returns [B, D]."""


def mean_pool(hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the mean over each sequence: [N, D] -> [B, D]."""
    counts = to_device(torch.tensor(lengths), hidden.device)
    return torch.segment_reduce(hidden, "mean", lengths=counts, unsafe=True)


def last_pool(hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the last token of each sequence: [N, D] -> [B, D]."""
    return hidden[to_device(torch.tensor(lengths).cumsum(0) - 1, hidden.device)]


POOLS: dict[str, Pool] = {"mean": mean_pool, "last": last_pool}
