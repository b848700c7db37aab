"""``Loss``: a numerator over a denominator, both sums over rows. It is called as ``loss(data, logprobs_list)``."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lossfns.checks import LARGEST_FLOAT, check_denominator, is_huge, is_real
from lossfns.compiled import Measure, OneKernel
from lossfns.deferred import DeferredMetrics, Numbers, finalised, join_numbers, not_divisible
from lossfns.devices import to_device
from lossfns.errors import LossInputError, add_loss_name, did_you_mean, show, warn
from lossfns.metrics import ADDITIVE, DIVIDED, with_prefix
from lossfns.pack import (
    as_row,
    as_tensor,
    check_align,
    check_differentiates,
    check_reads,
    find_column,
    is_plain,
    pack,
    pack_weights,
    tensor_form,
    weight_rows,
)
from lossfns.parts import Part, divisor_or_one
from lossfns.segments import active_counts
from lossfns.tensors import TensorBatch, blank_tensors, check_packed, check_padded
from lossfns.tokens import (
    COLUMNS,
    DATUM_COLUMNS,
    MODEL_COLUMNS,
    ON_POLICY,
    TOKEN_COLUMNS,
    TOKENS,
    Rows,
    Tokens,
    to_dtype,
)
from lossfns.values import extremes

Statistics = Mapping[str, Tensor]
"""One value for each row, detached, by name of the statistic: a dict, or ``OnDemand``."""
Terms = Callable[[Tokens], tuple[Tensor, Statistics]]
LossFn = Callable[[list[Any], list[Tensor]], tuple[Tensor, dict[str, float]]]
"""The contract: ``(data, logprobs_list) -> (loss, metrics)``."""

OUTPUTS = ("logprobs", "scores")
"""The outputs of a model that a loss may be a function of."""

METRICS = (*ADDITIVE, *DIVIDED, "denominator", "rows")
"""Metrics of every loss. A statistic cannot have one of these names."""


@dataclass(frozen=True, repr=False, eq=False)
class Loss:
    """L = Σ share·term / Σ count over the rows of a batch.

    Attributes:
        name, knobs: the preset and its arguments, for ``repr``, metrics and logs.
        reads: the columns that ``terms`` needs besides ``logprobs`` and ``weights``; identifiers, each once.
        terms: ``t -> (loss of each row, statistics of each row)``, pure torch on a packed batch ``t``.
        share: ``t -> coefficient of each row`` within its sequence or pair. It reads no logprobs.
        count: ``t -> this batch's part of the denominator``, which adds over micro-batches and ranks. It reads
            no logprobs. ``None`` makes the loss a raw sum, whose denominator is 1 however the batch is split.
        rows: the kind of row: ``"tokens"``, ``"targets"``, ``"pairs"`` or ``"sequences"`` (one for each datum).
        output: ``"logprobs"``, or ``"scores"`` of a value head or a reward head, which may have any sign.
        parts: the losses that a sum of losses adds up, by name; empty in any other loss. See ``sum_losses``.
        differentiates: the columns in ``reads`` that carry a gradient, like the logprobs. ``None``: the outputs of the
            model among them, ``entropy`` and ``sum_square_probs``. Terms get all other columns as constants, and a
            column that carries a gradient is refused if it comes without a graph while the logprobs have one.
    """

    name: str
    knobs: Mapping[str, Any]
    reads: tuple[str, ...]
    terms: Terms
    share: Callable[[Tokens], Tensor]
    count: Callable[[Tokens], Tensor] | None
    rows: Rows = TOKENS
    output: str = "logprobs"
    parts: Mapping[str, Part] = field(default_factory=dict)
    differentiates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", Rows.of(self.rows))
        if self.output not in OUTPUTS:
            hint = did_you_mean(str(self.output), OUTPUTS)
            raise LossInputError("output", " or ".join(map(repr, OUTPUTS)), show(self.output), hint)
        object.__setattr__(self, "reads", check_reads(self.reads))
        if self.differentiates is not None:
            object.__setattr__(self, "differentiates", check_differentiates(self.differentiates, self.reads))
        for name in ("terms", "share") if self.count is None else ("terms", "share", "count"):
            if not callable(getattr(self, name)):
                fix = "token_mean.share and token_mean.count are functions for share and count."
                raise LossInputError(name, "a function of a packed batch", repr(getattr(self, name)), fix)
        if not isinstance(self.name, str) or not isinstance(self.knobs, Mapping):
            got = f"{self.name!r} and {self.knobs!r}"
            raise LossInputError("name, knobs", "a string and a dict", got, "Without settings, pass knobs={}.")

    @property
    def signed(self) -> bool:
        """Whether weights may be negative: only in a plain likelihood, where they are coefficients."""
        return self.rows.per_token and not self.reads

    @property
    def masks(self) -> tuple[str, ...]:
        """The columns that hold weights of parts, besides ``weights``."""
        return tuple(dict.fromkeys(part.weights for part in self.parts.values() if part.weights != "weights"))

    @property
    def couples_groups(self) -> bool:
        """Whether the loss compares the datums of a group. All datums with one label must then be in one call."""
        return "groups" in self.reads

    @property
    def gradient_columns(self) -> tuple[str, ...]:
        """The columns that carry a gradient, like the logprobs; see ``differentiates``."""
        if self.differentiates is not None:
            return self.differentiates
        if self.parts:
            return tuple(dict.fromkeys(name for part in self.parts.values() for name in part.loss.gradient_columns))
        return tuple(name for name in self.reads if name in MODEL_COLUMNS)

    @functools.cached_property
    def kernel(self) -> Measure:
        """``measure`` for this loss, fused by ``torch.compile``."""
        return OneKernel(measure)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={name_or_repr(value)}' for name, value in self.knobs.items())})"

    def __call__(self, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Return the 0-d loss and a dict of metrics. Every column is read from the datums."""
        return BoundLoss(self)(data, logprobs_list)

    def bind(self, /, **columns: Any) -> BoundLoss:
        """Bind side columns, and optionally ``denominator=``, ``align=`` or ``grad_l1=``; see ``BoundLoss``."""
        return BoundLoss(self).bind(**columns)

    def denominator(self, data: Sequence[Any] | Tensor, *, layout: str | None = None) -> Any:
        """Return this batch's part of the denominator; see ``BoundLoss.denominator``."""
        return BoundLoss(self).denominator(data, layout=layout)

    def padded(self, logprobs: Any, weights: Any, **options: Any) -> tuple[Tensor, dict[str, float]]:
        """Return loss and metrics of a padded batch ``[B, T]``.

        Options are ``layout=``, ``denominator=`` and the columns that the loss reads; see ``BoundLoss.padded``.
        """
        return BoundLoss(self).padded(logprobs, weights, **options)

    def packed(self, logprobs: Any, weights: Any, **options: Any) -> tuple[Tensor, dict[str, float]]:
        """Return loss and metrics of a packed batch ``[N]``.

        Options are ``lengths=`` or ``cu_seqlens=``, ``layout=``, ``denominator=`` and the columns that the loss reads;
        see ``BoundLoss.packed``.
        """
        return BoundLoss(self).packed(logprobs, weights, **options)

    def deferred(self) -> DeferredLoss:
        """Return the loss without any transfer to the host; see ``DeferredLoss``."""
        return BoundLoss(self).deferred()

    def compiled(self) -> BoundLoss:
        """Return the loss as one fused kernel; see ``BoundLoss.compiled``."""
        return BoundLoss(self).compiled()


