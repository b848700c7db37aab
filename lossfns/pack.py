"""The one door: ``pack`` checks a batch, aligns its columns, and returns one masked ``Tokens``.

Shapes, types and lengths are checked here, before any maths. No later code masks. One check comes later:
``values.check_values`` reads a few numbers on the host, where they arrive together with the metrics.
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns.checks import is_real
from lossfns.devices import to_device
from lossfns.errors import LossInputError, did_you_mean, show
from lossfns.segments import nonempty
from lossfns.tokens import (
    DATUM_COLUMNS,
    DATUM_FIELDS,
    LOGPROB_COLUMNS,
    MODEL_COLUMNS,
    ON_POLICY,
    SEQUENCES,
    TARGETS,
    TOKENS,
    Rows,
    Tokens,
)

Values = np.ndarray[Any, Any] | Tensor
"""The values of one column for one datum."""
Shapes = Sequence[Sequence[int]]
"""The shape of each datum's logprobs: ``[N_i]``, or ``[N_i, K]``."""

RESERVED_COLUMNS = ("logprobs", "weights", "lengths", "columns", "active", "share", "denominator", "align", "grad_l1")
"""Names that a column of a loss cannot have: a batch, an export or an option of ``bind`` has them."""

TORCH_TYPES = frozenset("?bhilqBHILefd")
"""The NumPy types that torch has: no wider floats, and no second kind of unsigned integers of 64 bits."""

LOGPROB_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))

MISSING_COLUMN_FIX = {
    "target_tokens": "Build the datum with datum_from_tokens.",
    "weights": "Give one number for each target: 0 for the prompt, 1 for what is trained on.",
    "advantages": "Pass bind(advantages=...): a number (see group_advantages) or a row for each datum.",
    "old_logprobs": "Pass bind(old_logprobs=...): the old policy's logprobs, or ON_POLICY if it is the current one.",
    "ref_logprobs": "Pass bind(ref_logprobs=...): the frozen reference model's logprobs of the same targets.",
    "sampler_logprobs": "Pass bind(sampler_logprobs=...): see align_sampler_logprobs.",
    "entropy": "The local client supplies it. In a loop pass bind(entropy=...), from linear_logprobs or "
    "target_logprobs with return_entropy=True. A hosted service returns logprobs alone: for a bonus take "
    "with_sampled_entropy.",
    "sum_square_probs": "The local client supplies it. In a loop pass bind(sum_square_probs=...), from linear_logprobs "
    "or target_logprobs with return_sum_square_probs=True. A hosted service returns logprobs alone.",
}
"""The fix in the error for a datum that lacks a column, by column."""


def missing_column_fix(name: str) -> str:
    """Return the fix in the error for a datum that lacks this column."""
    what = ": the weights of this part of the sum, 0 where it trains nothing" if name.endswith("_weights") else ""
    return MISSING_COLUMN_FIX.get(name, f"Pass bind({name}=...){what}.")


def pack(
    data: Sequence[Any],
    logprobs_list: Sequence[Tensor],
    reads: Sequence[str] = (),
    columns: Mapping[str, Any] | None = None,
    *,
    rows: Rows = TOKENS,
    align: str = "strict",
    masks: Sequence[str] = (),
    differentiates: Sequence[str] = (),
) -> Tokens:
    """Check, align, concatenate, convert and mask a batch.

    Args:
        data: B datums, whose ``loss_fn_inputs`` map field names to TensorData, arrays, tensors or lists.
        logprobs_list: B float tensors ``[N_i]``, or ``[N_i, K]`` for a loss over K targets.
        reads: names of the columns to pack besides ``weights``: from ``columns``, or else from the datums.
        columns: for each name a list of B entries. An entry holds one datum's values, or one number for the datum.
        rows: what the loss has one term for: tokens, targets, pairs or sequences.
        align: ``"strict"``, or ``"truncate"`` to cut all columns of a datum to the length of its shortest.
        masks: the columns of ``reads`` that are weights, too. A slot is active if one of its weights is not 0.
        differentiates: the columns that carry a gradient, as ``columns`` has them. All others become constants.

    Returns:
        The packed batch, on the logprobs' device. Its dtype is that of the logprobs, or float32 if theirs is narrower.
        Every slot of weight 0 holds 0 in every column, so that no nan or inf can leak from it.

    Raises:
        LossInputError: if any input is malformed. The message names the datum, the field, what was expected, what came,
            and the fix.

    >>> import torch
    >>> from lossfns import datum_from_tokens
    >>> t = pack([datum_from_tokens([5, 6, 7], prompt_length=2)], [torch.tensor([-1.0, -2.0])])
    >>> t.logprobs, t.active
    (tensor([ 0., -2.]), tensor([False,  True]))
    """
    rows = Rows.of(rows)
    reads = check_reads(reads)
    check_align(align)
    if not isinstance(columns, Mapping | None):
        raise LossInputError("columns", "a dict of columns by name", show(columns), "Pass {name: rows}.")
    check_data(data, rows)
    check_logprobs(data, logprobs_list)
    shapes, logprobs = [lp.shape for lp in logprobs_list], concatenate(logprobs_list)
    graph = tuple(differentiates)
    packed = pack_columns(
        data, shapes, logprobs, reads, columns, rows=rows, align=align, masks=masks, differentiates=graph
    )
    for name in graph:
        check_has_graph(name, packed.columns[name], logprobs)
    return packed.with_logprobs(logprobs)


