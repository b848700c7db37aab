"""Losses in the ``Trainer`` of ``transformers``, and what the trainers built on it share.

    from lossfns.integrations.transformers import Trainer
    trainer = Trainer(model, args, train_dataset=..., loss=cross_entropy())

For a trainer of your own, ``compute_loss_func=compute_loss_func(cross_entropy())`` does the same without metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lossfns.errors import LossInputError, add_loss_name
from lossfns.integrations.trainer import denominator_for, for_trainer
from lossfns.labels import targets_from_labels, weights_from_labels
from lossfns.logprobs.target import target_logprobs
from lossfns.loss import BoundLoss, Loss
from lossfns.metrics import merge_metrics

try:
    import transformers
    from accelerate.utils import gather_object
    from transformers.modeling_outputs import MaskedLMOutput, TokenClassifierOutput
except ImportError as error:
    raise ImportError('lossfns.integrations.transformers needs the extra hf: pip install "lossfns[hf]"') from error

HOOK = ("transformers", (), ("tokens",))
"""The arguments of ``for_trainer`` besides the loss: name of the trainer, its columns and its counts."""

UNSHIFTED = (MaskedLMOutput, TokenClassifierOutput)
"""Outputs with one label for each position, which stands at that position."""

ComputeLoss = Callable[..., Tensor]
"""The function ``(outputs, labels, num_items_in_batch=...) -> loss`` that ``Trainer`` calls."""


def compute_loss_func(loss: Loss | BoundLoss, report: Callable[[dict[str, float]], Any] | None = None) -> ComputeLoss:
    """Return the loss as the argument ``compute_loss_func`` of ``transformers.Trainer``.

    The trainer counts the trained tokens of all micro-batches and ranks, and this count divides the loss: the gradient
    does not depend on ``gradient_accumulation_steps``.

    Args:
        loss: a loss that reads no columns and is divided by tokens, such as ``cross_entropy()``.
        report: called with the metrics of each micro-batch.

    Raises:
        LossInputError: if the loss reads columns or is divided by something else; in the call, if the trainer has no
            labels or no count, or if the model is an encoder-decoder or has a router with an auxiliary loss.
    """
    bound = for_trainer(loss, *HOOK)

    def compute_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        with add_loss_name(bound.loss.name):
            check_causal(outputs, labels)
            labels = labels.to(outputs.logits.device)
            logprobs = target_logprobs(outputs.logits[:, :-1], targets_from_labels(labels))
            weights = weights_from_labels(labels)
            count = denominator_for(bound.loss, "transformers", weights, tokens=num_items_in_batch)
            total, metrics = bound.padded(logprobs, weights, denominator=count)
        if report is not None:
            report(metrics)
        return total

    return compute_loss


def check_causal(outputs: Any, labels: Any) -> None:
    """Refuse a batch without labels, and outputs whose labels are not shifted or that have a second loss."""
    if labels is None:
        fix = "Give the dataset a column labels, with -100 at tokens that are not trained, and leave label_names alone."
        raise LossInputError("labels", "labels in each batch", "None", fix)
    if isinstance(outputs, UNSHIFTED):
        fix = "Its labels are not shifted: use the model's own loss."
        raise LossInputError("outputs", "those of a plain causal language model", f"a {type(outputs).__name__}", fix)
    for name in ("encoder_last_hidden_state", "aux_loss"):
        if outputs.get(name) is not None:
            fix = "Encoder-decoders shift no labels, and an auxiliary loss would be lost: use the model's own loss."
            raise LossInputError("outputs", "those of a plain causal language model", f"{name} as well", fix)


class LoggedLoss:
    """The argument ``loss=`` of a subclass of ``transformers.Trainer``, whose metrics go into the trainer's logs.

    The metrics of all micro-batches and ranks since the last log are merged exactly, under ``<name of the loss>/``.
    """

    model: Any
    hook: tuple[Any, ...] = HOOK

    def __init__(self, *args: Any, loss: Loss | BoundLoss, **options: Any) -> None:
        self.loss_fn = for_trainer(loss, *self.hook)
        self.recorded: dict[bool, list[dict[str, float]]] = {True: [], False: []}  # by whether the model is in training
        super().__init__(*args, **options)

    def record(self, metrics: dict[str, float]) -> None:
        """Keep the metrics of a micro-batch for the next log."""
        self.recorded[self.model.training].append(metrics)

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """Evaluate, without the metrics of an earlier loop that logged nothing, such as that of ``predict``."""
        self.recorded[False] = []
        return super().evaluation_loop(*args, **options)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Add the metrics since the last log, of training or of evaluation, and log."""
        parts = gather_object(self.recorded[self.model.training])
        self.recorded[self.model.training] = []
        prefix = f"{'' if self.model.training else 'eval_'}{self.loss_fn.loss.name}"
        logs.update({f"{prefix}/{name}": x for name, x in (merge_metrics(parts) if parts else {}).items()})
        super().log(logs, *args, **options)  # type: ignore[misc]  # of the trainer beside it


class Trainer(LoggedLoss, transformers.Trainer):  # type: ignore[misc]  # transformers is not read by mypy
    """``transformers.Trainer`` with one argument more, ``loss=``, and the metrics of the loss in its logs."""

    def __init__(self, *args: Any, loss: Loss | BoundLoss, **options: Any) -> None:
        if options.pop("compute_loss_func", None) is not None:
            raise LossInputError("compute_loss_func", "None beside loss=", "a function", "Pass one of the two.")
        super().__init__(*args, loss=loss, compute_loss_func=compute_loss_func(loss, self.record), **options)
        if self.args.label_smoothing_factor:
            got, fix = f"{self.args.label_smoothing_factor}", "It does not change this loss: leave it out."
            raise LossInputError("label_smoothing_factor", "0.0 in the trainer's args", got, fix)
        if not getattr(self, "_loss_shifts_labels", True):
            got = f"{type(self.model).__name__}, whose labels transformers counts without a shift"
            raise LossInputError("model", "a causal language model", got, "Use the model's own loss.")
        if self.get_cp_size() * self.get_sp_size() > 1:
            fix = "Leave context and sequence parallelism off."
            raise LossInputError("parallelism_config", "whole sequences on each rank", "parts of sequences", fix)
