"""The key-value cache: keys and values of the tokens that a model has read, for sampling."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossfns.backend.model.attention import Attend, Layout, sdpa
from lossfns.devices import to_device


@dataclass
class Cache:
    """Keys and values of B sequences, which grow by one token at a time.

    ``prefill`` and ``step`` return the attention of one forward pass. It must be called once per layer, in the same
    order in every pass.

    Attributes:
        layers: keys and values of each layer, [B, Hkv, capacity, d] each.
        lengths: [B] tokens that each sequence has so far.
        longest: the largest of ``lengths``, known without a transfer from the device.
        capacity: the most tokens that a sequence may have.
    """

    layers: list[list[Tensor]]
    lengths: Tensor
    longest: int
    capacity: int

    @staticmethod
    def empty(lengths: Sequence[int], max_new_tokens: int, device: torch.device) -> Cache:
        """Prepare a cache for prompts of the given lengths and ``max_new_tokens`` more tokens for each."""
        return Cache([], to_device(torch.tensor(lengths), device), max(lengths), max(lengths) + max_new_tokens)

    def prefill(self, layout: Layout) -> Attend:
        """Return attention over the packed prompts that also stores their keys and values."""

        def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            stored = [x.new_zeros(len(self.lengths), x.shape[1], self.capacity, x.shape[2]) for x in (k, v)]
            for store, x in zip(stored, (k, v)):
                store[layout.segment_ids, :, layout.positions] = x
            self.layers.append(stored)
            return layout.attend(q, k, v, **options)

        return attend

    def step(self) -> tuple[Tensor, Attend]:
        """Append one token to every sequence.

        Returns:
            The positions [B] of the new tokens, and attention from them (q [B, H, d], k and v [B, Hkv, d]) to all
            tokens of their sequences. It stores the new keys and values.
        """
        positions, rows = self.lengths, torch.arange(len(self.lengths), device=self.lengths.device)
        self.lengths, self.longest = self.lengths + 1, self.longest + 1
        layers, end = iter(self.layers), self.longest

        @functools.cache
        def bias(window: int | None, dtype: torch.dtype) -> Tensor:
            """[B, 1, 1, T] 0 where the new token sees a cached one, else −inf; the same in all layers."""
            distance = positions[:, None] - torch.arange(end, device=positions.device)
            hidden = (distance < 0) | (distance >= (end if window is None else window))
            zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            return zeros.masked_fill_(hidden, -torch.inf)[:, None, None]

        def attend(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            *,
            scale: float | None = None,
            window: int | None = None,
            softcap: float | None = None,
        ) -> Tensor:
            keys, values = next(layers)
            keys[rows, :, positions], values[rows, :, positions] = k, v
            # The query heads that share a key head become rows of one head: no kernel then has to repeat the cache.
            grouped = q.view(len(q), k.shape[1], -1, q.shape[-1])
            output = sdpa(grouped, keys[:, :, :end], values[:, :, :end], bias(window, q.dtype), scale, softcap)
            return output.flatten(1, 2)

        return positions, attend

    def select(self, rows: Tensor) -> Cache:
        """Return a cache of the given sequences, in that order; one may occur several times."""
        layers = [[x[rows] for x in layer] for layer in self.layers]
        return Cache(layers, self.lengths[rows], self.longest, self.capacity)