def pack_side_columns(
    data: Sequence[Any],
    shapes: Shapes,
    like: Tensor,
    reads: Sequence[str] = (),
    columns: Mapping[str, Any] | None = None,
    *,
    rows: Rows = TOKENS,
    align: str = "strict",
    masks: Sequence[str] = (),
) -> PackedColumns:
    """Pack every column but the logprobs, as constants. ``with_logprobs`` then returns what ``pack`` returns.

    Args:
        data, reads, columns, rows, align, masks: as for ``pack``.
        shapes: the shape of each datum's logprobs.
        like: a tensor with the dtype and the device of the logprobs.
    """
    check_data(data, rows)
    return pack_columns(data, shapes, like, reads, columns, rows=rows, align=align, masks=masks)


def pack_columns(
    data: Sequence[Any],
    shapes: Shapes,
    like: Tensor,
    reads: Sequence[str],
    columns: Mapping[str, Any] | None,
    *,
    rows: Rows,
    align: str,
    masks: Sequence[str] = (),
    differentiates: Sequence[str] = (),
) -> PackedColumns:
    """Pack every column but the logprobs, of data that have been checked."""
    check_shapes(data, shapes, rows.rank)
    columns = columns or {}
    on_policy = {name: ON_POLICY for name in reads if columns.get(name) is ON_POLICY}
    side = [name for name in reads if name not in on_policy]
    table = {name: find_column(name, data, columns, rows, with_graph=name in differentiates) for name in side}
    table["weights"] = find_weights(data, columns, reads)
    kept: list[Tensor] = []
    if align == "truncate":
        uncut = shapes
        shapes, table = truncate(shapes, table)
        # Row-major: the first entries of an [N, K] are those of its first positions.
        kept = [torch.arange(prod(shape)) < prod(cut) for shape, cut in zip(uncut, shapes)]
    else:
        check_targets(data, shapes)
    lengths = torch.from_numpy(np.array([prod(shape) for shape in shapes], dtype=np.int64))
    flat = {name: flatten_column(name, column, shapes, lengths, like, rows) for name, column in table.items()}
    weights = flat.pop("weights")
    active = any_active(weights, [flat[name] for name in masks])
    inactive = ~active
    # In place is safe: flatten_column returns new tensors.
    blanked = {name: x.masked_fill_(inactive, 0) for name, x in flat.items()}
    equal = len(set(map(tuple, shapes))) == 1 and bool(lengths[0] > 0)  # rows of no tokens would have no maximum
    targets, lengths = num_targets(shapes, rows), to_device(lengths, like.device)
    given = [name for name in side if not isinstance(table[name], list) and name not in differentiates]
    numbers = {name: to_device(as_tensor(table[name]), like.device, like.dtype) for name in given}
    if numbers:
        present = nonempty(Tokens(weights, weights, lengths, equal=equal, active=active))
        numbers = {name: blank(y, present) for name, y in numbers.items()}
    return PackedColumns(weights, active, lengths, blanked | on_policy, kept, equal, targets, numbers)


def num_targets(shapes: Shapes, rows: Rows) -> int:
    """Return K, the number of targets of a position; 0 if it is not known, or not the same for all datums."""
    widths = {shape[1] if len(shape) == 2 else 0 for shape in shapes} if rows is TARGETS else {1}
    return widths.pop() if len(widths) == 1 else 0


