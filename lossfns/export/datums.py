"""Two other contracts of a loss: a traced function of one datum, and a hosted service's built-in.

Both put share / denominator into the datums. A service that only sums over tokens then computes exactly the
weighed loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial, reduce
from math import prod
from operator import add
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossfns import terms as eq
from lossfns.combine import tis_log_weight
from lossfns.datum import TensorData
from lossfns.deferred import add_part_name, join_numbers, not_divisible
from lossfns.errors import LossInputError, add_loss_name
from lossfns.export.builtins import BUILTINS, CLIP, builtin_name
from lossfns.loss import BoundLoss, Loss, as_packed, check_terms, count_of, sum_of_rows
from lossfns.pack import Shapes, blank, check_data, pack, weight_rows
from lossfns.parts import divisor_or_one
from lossfns.segments import active_counts, sequence_level, sequence_value, to_tokens
from lossfns.tokens import ON_POLICY, TARGETS, Tokens
from lossfns.values import check_values, extremes

DatumFn = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def as_datum_fn(loss: Loss | BoundLoss) -> DatumFn:
    """Write a loss as a function of one datum, in the form of Tinker's ``create_custom_loss``.

    Args:
        loss: a loss of tokens, targets or sequences.

    Returns:
        ``fn(logprobs, weights, *reads) -> (0-d tensor, {"custom/<name>:sum": tensor})``, traceable by torch.fx. A sum
        of losses takes ``weights`` of its first part and ``<part>_weights`` of each other. A loss
        of sequences, and one with a sum over the sequence in its terms (``with_tis`` at ``sequence_level``), takes
        ``fn(logprobs, weights, share, *reads)``. Call it on the datums that ``with_denominators`` returns: the sum over
        them is the loss of the batch. Metrics are sums over the active rows: divide by ``custom/rows:sum``.

    Raises:
        LossInputError: if the loss is one of pairs, since a pair couples two datums.

    >>> from lossfns import ppo
    >>> as_datum_fn(ppo()).__code__.co_varnames
    ('logprobs', 'weights', 'advantages', 'old_logprobs')
    """
    loss = as_bound(loss).loss
    check_single_datums(loss, "as_datum_fn")
    if loss.parts:
        return sum_as_datum_fn(loss)

    def sums(t: Tokens, share: Tensor, active: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        result = loss.terms(t)
        if isinstance(t.weights, Tensor):
            check_terms(loss, t, result, share)
        term, statistics = result
        counted = active.to(torch.float32)
        totals = {name: sum_of_rows(name, statistics, counted) for name in statistics}
        metrics = {f"custom/{name}:sum": total for name, total in ({"rows": counted.sum()} | totals).items()}
        return (share * term).sum(), metrics

    def packed(logprobs: Tensor, weights: Tensor, columns: Sequence[Tensor]) -> Tokens:
        w = weights.flatten()
        active = w != 0
        blanked = {name: blank(x.flatten(), active) for name, x in zip(loss.reads, columns)}
        targets = logprobs.shape[-1] if loss.rows is TARGETS else 1
        return Tokens(blank(logprobs.flatten(), active), w, None, blanked, targets=targets)

    def of_tokens(logprobs: Tensor, weights: Tensor, *columns: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        t = packed(logprobs, weights, columns)
        return sums(t, t.weights, t.active)

    def of_tokens_with_share(
        logprobs: Tensor, weights: Tensor, share: Tensor, *columns: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        t = packed(logprobs, weights, columns)
        return sums(t, share.flatten(), t.active)

    def of_sequence(
        logprobs: Tensor, weights: Tensor, share: Tensor, *columns: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # with_denominators put the sequence's share at one token, and 0 at the others.
        sequence_share = share.sum(0, keepdim=True)
        return sums(packed(logprobs, weights, columns), sequence_share, sequence_share != 0)

    body = of_tokens_with_share if keeps_weights(loss) else of_tokens
    if not loss.rows.per_token:
        body = of_sequence
    return with_parameters(body, ("logprobs", *weight_fields(loss), *loss.reads), loss.name)


def with_parameters(body: DatumFn, parameters: Sequence[str], name: str) -> DatumFn:
    """Return a function with this name and these parameters, which are identifiers, that calls ``body``.

    The service reads the names of the parameters from the code object, and torch.fx reads their number.
    """
    names = ", ".join(parameters)
    fn: DatumFn = eval(f"lambda {names}: body({names})", {"body": body})
    fn.__name__ = fn.__qualname__ = name
    return fn


def weight_fields(loss: Loss) -> tuple[str, ...]:
    """Return the fields of a datum that hold weights and share / denominator."""
    return ("weights", "share") if keeps_weights(loss) else ("weights",)


def part_fields(loss: Loss) -> dict[str, dict[str, str]]:
    """Return for each part of a sum its weight fields, and the names that they have in the datums of the sum.

    The first part keeps its names. Those of another part begin with its own, even if parts share a column of weights:
    each has a denominator of its own.
    """
    prefixes = ["", *(f"{name}_" for name in [*loss.parts][1:])]
    return {
        name: {field: prefix + field for field in weight_fields(part.loss)}
        for prefix, (name, part) in zip(prefixes, loss.parts.items())
    }


def sum_as_datum_fn(loss: Loss) -> DatumFn:
    """Write a sum of losses as a function of one datum. Coefficients and denominators are in the weights."""
    fields = part_fields(loss)
    columns = [name for name in loss.reads if name not in loss.masks]
    parameters = ("logprobs", *(name for own in fields.values() for name in own.values()), *columns)
    functions = {name: as_datum_fn(part.loss) for name, part in loss.parts.items()}

    def body(*arguments: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        given = dict(zip(parameters, arguments))
        totals: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for name, part in loss.parts.items():
            names = ("logprobs", *fields[name].values(), *part.loss.reads)
            total, own = functions[name](*(given[each] for each in names))
            totals.append(total)
            metrics |= {key.replace("custom/", f"custom/{name}/", 1): x for key, x in own.items()}
        return reduce(add, totals), metrics

    return with_parameters(body, parameters, loss.name)


def check_single_datums(loss: Loss, name: str) -> None:
    """Refuse a loss of pairs or groups, or with a gradient through other columns, for an export of single datums."""
    if loss.gradient_columns:
        fix = "The service differentiates the logprobs alone: take with_sampled_entropy for an entropy bonus."
        got = f"{loss!r}, whose gradient goes through {loss.gradient_columns[0]}"
        raise LossInputError(name, "a loss of the logprobs and of constants", got, fix)
    if loss.rows.datums > 1 or loss.couples_groups:
        coupled = "which couples two" if loss.rows.datums > 1 else "which couples the datums of a group"
        fix = "Use it as a custom loss over the batch: forward_backward_custom(data, loss)."
        raise LossInputError(name, "a loss of single datums", f"{loss!r}, {coupled}", fix)


def keeps_weights(loss: Loss) -> bool:
    """Return whether the terms depend on the scale of a sequence's weights, which then cannot hold share / denominator.

    A mean over the sequence, as in gspo, does not depend on it; a sum, as in ``sequence_level``, does. The terms of
    some random sequences are compared with those of the same sequences under other weights.
    """
    return not loss.rows.per_token or sums_weights(loss) or any(terms_depend_on_scale(loss, seed) for seed in range(8))


def sums_weights(loss: Loss) -> bool:
    """Return whether a token weight of the loss is taken over sums. No draw need reach the threshold of a mask."""
    inner, levels = loss.knobs.get("loss"), getattr(loss.knobs.get("weight"), "levels", ())
    return sequence_level in levels or (isinstance(inner, Loss) and sums_weights(inner))


def terms_depend_on_scale(loss: Loss, seed: int) -> bool:
    """Return whether the terms of a random sequence change if its weights are multiplied."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.rand, PROBE_TOKENS, generator=g, dtype=torch.float64)
    logprobs, weights = -1 - draw(), 0.5 + draw()
    columns = {name: -1 - draw() for name in loss.reads}
    targets = 2 if loss.rows is TARGETS else 1
    one, other = (loss.terms(Tokens(logprobs, weights * by, None, columns, targets=targets))[0] for by in (1, 3))
    return not torch.allclose(one, other, rtol=1e-9, atol=1e-12)


