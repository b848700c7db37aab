"""``sum_losses``: a sum of losses, each over a denominator of its own and with weights of its own."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from lossfns.checks import check_number
from lossfns.errors import LossInputError, did_you_mean, show
from lossfns.loss import BoundLoss, Loss, count_of, name_or_repr
from lossfns.parts import Part, widest_rows
from lossfns.tokens import TARGETS, Tokens


def sum_losses(
    *, coefficients: Mapping[str, float] | None = None, weights: Mapping[str, str] | None = None, **losses: Loss
) -> Loss:
    """L = Σ c·N/D over the parts: a numerator and a denominator for each loss.

    The result is a loss like any other: it has every form of call, and any split of a batch is exact. Each part trains
    the tokens of its own weights. The first part takes its weights from the column ``weights``, a part ``ce`` from the
    column ``ce_weights``. A column that several parts read is one column. Where the weights of a part are 0, the values
    of the columns do not matter to this part. A part without an active token in a batch adds 0.

    ``denominator(data)`` returns a tensor ``[parts]``, which adds over micro-batches and ranks, and which
    ``bind(denominator=)`` accepts. Metrics are ``loss``, the counts of the batch, and every metric of a part under the
    name of the part, as in ``ce/nll``. ``ce/loss`` is not multiplied by the coefficient, which is ``ce/coefficient``.

    Args:
        coefficients: c of each part, a finite number; 1 where it is left out.
        weights: the column of a part's weights, if it is not the usual one. Several parts may share a column; at least
            one part has ``weights``.
        losses: the parts by name. A name is an identifier. Parts over pairs, sequences and tokens can be summed, and
            read the same datums. A part over ``[N, K]`` can be summed only with others over ``[N, K]``.

    Raises:
        LossInputError: if there is no part, or if a name, a coefficient or a column of weights is invalid.

    >>> import torch
    >>> from lossfns import cross_entropy, reinforce
    >>> loss_fn = sum_losses(rl=reinforce(), ce=cross_entropy(), coefficients={"ce": 0.5})
    >>> logprobs = torch.tensor([[-1.0, -2.0, -4.0]])
    >>> rl, ce = torch.tensor([[0, 1, 1]]), torch.tensor([[1, 0, 0]])
    >>> loss, metrics = loss_fn.padded(logprobs, rl, ce_weights=ce, advantages=torch.tensor([2.0]))
    >>> float(loss), metrics["rl/loss"], metrics["ce/loss"]  # −2·(−2 − 4) / 2 + 0.5 · 1 / 1
    (6.5, 6.0, 1.0)
    """
    coefficients, weights = dict(coefficients or {}), dict(weights or {})
    if not losses:
        raise LossInputError("losses", "at least one loss", "none", "Name each: sum_losses(rl=grpo(), ce=...).")
    for knob, setting in (("coefficients", coefficients), ("weights", weights)):
        for name in setting:
            if name not in losses:
                raise LossInputError(knob, "names of the parts", show(name), did_you_mean(name, losses))
    parts: dict[str, Part] = {}
    for name, loss in losses.items():
        check_part(name, loss)
        coefficient = coefficients.get(name, 1.0)
        check_number(f"coefficients[{name!r}]", coefficient, "a finite number", lambda x: True, "Leave a part out.")
        parts[name] = Part(loss, float(coefficient), weights.get(name, f"{name}_weights" if parts else "weights"))
    columns = [part.weights for part in parts.values()]
    if "weights" not in columns:
        raise LossInputError(
            "weights", "a part whose column is 'weights'", show(weights), "Leave out that of one part."
        )
    reads = [name for loss in losses.values() for name in loss.reads]
    for column in columns:
        if not isinstance(column, str) or column in reads or not column.endswith("weights"):
            fix = "A name such as 'expert_weights', which no part reads as another column."
            raise LossInputError("weights", "columns of weights", show(column), fix)
    kinds = [loss.rows for loss in losses.values()]
    if TARGETS in kinds and set(kinds) != {TARGETS}:
        got, fix = ", ".join(kinds), "Logprobs are [N] or [N, K]: sum losses that take the same."
        raise LossInputError("losses", "losses of logprobs of one shape", got, fix)
    outputs = {loss.output for loss in losses.values()}
    if len(outputs) > 1:
        fix = "Sum the losses of each head by itself, and add the totals of the heads in your own code."
        raise LossInputError("losses", "losses of one output of the model", " and ".join(sorted(outputs)), fix)
    count = partial(counts, parts) if any(loss.count is not None for loss in losses.values()) else None
    knobs = {**losses, **{knob: x for knob, x in (("coefficients", coefficients), ("weights", weights)) if x}}
    columns = [column for column in columns if column != "weights"]
    reads = list(dict.fromkeys([*reads, *columns]))
    return Loss("sum_losses", knobs, tuple(reads), no_rows, no_rows, count, widest_rows(kinds), outputs.pop(), parts)


def with_shared_weights(loss: Loss) -> Loss:
    """Return a sum of losses whose parts all have the weights of the first. Any other loss stays as it is.

    >>> from lossfns import cross_entropy, reinforce
    >>> with_shared_weights(sum_losses(rl=reinforce(), ce=cross_entropy())).reads
    ('advantages',)
    """
    if not loss.parts:
        return loss
    losses = {name: part.loss for name, part in loss.parts.items()}
    coefficients = {name: part.coefficient for name, part in loss.parts.items()}
    return sum_losses(**losses, coefficients=coefficients, weights=dict.fromkeys(losses, "weights"))


def check_part(name: str, loss: Any) -> None:
    """Refuse a part that is no loss of one denominator, and a name that cannot begin the name of a column."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise LossInputError("losses", "names that are identifiers", show(name), "A name such as rl or ce.")
    if not isinstance(loss, Loss):
        fix = "Sum the losses, then call bind() or compiled()." if isinstance(loss, BoundLoss) else "Call the preset."
        raise LossInputError(name, "a Loss such as grpo()", name_or_repr(loss), fix)
    if loss.parts:
        fix = f"Pass its parts themselves: {', '.join(loss.parts)}."
        raise LossInputError(name, "a loss of one denominator", repr(loss), fix)


def counts(parts: Mapping[str, Part], t: Tokens) -> Tensor:
    """Return the denominators of the parts ``[parts]``; 1 for a raw sum."""
    ones = t.weights.new_ones(())
    each = [ones if part.loss.count is None else count_of(part.loss, part.view(t)) for part in parts.values()]
    return torch.stack([count.to(t.weights.dtype) for count in each])


def no_rows(t: Tokens) -> NoReturn:
    """Refuse a request for the terms or shares of a sum: each part has rows of its own."""
    fix = "Take its parts one by one: loss.bind(...).by_part(data)[name]."
    raise LossInputError("loss", "a loss of one denominator", "a sum of losses", fix)