@dataclass(frozen=True)
class PackedColumns:
    """A packed batch without its logprobs.

    Attributes:
        weights, active: ``[N]``, as in ``Tokens``.
        lengths: ``[B]`` tokens of each sequence.
        columns: the other columns ``[N]``. A column that is ON_POLICY becomes the logprobs, in ``with_logprobs``.
        kept: for each datum a mask of the logprobs that are kept; empty unless columns are truncated.
        equal: whether all sequences are equally long.
        targets: K, the number of targets of a position; 0 if it is not the same for all datums.
        numbers: ``[B]`` of each column with one number for each datum, which ``columns`` have at every token.
    """

    weights: Tensor
    active: Tensor
    lengths: Tensor
    columns: Mapping[str, Any]
    kept: list[Tensor]
    equal: bool = False
    targets: int = 1
    numbers: Mapping[str, Tensor] = field(default_factory=dict)

    def with_logprobs(self, logprobs: Tensor, outputs: Mapping[str, Tensor] | None = None) -> Tokens:
        """Return the packed batch with these logprobs, concatenated over the datums.

        ``outputs`` are further columns ``[N]``, which the model has computed together with the logprobs.
        """
        if self.kept:
            index = to_device(torch.cat(self.kept).nonzero().squeeze(1), logprobs.device)
            logprobs = logprobs.index_select(0, index)
            outputs = {name: x.index_select(0, index) for name, x in (outputs or {}).items()}
        logprobs = blank(logprobs, self.active)
        columns = {name: logprobs.detach() if x is ON_POLICY else x for name, x in self.columns.items()}
        columns |= {name: blank(x, self.active) for name, x in (outputs or {}).items()}
        layout, by_datum = (self.equal, False), [(columns[name], y) for name, y in self.numbers.items()]
        return Tokens(logprobs, self.weights, self.lengths, columns, *layout, self.active, self.targets, by_datum)

    def part(self, which: slice) -> PackedColumns:
        """Return the columns of ``data[which]``, a slice of consecutive datums, as views."""
        first, last, _ = which.indices(len(self.lengths))
        tokens = slice(int(self.lengths[:first].sum()), int(self.lengths[:last].sum()))
        columns = {name: x if x is ON_POLICY else x[tokens] for name, x in self.columns.items()}
        weights, active, lengths = self.weights[tokens], self.active[tokens], self.lengths[which]
        numbers = {name: y[which] for name, y in self.numbers.items()}
        return PackedColumns(weights, active, lengths, columns, self.kept[which], self.equal, self.targets, numbers)


def pack_weights(
    data: Sequence[Any],
    reads: Sequence[str],
    columns: Mapping[str, Any],
    *,
    rows: Rows,
    align: str = "strict",
    masks: Sequence[str] = (),
) -> Tokens:
    """Pack the weights alone, in float64, with zeros as logprobs: enough to compute a denominator."""
    check_data(data, rows)
    table = {name: find_column(name, data, columns, rows) for name in masks}
    table["weights"] = weight_rows(data, reads, columns)
    if align == "truncate":
        shapes = [row.shape for row in find_column("target_tokens", data, columns)]
        others = {name: column_or_none(name, data, columns, rows) for name in reads if name not in masks}
        table = truncate(shapes, others | table)[1]
    for i, row in enumerate(table["weights"]):
        if row.ndim not in (1, rows.rank):
            expected, fix = "a row with a number for each target", "Give one number for each entry of the logprobs."
            raise LossInputError("weights", expected, f"shape {tuple(row.shape)}", fix, datum=i)
    targets = num_targets(target_shapes(data, table["weights"]), rows) if rows is TARGETS else 1
    shapes = [row.shape for row in table["weights"]]
    lengths, like = torch.tensor([prod(shape) for shape in shapes]), torch.empty(0, dtype=torch.float64)
    flat = {name: flatten_column(name, table[name], shapes, lengths, like, rows) for name in ("weights", *masks)}
    weights = flat.pop("weights")
    return Tokens(torch.zeros_like(weights), weights, lengths, flat, targets=targets)


