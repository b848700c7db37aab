"""Exact causal attention over sequences that are packed end to end, without padding, with shared prefixes.

A batch of N tokens is a list of segments. A segment may continue an earlier one, its parent: its tokens see the
parent's tokens and then their own. A prompt with G completions is one parent and G segments that continue it, so the
prompt is computed once.

``Layout`` describes such a batch, and ``Layout.attend`` computes the attention by one of three routes:

    varlen          PyTorch's variable-length kernel; half precision on a GPU
    flex            FlexAttention, compiled, with a block mask; other dtypes and softcaps on a GPU
    sdpa-by-length  PyTorch's dense attention, one call per group of equal segments; anywhere

Shapes: q [N, H, d], k and v [N, Hkv, d] with H a multiple of Hkv (grouped queries).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lossfns.backend.model.prefixes import ranges
from lossfns.devices import to_device
from lossfns.errors import LossInputError

Attend = Callable[..., Tensor]
"""``attend(q [N, H, d], k, v [N, Hkv, d], scale=, window=, softcap=) -> [N, H, d]``, as ``Layout.attend``."""


class SegmentGroup(NamedTuple):
    """Adjacent segments of one parent and one length, ``segments`` of them. They attend in one call."""

    parent: int | None
    length: int
    segments: int


class Layout:
    """Which of N packed tokens see one another.

    Args:
        lengths: tokens of each segment, at least 1; the segments lie end to end.
        parents: for each segment the index of the earlier segment that it continues, or None. A parent has no parent
            itself. None for the whole argument: no segment continues another.
        device: the device of index tensors. They are made on the host and moved once.

    Attributes:
        positions: [N] position of each token in its sequence, the parent's tokens included.
        groups: adjacent segments of one parent and one length. The dense route makes one call for each, so it is
            fastest where equal segments are side by side, as ``share_prefixes`` lays them.
        route: name of the route that ``attend`` took last, None before the first call.

    Raises:
        LossInputError: empty segments, or a parent that comes later or has a parent.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        parents: Sequence[int | None] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.lengths = list(lengths)
        self.parents = list(parents) if parents is not None else [None] * len(self.lengths)
        check_segments(self.lengths, self.parents)
        self.device = torch.device(device)
        self.has_parents = any(parent is not None for parent in self.parents)
        equal = groupby(zip(self.parents, self.lengths))
        self.groups = [SegmentGroup(*kind, len(list(members))) for kind, members in equal]
        self.route: str | None = None
        # For each segment: the count of its tokens, the index of its first token, the count of its parent's tokens, and
        # the count of all tokens that it sees.
        self.query_lengths = np.array(self.lengths)
        self.starts = self.query_lengths.cumsum() - self.query_lengths
        self.prefix_lengths = np.array([0 if parent is None else self.lengths[parent] for parent in self.parents])
        self.key_lengths = self.prefix_lengths + self.query_lengths
        self.max_key_length = int(self.key_lengths.max())
        self.positions = self.to_device(ranges(self.prefix_lengths, self.query_lengths))
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
        """Attend from q [N, H, d] to k and v [N, Hkv, d]; each token sees itself and the tokens before it.

        Args:
            scale: factor of the scores q·k; None is 1/√d.
            window: the most tokens that a token sees, itself included; None is all.
            softcap: a score s becomes softcap·tanh(s / softcap); None leaves it.

        Returns:
            [N, H, d] in the dtype of q.
        """
        window = None if window is not None and window >= self.max_key_length else window
        self.route = choose_route(q.device, q.dtype, q.shape[-1], softcap is not None)
        return ROUTES[self.route](self, q, k, v, scale, window, softcap)

    def to_device(self, index: np.ndarray) -> Tensor:
        return to_device(index, self.device)

    def causal_bias(self, start: int, end: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return what is added to the scores of the tokens at positions ``start`` to ``end``: 0 if visible, else −inf.

        The result is [end − start, end]: a row per query position and a column per key position. One tensor for each
        window and dtype is computed at the first call, large enough for all segments that need it, and the results
        are views of it. Without a window, only segments that continue another need one.
        """
        if (window, dtype) not in self.biases:
            needed = (self.prefix_lengths > 0) | (window is not None)
            first, last = int(self.prefix_lengths[needed].min()), int(self.key_lengths[needed].max())
            masked = torch.full((last - first, last), -torch.inf, dtype=dtype, device=self.device)
            bias = masked.triu(first + 1)
            self.biases[window, dtype] = first, bias if window is None else bias + masked.tril(first - window)
        first, bias = self.biases[window, dtype]
        return bias[start - first : end - first, :end]

    @cached_property
    def key_index(self) -> Tensor:
        """[M] the tokens that each segment sees, segment after segment: its parent's, then its own."""
        parent_starts = [0 if parent is None else self.starts[parent] for parent in self.parents]
        starts = np.stack((parent_starts, self.starts), 1)
        counts = np.stack((self.prefix_lengths, self.query_lengths), 1)
        return self.to_device(ranges(starts.ravel(), counts.ravel()))

    @cached_property
    def cu_seqlens(self) -> tuple[Tensor, Tensor]:
        """Cumulative lengths of each segment's queries and of its keys in ``key_index``, two [segments + 1] int32."""
        queries, keys = (np.append(0, counts.cumsum()) for counts in (self.query_lengths, self.key_lengths))
        return self.to_device(queries.astype(np.int32)), self.to_device(keys.astype(np.int32))

    @cached_property
    def segment_ids(self) -> Tensor:
        """[N] the segment of each token."""
        return self.to_device(np.arange(len(self.lengths)).repeat(self.query_lengths))

    @cached_property
    def parent_ids(self) -> Tensor:
        """[N] the parent of each token's segment, or the segment itself where it has none."""
        parents = [i if parent is None else parent for i, parent in enumerate(self.parents)]
        return self.to_device(np.array(parents).repeat(self.query_lengths))

    def block_mask(self, window: int | None) -> Any:
        """Return FlexAttention's mask over all tokens; made once for each window."""
        if window not in self.block_masks:
            n, (_, create_block_mask) = len(self.positions), compiled_flex()
            self.block_masks[window] = create_block_mask(mask_mod(self, window), None, None, n, n, self.device)
        return self.block_masks[window]


def check_segments(lengths: Sequence[int], parents: Sequence[int | None]) -> None:
    """Refuse segments without a token, and parents that come later or have a parent themselves."""
    if not lengths or min(lengths) < 1:
        raise LossInputError("lengths", "segments of at least one token", f"{list(lengths)}", "Leave out empty ones.")
    if len(parents) != len(lengths):
        fix = "None stands for a segment without a parent."
        raise LossInputError("parents", f"{len(lengths)}, one per segment", f"{len(parents)}", fix)
    for i, parent in enumerate(parents):
        if parent is not None and not (0 <= parent < i and parents[parent] is None):
            expected, fix = f"for segment {i} an earlier one that has no parent itself", "Put prefixes first."
            raise LossInputError("parents", expected, f"{parent}", fix)


# The routes. Each takes a layout, q [N, H, d], k and v [N, Hkv, d], scale, window and softcap, and returns [N, H, d].


def sdpa_by_length(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Attend with PyTorch's dense attention, one call per group of equal segments."""
    sizes = [group.length * group.segments for group in layout.groups]
    outputs = []
    # torch.split writes one gradient for all pieces in its backward pass; each slice would write one of full size.
    for group, rows, keys, values in zip(
        layout.groups, torch.split(q, sizes), by_group(layout, k, sizes), by_group(layout, v, sizes)
    ):
        queries = rows.view(group.segments, group.length, *rows.shape[1:]).transpose(1, 2)
        bias, end = None, keys.shape[2]
        if window is not None or group.parent is not None:
            bias = layout.causal_bias(end - group.length, end, window, q.dtype)
        outputs.append(sdpa(queries, keys, values, bias, scale, softcap).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def by_group(layout: Layout, x: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """Yield the keys (or values) x [N, Hkv, d] that each group sees: [B, Hkv, T, d], those of the parent first."""
    # The parent's rows pass through float32, so that autograd sums their gradient over all continuations in float32.
    segments = (
        torch.split(x.to(torch.promote_types(x.dtype, torch.float32)), layout.lengths) if layout.has_parents else ()
    )
    for group, rows in zip(layout.groups, torch.split(x, sizes)):
        visible = rows.view(group.segments, group.length, *rows.shape[1:])
        if group.parent is not None:
            visible = torch.cat((segments[group.parent].to(x.dtype).expand(group.segments, -1, -1, -1), visible), 1)
        yield visible.transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, softcap: float | None) -> Tensor:
    """Attend from q [B, H, T, d] to k and v [B, Hkv, S, d] with PyTorch's dense attention.

    ``bias`` is added to the scores and broadcast to [B, H, T, S]; without a bias, attention is causal. With a softcap,
    the attention is written out, in float32 or better, with all scores in memory.
    """
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None, scale=scale, enable_gqa=True)
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).to(dtype) for x in (k, v))
    scores = q.to(dtype) @ k.mT * (scale if scale is not None else q.shape[-1] ** -0.5)
    bias = torch.full(scores.shape[2:], -torch.inf, device=q.device).triu(1) if bias is None else bias
    return ((softcap * (scores / softcap).tanh() + bias).softmax(-1) @ v).to(q.dtype)


