"""Causal attention over sequences laid end to end, of which some continue others: exact, without padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property, partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lossfns.backend.model.prefixes import ranges
from lossfns.errors import LossInputError


class Run(NamedTuple):
    """Adjacent segments of one parent and one length, so many, which attend in one call."""

    parent: int | None
    length: int
    segments: int


class Layout:
    """Which of N tokens see one another: segments of ``lengths`` end to end, segment i after ``parents[i]``.

    A parent is laid before its continuations and continues nothing itself. Adjacent segments of one parent and
    one length share a call, so the fewest are made where equal ones are side by side (``prefixes.share_prefixes`` does
    that). ``positions`` [N] count from the start of a token's sequence, its parent included. ``route`` names the
    attention in use, once there was some. All indices are made on the host and moved once.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        parents: Sequence[int | None] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.lengths = list(lengths)
        self.parents = list(parents) if parents is not None else [None] * len(self.lengths)
        check(self.lengths, self.parents)
        self.device = torch.device(device)
        self.shared = any(parent is not None for parent in self.parents)
        self.runs = [Run(*of, len(list(segments))) for of, segments in groupby(zip(self.parents, self.lengths))]
        self.route: str | None = None
        # Of each segment: its tokens, where they start, and how many come before the first of them.
        self.own = np.array(self.lengths)
        self.start = self.own.cumsum() - self.own
        self.before = np.array([0 if parent is None else self.lengths[parent] for parent in self.parents])
        self.longest = int((self.before + self.own).max())
        self.positions = self.move(ranges(self.before, self.own))
        self.biases: dict[tuple[int | None, torch.dtype], tuple[int, Tensor]] = {}
        self.block_masks: dict[int | None, Any] = {}

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """q [N, H, d] over k and v [N, Hkv, d] -> [N, H, d]: each token sees itself and what came before it.

        Args:
            scale: of the scores q·k; 1/√d if not given.
            window: how many tokens one sees at most, itself included.
            softcap: a score s becomes softcap · tanh(s / softcap).
        """
        window = None if window is not None and window >= self.longest else window
        self.route = route(q.device, q.dtype, q.shape[-1], softcap is not None)
        return ROUTES[self.route](self, q, k, v, scale, window, softcap)

    def move(self, index: np.ndarray) -> Tensor:
        return torch.from_numpy(index).to(self.device)

    def bias(self, start: int, end: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """To add to scores: 0 where the token at position ``start + i`` sees the one at j, else -inf; both to ``end``.

        Made once, for all segments that take one: without a window those that continue another. What a run needs
        is a part of it.
        """
        if (window, dtype) not in self.biases:
            taking = (self.before > 0) | (window is not None)
            first, last = int(self.before[taking].min()), int((self.before + self.own)[taking].max())
            hidden = torch.full((last - first, last), -torch.inf, dtype=dtype, device=self.device)
            bias = hidden.triu(first + 1)
            self.biases[window, dtype] = first, bias if window is None else bias + hidden.tril(first - window)
        first, bias = self.biases[window, dtype]
        return bias[start - first : end - first, :end]

    @cached_property
    def keys(self) -> Tensor:
        """[M]: the tokens that each segment sees, one segment after the other: its parent's, then its own."""
        parent = [0 if parent is None else self.start[parent] for parent in self.parents]
        begins, counts = np.stack((parent, self.start), 1), np.stack((self.before, self.own), 1)
        return self.move(ranges(begins.ravel(), counts.ravel()))

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Where each segment's queries begin and the last one's end, [B + 1] int32; the same of ``keys``."""
        queries, keys = (np.append(0, counts.cumsum()) for counts in (self.own, self.before + self.own))
        return self.move(queries.astype(np.int32)), self.move(keys.astype(np.int32))

    @cached_property
    def segments(self) -> tuple[Tensor, Tensor]:
        """Of each token its segment, and the one which that continues or else itself: two [N]."""
        each = np.arange(len(self.lengths))
        parents = [i if parent is None else parent for i, parent in enumerate(self.parents)]
        return self.move(each.repeat(self.own)), self.move(np.array(parents).repeat(self.own))

    def block_mask(self, window: int | None) -> Any:
        """FlexAttention's mask of all tokens."""
        if window not in self.block_masks:
            n = len(self.positions)
            self.block_masks[window] = flex()[1](visible(self, window), None, None, n, n, self.device)
        return self.block_masks[window]


def check(lengths: Sequence[int], parents: Sequence[int | None]) -> None:
    """Refuse segments without a token, and parents that come later or continue another segment."""
    if not lengths or min(lengths) < 1:
        raise LossInputError("lengths", "segments of a token or more", f"{list(lengths)}", "Leave out what is empty.")
    if len(parents) != len(lengths):
        raise LossInputError("parents", f"{len(lengths)}, one a segment", f"{len(parents)}", "None has no parent.")
    for i, parent in enumerate(parents):
        if parent is not None and not (0 <= parent < i and parents[parent] is None):
            expected, fix = f"for segment {i} an earlier one that has none itself", "Lay prefixes first."
            raise LossInputError("parents", expected, f"{parent}", fix)


# Each route takes a layout, q [N, H, d], k and v [N, Hkv, d], scale, window and softcap, and gives [N, H, d].


def by_length(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """PyTorch's dense attention, once for each run of segments."""
    attention = dense if softcap is None else partial(capped, softcap=softcap)
    sizes = [run.length * run.segments for run in layout.runs]
    outputs = []
    # Split, not sliced: the gradient of all the pieces is written once, where each slice writes a whole of its own.
    for run, rows, keys, values in zip(
        layout.runs, torch.split(q, sizes), seen(layout, k, sizes), seen(layout, v, sizes)
    ):
        queries = rows.view(run.segments, run.length, *rows.shape[1:]).transpose(1, 2)
        bias, end = None, keys.shape[2]
        if window is not None or run.parent is not None:
            bias = layout.bias(end - run.length, end, window, q.dtype)
        outputs.append(attention(queries, keys, values, bias, scale).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def seen(layout: Layout, x: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """The keys or values x [N, Hkv, d] that each run sees, [B, Hkv, T, d]: its parent's rows, then its own."""
    # In float32, so that a parent's gradient is, too: it is a sum over all continuations.
    segments = torch.split(x.to(torch.promote_types(x.dtype, torch.float32)), layout.lengths) if layout.shared else ()
    for run, rows in zip(layout.runs, torch.split(x, sizes)):
        own = rows.view(run.segments, run.length, *rows.shape[1:])
        if run.parent is not None:
            own = torch.cat((segments[run.parent].to(x.dtype).expand(run.segments, -1, -1, -1), own), 1)
        yield own.transpose(1, 2)


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """q [B, H, T, d] over k and v [B, Hkv, S, d]; ``bias`` [T, S] is added to the scores, None means causal."""
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None, scale=scale, enable_gqa=True)


def capped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, *, softcap: float) -> Tensor:
    """The same with soft-capped scores, written out: at least in float32, and with all of the scores in memory."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).to(dtype) for x in (k, v))
    scores = q.to(dtype) @ k.mT * (scale if scale is not None else q.shape[-1] ** -0.5)
    bias = torch.full(scores.shape[2:], -torch.inf, device=q.device).triu(1) if bias is None else bias
    return ((softcap * (scores / softcap).tanh() + bias).softmax(-1) @ v).to(q.dtype)


def varlen(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """The kernel for sequences end to end; a continuation's keys are gathered behind its parent's."""
    if layout.shared:  # in float32 for the gradient, a sum over all continuations
        k, v = (x.float().index_select(0, layout.keys).to(x.dtype) for x in (k, v))
    longest = int(layout.own.max()), layout.longest
    reach = (-1 if window is None else window - 1, 0)
    kernel: Callable[..., Tensor] = varlen_kernel()
    return kernel(q, k, v, *layout.bounds, *longest, scale=scale, window_size=reach, enable_gqa=True)


def flexible(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """FlexAttention, compiled: all tokens are one sequence, of which blocks that nobody sees are left out."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    score = None if softcap is None else cap(torch.full((), softcap, device=q.device))
    output: Tensor = flex()[0](q, k, v, score, layout.block_mask(window), scale, enable_gqa=True)
    return output[0].transpose(0, 1)


def visible(layout: Layout, window: int | None) -> Callable[..., Tensor]:
    """FlexAttention's question whether token i sees token j."""
    (segment, parent), position = layout.segments, layout.positions
    # A tensor like the rest: for another number, the kernel would be compiled again.
    reach = torch.full((), len(position) if window is None else window, device=layout.device)

    def sees(_batch: Any, _head: Any, i: Tensor, j: Tensor) -> Tensor:
        ago = position[i] - position[j]
        return ((segment[j] == segment[i]) | (segment[j] == parent[i])) & (ago >= 0) & (ago < reach)

    return sees


def cap(softcap: Tensor) -> Callable[..., Tensor]:
    """FlexAttention's change of a score."""

    def capped(score: Tensor, _batch: Any, _head: Any, _i: Any, _j: Any) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


ROUTES: dict[str, Callable[..., Tensor]] = {"varlen": varlen, "flex": flexible, "sdpa-by-length": by_length}


@cache
def route(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool = False) -> str:
    """The name of the fastest exact route that the installed PyTorch has on a device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return "sdpa-by-length"
    return on_cuda(dtype, head_dim, softcap, varlen_kernel() is not None)


def on_cuda(dtype: torch.dtype, head_dim: int, softcap: bool, has_varlen: bool) -> str:
    """From compute capability 8.0 on, which the flash kernels need."""
    half = dtype in (torch.float16, torch.bfloat16)
    if half and not softcap and has_varlen and head_dim % 8 == 0 and head_dim <= 256:
        return "varlen"
    if (half or dtype == torch.float32) and head_dim in (16, 32, 64, 128, 256)[: 5 if half else 4]:
        return "flex"
    return "sdpa-by-length"


@cache
def varlen_kernel() -> Any:
    """``varlen_attn``, where the installed PyTorch has one that knows windows and grouped queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters.keys()
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known else None


@cache
def flex() -> tuple[Any, Any]:
    """``flex_attention`` and ``create_block_mask``, compiled for any length."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)