PROBE_TOKENS = 6
"""Tokens of the sequences whose terms are compared. A function of a sum over six log-ratios shows among eight draws."""


def as_bound(loss: Loss | BoundLoss) -> BoundLoss:
    """Return the loss as a ``BoundLoss``, and refuse anything that is not a loss of this library."""
    if isinstance(loss, Loss):
        return loss.bind()
    if not isinstance(loss, BoundLoss):
        raise LossInputError("loss", "a Loss such as ppo()", f"{loss!r}", "Call the preset: ppo(), not ppo.")
    return loss


def with_denominators(loss: Loss | BoundLoss, data: Sequence[Any]) -> list[Any]:
    """Copy the datums with share / denominator as ``weights``, and add every column that the loss reads.

    For a loss of sequences, ``weights`` stay as they are, since its terms may read them. Its share / denominator is put
    into the field ``share``, at the first active token of each datum. A loss of tokens with a sum over the sequence in
    its terms keeps its ``weights``, too, and has a ``share`` for each token.

    Args:
        loss: a loss, with its side columns bound. For a chunk, bind the denominator of the whole batch, too.
        data: datums, which pass the same checks as in a call of the loss.

    Raises:
        LossInputError: if the loss is one of pairs, if a call of the loss would refuse the datums, or if
            ``align="truncate"`` or ``ON_POLICY`` is bound.
    """
    bound = as_bound(loss)
    check_single_datums(bound.loss, "with_denominators")
    if bound.loss.parts:
        return with_denominators_of_parts(bound, data)
    t, share, shapes = pack_share(bound, data)
    return with_columns(data, fields_of_share(bound.loss, t, share) | dict(t.columns), shapes)


