"""The unembedding of a model, with a low-rank adapter or without, and the products of matrices that it needs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

ALL = slice(None)

Adapter = tuple[Tensor, Tensor, float]
"""``(a [r, D], b [V, r], scale)``: the low-rank addition scale·b·a to a weight, as in LoRA."""


class Head(NamedTuple):
    """The unembedding: logits z = c·tanh(raw / c) / T of raw = h·Wᵀ + b, with softcap c and temperature T.

    With a low-rank addition up·down to W, raw = h·Wᵀ + u·upᵀ + b with u = h·downᵀ. The functions of tiles take h and u
    side by side, ``with_low_rank(h)``, and do not need ``down``.
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    down: Tensor | None = None  # [r, D], of any dtype
    up: Tensor | None = None  # [V, r]
    temperature: float = 1.0
    softcap: float | None = None

    @property
    def factors(self) -> list[tuple[slice, Tensor]]:
        """The matrices, each with the columns of h and u that it multiplies."""
        if self.up is None:
            return [(ALL, self.weight)]
        width = self.weight.shape[1]
        return [(slice(width), self.weight), (slice(width, None), self.up)]

    def with_low_rank(self, hidden: Tensor) -> Tensor:
        """Return h and u side by side, [n, D + r] in the dtype of h; h itself without a low-rank addition."""
        if self.down is None:
            return hidden
        with without_autocast(hidden):
            u = hidden.to(self.down.dtype) @ self.down.T
        return torch.cat((hidden, u.to(hidden.dtype)), 1)

    def raw(self, hidden: Tensor, vocab: slice, buffer: Tensor | None = None) -> Tensor:
        """Return raw [n, v] in the dtype of the weight, in the buffer if it is large enough; ``hidden`` is h and u."""
        product, *added = [(hidden[:, columns], x[vocab].T) for columns, x in self.factors]
        out = view_of(buffer, len(hidden), product[1].shape[1])
        if self.bias is None:
            out = torch.mm(*product, out=out)
        else:
            out = torch.addmm(self.bias[vocab], *product, out=out)
        for narrow in added:
            out.addmm_(*narrow)
        return out

    def to_logits(self, raw: Tensor) -> Tensor:
        """Return z for ``raw``, in ``compute_dtype``. This is ``raw`` itself if nothing changes."""
        z = raw.to(compute_dtype(raw))
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        return z if self.temperature == 1 else z / self.temperature

    def chain_through_head(self, d: Tensor, z: Tensor) -> Tensor:
        """Return ∂loss/∂raw from ``d`` = ∂loss/∂z at the logits ``z``."""
        d = d if self.softcap is None else d * (1 - (z * (self.temperature / self.softcap)).square())
        return d if self.temperature == 1 else d / self.temperature

    def logits(self, hidden: Tensor) -> Tensor:
        """Return z over the whole vocabulary, [n, V], for h [n, D] of any dtype."""
        dtype = self.weight.dtype
        head = self if self.up is None else self._replace(up=self.up.to(dtype))
        return self.to_logits(head.raw(self.with_low_rank(hidden.to(dtype)), ALL))


def head_of(model: Any) -> Head:
    """Return a model's unembedding, with its bias, softcap, temperature and adapter where it has them.

    Every model has ``head`` [V, D]. A model with adapters also has ``factored_head``: the weight, and an ``Adapter`` or
    None, so that their sum is not computed.
    """
    weight, adapter = getattr(model, "factored_head", None) or (model.head, None)
    down, up = (None, None) if adapter is None else low_rank(adapter)
    bias, softcap = getattr(model, "head_bias", None), getattr(model, "head_softcap", None)
    return Head(weight, bias, down, up, getattr(model, "head_temperature", 1.0), softcap)


def low_rank(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return ``down`` = scale·a and ``up`` = b of a ``Head``."""
    a, b, scale = adapter
    return (a if scale == 1 else scale * a), b


def without_autocast(x: Tensor) -> torch.autocast:
    """Switch autocast off on the device of ``x``, so that products have the dtypes of their factors."""
    return torch.autocast(x.device.type, enabled=False)


# Dtypes and products


def is_inside(local: Tensor, vocab: slice) -> Tensor:
    """Return whether indices that count from the first entry of ``vocab`` lie in it."""
    size: int = vocab.stop - vocab.start
    return (local >= 0) & (local < size)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of elementwise maths and of sums: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def view_of(buffer: Tensor | None, n: int, v: int) -> Tensor | None:
    """Return an [n, v] view of the buffer, or None if it is too small. To allocate new memory takes longer."""
    return None if buffer is None or buffer.numel() < n * v else buffer.view(-1)[: n * v].view(n, v)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a·b, on a GPU with a float32 result for half-precision inputs. A CPU rounds the result to their dtype."""
    if a.is_cuda and a.dtype != compute_dtype(a):
        return torch.mm(a, b, out_dtype=compute_dtype(a))
    return a @ b


def add_matmul_(total: Tensor, a: Tensor, b: Tensor, overwrite: bool = False) -> None:
    """total += a·b, or total = a·b with ``overwrite``; in one kernel if the dtypes are the same."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=not overwrite)
    elif overwrite:
        total.copy_(matmul(a, b))
    else:
        total += matmul(a, b)


def add_hidden_grad_(total: Tensor, d: Tensor, weight: Tensor, local: Tensor) -> None:
    """total [n, D] += d·W for the gradient ``d`` [n, v] of a tile, with the target entries compensated.

    ``local`` [n, K] are the targets, counted from the first entry of the tile.

    A CPU rounds a half-precision product to half precision, here once per tile instead of once for the whole
    vocabulary. The error is proportional to the entries of ``d``. Those of the targets are by far the largest, so
    they are left out of the product and added in float32. The sum is then about as exact as one product over the
    whole vocabulary, except where the rows of W have a large part in common.
    """
    if d.dtype == total.dtype or d.is_cuda:
        return add_matmul_(total, d, weight)
    rows, k = is_inside(local, slice(0, d.shape[1])).nonzero(as_tuple=True)
    places = torch.unique(rows * d.shape[1] + local[rows, k])  # a target that occurs twice is one entry of d
    flat = d.view(-1)
    entries = flat[places]
    flat[places] = 0
    add_matmul_(total, d, weight)
    flat[places] = entries
    for part, values in zip(torch.split(places, len(d)), torch.split(entries, len(d))):  # [n, D] at a time
        total.index_add_(0, part // d.shape[1], values[:, None].to(total.dtype) * weight[part % d.shape[1]])