def name_or_repr(value: Any) -> str:
    """Return a function's name, or the ``repr`` of any other value."""
    return getattr(value, "__name__", repr(value))


def evaluate(loss: Loss, t: Tokens, denominator: Tensor | float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Reduce a packed batch to Σ share·term / denominator, the only reduction of the library.

    Args:
        loss: the loss. Its ``count(t)`` is the denominator unless one is given. A raw sum is never divided.
        t: a packed batch.
        denominator: the count of the whole batch, if ``t`` is a part of it. A sum of losses takes a tensor with one
            count for each part.

    Returns:
        The 0-d loss, and a dict of 0-d sums over the active rows: their number as ``rows``, and each statistic. In a
        sum of losses the names begin with the name of the part, as in ``rl/rows``.

    Raises:
        LossInputError: if the terms, the statistics or the share do not have one number for each row, or if a statistic
            has the name of a metric.
    """
    if not isinstance(loss, Loss) or not isinstance(t, Tokens):
        fix = "pack(data, logprobs_list, loss.reads, columns) returns a packed batch."
        raise LossInputError("evaluate", "a Loss and a packed batch", f"{show(loss)} and {show(t)}", fix)
    missing = [name for name in loss.reads if name not in t.columns]
    if missing:
        fix = "Pack it with reads=loss.reads."
        raise LossInputError("t", "a batch with every column that the loss reads", f"none called {missing[0]}", fix)
    if loss.parts:
        total, (sums,) = add_parts(loss, t, denominator, evaluate_part)
        return total, sums
    result, share = loss.terms(t), loss.share(t)
    if isinstance(t.weights, Tensor):  # else torch.fx traces, and nothing has a shape
        check_terms(loss, t, result, share)
    term, statistics = result
    total = torch.dot(share.to(term.dtype), term)
    del result, term  # frees memory, in which the statistics are then computed
    if loss.count is not None:
        if denominator is None:
            denominator = count_of(loss, t)
        elif isinstance(t.weights, Tensor):
            denominator = as_denominator(denominator)
        total = total / denominator
    # A pair or a sequence is active if its share is not 0.
    active = to_dtype(t.active if loss.rows.per_token else share != 0, total.dtype)
    sums = {name: sum_of_rows(name, statistics, active) for name in statistics}
    return total, {"rows": active.sum(), **sums}


Tables = tuple[dict[str, Tensor], ...]
"""Tables of 0-d tensors by name."""


def evaluate_part(loss: Loss, t: Tokens, denominator: Tensor | float) -> tuple[Tensor, Tables]:
    """Return the loss of one part of a sum, and its sums as the only table."""
    total, sums = evaluate(loss, t, denominator)
    return total, (sums,)


def add_parts(
    loss: Loss, t: Tokens, denominators: Any, function: Callable[[Loss, Tokens, Any], tuple[Tensor, Tables]]
) -> tuple[Tensor, Tables]:
    """Return Σ coefficient·loss over the parts of a sum, and the tables of all parts, in which each name has a prefix.

    Args:
        loss: a sum of losses.
        t: a packed batch.
        denominators: for each part the count of the whole batch, or None for the counts of ``t``. Where one is 0, no
            row of the batch is of this part, and its loss is 0.
        function: ``evaluate_part`` or ``measure_part``, which is called for each part.
    """
    if loss.count is None:
        denominators = None  # no part has one
    if denominators is not None and not isinstance(denominators, Tensor):
        denominators = as_divisors(denominators, loss)
    if denominators is not None:  # a float64 would make the loss one
        denominators = to_device(denominators, t.weights.device, t.weights.dtype)
    totals, tables = [], []
    for i, (name, part) in enumerate(loss.parts.items()):
        seen = part.view(t)
        if part.loss.count is None:
            divisor = 1.0
        else:
            divisor = divisor_or_one(count_of(part.loss, seen) if denominators is None else denominators[i])
        total, own = function(part.loss, seen, divisor)
        totals.append(part.coefficient * total)
        tables.append([with_prefix(name, table) for table in own])
    joined = tuple(functools.reduce(operator.or_, same) for same in zip(*tables))
    return functools.reduce(operator.add, totals), joined


def count_of(loss: Loss, t: Tokens) -> Tensor:
    """Return this batch's part of the denominator. Refuse a count that is no scalar."""
    assert loss.count is not None  # a raw sum has none
    count: Any = loss.count(t)
    if loss.parts:
        return count  # type: ignore[no-any-return]  # one of each part, which has been checked
    if isinstance(t.weights, Tensor) and not (isinstance(count, Tensor) and is_plain(count) and count.ndim == 0):
        if not is_real(count) or is_huge(count) or LARGEST_FLOAT < abs(float(count)) < math.inf:
            got = f"shape {tuple(count.shape)}" if isinstance(count, Tensor) and is_plain(count) else show(count)
            raise LossInputError("count", "a 0-d tensor or a number", got, "Sum over the batch.", loss=loss.name)
        return t.weights.new_full((), float(count))
    counted: Tensor = count
    return counted


def as_denominator(denominator: Any) -> Any:
    """Return a denominator. Refuse anything but a number above 0, or a 0-d tensor.

    The value of a tensor is not read here, since it may be on a device.
    """
    if isinstance(denominator, Tensor) and is_plain(denominator) and denominator.ndim == 0:
        return denominator
    check_denominator(denominator)
    return float(denominator)


def as_divisor(denominator: Any, loss: Loss) -> Tensor | float:
    """Return a denominator to bind. A tensor on a device stays there, and is checked when the metrics are read."""
    if loss.parts and loss.count is not None:
        return as_divisors(denominator, loss)
    if isinstance(denominator, Tensor) and is_plain(denominator) and denominator.numel() == 1:
        on_device = denominator.device.type != "cpu"
        denominator = denominator.detach().reshape(()) if on_device else denominator.item()
    return as_denominator(denominator)  # type: ignore[no-any-return]


def as_divisors(denominators: Any, loss: Loss) -> Tensor:
    """Return the denominators of the parts of a sum as a tensor. On the host, refuse any that cannot divide."""
    names = ", ".join(loss.parts)
    expected = f"{len(loss.parts)} finite numbers of at least 0, not all 0: one for each of {names}"
    fix = "Take them from loss.denominator(whole_batch)."
    try:
        x = as_tensor(as_row(denominators, "denominator", None))
    except LossInputError:
        raise LossInputError("denominator", expected, show(denominators), fix) from None
    if x.shape != (len(loss.parts),):
        raise LossInputError("denominator", expected, f"shape {tuple(x.shape)}", fix)
    if x.device.type == "cpu" and not (bool((x.isfinite() & (x >= 0)).all()) and bool(x.any())):
        raise LossInputError("denominator", expected, show(x.tolist()), fix)
    return x if x.device.type != "cpu" else x.double()


def check_terms(loss: Loss, t: Tokens, result: Any, share: Any) -> None:
    """Refuse results of a user's loss that have the wrong shape, and statistics with the name of a metric."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        fix = "Return (term, {}) if there are no statistics."
        raise LossInputError(
            "terms", "the loss of each row, and a dict of statistics", f"a {type(result).__name__}", fix
        )
    term, statistics = result
    shape = t.logprobs.shape if loss.rows.per_token else (t.sequences // loss.rows.datums,)
    check_rows("terms", term, shape)
    check_rows("share", share, shape)
    if not term.is_floating_point():
        raise LossInputError("terms", "floating point numbers", str(term.dtype), "Compute them from the logprobs.")
    for name in statistics:
        if not isinstance(name, str) or name in METRICS or name.endswith(":sum"):
            fix = f"Rename it: a call returns {', '.join(METRICS)} itself, and sums end in ':sum'."
            raise LossInputError("statistics", "names that are no metric of every loss", repr(name), fix)


def sum_of_rows(name: str, statistics: Statistics, active: Tensor) -> Tensor:
    """Return the sum of a statistic over the active rows."""
    x = statistics[name]
    if isinstance(active, Tensor):  # else torch.fx traces
        check_rows(name, x, active.shape)
    return torch.dot(active, to_dtype(x.detach(), active.dtype))


def check_rows(name: str, x: Any, shape: Sequence[int]) -> None:
    """Refuse anything but a tensor of this shape."""
    if not isinstance(x, Tensor) or not is_plain(x) or x.shape != shape:
        got = tensor_form(x) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        fix = "Do not reduce it: share and count weigh the rows and divide their sum."
        raise LossInputError(name, f"a tensor of shape {tuple(shape)}, one number for each row", got, fix)


@dataclass(frozen=True)
class BoundLoss:
    """A ``Loss`` with its side columns, as ``forward_backward_custom(data, loss_fn)`` takes it.

    Attributes:
        loss: the loss.
        columns: side columns by name, each with one row or one number for each datum. They replace the datums' own.
        divisor: the denominator of the whole batch, if calls get parts of it. None: the count of the batch of the call.
            In a sum of losses it is a tensor with a denominator for each part.
        align: ``"strict"``, or ``"truncate"`` to cut all columns of a datum to the length of its shortest.
        grad_l1: whether to add the metric ``grad_l1``, Σ|∂L/∂logprob|.
        measure: the function that computes loss and metrics: ``measure``, or the ``kernel`` of the loss.
    """

    loss: Loss
    columns: Mapping[str, Any] = field(default_factory=dict)
    divisor: Tensor | float | None = None
    align: str = "strict"
    grad_l1: bool = False
    measure: Measure = field(default_factory=lambda: measure, repr=False)  # a lambda, since it is defined below

    def __post_init__(self) -> None:
        if not isinstance(self.loss, Loss):
            fix = "Call the preset, and bind: ppo().bind(advantages=...)."
            raise LossInputError("loss", "a Loss such as ppo()", name_or_repr(self.loss), fix)

    def bind(
        self,
        /,
        *,
        denominator: Any = None,
        align: str | None = None,
        grad_l1: bool | None = None,
        **columns: Any,
    ) -> BoundLoss:
        """Return a copy with these columns and options. They replace those that are bound already.

        Args:
            denominator: the denominator of the whole batch, if calls get parts of it: a number above 0, or a tensor of
                one number. A sum of losses takes one for each part: an array, or a tensor ``[parts]``. A tensor on a
                device is checked when the metrics are read.
            align: ``"strict"`` or ``"truncate"``; see ``BoundLoss``.
            grad_l1: whether to add the metric ``grad_l1``.
            columns: columns by name, for datums or for tensors, whichever the loss is then called with.

        Raises:
            LossInputError: if a name is no column of the loss, or an option is malformed.

        >>> from lossfns import reinforce
        >>> reinforce().bind(denominator=4).bind(denominator=8).divisor
        8.0
        """
        with add_loss_name(self.loss.name):
            check_bound(self.loss, columns, align, grad_l1)
            return replace(
                self,
                columns={**self.columns, **columns},
                divisor=self.divisor if denominator is None else as_divisor(denominator, self.loss),
                align=align or self.align,
                grad_l1=self.grad_l1 if grad_l1 is None else grad_l1,
            )

    @property
    def gradient_columns(self) -> tuple[str, ...]:
        """The columns that carry a gradient; see ``Loss.differentiates``."""
        return self.loss.gradient_columns

    def denominator(self, data: Sequence[Any] | Tensor, *, layout: str | None = None) -> Any:
        """Return this batch's part of the denominator, even if one is bound: a float, which is 1 for a raw sum.

        It needs no logprobs, and adds over micro-batches and ranks. A sum of losses returns a tensor ``[parts]`` in
        float64 on the host, with the denominator of each part.

        Args:
            data: the datums, or the weights of a padded batch: ``[B, T]``, or ``[B, T, K]``. The weights of other
                parts of a sum are then those that are bound.
            layout: for pairs in one tensor of weights: as for ``padded``.

        >>> from lossfns import sequence_mean, reinforce
        >>> reinforce(weigh=sequence_mean).denominator(torch.tensor([[1, 1], [1, 0], [0, 0]]))
        2.0
        """
        loss = self.loss
        if loss.count is None:
            return 1.0
        with add_loss_name(loss.name):
            if isinstance(data, Tensor):
                weights = as_tensor(as_row(data, "weights", None))
                zeros = torch.zeros(weights.shape, device=weights.device)
                batch = check_padded(zeros, weights, loss.masks, self.columns, rows=loss.rows, layout=layout)
                t = blank_tensors(replace(batch, masks=loss.masks))
            else:
                t = pack_weights(data, loss.reads, self.columns, rows=loss.rows, align=self.align, masks=loss.masks)
            counts = count_of(loss, t).cpu()
            if counts.isnan().any():
                raise not_divisible(math.nan)
        return counts.double() if loss.parts else float(counts)

    def __call__(self, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Return the 0-d loss and a dict of metrics."""
        with add_loss_name(self.loss.name):
            return self.evaluate_packed(self.pack(data, logprobs_list))

    def value(self, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Tensor:
        """Return the loss, without metrics and without checks of values. Nothing is copied to the host."""
        with add_loss_name(self.loss.name):
            return evaluate(self.loss, self.pack(data, logprobs_list), self.divisor)[0]

    def pack(self, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Tokens:
        """Pack the batch into the form that the loss's terms read."""
        loss = self.loss
        return pack(
            data,
            logprobs_list,
            loss.reads,
            self.columns,
            rows=loss.rows,
            align=self.align,
            masks=loss.masks,
            differentiates=loss.gradient_columns,
        )

    def part(self, which: slice) -> BoundLoss:
        """Return the loss for ``data[which]``: every bound column is cut to these datums."""
        columns = {name: x if x is ON_POLICY else x[which] for name, x in self.columns.items()}
        return replace(self, columns=columns)

    def by_part(self, data: Sequence[Any]) -> dict[str, BoundLoss]:
        """Return each part of a sum as a loss by itself, with its columns, its weights and its denominator.

        Σ coefficient·part(data, logprobs_list) over the parts is the loss. A part without a row has the denominator 1.
        """
        raw = self.loss.count is None
        counts = [1.0] * len(self.loss.parts) if raw else self.denominator(data).tolist()
        divisors = counts if raw or self.divisor is None else self.divisor.tolist()  # type: ignore[union-attr]
        bound = {}
        for (name, part), divisor in zip(self.loss.parts.items(), divisors):
            columns = {column: self.columns[column] for column in part.loss.reads if column in self.columns}
            if part.weights == "weights":
                columns["weights"] = weight_rows(data, self.loss.reads, self.columns)
            else:
                columns["weights"] = find_column(part.weights, data, self.columns, self.loss.rows)
            bound[name] = replace(self, loss=part.loss, columns=columns, divisor=divisor_or_one(divisor))
        return bound

    def padded(
        self, logprobs: Any, weights: Any, *, layout: str | None = None, denominator: Any = None, **columns: Any
    ) -> tuple[Tensor, dict[str, float]]:
        """Return loss and metrics of a padded batch.

        Args:
            logprobs: ``[B, T]`` logprobs of the targets, or ``[B, T, K]`` for a loss over K targets. For pairs also a
                tuple of two tensors ``[P, T]``, chosen and rejected, whose T may differ.
            weights: of the same shape: 0 for prompt and padding, on either side. A mask of any dtype is taken.
            layout: for pairs in one tensor: ``"interleaved"`` (the default: rows 2i and 2i + 1 are pair i) or
                ``"halves"`` (rows i and i + P).
            denominator: the denominator of the whole batch, if this is a part of it: the sum of all weights for
                ``token_mean``, and the number of sequences or pairs with an active token for means over these.
            columns: the columns that the loss reads, in the shape of the logprobs. Advantages may be ``[B]``. Weights
                and columns are constants, except those in ``loss.gradient_columns``, such as the ``entropy`` of a
                bonus: they are outputs of the model, as the logprobs are, and come with their graph.

        Raises:
            LossInputError: if any input is malformed.

        >>> from lossfns import reinforce
        >>> logprobs = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]], requires_grad=True)
        >>> mask = torch.tensor([[1, 1], [1, 0]])
        >>> loss, metrics = reinforce().padded(logprobs, mask, advantages=torch.tensor([1.0, -2.0]))
        >>> round(loss.item(), 4), metrics["tokens"]
        (0.6667, 3.0)
        """
        return finalised(
            DeferredLoss(self).padded(logprobs, weights, layout=layout, denominator=denominator, **columns)
        )

    def packed(
        self,
        logprobs: Any,
        weights: Any,
        *,
        lengths: Any = None,
        cu_seqlens: Any = None,
        layout: str | None = None,
        denominator: Any = None,
        **columns: Any,
    ) -> tuple[Tensor, dict[str, float]]:
        """Return loss and metrics of a packed batch, whose sequences lie end to end.

        Args:
            logprobs: ``[N]`` logprobs of the targets, or ``[N, K]`` for a loss over K targets. Where the last
                token of a sequence has an entry, its target is not of this sequence: give it weight 0.
            weights: of the same shape.
            lengths: ``[B]`` tokens of each sequence.
            cu_seqlens: ``[B + 1]``, in place of ``lengths``: 0 and the index after each sequence.
            layout: for pairs: ``"interleaved"`` (the default) or ``"halves"`` (all chosen sequences first).
            denominator: the denominator of the whole batch, if this is a part of it: the sum of all weights for
                ``token_mean``, and the number of sequences or pairs with an active token for means over these.
            columns: the columns that the loss reads, in the shape of the logprobs. Advantages may be ``[B]``. Weights
                and columns are constants, except those in ``loss.gradient_columns``, such as the ``entropy`` of a
                bonus: they are outputs of the model, as the logprobs are, and come with their graph.

        Raises:
            LossInputError: if any input is malformed.

        >>> from lossfns import reinforce
        >>> logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
        >>> loss, metrics = reinforce().packed(logprobs, torch.ones(3), lengths=[2, 1], advantages=[1.0, -2.0])
        >>> round(loss.item(), 4), metrics["sequences"]
        (0.6667, 2.0)
        """
        deferred = DeferredLoss(self).packed(
            logprobs,
            weights,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            layout=layout,
            denominator=denominator,
            **columns,
        )
        return finalised(deferred)

    def deferred(self) -> DeferredLoss:
        """Return the loss without any transfer to the host; see ``DeferredLoss``."""
        return DeferredLoss(self)

    def compiled(self) -> BoundLoss:
        """Return the loss fused with its metrics and its gradient by ``torch.compile``, in every form.

        The first call of a form compiles, which takes some seconds. Batches of other sizes are not compiled again. If
        torch.compile fails, or if the loss has learnable tensors of its own, it runs eagerly after a ``LossWarning``. A
        number that terms of your own read from outside is compiled anew when it changes, and after 8 times the loss
        runs eagerly: keep such a number in a tensor. ``backward(create_graph=True)`` raises a ``LossInputError``.
        """
        return replace(self, measure=self.loss.kernel)

    def evaluate_packed(self, t: Tokens) -> tuple[Tensor, dict[str, float]]:
        """Return loss and metrics of a packed batch. Metrics and checks of values share one transfer to the host."""
        return finalised(self.defer(as_packed, t))

    def defer(
        self, pack: Callable[[Any], Tokens], batch: Tokens | TensorBatch, checks: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, DeferredMetrics]:
        """Return loss and metrics of ``pack(batch)``. Nothing is copied to the host.

        Args:
            pack: ``as_packed`` for a batch of ``Tokens``, or ``blank_tensors`` for a ``TensorBatch``.
            batch: the batch.
            checks: 0-d tensors for ``check_values``, besides the extrema of the batch.
        """
        loss, sequences = self.loss, 1 if batch.lengths is None else len(batch.lengths)
        divisor = self.divisor
        if isinstance(divisor, Tensor) and loss.parts:  # a compiled loss takes tensors of one device
            divisor = to_device(divisor, batch.logprobs.device)
        total, numbers = self.measure(loss, pack, batch, divisor)
        extras = {**(checks or {}), **({"grad_l1": grad_l1(total, batch.logprobs)} if self.grad_l1 else {})}
        get_batch = functools.partial(pack, without_graph(batch, loss.gradient_columns))
        metrics = DeferredMetrics(
            loss.name,
            loss.rows,
            loss.output,
            loss.signed,
            self.divisor,
            sequences,
            get_batch,
            numbers,
            extras,
            loss.parts,
        )
        return total, metrics


def as_packed(t: Tokens) -> Tokens:
    """Return a batch that is packed and masked already."""
    return t


def without_graph(batch: Any, gradient_columns: Sequence[str]) -> Any:
    """Return a batch whose logprobs and columns are constants."""
    columns = {**batch.columns, **{name: batch.columns[name].detach() for name in gradient_columns}}
    return replace(batch, logprobs=batch.logprobs.detach(), columns=columns)


def measure(
    loss: Loss, pack: Callable[[Any], Tokens], batch: Any, divisor: Tensor | float | None
) -> tuple[Tensor, Numbers]:
    """Return the 0-d loss of ``pack(batch)``, and its numbers: totals, sums of statistics, and extrema."""
    total, tables = measure_part(loss, pack(batch), divisor)
    return total, join_numbers(total.dtype, *tables)


def measure_part(loss: Loss, t: Tokens, divisor: Tensor | float | None) -> tuple[Tensor, Tables]:
    """Return the 0-d loss of a packed batch, and its totals, sums of statistics, and extrema."""
    tokens = active_counts(t)
    totals = {"tokens": tokens.sum(), "sequences_empty": (tokens == 0).sum()}
    if loss.parts:
        total, (of_parts, sums, extrema) = add_parts(loss, t, divisor, measure_part)
        return total, ({"loss": total.detach(), **totals, **of_parts}, sums, extrema)
    count = {} if loss.count is None else {"count": count_of(loss, t)}
    total, sums = evaluate(loss, t, count.get("count") if divisor is None else divisor)
    return total, ({"loss": total.detach(), **totals, **count}, sums, extremes(t, loss.rows))


@dataclass(frozen=True)
class DeferredLoss:
    """A loss whose metrics stay on the device until ``finalise()`` is called, for CUDA graphs and pipelines.

    Each form of the call returns ``(loss, DeferredMetrics)`` and never waits for the device. ``finalise`` checks the
    values of the batch, and raises for a nan.

    >>> from lossfns import cross_entropy
    >>> logprobs = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    >>> loss, metrics = cross_entropy().deferred().padded(logprobs, torch.ones(1, 2))
    >>> metrics.tensors["nll"], metrics.finalise()["nll"]
    (tensor(2.), 2.0)
    """

    bound: BoundLoss

    def __call__(self, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, DeferredMetrics]:
        with add_loss_name(self.bound.loss.name):
            return self.bound.defer(as_packed, self.bound.pack(data, logprobs_list))

    def padded(
        self, logprobs: Any, weights: Any, *, layout: str | None = None, denominator: Any = None, **columns: Any
    ) -> tuple[Tensor, DeferredMetrics]:
        """See ``BoundLoss.padded``."""
        bound = self.bound.bind(denominator=denominator, **columns)
        loss = bound.loss
        with add_loss_name(loss.name):
            batch = check_padded(
                logprobs,
                weights,
                loss.reads,
                bound.columns,
                rows=loss.rows,
                layout=layout,
                differentiates=loss.gradient_columns,
            )
            return bound.defer(blank_tensors, replace(batch, masks=loss.masks))

    def packed(
        self,
        logprobs: Any,
        weights: Any,
        *,
        lengths: Any = None,
        cu_seqlens: Any = None,
        layout: str | None = None,
        denominator: Any = None,
        **columns: Any,
    ) -> tuple[Tensor, DeferredMetrics]:
        """See ``BoundLoss.packed``."""
        bound = self.bound.bind(denominator=denominator, **columns)
        loss = bound.loss
        with add_loss_name(loss.name):
            batch, checks = check_packed(
                logprobs,
                weights,
                loss.reads,
                bound.columns,
                rows=loss.rows,
                lengths=lengths,
                cu_seqlens=cu_seqlens,
                layout=layout,
                differentiates=loss.gradient_columns,
            )
            return bound.defer(blank_tensors, replace(batch, masks=loss.masks), checks)


def grad_l1(total: Tensor, logprobs: Tensor) -> Tensor:
    """Return Σ|∂L/∂logprob| over the batch."""
    if not total.requires_grad:
        fix = "Pass leaves with requires_grad=True, outside no_grad."
        raise LossInputError("logprobs_list", "tensors that require grad, for grad_l1", "constants", fix)
    return torch.autograd.grad(total, logprobs, retain_graph=True, materialize_grads=True)[0].abs().sum()


def check_bound(loss: Loss, columns: Mapping[str, Any], align: Any, grad_l1: Any) -> None:
    """Refuse a column that no loss has, and warn about one that this loss does not read."""
    known = {*COLUMNS, *TOKEN_COLUMNS, *DATUM_COLUMNS, *loss.reads}
    for name, value in columns.items():
        if name not in known:
            got, fix = f"the name {name!r}", did_you_mean(name, known | {"denominator", "align", "grad_l1"})
            raise LossInputError("bind", "the name of a column", got, fix)
        if value is None or (value is ON_POLICY and name != "old_logprobs"):
            fix = "Leave it out to read the datums' own."
            raise LossInputError(name, "one row per datum", show(value), fix)
        if name != "weights" and name not in loss.reads:
            warn(f"{loss!r} does not read {name}: binding it has no effect")
    if not isinstance(grad_l1, bool | None):
        raise LossInputError("grad_l1", "True or False", show(grad_l1), "True adds the metric grad_l1.")
    if align is not None:
        check_align(align)