def fields_of_share(loss: Loss, t: Tokens, share: Tensor) -> dict[str, Tensor]:
    """Return the weight fields ``[N]`` of a packed batch: ``weights``, and ``share`` where these stay as they are."""
    if not keeps_weights(loss):
        return {"weights": share}
    return {"weights": t.weights, "share": share if loss.rows.per_token else at_first_active(t, share)}


def with_denominators_of_parts(bound: BoundLoss, data: Sequence[Any]) -> list[Any]:
    """Copy the datums with coefficient·share / denominator of each part, and every column that a part reads."""
    loss, columns = bound.loss, dict[str, Tensor]()
    with add_loss_name(loss.name):
        t, shapes = pack_without_logprobs(bound, data)
        counts: Any = count_of(loss, t) if bound.divisor is None or loss.count is None else bound.divisor
        if loss.count is not None and not counts.any():
            raise not_divisible(0.0)
        for i, (name, part) in enumerate(loss.parts.items()):
            seen = part.view(t)
            share = part.coefficient * part.loss.share(seen)
            if part.loss.count is not None:
                if not (counts[i] > 0 or (counts[i] == 0 and not seen.active.any())):
                    raise not_divisible(float(counts[i]))
                share = share / divisor_or_one(counts[i])
            own = fields_of_share(part.loss, seen, share)
            columns |= {field: own[name_in_part] for name_in_part, field in part_fields(loss)[name].items()}
            for column, x in seen.columns.items():  # of parts that share a column, each has 0 where it is inactive
                columns[column] = torch.where(seen.active, x, columns.get(column, x))
    return with_columns(data, columns, shapes)


