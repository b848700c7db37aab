"""Regions, which say where a token keeps its gradient, and weights of tokens: functions of the importance ratio.

They take the ratio r and the advantages A of each token ``[N]``, as constants.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Region = Callable[[Tensor, Tensor, tuple[float, float]], Tensor]
"""A function ``(ratio, advantages, clip) -> bool [N]``: True where a token keeps its gradient."""
RatioWeight = Callable[[Tensor], Tensor]
"""A function ``ratio -> weight of each token [N]``."""


def one_side(ratio: Tensor, advantages: Tensor, clip: tuple[float, float]) -> Tensor:
    """Where PPO's clip keeps the gradient: r <= high if A > 0, r >= low if A < 0, and everywhere if A = 0."""
    low, high = clip
    return ((advantages <= 0) | (ratio <= high)) & ((advantages >= 0) | (ratio >= low))


def two_side(ratio: Tensor, advantages: Tensor, clip: tuple[float, float]) -> Tensor:
    """Where low <= r <= high, for any advantage."""
    low, high = clip
    return (ratio >= low) & (ratio <= high)


def unit_weight(ratio: Tensor) -> Tensor:
    """1 for each token, without importance sampling."""
    return torch.ones_like(ratio)


def ratio_weight(ratio: Tensor) -> Tensor:
    """r, the importance weight."""
    return ratio
