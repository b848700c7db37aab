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
from lossfns.errors import LossInputError, add_loss_name, show
from lossfns.export.datums import as_bound
from lossfns.export.token_gradient import TokenwiseTokens
from lossfns.loss import BoundLoss, Loss, Statistics
from lossfns.tokens import ON_POLICY, PAIRS, TOKENS, Rows, Tokens
from lossfns.weigh import Weighing, length_count, pair_count, sequence_count, sequence_count_or_nan, weight_sum

UNITS: dict[Any, str] = {
    weight_sum: "tokens",
    sequence_count: "sequences",
    sequence_count_or_nan: "sequences",
    pair_count: "pairs",
    None: "sum",
}
"""What each count of a weighing adds up. ``"sum"`` is a loss that is never divided."""

WEIGHINGS_OF_UNIT = {
    "tokens": "token_mean",
    "sequences": "sequence_mean, sequence_sum_mean or fixed_length(L)",
    "pairs": "pair_mean",
    "sum": "token_sum",
}

OTHER_ROWS_FIX = {
    TOKENS: "TRL's GRPOTrainer takes policy losses, and SFTTrainer takes cross_entropy().",
    PAIRS: "TRL's DPOTrainer takes losses over pairs. Elsewhere, call loss.padded in a training step of your own.",
}

MASKS_FIX = "The trainer has one mask: take a sum whose parts share it, such as rpo(), or call loss.padded yourself."

NOT_PASSED_FIX = {
    "advantages": "Take a loss that does not read it, such as cross_entropy().",
    "old_logprobs": "Take a loss without a ratio, such as reinforce(), or bind(old_logprobs=ON_POLICY): a ratio of 1.",
    "ref_logprobs": "Leave the penalty to the trainer's own KL setting, and take kl_beta=0.",
    "sampler_logprobs": "Leave with_tis out, and take the trainer's own correction, if it has one.",
}


def for_trainer(
    loss: Loss | BoundLoss,
    trainer: str,
    columns: Sequence[str],
    counts: Sequence[str] | None = None,
    rows: Rows = TOKENS,
) -> BoundLoss:
    """Return the loss as the trainer will call it. ``compiled()`` and ``bind(old_logprobs=ON_POLICY)`` may be called.

    Args:
        loss: the loss.
        trainer: name of the trainer, for messages.
        columns: the columns that the trainer passes.
        counts: what the trainer counts of the whole batch, as in ``UNITS``. None: the adapter checks the weighing.
        rows: the kind of row of the losses that the trainer takes.

    Raises:
        LossInputError: if the loss has another kind of row, reads a column that the trainer does not have, is divided
            by what the trainer does not count, or has a denominator or another column bound.
    """
    bound = as_bound(loss)
    with add_loss_name(bound.loss.name):
        if bound.loss.rows is not rows:
            fix = OTHER_ROWS_FIX.get(bound.loss.rows, "Call loss.padded in a training step of your own.")
            raise LossInputError("loss", f"a loss over {rows} for {trainer}", f"one over {bound.loss.rows}", fix)
        check_unbound(bound, trainer)
        for name in bound.loss.reads:
            if name not in columns and name not in bound.columns:
                expected = f"one of the columns of {trainer}: {', '.join(columns) or 'it has none'}"
                fix = MASKS_FIX if name in bound.loss.masks else NOT_PASSED_FIX.get(name, "")
                raise LossInputError(name, expected, f"{bound.loss!r}, which reads it", fix)
        if counts is not None:
            check_counted(bound.loss, trainer, counts)
    return bound


def check_unbound(bound: BoundLoss, trainer: str) -> None:
    """Refuse a loss to which anything but ``old_logprobs=ON_POLICY`` is bound."""
    given = {name: x for name, x in bound.columns.items() if x is not ON_POLICY}
    for name, x in {"denominator": bound.divisor, "grad_l1": bound.grad_l1 or None, **given}.items():
        if x is not None:
            expected = f"a loss to which nothing is bound, since {trainer} gives each batch its columns and counts"
            fix = f"Leave bind({name}=...) out. Only old_logprobs=ON_POLICY may be bound."
            raise LossInputError(name, expected, f"{name}={show(x)}", fix)