def pack_share(bound: BoundLoss, data: Sequence[Any]) -> tuple[Tokens, Tensor, Shapes]:
    """Pack a batch without its logprobs. Return it, share / denominator of each row, and the shape of each datum."""
    loss = bound.loss
    with add_loss_name(loss.name):
        t, shapes = pack_without_logprobs(bound, data)
        share = loss.share(t)
        if loss.count is not None:
            count = float(count_of(loss, t) if bound.divisor is None else bound.divisor)
            if not count > 0:
                raise not_divisible(count)
            share = share / count
    return t, share, shapes


def with_columns(data: Sequence[Any], columns: Mapping[str, Tensor], shapes: Shapes) -> list[Any]:
    """Copy the datums with these packed columns ``[N]`` as fields."""
    parts = {name: torch.split(x.cpu(), [prod(shape) for shape in shapes]) for name, x in columns.items()}
    return [
        with_fields(datum, {name: rows[i].reshape(shape).numpy() for name, rows in parts.items()})
        for i, (datum, shape) in enumerate(zip(data, shapes))
    ]


def at_first_active(t: Tokens, y: Tensor) -> Tensor:
    """Put each sequence's value at its first active token, and 0 elsewhere: ``[B] -> [N]``."""
    counts = active_counts(t)
    before = to_tokens(t, counts.cumsum(0) - counts)
    first = t.active & (t.active.cumsum(0) - before == 1)
    return torch.where(first, to_tokens(t, y), 0)


def pack_without_logprobs(bound: BoundLoss, data: Sequence[Any]) -> tuple[Tokens, Shapes]:
    """Pack a batch with zeros as logprobs, and check its values. Return it with the shape of each datum's rows."""
    loss = bound.loss
    if bound.align != "strict" or any(x is ON_POLICY for x in bound.columns.values()):
        got = "align='truncate'" if bound.align != "strict" else "old_logprobs=ON_POLICY"
        fix = "The service reads the datums, so each column must be a row of numbers as long as the datum."
        raise LossInputError("bind", "rows as the datums have them", got, fix)
    check_data(data, loss.rows)
    shapes: list[Sequence[int]] = [row.shape for row in weight_rows(data, loss.reads, bound.columns)]
    targets = [d.loss_fn_inputs.get("target_tokens") for d in data]
    if loss.rows is TARGETS:
        shapes = [shape if len(shape) == 2 or y is None else y.to_numpy().shape for shape, y in zip(shapes, targets)]
    zeros = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    t = pack(data, zeros, loss.reads, bound.columns, rows=loss.rows, masks=loss.masks)
    views = {name: (part.loss, part.weights, part.view(t)) for name, part in loss.parts.items()}
    for name, (own, weights, seen) in (views or {"": (loss, "weights", t)}).items():
        numbers = join_numbers(torch.float64, extremes(seen, own.rows))
        (extrema,) = numbers.tables(numbers.values.tolist())
        with add_part_name(name, weights) if views else nullcontext():
            check_values(extrema, partial(as_packed, seen), own.output, signed=own.signed)
    return t, shapes


def with_fields(datum: Any, fields: Mapping[str, np.ndarray]) -> Any:
    """Copy a datum with these fields as float32 tensors. Datum and tensors have the classes of the original."""
    own_class = type(datum.loss_fn_inputs.get("target_tokens"))
    tensor_class: Any = own_class if own_class.__name__ == "TensorData" else TensorData  # an SDK's, or ours
    new = {name: tensor_class.from_numpy(np.array(row, dtype=np.float32)) for name, row in fields.items()}
    return with_inputs(datum, {**datum.loss_fn_inputs, **new})


def with_only(datum: Any, names: Sequence[str]) -> Any:
    """Copy a datum with only these fields."""
    return with_inputs(datum, {name: datum.loss_fn_inputs[name] for name in names})