def varlen(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Attend with the variable-length kernel; the parent's keys are copied before those of each continuation."""
    if layout.has_parents:  # through float32, so that autograd sums the parent's gradient in it
        k, v = (x.float().index_select(0, layout.key_index).to(x.dtype) for x in (k, v))
    longest = int(layout.query_lengths.max()), layout.max_key_length
    window_size = (-1 if window is None else window - 1, 0)
    kernel: Callable[..., Tensor] = varlen_kernel()
    return kernel(q, k, v, *layout.cu_seqlens, *longest, scale=scale, window_size=window_size, enable_gqa=True)


def flex(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Attend with FlexAttention: the batch is one sequence, and blocks of the mask that are empty are skipped."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    score = None if softcap is None else score_mod(torch.full((), softcap, device=q.device))
    flex_attention, _ = compiled_flex()
    output: Tensor = flex_attention(q, k, v, score, layout.block_mask(window), scale, enable_gqa=True)
    return output[0].transpose(0, 1)


def mask_mod(layout: Layout, window: int | None) -> Callable[..., Tensor]:
    """Return the function that tells FlexAttention whether query i sees key j."""
    segment, parent, position = layout.segment_ids, layout.parent_ids, layout.positions
    # The window is a tensor, because the kernel is compiled again for each new Python number.
    limit = torch.full((), len(position) if window is None else window, device=layout.device)

    def is_visible(_batch: Any, _head: Any, i: Tensor, j: Tensor) -> Tensor:
        distance = position[i] - position[j]
        return ((segment[j] == segment[i]) | (segment[j] == parent[i])) & (distance >= 0) & (distance < limit)

    return is_visible


def score_mod(softcap: Tensor) -> Callable[..., Tensor]:
    """Return the function by which FlexAttention soft-caps a score."""

    def capped(score: Tensor, _batch: Any, _head: Any, _i: Any, _j: Any) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


ROUTES: dict[str, Callable[..., Tensor]] = {"varlen": varlen, "flex": flex, "sdpa-by-length": sdpa_by_length}


@cache
def choose_route(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool = False) -> str:
    """Return the name of the fastest exact route that the installed PyTorch has on a device."""
    # The kernels of the other two routes need compute capability 8.0.
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return "sdpa-by-length"
    return choose_cuda_route(dtype, head_dim, softcap, varlen_kernel() is not None)


def choose_cuda_route(dtype: torch.dtype, head_dim: int, softcap: bool, has_varlen: bool) -> str:
    """Return the name of the fastest exact route on a GPU of compute capability 8.0 or more."""
    half = dtype in (torch.float16, torch.bfloat16)
    if half and not softcap and has_varlen and head_dim % 8 == 0 and head_dim <= 256:
        return "varlen"
    head_dims = (16, 32, 64, 128, 256) if half else (16, 32, 64, 128)
    if (half or dtype == torch.float32) and head_dim in head_dims:
        return "flex"
    return "sdpa-by-length"


@cache
def varlen_kernel() -> Any:
    """Return ``varlen_attn`` if the installed PyTorch has one that takes windows and grouped queries, else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    arguments = inspect.signature(varlen_attn).parameters.keys()
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= arguments else None


@cache
def compiled_flex() -> tuple[Any, Any]:
    """Return ``flex_attention`` and ``create_block_mask``, compiled for any length."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)