def check_counted(loss: Loss, trainer: str, counts: Sequence[str]) -> None:
    """Refuse a loss that is divided by something that the trainer does not count, and a sum that it would scale."""
    for part in loss.parts.values():
        check_counted(part.loss, trainer, counts)
    unit = unit_of(loss)
    if unit not in counts and not loss.parts:
        units = " or ".join(each for each in counts if each != "sum")
        divided = f"one divided by {unit or 'a count of its own'}"
        got = "a sum that is never divided" if unit == "sum" else divided
        fix = f"Take weigh={', or '.join(WEIGHINGS_OF_UNIT[each] for each in counts)}, in place of that of {loss!r}."
        raise LossInputError("weigh", f"a loss that is divided by {units}, which {trainer} counts", got, fix)


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


def unit_of(loss: Loss) -> str | None:
    """Return what the denominator of a loss counts, as in ``UNITS``, and None for a count of a user's own."""
    return UNITS.get(loss.count) if fixed_length_of(loss) is None else "sequences"


def denominator_for(loss: Loss, trainer: str, weights: Tensor, **counts: Any) -> Any:
    """Return the denominator of the whole batch from the trainer's counts of it. Nothing waits for the device.

    A count of 0 becomes 1 in a call without a trained token: the batch trains nothing, and loss and gradient are 0.
    Beside trained tokens it stays 0 and is refused, at once on the CPU and with the metrics on a device. No other count
    is changed: a share of a count, as for one of several ranks, may be below 1.

    Args:
        loss: a loss that ``for_trainer`` has let pass for these counts.
        trainer: name of the trainer, for messages.
        weights: the weights or the mask of this call.
        counts: the trainer's counts of all ranks and micro-batches, by unit, as in ``UNITS``: numbers, or tensors of
            one number.

    Raises:
        LossInputError: if the count that the loss needs is None, or has several numbers.

    >>> from lossfns import fixed_length, ppo
    >>> denominator_for(ppo(weigh=fixed_length(8)), "TRL", torch.ones(2, 3), tokens=6, sequences=2)
    16
    """
    if loss.parts:
        seen = [part.loss for part in loss.parts.values()]
        each = [1.0 if own.count is None else denominator_for(own, trainer, weights, **counts) for own in seen]
        return torch.stack([torch.as_tensor(x, dtype=torch.float64, device=weights.device) for x in each])
    unit, length = unit_of(loss) or "", fixed_length_of(loss)
    count = counts[unit]
    if count is None or (isinstance(count, Tensor) and count.numel() != 1):
        several = "Start one process for each GPU, with torchrun: under DataParallel there is one count for each."
        missing = f"Pass on the trainer's own: {loss!r} is divided by it, or parts of a batch would not add up."
        got, fix = ("None", missing) if count is None else (f"shape {tuple(count.shape)}", several)
        raise LossInputError(unit, f"the number of {unit} in the whole batch, from {trainer}", got, fix)
    if isinstance(count, Tensor):  # a model on several devices has its logits on the last
        count = count.item() if count.device.type == "cpu" else count.to(weights.device)
    if isinstance(count, Tensor) or count == 0:
        count = torch.where((weights == 0).all() & (count == 0), 1, count)
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


def counts_rows(name: str) -> bool:
    """Return whether a sum of a call counts rows, of the loss or of a part of a sum, and is no statistic."""
    return name.rpartition("/")[2] == "rows"


def shares(metrics: DeferredMetrics, count: Any) -> dict[str, Tensor]:
    """Return each statistic's sum over this part, divided by a count of the whole batch. Trainers add these up."""
    return {name: x / count for name, x in metrics.sums.items() if not counts_rows(name)}


def means(metrics: DeferredMetrics) -> dict[str, Tensor]:
    """Return the mean of each statistic over the active tokens of this part, as 0-d tensors."""
    tensors = metrics.tensors
    return {name: tensors[name] for name in metrics.sums if not counts_rows(name)}


def means_as_floats(metrics: DeferredMetrics) -> dict[str, float]:
    """Return the same means as floats, in one transfer, which also checks the values of the batch."""
    numbers: Mapping[str, float] = metrics.finalise()
    return {name: numbers[name] for name in metrics.sums if not counts_rows(name)}