def target_shapes(data: Sequence[Any], weights: Sequence[Values]) -> list[Sequence[int]]:
    """Return the shapes ``[N, K]`` of weights. Flat weights have the shape of the datum's ``target_tokens``."""
    shapes: list[Sequence[int]] = []
    for datum, row in zip(data, weights):
        ids = datum.loss_fn_inputs.get("target_tokens")
        known = not isinstance(ids, Tensor) or is_plain(ids)
        shape = tuple(getattr(ids, "shape", None) or ()) if known else ()
        shapes.append(shape if row.ndim == 1 and prod(shape) == len(row) else tuple(row.shape))
    return shapes


def weight_rows(data: Sequence[Any], reads: Sequence[str], columns: Mapping[str, Any]) -> list[Values]:
    """Return the weights of each datum. They are ones for RL datums, which have none."""
    weights: list[Values] | None = find_weights(data, columns, reads)
    if weights is not None:
        return weights
    return [np.ones(len(row), dtype=np.float32) for row in as_rows(fields(data, "advantages"), "advantages")]


def column_or_none(name: str, data: Sequence[Any], columns: Mapping[str, Any], rows: Rows) -> Any:
    """Return a column that is bound or that all datums have, else None. ON_POLICY gives None."""
    available = name in columns or not any(value is None for value in fields(data, name))
    return find_column(name, data, columns, rows) if available and columns.get(name) is not ON_POLICY else None


def blank(x: Tensor, active: Tensor) -> Tensor:
    """Put 0 into every inactive slot, before any maths: its content can then reach neither value nor gradient."""
    return torch.where(active, x, 0)


def any_active(weights: Tensor, others: Sequence[Tensor]) -> Tensor:
    """``[N]`` bool: True where one of several columns of weights is not 0."""
    active = weights != 0
    for other in others:
        active = active | (other != 0)
    return active


def check_align(align: Any) -> None:
    if not isinstance(align, str) or align not in ("strict", "truncate"):
        hint = did_you_mean(align, ("strict", "truncate"))
        raise LossInputError("align", "'strict' or 'truncate'", show(align), hint)


def check_reads(reads: Any) -> tuple[str, ...]:
    """Return the names of the columns as a tuple. Refuse a name that no column can have."""
    if not isinstance(reads, (tuple, list)):
        fix = "One column is ('advantages',)."
        raise LossInputError("reads", "a tuple of names of columns", show(reads), fix)
    for name in reads:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            # Exports write a function whose parameters have these names.
            fix = "A name has letters, digits and underscores, as the name of a variable."
            raise LossInputError("reads", "names of columns that are identifiers", show(name), fix)
        if name in RESERVED_COLUMNS:
            fix = "Logprobs and weights are always there; give a column of your own another name."
            raise LossInputError("reads", f"names other than {', '.join(RESERVED_COLUMNS)}", repr(name), fix)
    if len(set(reads)) < len(reads):
        raise LossInputError("reads", "each name once", show(reads), "Drop the second one.")
    return tuple(reads)


