"""Parts of the formulas that stand for frameworks whose code is not run: plain tensors ``[B, T]``, no masks inside."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.rosetta.batch import Batch


def token_mean(b: Batch, x: Tensor) -> Tensor:
    """Mean over the tokens that count."""
    return token_sum(b, x) / b.mask.sum()


def token_sum(b: Batch, x: Tensor) -> Tensor:
    """Sum over the tokens that count."""
    return (x * b.mask).sum()


def sequence_mean(b: Batch, x: Tensor) -> Tensor:
    """Mean over sequences of the mean over tokens."""
    return ((x * b.mask).sum(1) / b.lengths).mean()


def per_sequence(b: Batch, x: Tensor) -> Tensor:
    """Mean over the tokens of each sequence ``[B, 1]``."""
    return (x * b.mask).sum(1, keepdim=True) / b.lengths[:, None]


def log_ratio(b: Batch, base: str = "old_logprobs", cap: float | None = None) -> Tensor:
    """lp − base, bounded by ±cap."""
    d: Tensor = b.lp - getattr(b, base)
    return d if cap is None else d.clamp(-cap, cap)


def clipped(ratio: Tensor, a: Tensor, low: float, high: float, c: float | None = None) -> Tensor:
    """−min(r·A, clip(r)·A); with c at most −c·A where A < 0."""
    loss = -torch.min(ratio * a, ratio.clamp(low, high) * a)
    return loss if c is None else torch.where(a < 0, torch.min(loss, -c * a), loss)


def weighted(b: Batch, weight: Tensor) -> Tensor:
    """−sg(weight)·A·lp."""
    return -weight.detach() * b.A * b.lp


def k3(x: Tensor) -> Tensor:
    """exp(x) − x − 1."""
    return x.exp() - x - 1


def by_token(b: Batch) -> Tensor:
    """The log-ratio of GSPO-token: the value of its mean over the sequence, the gradient of the token's own."""
    return per_sequence(b, log_ratio(b)).detach() + b.lp - b.lp.detach()


def pair_sums(b: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over tokens of the chosen and of the rejected sides ``[P]``."""
    total = (x * b.mask).sum(1)
    return total[0::2], total[1::2]


def pair_means(b: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
    """Means over tokens of the chosen and of the rejected sides ``[P]``."""
    mean = (x * b.mask).sum(1) / b.lengths
    return mean[0::2], mean[1::2]


def log_odds(a: Tensor) -> Tensor:
    """log(p / (1 − p)) for a = log p."""
    return a - torch.log1p(-a.exp())