def with_inputs(datum: Any, inputs: Mapping[str, Any]) -> Any:
    """Make a datum of the same class, as the SDKs' classes take their arguments."""
    try:
        return type(datum)(datum.model_input, inputs)
    except (AttributeError, TypeError):
        got, fix = f"a {type(datum).__name__}", "Use Datum, or the class of an SDK."
        raise LossInputError("data", "datums that Datum(model_input, loss_fn_inputs) makes", got, fix) from None


class Folded(NamedTuple):
    """The arguments of ``forward_backward(data, loss_fn, loss_fn_config)``."""

    data: list[Any]
    loss_fn: str
    loss_fn_config: dict[str, float] | None


def fold(loss: Loss | BoundLoss, data: Sequence[Any]) -> Folded:
    """Write a loss as a hosted service's built-in, which needs one pass, by folding share / denominator into datums.

    The advantages (or the weights of a cross-entropy) are multiplied by share / denominator. The gradient is exactly
    that of the loss. The weight of ``with_tis`` is a constant, and is multiplied in as well.

    Args:
        loss: a loss, bound to its side columns.
        data: datums, which pass the same checks as in a call of the loss.

    Raises:
        LossInputError: if no built-in computes this loss. This holds for a loss with a KL penalty, a dual clip or a
            log-ratio cap, for ``dro`` (advantages cannot scale its penalty), for ``gspo_token`` if the weights within
            a sequence differ (the service's mean is over a mask), for a loss that couples datums, and for any loss
            that the services do not have.
    """
    bound = as_bound(loss)
    loss = bound.loss
    corrected = loss.knobs.get("loss") if loss.name == "with_tis" else None
    inner = corrected if isinstance(corrected, Loss) else loss
    name = builtin_name(inner)
    t, share, shapes = pack_share(bound, data)
    if corrected is not None:
        share = share * eq.importance_weight(tis_log_weight(t, loss.knobs["level"]), loss.knobs["cap"])
    if "sequence_ratio_mask" in BUILTINS[name].required:
        check_mask(t, loss)
    weighted = with_columns(data, {"weights": share, **t.columns}, shapes)
    for i, datum in enumerate(weighted):
        if "target_tokens" not in datum.loss_fn_inputs:
            fix = "Build it with datum_from_tokens."
            raise LossInputError("target_tokens", "the ids of the targets", "nothing", fix, datum=i, loss=loss.name)
    if name == "cross_entropy":
        return Folded([with_only(d, ("target_tokens", "weights")) for d in weighted], name, None)
    builtin = BUILTINS[name]
    folded = [advantages_times_weights(d, with_mask="sequence_ratio_mask" in builtin.required) for d in weighted]
    has_clip = CLIP.keys() <= builtin.config.keys()
    return Folded(folded, name, dict(zip(CLIP, inner.knobs["clip"])) if has_clip else None)


def check_mask(t: Tokens, loss: Loss) -> None:
    """Refuse weights that differ within a sequence, for a built-in whose sequence ratio is a mean over a mask."""
    differs = t.active & (t.weights != to_tokens(t, sequence_value(t, t.weights)))
    if differs.any():
        ends = t.ends
        datum = int(torch.searchsorted(ends, differs.nonzero()[0], right=True))
        fix = "The built-in's sequence ratio is a mean over a mask: use forward_backward_custom(data, loss)."
        got = "weights that differ"
        raise LossInputError("weights", "one weight for all trained tokens", got, fix, datum=datum, loss=loss.name)


def advantages_times_weights(datum: Any, *, with_mask: bool) -> Any:
    """Make a policy datum of the services: ``target_tokens``, old ``logprobs``, and ``advantages`` times weights."""
    weights, advantages, old = (datum.loss_fn_inputs[n].to_numpy() for n in ("weights", "advantages", "old_logprobs"))
    active = weights != 0
    fields = {"logprobs": np.where(active, old, 0), "advantages": np.where(active, advantages, 0) * weights}
    mask = {"sequence_ratio_mask": active} if with_mask else {}
    return with_only(with_fields(datum, fields | mask), ("target_tokens", *fields, *mask))