def check_differentiates(differentiates: Any, reads: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the columns that carry a gradient. Refuse a column that the loss does not read."""
    unread = [name for name in check_reads(differentiates) if name not in reads]
    if unread:
        fix = "A gradient can go through a column that the terms read."
        raise LossInputError("differentiates", f"names among {', '.join(reads) or 'no'} reads", repr(unread[0]), fix)
    return tuple(differentiates)


def check_has_graph(name: str, column: Tensor, logprobs: Tensor) -> None:
    """Refuse a column without a graph where the loss's gradient goes through it: this part of it would be lost."""
    if logprobs.requires_grad and not column.requires_grad and torch.is_grad_enabled():
        fix = f"Pass the {name} of the same forward pass as the logprobs, as it is: no .detach(), list or datum field."
        raise LossInputError(name, "a tensor with its graph, since the gradient goes through it", "a constant", fix)


def check_data(data: Sequence[Any], rows: Rows) -> None:
    """Refuse data that are not a list of datums. For a loss over pairs, also refuse an odd number of datums."""
    if not isinstance(data, (list, tuple)):
        fix = "Pass [datum] for a single one."
        if isinstance(data, Tensor):
            fix = (
                "For tensors call padded(logprobs [B, T], weights, ...) or packed(logprobs [N], weights, lengths=...)."
            )
        raise LossInputError("data", "a list of datums", f"a {type(data).__name__}", fix)
    if not data:
        raise LossInputError("data", "at least one datum", "data is empty", "Skip the call for an empty batch.")
    for i, datum in enumerate(data):
        inputs = getattr(datum, "loss_fn_inputs", None)
        if type(inputs) is not dict and not isinstance(inputs, Mapping):  # the first test is faster
            fix = "Build it with datum_from_tokens, or pass tinker.Datum objects."
            raise LossInputError("loss_fn_inputs", "a Datum", f"a {type(datum).__name__}", fix, datum=i)
    if len(data) % rows.datums:
        fix = "Interleave them: datum 2i chosen, 2i + 1 rejected."
        raise LossInputError("data", "chosen/rejected pairs", f"{len(data)} datums, an odd number", fix)


def check_logprobs(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> None:
    """Refuse anything but one floating point tensor for each datum, all on one device."""
    if not isinstance(logprobs_list, (list, tuple)):
        got = f"a {type(logprobs_list).__name__}"
        raise LossInputError("logprobs_list", "a list of tensors, one per datum", got, "Split it by sequence.")
    if len(data) != len(logprobs_list):
        raise wrong_count(data, logprobs_list)
    device = getattr(logprobs_list[0], "device", None)
    has_values = getattr(device, "type", "") != "meta"
    kinds = {isinstance(lp, Tensor) and (lp.dtype, lp.device, lp.layout, lp.is_nested) for lp in logprobs_list}
    if kinds <= {(dtype, device, torch.strided, False) for dtype in LOGPROB_DTYPES} and has_values:
        return  # the usual case, faster than one by one
    for i, lp in enumerate(logprobs_list):
        if not isinstance(lp, Tensor):
            raise LossInputError("logprobs", "a torch.Tensor", f"a {type(lp).__name__}", "Call torch.tensor.", datum=i)
        if lp.dtype not in LOGPROB_DTYPES:
            fix = "Logprobs are real numbers: were token ids passed?"
            raise LossInputError("logprobs", "a floating point tensor", str(lp.dtype), fix, datum=i)
        if lp.device != device:
            got = f"{lp.device}, while datum[0] has {device}"
            raise LossInputError("logprobs", "one device for the whole batch", got, "Move them with .to().", datum=i)
        if lp.layout != torch.strided or lp.is_nested or not has_values:  # LOGPROB_DTYPES are all real
            fix = "Pass the logprobs of the datum's targets as a dense tensor of float32."
            raise LossInputError("logprobs", "a dense tensor with values", tensor_form(lp), fix, datum=i)


def check_shapes(data: Sequence[Any], shapes: Shapes, rank: int) -> None:
    """Refuse logprobs whose number is not that of the datums, or whose rank is not the one that the loss takes."""
    if len(data) != len(shapes):
        raise wrong_count(data, shapes)
    if set(map(len, shapes)) - {rank}:
        i = next(i for i, shape in enumerate(shapes) if len(shape) != rank)
        raise wrong_rank(shapes[i], rank, i)


def wrong_count(data: Sequence[Any], logprobs_list: Sequence[Any]) -> LossInputError:
    got = f"{len(data)} datums but {len(logprobs_list)} logprobs tensors"
    return LossInputError("logprobs_list", "one tensor per datum", got, "Pass the datums of the same forward call.")


def wrong_rank(shape: Sequence[int], rank: int, datum: int) -> LossInputError:
    fixes = {1: "For [N] use cross_entropy.", 2: "For [N, K] use multi_target_cross_entropy."}
    fix = fixes.get(len(shape), "Split the batch by sequence.")
    return LossInputError("logprobs", ("[N]", "[N, K]")[rank - 1], f"shape {tuple(shape)}", fix, datum=datum)


def check_targets(data: Sequence[Any], shapes: Shapes) -> None:
    """Refuse logprobs whose length is not that of the datum's ``target_tokens``, if these are TensorData."""
    given = fields(data, "target_tokens")
    if [getattr(targets, "shape", None) for targets in given] == list(map(list, shapes)):
        return  # the usual case, faster than one by one
    for i, (targets, shape) in enumerate(zip(given, shapes)):
        if hasattr(targets, "to_numpy"):
            # An SDK's TensorData may have no shape. Flat targets of an [N, K] have N·K entries.
            target_shape = getattr(targets, "shape", None)
            if not (isinstance(target_shape, (list, tuple)) and target_shape):
                target_shape = as_row(targets, "target_tokens", i).shape or ("no",)
            count = target_shape[0]
            if count != shape[0] and count != prod(shape):
                got, fix = str(shape[0]), "Pass the logprobs of these datums' targets."
                raise LossInputError("logprobs", f"{count} rows (the length of target_tokens)", got, fix, datum=i)


def find_column(
    name: str, data: Sequence[Any], columns: Mapping[str, Any], rows: Rows = TOKENS, *, with_graph: bool = False
) -> Any:
    """Return a column as a list of B rows, or as one array ``[B]`` with a number for each datum.

    The column comes from ``columns`` if it is bound there, else from the datums. Tensors lose their graph unless it is
    to be kept.
    """
    if name in columns:
        given = columns[name]
        if isinstance(given, (Mapping, Set)) or not has_length(given) or getattr(given, "ndim", 1) == 0:
            got, fix = f"a {type(given).__name__}", "Bind a list with one entry for each datum."
            raise LossInputError(name, f"{len(data)} entries, one per datum", got, fix)
        if isinstance(given, Tensor) and not is_plain(given):
            fix = "Bind a list with one row for each datum."
            raise LossInputError(name, f"{len(data)} entries, one per datum", tensor_form(given), fix)
        if len(given) != len(data):
            fix = "Bind one entry for each datum of the call."
            raise LossInputError(name, f"{len(data)} entries, one per datum", str(len(given)), fix)
    else:
        given = fields(data, name)
        missing = next((i for i, value in enumerate(given) if value is None), None)
        if missing is not None:
            got, fix = "nothing bound and nothing in the datum", missing_column_fix(name)
            raise LossInputError(name, "one row per datum", got, fix, datum=missing)
    return as_column(name, given, rows, with_graph=with_graph)


def has_length(x: Any) -> bool:
    """Return whether ``len`` works, whatever the value's own method raises."""
    try:
        return len(x) >= 0
    except Exception:
        return False


def as_column(name: str, given: Any, rows: Rows = TOKENS, *, with_graph: bool = False) -> Any:
    """Convert a column to a list of B rows, or to one array ``[B]`` if each datum has a number."""
    if isinstance(given, (Tensor, np.ndarray)) and given.ndim == 1:
        return check_one_number_each(name, as_row(given, name, None), rows)
    datum_rows = as_rows(given, name, with_graph=with_graph)
    ranks = {row.ndim for row in datum_rows}
    if 0 not in ranks:
        return datum_rows
    if ranks != {0}:
        number = next(i for i, row in enumerate(datum_rows) if row.ndim == 0)
        expected = "a row for each datum, or a number for each"
        raise LossInputError(name, expected, "a number among rows", "Use one form.", datum=number)
    if any(isinstance(row, Tensor) for row in datum_rows):
        numbers = list(map(as_tensor, datum_rows))
        return check_one_number_each(name, torch.stack(on_one_device(numbers, numbers[0].device)), rows)
    return check_one_number_each(name, np.stack(datum_rows), rows)


def check_one_number_each(name: str, given: Values, rows: Rows) -> Values:
    """Return a column ``[B]`` with one number for each datum if this column may have that form, else refuse it.

    Advantages may, and so may ``DATUM_COLUMNS``. In a loss over sequences, so may a column of its own.
    """
    if not may_be_number(name, rows):
        fix = f"Only advantages, {', '.join(DATUM_COLUMNS)} may be one number for each datum."
        raise LossInputError(name, "a row for each datum", "a number for each", fix)
    return given


def may_be_number(name: str, rows: Rows) -> bool:
    """Return whether a column may have one number for each datum."""
    per_token = ("weights", "target_tokens", *LOGPROB_COLUMNS, *MODEL_COLUMNS)
    is_label = rows is SEQUENCES and name not in per_token and not name.endswith("_weights")
    return name in ("advantages", *DATUM_COLUMNS) or is_label


def find_weights(data: Sequence[Any], columns: Mapping[str, Any], reads: Sequence[str]) -> Any:
    """Return the weights, or None if all weights are 1.

    They are 1 for RL datums: these have per-token ``advantages`` and no weights. A datum without weights that has a
    ``mask`` or a ``loss_mask`` is refused, since the mask would have no effect.
    """
    if "weights" in columns:
        return find_column("weights", data, columns)
    given = fields(data, "weights")
    missing = next((i for i, value in enumerate(given) if value is None), None)
    if missing is None:
        return as_column("weights", given)
    masks = [name for name in ("mask", "loss_mask") if name in data[missing].loss_fn_inputs]
    advantages = fields(data, "advantages")
    has_advantages = "advantages" in reads and all(a is not None for a in advantages)
    is_rl_batch = has_advantages and all(w is None for w in given) and not masks
    if not is_rl_batch or any(row.ndim != 1 for row in as_rows(advantages, "advantages")):
        fix = f"Its {masks[0]!r} is not read: pass it as weights." if masks else MISSING_COLUMN_FIX["weights"]
        raise LossInputError("weights", "a row for each datum", "loss_fn_inputs without weights", fix, datum=missing)
    return None


def fields(data: Sequence[Any], name: str) -> list[Any]:
    """Return the value of a field for each datum, or None for a datum without this field."""
    inputs = [datum.loss_fn_inputs for datum in data]
    first, *others = DATUM_FIELDS.get(name, (name,))
    values = [x.get(first) for x in inputs]
    for other in others:
        values = [x.get(other) if value is None else value for value, x in zip(values, inputs)]
    return values


def as_rows(values: Any, name: str, *, with_graph: bool = False) -> list[Values]:
    """Convert each datum's row to an array or a tensor, which is detached unless its graph is to be kept."""
    kind, *others = set(map(type, values))
    if not others and kind.__name__ == "TensorData":  # ours, or an SDK's: no need to check each
        return [value.to_numpy() for value in values]
    return [as_row(value, name, i, with_graph=with_graph) for i, value in enumerate(values)]


def as_row(value: Any, name: str, datum: int | None, *, with_graph: bool = False) -> Values:
    """Convert one row to an array or a tensor, which is detached unless its graph is to be kept.

    A ``None`` among the numbers becomes nan.
    """
    if isinstance(value, Tensor) and is_plain(value):
        return value if with_graph else value.detach()
    try:
        row = np.asarray(value.to_numpy() if hasattr(value, "to_numpy") else value)
        if row.dtype == object and row.ndim and all(x is None or is_real(x) for x in row.flat):
            row = row.astype(np.float64)
        if row.dtype.kind in "fiub" and not isinstance(value, Tensor):
            if row.dtype.char not in TORCH_TYPES or not row.dtype.isnative:
                return row.astype(np.float64)
            return row.copy() if row.ndim and min(row.strides) < 0 else row
    except Exception:  # whatever the value's own to_numpy raises
        pass
    got, fix = f"a {type(value).__name__} that is no rectangular array of numbers", "Use a list, array or tensor."
    fix = "Number the groups of the batch from 0." if name == "groups" else fix
    raise LossInputError(name, "a number or a row of numbers", got, fix, datum=datum)


def as_tensor(row: Values) -> Tensor:
    """Return a row as a tensor; an array is copied, since torch warns of one that is not writable."""
    return row if isinstance(row, Tensor) else torch.tensor(row)


def is_plain(x: Tensor) -> bool:
    """Return whether a tensor is a dense array of real numbers with storage. Otherwise even its shape may raise."""
    return x.layout == torch.strided and not (x.is_complex() or x.is_meta or x.is_nested or x.is_quantized)


def tensor_form(x: Tensor) -> str:
    """Describe a tensor of any form, for an error message."""
    kind = "nested" if x.is_nested else "quantized" if x.is_quantized else "meta" if x.is_meta else ""
    layout = "" if x.layout == torch.strided else str(x.layout).removeprefix("torch.")
    shape = "" if x.is_nested else f" of shape {tuple(x.shape)}"
    return " ".join(["a", *filter(None, [kind, layout, str(x.dtype), "tensor"])]) + shape


def truncate(shapes: Shapes, table: dict[str, Any]) -> tuple[Shapes, dict[str, Any]]:
    """Cut all columns of a datum, and the shape of its logprobs, to the length of the shortest."""
    by_row = {name: rows for name, rows in table.items() if isinstance(rows, list)}  # a number for a datum needs no cut
    if len(shapes[0]) == 2:
        by_row = {name: [as_matrix(row, shape[1]) for row, shape in zip(rows, shapes)] for name, rows in by_row.items()}
    # For each datum: the length of its shortest column or of its logprobs.
    shortest = [min(shape[0], *map(len, rows)) for shape, *rows in zip(shapes, *by_row.values())]
    cut = {name: [row[:n] for row, n in zip(rows, shortest)] for name, rows in by_row.items()}
    return [(n, *shape[1:]) for shape, n in zip(shapes, shortest)], table | cut


def as_matrix(row: Values, k: int) -> Values:
    """Reshape a flat list of N·K entries to ``[N, K]``."""
    return row.reshape(-1, k) if row.ndim == 1 and k and len(row) % k == 0 else row


def concatenate(logprobs_list: Sequence[Tensor]) -> Tensor:
    """Lay all logprobs end to end, in float32 at least, without a copy if they are the parts of one leaf."""
    flat = common_leaf(logprobs_list)
    if flat is None:
        flat = torch.cat([lp if lp.ndim == 1 else lp.flatten() for lp in logprobs_list])
    return flat.flatten().to(torch.promote_types(flat.dtype, torch.float32))


def common_leaf(logprobs_list: Sequence[Tensor]) -> Tensor | None:
    """Return the leaf whose ``torch.split`` returned exactly these tensors, in this order; else None.

    The gradient can then go to the leaf at once, instead of to thousands of parts.
    """
    split = logprobs_list[0].grad_fn
    if split is None or split.name() not in ("SplitWithSizesBackward0", "SplitBackward0"):
        return None
    # Only the AccumulateGrad node of a leaf has `variable`.
    leaf: Tensor | None = getattr(split.next_functions[0][0], "variable", None)
    if leaf is None or leaf.shape[1:] != logprobs_list[0].shape[1:]:
        return None
    for i, lp in enumerate(logprobs_list):
        # A hook or retain_grad on a part would get no gradient, since the graph does not pass through the part.
        if lp.grad_fn is not split or lp.output_nr != i or lp._backward_hooks or lp.retains_grad:
            return None
    return leaf if sum(lp.numel() for lp in logprobs_list) == leaf.numel() else None


def flatten_column(
    name: str, column: Any, shapes: Shapes, lengths: Tensor, like: Tensor, rows: Rows = TOKENS
) -> Tensor:
    """Lay a column end to end, in the dtype and on the device of ``like``: ``[N]``. None becomes ones."""
    if column is None:
        return like.new_ones(int(lengths.sum()))
    if not isinstance(column, list):
        numbers = to_device(as_tensor(column), like.device, like.dtype)
        return torch.repeat_interleave(numbers, to_device(lengths, like.device), output_size=int(lengths.sum()))
    if [row.shape for row in column] != shapes:
        column = [align_row(row, shape, name, i, rows) for i, (row, shape) in enumerate(zip(column, shapes))]
    if len(shapes[0]) > 1:
        column = [row.reshape(-1) for row in column]
    if any(issubclass(kind, Tensor) for kind in set(map(type, column))):
        flat = torch.cat(on_one_device(list(map(as_tensor, column)), like.device))
    else:
        flat = torch.from_numpy(np.concatenate(column))
    return to_device(flat, like.device, like.dtype)


def on_one_device(rows: list[Tensor], device: torch.device) -> list[Tensor]:
    """Return rows that are on one device already as they are; move rows of several devices to ``device``."""
    return rows if len({row.device for row in rows}) == 1 else [to_device(row, device) for row in rows]


def align_row(row: Values, shape: Sequence[int], name: str, datum: int, rows: Rows = TOKENS) -> Values:
    """Return the row if it has the logprobs' shape, or lists the entries of ``[N, K]`` row-major; else refuse it."""
    shape = tuple(shape)
    if tuple(row.shape) == shape or (row.ndim == 1 and len(shape) == 2 and len(row) == prod(shape)):
        return row
    if len(shape) == 2 or row.ndim != 1:
        expected, got = f"shape {shape}, that of logprobs", f"shape {tuple(row.shape)}"
        raise LossInputError(
            name, expected, got, "Give one number for each entry of the logprobs, row-major.", datum=datum
        )
    if len(row) == 1 and may_be_number(name, rows):
        expected = f"{shape[0]} values (the length of logprobs), or one number for each datum"
        raise LossInputError(name, expected, "a row of 1", f"Bind a flat list: {name}=[...].", datum=datum)
    fix = {
        1: "It has one entry for each token: drop the first entry, as position j holds token j + 1.",
        -1: "It looks shifted twice: weights and targets must be shifted by one, once.",
    }.get(
        len(row) - shape[0],
        'Every row has the length of target_tokens; align="truncate" cuts all to the shortest.',
    )
    expected = f"{shape[0]} values (the length of logprobs)"
    raise LossInputError(name, expected, str(len(row)), fix, datum=datum)
