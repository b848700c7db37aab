"""The door for tensors: padded ``[B, T]`` and packed ``[N]`` batches become the ``Tokens`` that ``pack`` returns.

``check_padded`` and ``check_packed`` check the shapes of a batch. Then ``blank_tensors`` converts and masks its
columns: a step that a compiled loss can fuse. No shape depends on the data, no loop runs over sequences, and the host
does not wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossfns.devices import to_device
from lossfns.errors import LossInputError, did_you_mean, show
from lossfns.pack import (
    LOGPROB_DTYPES,
    any_active,
    as_row,
    as_tensor,
    blank,
    check_has_graph,
    is_plain,
    may_be_number,
    missing_column_fix,
    tensor_form,
)
from lossfns.segments import with_numbers
from lossfns.tokens import ON_POLICY, PAIRS, Rows, Tokens, to_dtype
from lossfns.values import LENGTHS_FIT

LAYOUTS = ("interleaved", "halves")
"""Where the chosen and the rejected row of pair i are: at 2i and 2i + 1, or at i and i + P, as in TRL."""
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class TensorBatch:
    """A checked batch of tensors, before its columns are converted and masked.

    Attributes:
        logprobs, weights: ``[N]``, in any dtype.
        columns: other columns by name, each ``[N]`` or ON_POLICY.
        numbers: the columns with one number for each sequence, ``[B]``.
        lengths, equal, halves, targets: as in ``Tokens``.
        masks: the columns that are weights, too.
    """

    logprobs: Tensor
    weights: Tensor
    columns: Mapping[str, Any]
    numbers: Mapping[str, Tensor]
    lengths: Tensor
    equal: bool
    halves: bool
    targets: int = 1
    masks: tuple[str, ...] = ()


def blank_tensors(batch: TensorBatch) -> Tokens:
    """Convert every column to the dtype of the logprobs, and put 0 into every inactive slot."""
    dtype = torch.promote_types(batch.logprobs.dtype, torch.float32)
    weights = to_dtype(batch.weights, dtype)
    active = any_active(weights, [batch.columns[name] for name in batch.masks])
    logprobs = blank(batch.logprobs.to(dtype), active)
    columns = {
        name: logprobs.detach() if x is ON_POLICY else blank(to_dtype(x, dtype), active)
        for name, x in batch.columns.items()
    }
    t = Tokens(logprobs, weights, batch.lengths, columns, batch.equal, batch.halves, active, batch.targets)
    return with_numbers(t, {name: to_dtype(x, dtype) for name, x in batch.numbers.items()})


def check_padded(
    logprobs: Any,
    weights: Any,
    reads: Sequence[str] = (),
    columns: Mapping[str, Any] | None = None,
    *,
    rows: Rows,
    layout: str | None = None,
    differentiates: Sequence[str] = (),
) -> TensorBatch:
    """Check a padded batch.

    Args:
        logprobs: ``[B, T]``, or ``[B, T, K]`` for a loss over K targets. For pairs also a tuple of two tensors
            ``[P, T]``, chosen and rejected, whose T may differ.
        weights: of the same shape; 0 where a token is not trained, and at padding on either side.
        reads, rows, differentiates: as for ``pack``.
        columns: for each name a tensor of the same shape, or ``[B]`` with one number for each row where the column may
            have one. Every column of pairs in two tensors is a tuple of two.
        layout: ``"interleaved"`` (the default) or ``"halves"``, for pairs in one tensor.

    Returns:
        The batch of all B·T tokens, on the device of the logprobs.

    Raises:
        LossInputError: if any input is malformed.
    """
    rows = Rows.of(rows)
    check_layout(layout, rows, two_tensors=isinstance(logprobs, (tuple, list)))
    if isinstance(logprobs, (tuple, list)):
        return check_two_sides(logprobs, weights, reads, columns or {}, rows, differentiates)
    check_logprobs(logprobs, "logprobs", rows.rank + 1, "padded", ("B", "T", "K"))
    if logprobs.shape[0] % rows.datums:
        raise LossInputError(
            "logprobs", "chosen/rejected pairs", f"{logprobs.shape[0]} rows, an odd number", LAYOUT_FIX
        )

    def align(name: str, x: Any) -> Tensor:
        return align_rows(name, x, logprobs, rows, with_graph=name in differentiates)

    aligned, numbers = align_columns(align, find_columns(reads, columns or {}), logprobs.numel())
    for name in differentiates:
        check_has_graph(name, aligned[name], logprobs)
    lengths = torch.full(logprobs.shape[:1], logprobs[0].numel(), device=logprobs.device)
    halves = layout == "halves"
    targets = logprobs.shape[2] if logprobs.ndim == 3 else 1
    weights = align("weights", weights)
    return TensorBatch(logprobs.flatten(), weights, aligned, numbers, lengths, True, halves, targets)


def check_two_sides(
    logprobs: Any,
    weights: Any,
    reads: Sequence[str],
    columns: Mapping[str, Any],
    rows: Rows,
    differentiates: Sequence[str],
) -> TensorBatch:
    """Check pairs in two padded tensors, chosen and rejected. The batch has all chosen rows first: layout "halves"."""
    sides = pair_of("logprobs", logprobs)
    for side, x in zip(SIDES, sides):
        check_logprobs(x, f"{side} logprobs", 2, "padded", ("P", "T"))
    if len(sides[0]) != len(sides[1]):
        got = f"{len(sides[0])} and {len(sides[1])} rows"
        raise LossInputError("logprobs", "as many chosen as rejected rows", got, "Row i of both is pair i.")

    def join(name: str, x: Any) -> Tensor:
        graph = name in differentiates
        both = [align_rows(name, y, lp, rows, with_graph=graph) for y, lp in zip(pair_of(name, x), sides)]
        if not all(y.numel() < lp.numel() for y, lp in zip(both, sides)):  # not a number for each row of both sides
            both = [at_tokens(y, lp) for y, lp in zip(both, sides)]
        joined: Tensor = torch.cat(both)
        return joined

    logprobs = torch.cat([x.flatten() for x in sides])
    aligned, numbers = align_columns(join, find_columns(reads, columns), logprobs.numel())
    for name in differentiates:
        check_has_graph(name, aligned[name], logprobs)
    lengths = torch.cat([torch.full(x.shape[:1], x.shape[1], device=x.device) for x in sides])
    equal = sides[0].shape == sides[1].shape
    return TensorBatch(logprobs, join("weights", weights), aligned, numbers, lengths, equal=equal, halves=True)


def check_packed(
    logprobs: Any,
    weights: Any,
    reads: Sequence[str] = (),
    columns: Mapping[str, Any] | None = None,
    *,
    rows: Rows,
    lengths: Any = None,
    cu_seqlens: Any = None,
    layout: str | None = None,
    differentiates: Sequence[str] = (),
) -> tuple[TensorBatch, dict[str, Tensor]]:
    """Check a packed batch, whose sequences lie end to end without padding.

    Args:
        logprobs: ``[N]``, or ``[N, K]`` for a loss over K targets.
        weights: of the same shape.
        reads, rows, differentiates: as for ``pack``.
        columns: for each name a tensor of the same shape, or ``[B]`` where the column may have one number for each
            sequence.
        lengths: ``[B]`` tokens of each sequence, which sum to N.
        cu_seqlens: ``[B + 1]``, in place of ``lengths``: 0 and the index after each sequence, as attention kernels
            take it.
        layout: ``"interleaved"`` (the default) or ``"halves"``, for pairs.

    Returns:
        The batch, and 0-d tensors that ``check_values`` reads later. For lengths on a device, ``LENGTHS_FIT`` tells
        whether they are the lengths of a batch of N tokens.

    Raises:
        LossInputError: if any input is malformed.
    """
    rows = Rows.of(rows)
    check_layout(layout, rows, two_tensors=False)
    check_logprobs(logprobs, "logprobs", rows.rank, "packed", ("N", "K"))
    width = logprobs.shape[1] if rows.rank == 2 else 1
    tokens, checks = sequence_lengths(lengths, cu_seqlens, len(logprobs))
    tokens = to_device(tokens, logprobs.device)
    if len(tokens) % rows.datums:
        raise LossInputError("lengths", "chosen/rejected pairs", f"{len(tokens)} sequences, an odd number", LAYOUT_FIX)

    def align(name: str, x: Any) -> Tensor:
        column = column_tensor(name, x, logprobs, with_graph=name in differentiates)
        if column.shape == logprobs.shape:
            return column.flatten()
        if column.shape != tokens.shape or not may_be_number(name, rows):
            raise wrong_shape(name, column, logprobs.shape, rows, len(tokens))
        if name in differentiates:
            return torch.repeat_interleave(column, tokens * width, output_size=logprobs.numel())
        return column

    aligned, numbers = align_columns(align, find_columns(reads, columns or {}), logprobs.numel())
    for name in differentiates:
        check_has_graph(name, aligned[name], logprobs)
    weights, halves = align("weights", weights), layout == "halves"
    batch = TensorBatch(logprobs.flatten(), weights, aligned, numbers, tokens * width, False, halves, width)
    return batch, checks


LAYOUT_FIX = 'Interleave them: row 2i chosen, 2i + 1 rejected, or pass layout="halves".'


def check_layout(layout: Any, rows: Rows, *, two_tensors: bool) -> None:
    """Refuse a layout that does not exist or does not apply, and two tensors for a loss that is not over pairs."""
    if layout is not None and not (isinstance(layout, str) and layout in LAYOUTS):
        hint = did_you_mean(layout, LAYOUTS)
        raise LossInputError("layout", " or ".join(map(repr, LAYOUTS)), show(layout), hint)
    if layout is not None and (rows is not PAIRS or two_tensors):
        got = "two tensors" if two_tensors else f"a loss over {rows}"
        raise LossInputError("layout", "a loss over pairs in one tensor", got, "Leave it out.")
    if two_tensors and rows is not PAIRS:
        raise LossInputError(
            "logprobs", "one tensor", "a list", "For datums and a list of tensors call the loss itself."
        )


def check_logprobs(x: Any, name: str, rank: int, form: str, dims: Sequence[str]) -> None:
    """Refuse anything but a dense floating point tensor of this rank with at least one entry."""
    if not isinstance(x, Tensor):
        raise LossInputError(name, "a torch.Tensor", f"a {type(x).__name__}", "Call torch.tensor.")
    check_local(name, x)
    if not is_plain(x) or x.dtype not in LOGPROB_DTYPES:
        fix = "Pass the logprobs of the targets as a dense tensor of float32."
        raise LossInputError(name, "a dense tensor of real numbers", tensor_form(x), fix)
    if x.ndim != rank:
        fixes = {
            ("padded", 1): "Call packed(logprobs, weights, lengths=...) for tokens end to end.",
            ("padded", 3): "For logits take target_logprobs first; for [B, T, K] use multi_target_cross_entropy.",
            ("packed", 2): "Call padded(logprobs, weights) for [B, T]; squeeze(0) a packed [1, N].",
        }
        fix = fixes.get((form, x.ndim), "Pass one logprob for each target.")
        raise LossInputError(name, f"[{', '.join(dims[:rank])}]", f"shape {tuple(x.shape)}", fix)
    if x.numel() == 0:
        raise LossInputError(name, "at least one token", f"shape {tuple(x.shape)}", "Skip the call for an empty batch.")


def check_local(name: str, x: Any) -> None:
    """Refuse a DTensor, whose parts lie on several ranks."""
    if hasattr(x, "full_tensor"):
        fix = "Call full_tensor(), or to_local() and pass the denominator= of all ranks."
        raise LossInputError(name, "a tensor of this rank", f"a {type(x).__name__}", fix)


def sequence_lengths(lengths: Any, cu_seqlens: Any, tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the lengths ``[B]`` of the sequences, and the result of their check if it cannot be read yet.

    Lengths on the host are checked here. Lengths on a device are clamped, so that no kernel reads beyond the batch, and
    the returned 0-d tensor tells whether they were right.
    """
    if (lengths is None) == (cu_seqlens is None):
        got = "both" if lengths is not None else "neither"
        raise LossInputError("lengths", "either lengths or cu_seqlens", got, "They say where sequences begin and end.")
    name = "lengths" if cu_seqlens is None else "cu_seqlens"
    integers = as_tensor(as_row(lengths if cu_seqlens is None else cu_seqlens, name, None))
    if integers.ndim != 1 or integers.is_floating_point() or integers.dtype == torch.bool or not len(integers):
        got = f"{integers.dtype} of shape {tuple(integers.shape)}"
        raise LossInputError(name, "whole numbers, one for each sequence", got, "Pass a list or a tensor [B].")
    integers = integers.to(torch.int64)
    bounds = integers if cu_seqlens is not None else torch.cat([integers.new_zeros(1), integers.cumsum(0)])
    counts = bounds.diff()
    fit = (bounds[0] == 0) & (bounds[-1] == tokens) & (counts >= 0).all()
    if integers.device.type != "cpu" or torch.compiler.is_compiling():  # nothing may be read on the host
        inner = torch.cummax(bounds[1:-1].clamp(0, tokens), 0).values
        inside = torch.cat([bounds.new_zeros(1), inner, bounds.new_full((1,), tokens)])
        return inside.diff(), {LENGTHS_FIT: fit}
    if len(bounds) < 2 or not fit:
        expected = f"0, …, {tokens} in order" if cu_seqlens is not None else f"numbers from 0 that sum to {tokens}"
        shown = integers.tolist()
        got = str(shown if len(shown) < 9 else [*shown[:4], "…", *shown[-4:]])
        raise LossInputError(name, expected, got, "They count the tokens of logprobs.")
    return counts, {}


