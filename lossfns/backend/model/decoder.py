"""A small Llama-style decoder: RMSNorm, rotary positions, grouped-query attention and SwiGLU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lossfns.backend.model import lora
from lossfns.backend.model.attention import Attend, Layout, choose_route
from lossfns.backend.model.cache import Cache
from lossfns.logprobs.head import Adapter


class Decoder(nn.Module):
    """Causal transformer over packed sequences.

    Args:
        vocab_size: V.
        dim: D, width of the hidden states.
        layers: transformer layers.
        heads: query heads; each has dim / heads channels.
        kv_heads: key and value heads; it divides ``heads``.
        hidden: width of the MLP.
        rope_theta: base of the rotary frequencies.
        tied: whether embedding and unembedding share one weight.
        seed: the seed of the initial weights, which are the same on every platform.

    ``shape`` holds these arguments: ``Decoder(**model.shape)`` builds the same model with its initial weights.
    """

    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "mlp": ("gate_up", "down"),
        "attn": ("qkv", "out"),
        "unembed": ("unembed",),
    }
    """Names of the linear layers of each part, for ``lora.adapt``."""

    checkpointing = False
    """Whether each layer keeps only its input for the backward pass, and runs again there."""

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
        self.head_dim, self.rope_theta = dim // heads, rope_theta
        self.embed = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(Layer(dim, heads, kv_heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.unembed = nn.Linear(dim, vocab_size, bias=False, device="meta" if tied else None)
        if tied:  # two layers with one weight, so that an adapter of one does not change the other
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
                    # Each layer adds two branches to the residual stream. With this scale, all branches together
                    # start at unit variance.
                    std /= math.sqrt(2 * len(self.layers))
                uniform = torch.rand(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
                weight.copy_((2 * uniform - 1) * (math.sqrt(3) * std))

    @property
    def head(self) -> Tensor:
        """Unembedding weight [V, D], its adapter included: ``logits = hidden @ head.T``."""
        return lora.adapted_weight(self.unembed)

    @property
    def factored_head(self) -> tuple[Tensor, Adapter | None]:
        """Unembedding weight [V, D] without its adapter, and the adapter or None: ``head`` as two parts."""
        return lora.factored_weight(self.unembed)

    @property
    def attention(self) -> str:
        """Name of the route that the attention of a packed batch takes, from ``choose_route``."""
        return choose_route(self.embed.weight.device, self.embed.weight.dtype, self.head_dim)

    def forward(self, tokens: Tensor, lengths: Sequence[int], previous: Sequence[int | None] | None = None) -> Tensor:
        """Return hidden states [N, D] after the final norm.

        Args:
            tokens: [N] ids of the segments, end to end.
            lengths: tokens of each segment.
            previous: for each segment the token that comes before its first one, or None; see ``Layout``.
        """
        layout = Layout(lengths, previous, tokens.device)
        return self._run(tokens, layout.positions, layout.attend)

    def prefill(self, tokens: Tensor, lengths: Sequence[int], max_new_tokens: int) -> tuple[Tensor, Cache]:
        """Read packed prompts. Return the hidden state of the last token of each, [B, D], and a cache of them.

        The cache holds ``max_new_tokens`` more tokens for each prompt.
        """
        layout, cache = Layout(lengths, device=tokens.device), Cache.empty(lengths, max_new_tokens, tokens.device)
        hidden = self._run(tokens, layout.positions, cache.prefill(layout))
        return hidden[cache.lengths.cumsum(0) - 1], cache

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Append one token to each cached sequence, ``tokens`` [B]. Return the hidden states [B, D] of these tokens."""
        return self._run(tokens, *cache.step())

    def _run(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run all layers over ``tokens`` [N]; only ``attend`` knows which tokens see one another."""
        # The embedding is looked up in pieces: a backward pass adds the gradients of a frequent token one by one, and
        # rounding adds up. With a thousand datums in one lookup, the embedding's gradient had a larger relative error
        # (1.2e-6) than that of any other weight.
        pieces = torch.split(tokens, max(self.embed.num_embeddings, 1024))
        x: Tensor = torch.cat([self.embed(piece) for piece in pieces])
        rope = rotation(positions, self.head_dim, self.rope_theta, x.dtype)
        recompute = self.checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            x = checkpoint(layer, x, rope, attend, use_reentrant=False) if recompute else layer(x, rope, attend)
        hidden: Tensor = self.norm(x)
        return hidden


class Layer(nn.Module):
    """One transformer layer on packed tokens: grouped-query attention, then SwiGLU."""

    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.qkv_heads = [heads, kv_heads, kv_heads]
        self.attention_norm = nn.RMSNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, sum(self.qkv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.RMSNorm(dim, eps=1e-6)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Return the residual stream [N, D] after this layer, from ``x`` [N, D] and the ``rotation`` of positions."""
        qkv: Tensor = self.qkv(self.attention_norm(x))
        q, k, v = torch.split(qkv.view(len(x), -1, self.head_dim), self.qkv_heads, dim=1)
        x = x + self.out(attend(rotate(q, rope), rotate(k, rope), v).flatten(1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=1)
        x = x + self.down(F.silu(gate) * up)
        return x


def rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [N, 1, d/2] of the rotary angles."""
    # The angles are float32: bfloat16 does not have the integers past 256.
    pair = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angle = positions[:, None, None] * theta ** (-pair / head_dim)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (x[..., i], x[..., i + d/2]) of x [N, H, d] by the angle of its position."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
