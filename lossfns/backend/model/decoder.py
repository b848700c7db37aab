"""A small Llama-style decoder: RMSNorm, rotary positions, grouped-query attention and SwiGLU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lossfns.backend.model import lora
from lossfns.backend.model.attention import Layout, choose_route

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Decoder(nn.Module):
    """Causal transformer over packed sequences; ``Decoder(**model.shape)`` builds another like it."""

    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "mlp": ("gate_up", "down"),
        "attn": ("qkv", "out"),
        "unembed": ("unembed",),
    }
    """The linear layers of each part, for ``lora.adapt``."""
    checkpointing = False
    """Whether the backward pass computes each layer again, instead of keeping what is inside it."""

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        layers: int,
        heads: int,
        kv_heads: int,
        hidden: int,
        rope_theta: float = 10_000.0,
        tied: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.shape: dict[str, Any] = {
            "vocab_size": vocab_size,
            "dim": dim,
            "layers": layers,
            "heads": heads,
            "kv_heads": kv_heads,
            "hidden": hidden,
            "rope_theta": rope_theta,
            "tied": tied,
            "seed": seed,
        }
        self.kv_heads, self.head_dim, self.rope_theta = kv_heads, dim // heads, rope_theta
        self.embed = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(Layer(dim, heads, kv_heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.unembed = nn.Linear(dim, vocab_size, bias=False, device="meta" if tied else None)
        if tied:  # one weight in two layers: an adapter of the one leaves the other alone
            self.unembed.weight = self.embed.weight
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        # Uniform rather than normal draws: they are exact arithmetic, so every platform gets the same bits.
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                std = 0.02 if "embed" in name else weight.shape[1] ** -0.5
                if name.endswith(("out.weight", "down.weight")):
                    # Each layer adds two branches to the residual: together they start at unit variance.
                    std /= math.sqrt(2 * len(self.layers))
                uniform = torch.rand(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
                weight.copy_((2 * uniform - 1) * (math.sqrt(3) * std))

    @property
    def head(self) -> Tensor:
        """Unembedding weight [V, D], adapters included and in their precision: ``logits = hidden @ head.T``."""
        return lora.adapted_weight(self.unembed)

    @property
    def attention(self) -> str:
        """The route that its attention takes."""
        return choose_route(self.embed.weight.device, self.embed.weight.dtype, self.head_dim)

    def forward(self, tokens: Tensor, lengths: Sequence[int], parents: Sequence[int | None] | None = None) -> Tensor:
        """Hidden states [N, D] after the final norm, of segments laid end to end in ``tokens`` [N].

        Segment i continues the tokens of segment ``parents[i]``, as ``Layout`` has it; None begins a sequence.
        """
        layout = Layout(lengths, parents, tokens.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return layout.attend(q, k, v)

        return self._run(tokens, layout.positions, attend)

    def prefill(self, tokens: Tensor, lengths: Sequence[int], max_new_tokens: int) -> tuple[Tensor, Cache]:
        """Last hidden state of each packed prompt [B, D], and a cache with room for ``max_new_tokens`` more."""
        layout = Layout(lengths, device=tokens.device)
        size = (len(self.layers), len(lengths), self.kv_heads, max(lengths) + max_new_tokens, self.head_dim)
        cache = Cache(
            keys=self.embed.weight.new_zeros(size),
            values=self.embed.weight.new_zeros(size),
            lengths=torch.tensor(lengths, device=tokens.device),
            longest=max(lengths),
        )
        rows = layout.segment_ids

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.keys[layer][rows, :, layout.positions] = k
            cache.values[layer][rows, :, layout.positions] = v
            return layout.attend(q, k, v)

        hidden = self._run(tokens, layout.positions, attend)
        return hidden[cache.lengths.cumsum(0) - 1], cache

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Hidden states [B, D] of one more token per row, ``tokens`` [B], which the cache takes in."""
        rows = torch.arange(len(tokens), device=tokens.device)
        positions, cache.lengths = cache.lengths, cache.lengths + 1
        cache.longest += 1
        seen = torch.arange(cache.longest, device=tokens.device) < cache.lengths[:, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.keys[layer][rows, :, positions] = k
            cache.values[layer][rows, :, positions] = v
            q, k, v = q[:, :, None], cache.keys[layer], cache.values[layer]
            k, v = k[:, :, : cache.longest], v[:, :, : cache.longest]
            return F.scaled_dot_product_attention(q, k, v, seen[:, None, None], enable_gqa=True).squeeze(2)

        return self._run(tokens, positions, attend)

    def _run(
        self, tokens: Tensor, positions: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The layers over ``tokens`` [N]; only ``attend`` knows which tokens see one another."""
        # In runs: the gradient of a frequent token is a sum over its occurrences, one after the other. Of a
        # thousand datums in one call, rounding in it was more than in all other weights (1.2e-6 of its norm).
        x: Tensor = torch.cat([self.embed(run) for run in torch.split(tokens, max(self.embed.num_embeddings, 1024))])
        rope = rotation(positions, self.head_dim, self.rope_theta, x.dtype)
        for i, layer in enumerate(self.layers):
            run = (
                partial(checkpoint, layer, use_reentrant=False)
                if self.checkpointing and torch.is_grad_enabled()
                else layer
            )
            x = run(x, rope, partial(attend, i))
        hidden: Tensor = self.norm(x)
        return hidden


class Layer(nn.Module):
    """One transformer layer on packed tokens: grouped-query attention, then SwiGLU."""

    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.groups = [heads, kv_heads, kv_heads]
        self.attention_norm = nn.RMSNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, sum(self.groups) * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.RMSNorm(dim, eps=1e-6)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """x [N, D] -> [N, D]; ``attend`` maps q [N, H, d], k and v [N, Hkv, d] to [N, H, d]."""
        qkv: Tensor = self.qkv(self.attention_norm(x))
        q, k, v = torch.split(qkv.view(len(x), -1, self.head_dim), self.groups, dim=1)
        x = x + self.out(attend(rotate(q, rope), rotate(k, rope), v).flatten(1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=1)
        x = x + self.down(F.silu(gate) * up)
        return x


@dataclass
class Cache:
    """Keys and values [L, B, Hkv, T, d], of which row ``b`` holds ``lengths[b]`` and none over ``longest``."""

    keys: Tensor
    values: Tensor
    lengths: Tensor
    longest: int

    def select(self, rows: Tensor) -> Cache:
        """The cache of the given rows, in that order; a row may be repeated."""
        return Cache(self.keys[:, rows], self.values[:, rows], self.lengths[rows], self.longest)


def rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, 1, d/2] of the rotary angles; in float32, since bfloat16 cannot count past 256."""
    pair = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angle = positions[:, None, None] * theta ** (-pair / head_dim)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair (x[..., i], x[..., i + d/2]) of x [N, H, d] by its position's angle."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