def find_columns(reads: Sequence[str], columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that the loss reads, by name."""
    if "weights" in columns:
        fix = "Pass them in the call, and bind the other columns only."
        raise LossInputError("weights", "the weights of the call", "weights of bind(weights=...) besides", fix)
    missing = next((name for name in reads if name not in columns), None)
    if missing is not None:
        fix = missing_column_fix(missing).replace(f"bind({missing}=...)", f"{missing}=...")
        raise LossInputError(missing, "a tensor of the shape of logprobs", "nothing", fix)
    return {name: columns[name] for name in reads}


def align_columns(
    align: Callable[[str, Any], Tensor], columns: Mapping[str, Any], entries: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the columns with all N entries, or ON_POLICY; and those with one number for each sequence."""
    on_policy = {name: x for name, x in columns.items() if x is ON_POLICY}
    aligned = {name: align(name, x) for name, x in columns.items() if name not in on_policy}
    numbers = {name: x for name, x in aligned.items() if x.numel() != entries}
    return {name: x for name, x in (aligned | on_policy).items() if name not in numbers}, numbers


def column_tensor(name: str, x: Any, like: Tensor, *, with_graph: bool = False) -> Tensor:
    """Return a column as a tensor, without its graph unless that is to be kept, on the device of ``like``."""
    check_local(name, x)
    column = to_device(as_tensor(as_row(x, name, None, with_graph=with_graph)), like.device)
    if torch.compiler.is_compiling() or not column.is_inference() or torch.is_inference_mode_enabled():
        return column
    return column.clone()  # autograd saves the weights, but refuses to save a tensor that was made in inference mode


def pair_of(name: str, x: Any) -> tuple[Any, Any]:
    """Return the two sides of a column of pairs in two tensors."""
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        got = f"{len(x)} entries" if isinstance(x, (tuple, list)) else f"a {type(x).__name__}"
        raise LossInputError(name, "a tuple (chosen, rejected) of two tensors", got, "Every column comes in two.")
    return x[0], x[1]


def align_rows(name: str, x: Any, logprobs: Tensor, rows: Rows, *, with_graph: bool = False) -> Tensor:
    """Return a padded column as ``[N]``, or one with a number for each row as ``[B]``, unless its graph is kept."""
    column, shape = column_tensor(name, x, logprobs, with_graph=with_graph), logprobs.shape
    if column.shape == shape:
        return column.flatten()
    one_each = column.shape in (shape[:1], (shape[0], 1))
    if not (one_each and may_be_number(name, rows)):
        raise wrong_shape(name, column, shape, rows, shape[0])
    return at_tokens(column.flatten(), logprobs) if with_graph else column.flatten()


def at_tokens(column: Tensor, logprobs: Tensor) -> Tensor:
    """Return a column ``[N]`` as it is; repeat one with a number for each row over the tokens of the row."""
    if column.numel() == logprobs.numel():
        return column
    return column.reshape(-1, *[1] * (logprobs.ndim - 1)).expand_as(logprobs).flatten()


def wrong_shape(name: str, x: Tensor, shape: Sequence[int], rows: Rows, sequences: int) -> LossInputError:
    """Return the error for a column that has neither the shape of the logprobs nor one number for each sequence."""
    one_each = f" or ({sequences},)" if may_be_number(name, rows) else ""
    if x.ndim < 2 and may_be_number(name, rows):
        fix = "Pass one number for each sequence; both sides of a pair count."
    elif len(shape) > x.ndim and tuple(x.shape) == tuple(shape)[:-1]:
        fix = "Repeat it for each of the K targets: x.unsqueeze(-1).expand_as(logprobs)."
    else:
        fix = "Shift labels, masks and logprobs alike: position j holds token j + 1."
    return LossInputError(name, f"shape {tuple(shape)}{one_each}, that of logprobs", f"shape {tuple(x.shape)}", fix)
