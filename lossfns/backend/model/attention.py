"""Exact causal attention over sequences that are packed end to end, without padding, with shared prefixes.

A batch of N tokens is a list of segments. A segment may continue another from any of its tokens on, the segment's
``previous`` token: its tokens see that token, all that it sees, and then their own. A prompt with G completions is one
segment with the first completion, and G − 1 segments that continue it from the prompt's last token on, so the prompt is
computed once. The turns of a conversation, with groups of completions, form a tree of any depth.

``Layout`` describes such a batch, and ``Layout.attend`` computes the attention by one of three routes:

    varlen          PyTorch's variable-length kernel; half precision on a GPU
    flex            FlexAttention, compiled, with a block mask; other dtypes and softcaps on a GPU
    sdpa-by-length  PyTorch's dense attention, one call per group of equal segments; anywhere

Shapes: q [N, H, d], k and v [N, Hkv, d] with H a multiple of Hkv (grouped queries).
"""

from __future__ import annotations

import inspect
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from itertools import accumulate, groupby, pairwise
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
    """Adjacent segments with one previous token and one length, ``segments`` of them. They attend in one call."""

    previous: int | None
    length: int
    segments: int


class Layout:
    """Which of N packed tokens see one another.

    Args:
        lengths: tokens of each segment, at least 1; the segments lie end to end.
        previous: for each segment the index in [0, N) of the token that comes before its first one, in an earlier
            segment; None where a sequence begins. None for the whole argument: no segment continues another.
        device: the device of index tensors. They are made on the host and moved once.

    Attributes:
        positions: [N] position of each token in its sequence: how many tokens it sees before itself.
        groups: adjacent segments with one previous token and one length. The dense route makes one call for each, so it
            is fastest where equal segments are side by side, as ``share_prefixes`` lays them.
        route: name of the route that ``attend`` took last, None before the first call.

    Raises:
        LossInputError: empty segments, or a previous token that is in no earlier segment.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        previous: Sequence[int | None] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.lengths = list(lengths)
        self.previous: list[int | None] = [None] * len(self.lengths) if previous is None else list(previous)
        check_segments(self.lengths, self.previous)
        self.device = torch.device(device)
        self.is_tree = any(token is not None for token in self.previous)
        equal = groupby(zip(self.previous, self.lengths))
        self.groups = [SegmentGroup(*kind, len(list(members))) for kind, members in equal]
        self.route: str | None = None
        # For each segment: the count of its tokens, the index of its first token, the count of the tokens before it in
        # its sequence, and the count of all tokens that it sees.
        self.query_lengths = np.array(self.lengths)
        self.starts = self.query_lengths.cumsum() - self.query_lengths
        self.contexts = contexts(self.starts.tolist(), self.previous)
        self.prefix_lengths = np.array([sum(b - a for a, b in self.contexts[token]) for token in self.previous])
        self.key_lengths = self.prefix_lengths + self.query_lengths
        self.max_key_length = int(self.key_lengths.max())
        self.positions = self.to_device(ranges(self.prefix_lengths, self.query_lengths))
        self.biases: dict[tuple[int | None, torch.dtype], Tensor] = {}
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

    def causal_bias(self, length: int, key_length: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return what is added to the scores of the last ``length`` of ``key_length`` tokens: 0 if visible, else −inf.

        The result is [length, key_length]: a row per query and a column per key. One tensor for each window and dtype
        is computed at the first call, large enough for all segments that need it. The results are views of its lower
        right corner. Without a window, only segments that are no longer than what they continue need one.
        """
        if (window, dtype) not in self.biases:
            needed = (self.prefix_lengths >= self.query_lengths) | (window is not None)
            rows, columns = int(self.query_lengths[needed].max()), int(self.key_lengths[needed].max())
            masked = torch.full((rows, columns), -torch.inf, dtype=dtype, device=self.device)
            bias = masked.triu(columns - rows + 1)
            self.biases[window, dtype] = bias if window is None else bias + masked.tril(columns - rows - window)
        return self.biases[window, dtype][-length:, -key_length:]

    @cached_property
    def piece_lengths(self) -> list[int]:
        """Tokens of the pieces that result if all segments are cut behind the tokens that others continue."""
        cuts = {0, *(self.starts + self.query_lengths).tolist()}
        cuts |= {token + 1 for token in self.previous if token is not None}
        return [b - a for a, b in pairwise(sorted(cuts))]

    @cached_property
    def context_pieces(self) -> dict[int, list[int]]:
        """For each previous token the indices of the pieces that make up what it sees."""
        starts = np.append(0, np.cumsum(self.piece_lengths)).tolist()
        index = {start: i for i, start in enumerate(starts)}
        return {
            token: [i for a, b in parts for i in range(index[a], index[b])]
            for token, parts in self.contexts.items()
            if token is not None
        }

    @cached_property
    def key_index(self) -> Tensor:
        """[M] the tokens that each segment sees, segment after segment: those before it, then its own."""
        own = zip(self.starts.tolist(), (self.starts + self.query_lengths).tolist())
        parts = np.array([part for token, last in zip(self.previous, own) for part in [*self.contexts[token], last]])
        return self.to_device(ranges(parts[:, 0], parts[:, 1] - parts[:, 0]))

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
    def intervals(self) -> tuple[Tensor, Tensor]:
        """Each token's place in depth-first order, and the end of the places of the tokens that see it, two [N].

        A segment comes before those that continue it, and of these the ones that continue a later token come first. So
        the tokens that see a token follow it without a gap.
        """
        starts, children = self.starts.tolist(), [list[int]() for _ in self.lengths]
        sizes, to_do = self.lengths.copy(), []  # tokens of a segment and of all that continue it
        for i, token in reversed(list(enumerate(self.previous))):
            if token is None:
                to_do.append(i)
            else:
                parent = bisect(starts, token) - 1
                children[parent].append(i)
                sizes[parent] += sizes[i]
        segment_places, place = np.zeros_like(self.starts), 0
        while to_do:
            i = to_do.pop()
            segment_places[i], place = place, place + self.lengths[i]
            to_do += sorted(children[i], key=lambda child: self.previous[child] or 0)
        continuing = np.zeros(len(self.positions), int)  # for each token: the tokens of all that continues it
        for i, token in enumerate(self.previous):
            if token is not None:
                continuing[token] += sizes[i]
        from_here = np.append(continuing[::-1].cumsum()[::-1], 0)
        ends = self.starts + self.query_lengths
        own_ends = segment_places + self.query_lengths - from_here[ends]
        places = ranges(segment_places, self.query_lengths)
        return self.to_device(places), self.to_device(from_here[:-1] + own_ends.repeat(self.query_lengths))

    def block_mask(self, window: int | None) -> Any:
        """Return FlexAttention's mask over all tokens; made once for each window."""
        if window not in self.block_masks:
            n, (_, create_block_mask) = len(self.positions), compiled_flex()
            self.block_masks[window] = create_block_mask(mask_mod(self, window), None, None, n, n, self.device)
        return self.block_masks[window]


