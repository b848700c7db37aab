"""Parts that the adapters share: checks of a loss against a trainer, the trainer's denominators, and metrics.

A trainer calls the loss through its hook. It passes padded tensors, and divides, sums or averages the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lossfns.deferred import DeferredMetrics
from lossfns.errors import LossInputError, show
from lossfns.export.datums import as_bound
from lossfns.export.token_gradient import TokenwiseTokens
from lossfns.loss import BoundLoss, Loss, Statistics
from lossfns.tokens import ON_POLICY, TOKENS, Tokens
from lossfns.weigh import Weighing, length_count, sequence_count, sequence_count_or_nan, weight_sum

NOT_PASSED_FIX = {
    "ref_logprobs": "Leave the penalty to the trainer's own KL setting, and take kl_beta=0.",
    "sampler_logprobs": "Leave with_tis out, and take the trainer's own correction, if it has one.",
}


def for_trainer(loss: Loss | BoundLoss, trainer: str, columns: Sequence[str]) -> BoundLoss:
    """Return the loss as the trainer will call it.

    Args:
        loss: a loss of tokens. ``compiled()`` and ``bind(old_logprobs=ON_POLICY)`` may have been called.
        trainer: name of the trainer, for messages.
        columns: the columns that the trainer passes.

    Raises:
        LossInputError: if the loss is not one of tokens, reads a column that the trainer does not have, or has a
            denominator or another column bound.
    """
    bound = as_bound(loss)
    if bound.loss.rows is not TOKENS:
        fix = "Call loss.padded in a training step of your own."
        got = f"{bound.loss!r}, over {bound.loss.rows}"
        raise LossInputError("loss", f"a loss of tokens, as the hook of {trainer} takes it", got, fix)
    given = {name: x for name, x in bound.columns.items() if x is not ON_POLICY}
    for name, x in {"denominator": bound.divisor, "grad_l1": bound.grad_l1 or None, **given}.items():
        if x is not None:
            fix = "Bind nothing but old_logprobs=ON_POLICY: the adapter passes what the trainer has."
            raise LossInputError(name, f"that of {trainer}", show(x), fix)
    for name in bound.loss.reads:
        if name not in columns and name not in bound.columns:
            expected = f"one of the columns of {trainer}: {', '.join(columns)}"
            raise LossInputError(name, expected, f"{bound.loss!r}, which reads it", NOT_PASSED_FIX.get(name, ""))
    return bound


def columns_for(bound: BoundLoss, trainer: str, **given: Any) -> dict[str, Any]:
    """Return the columns that the loss reads and does not have, by name. Refuse one that the trainer left out."""
    wanted = {name: given.get(name) for name in bound.loss.reads if name not in bound.columns}
    for name, x in wanted.items():
        if x is None:
            fix = f"Turn on the setting of {trainer} that computes it, or take a loss that does not read it."
            raise LossInputError(name, f"a tensor from {trainer}", "None", fix)
    return wanted


def is_weighed(weighed: Loss | Weighing, *weighings: Weighing) -> bool:
    """Return whether the loss has, or the weighing is, one of these weighings."""
    return any((weighed.share, weighed.count) == (weigh.share, weigh.count) for weigh in weighings)


def check_weighing(loss: Loss, trainer: str, *weighings: Weighing, fix: str) -> None:
    """Refuse a loss that has none of these weighings."""
    if not is_weighed(loss, *weighings):
        expected = f"{' or '.join(weigh.name for weigh in weighings)} in {trainer}"
        raise LossInputError("weigh", expected, f"{loss!r}", fix)


def fixed_length_of(weighed: Loss | Weighing) -> float | None:
    """Return L of ``fixed_length(L)``, or of a loss that is weighed by it, and None for any other."""
    count = weighed.count
    return count.keywords["length"] if isinstance(count, partial) and count.func is length_count else None


def global_count(loss: Loss, trainer: str, *, tokens: Any, sequences: Any) -> Any:
    """Return the denominator of the whole batch from the trainer's counts of it; 1 for a raw sum.

    Args:
        loss: a loss with one of the library's weighings.
        trainer: name of the trainer, for messages.
        tokens, sequences: the trainer's counts over all ranks and micro-batches, as numbers or 0-d tensors.

    Raises:
        LossInputError: if the count that the loss needs is missing, or if the loss counts in another way.
    """
    length = fixed_length_of(loss)
    if loss.count is None:
        return 1.0
    if loss.count is weight_sum:
        name, count = "tokens", tokens
    elif length is not None or loss.count in (sequence_count, sequence_count_or_nan):
        name, count = "sequences", sequences
    else:
        fix = "Weigh by token_mean, sequence_mean, sequence_sum_mean, fixed_length(L) or token_sum."
        raise LossInputError("weigh", f"a count that {trainer} has: tokens or sequences", f"{loss!r}", fix)
    if count is None:
        fix = f"{loss!r} is divided by it: without it the parts of a batch do not add up."
        raise LossInputError(name, f"the number of {name} in the whole batch, from {trainer}", "None", fix)
    return count if length is None else length * count


def scaled_by(bound: BoundLoss, column: str) -> BoundLoss:
    """Return the loss with every token's term multiplied by a column, as a trainer's weights of tokens do."""
    loss = bound.loss

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        term, statistics = loss.terms(t)
        return getattr(t, column) * term, statistics

    return replace(bound, loss=replace(loss, reads=(*loss.reads, column), terms=terms))


def trial_terms(loss: Loss, kind: type[Tokens] = Tokens, scale: float = 1.0) -> tuple[Tensor, Statistics]:
    """Return the terms and statistics of four tokens, whose advantages are multiplied by ``scale``."""
    draw = torch.Generator().manual_seed(0)
    columns = {name: -torch.rand(4, generator=draw, dtype=torch.float64) for name in loss.reads}
    if "advantages" in columns:
        columns["advantages"] = torch.tensor([1.0, -2.0, 0.5, -1.0], dtype=torch.float64) * scale
    logprobs = torch.tensor([-0.5, -1.5, -0.1, -3.0], dtype=torch.float64)
    return loss.terms(kind(logprobs, torch.ones_like(logprobs), None, columns))


def check_tokenwise(loss: Loss, trainer: str) -> None:
    """Refuse a loss whose terms depend on whole sequences, for a trainer that does not pass their bounds."""
    try:
        trial_terms(loss, TokenwiseTokens)
    except LossInputError:
        fix = f"{trainer} packs sequences into rows, and does not tell the loss where they begin."
        raise LossInputError("loss", "a loss whose tokens stand for themselves", f"{loss!r}", fix) from None


def check_scales_with_advantages(loss: Loss, trainer: str) -> None:
    """Refuse a loss that is not doubled with its advantages, for a trainer that divides these instead of the loss."""
    if not torch.equal(2 * trial_terms(loss)[0], trial_terms(loss, scale=2.0)[0]):
        fix = (
            f"{trainer} divides the advantages by the size of the batch; any other part of a term would stay undivided."
        )
        raise LossInputError("loss", "terms proportional to the advantages", f"{loss!r}", fix)


def shares(metrics: DeferredMetrics, count: Any) -> dict[str, Tensor]:
    """Return each statistic's sum over this part, divided by a count of the whole batch. Trainers add these up."""
    return {name: x / count for name, x in metrics.sums.items() if name != "rows"}


def means(metrics: DeferredMetrics) -> dict[str, Tensor]:
    """Return the mean of each statistic over the active tokens of this part, as 0-d tensors."""
    tensors = metrics.tensors
    return {name: tensors[name] for name in metrics.sums if name != "rows"}


def means_as_floats(metrics: DeferredMetrics) -> dict[str, float]:
    """Return the same means as floats, in one transfer, which also checks the values of the batch."""
    numbers: Mapping[str, float] = metrics.finalise()
    return {name: numbers[name] for name in metrics.sums if name != "rows"}