def contexts(starts: list[int], previous: list[int | None]) -> dict[int | None, list[tuple[int, int]]]:
    """Return what each previous token sees, itself included: ranges of tokens, in the order of its sequence."""
    result: dict[int | None, list[tuple[int, int]]] = {None: []}
    for token in previous:
        if token is not None and token not in result:
            parent = bisect(starts, token) - 1
            result[token] = [*result[previous[parent]], (starts[parent], token + 1)]
    return result


def check_segments(lengths: Sequence[int], previous: Sequence[int | None]) -> None:
    """Refuse segments without a token, and previous tokens that are in no earlier segment."""
    if not lengths or min(lengths) < 1:
        raise LossInputError("lengths", "segments of at least one token", f"{list(lengths)}", "Leave out empty ones.")
    if len(previous) != len(lengths):
        fix = "None stands for a segment that begins a sequence."
        raise LossInputError("previous", f"{len(lengths)}, one per segment", f"{len(previous)}", fix)
    for i, (token, start) in enumerate(zip(previous, accumulate(lengths, initial=0))):
        if token is not None and not 0 <= token < start:
            expected = f"for segment {i} a token of an earlier one, 0 to {start - 1}" if i else "None for segment 0"
            raise LossInputError("previous", expected, f"{token}", "Put a segment behind the one that it continues.")


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
        before = keys.shape[2] - group.length
        if window is None and before < group.length:
            output = causal(queries, keys, values, scale, softcap)
        else:
            bias = layout.causal_bias(group.length, keys.shape[2], window, q.dtype)
            output = sdpa(queries, keys, values, bias, scale, softcap)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def by_group(layout: Layout, x: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """Yield the keys (or values) x [N, Hkv, d] that each group sees: [B, Hkv, T, d], those before its own first."""
    # What segments continue passes through float32, so that autograd sums its gradient over all of them in float32.
    pieces = (
        torch.split(x.to(torch.promote_types(x.dtype, torch.float32)), layout.piece_lengths) if layout.is_tree else ()
    )
    for group, rows in zip(layout.groups, torch.split(x, sizes)):
        visible = rows.view(group.segments, group.length, *rows.shape[1:])
        if group.previous is not None:
            before = [
                pieces[i].to(x.dtype).expand(group.segments, -1, -1, -1) for i in layout.context_pieces[group.previous]
            ]
            visible = torch.cat((*before, visible), 1)
        yield visible.transpose(1, 2)


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    """Attend from q [B, H, T, d], the last T of S tokens, to k and v [B, Hkv, S, d].

    The first S − T tokens get queries of 0, whose results are dropped. This takes less time than a bias if T is more
    than S / 2: the causal kernel leaves out the upper half of the scores.
    """
    before = k.shape[2] - q.shape[2]
    if not before:
        return sdpa(q, k, v, None, scale, softcap)
    return sdpa(F.pad(q, (0, 0, before, 0)), k, v, None, scale, softcap)[:, :, before:]


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
    """Attend with the variable-length kernel; the keys that a segment continues are copied before its own."""
    if layout.is_tree:  # through float32, so that autograd sums the gradient over all that continues a key
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
    (place, end), position = layout.intervals, layout.positions
    # The window is a tensor, because the kernel is compiled again for each new Python number.
    limit = torch.full((), len(position) if window is None else window, device=layout.device)

    def is_visible(_batch: Any, _head: Any, i: Tensor, j: Tensor) -> Tensor:
        return (place[j] <= place[i]) & (place[i] < end[j]) & (position[i] - position[j] < limit)

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
