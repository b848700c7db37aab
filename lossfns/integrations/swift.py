"""ms-swift: a loss for ``loss_map``, chosen by ``--loss_type``.

Signature and scaling as in ms-swift 4.6.0 (``swift/loss``, ``swift/trainers/seq2seq_trainer.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lossfns.errors import LossInputError, add_loss_name
from lossfns.integrations.trainer import check_weighing, denominator_for, for_trainer
from lossfns.labels import targets_from_labels, weights_from_labels
from lossfns.logprobs.target import target_logprobs
from lossfns.loss import BoundLoss, Loss
from lossfns.weigh import token_mean


def sft_loss(loss: Loss | BoundLoss) -> Callable[[Any, Any], Callable[..., Tensor]]:
    """Write a loss as a value of ``swift.loss.loss_map``.

    The denominator is ``num_items_in_batch``. It is None in an evaluation, where each batch is averaged by itself, as
    ms-swift does. ``loss_scale``, which ms-swift has shifted and flattened, becomes the weights of the tokens. Nothing
    waits for the device, so nothing checks the values either.

    Args:
        loss: a loss weighed by ``token_mean`` that reads no columns, such as ``cross_entropy()``.

    Returns:
        ``make(args, trainer)``, which ms-swift calls as it calls a ``BaseLoss``. It returns
        ``fn(outputs, labels, *, num_items_in_batch, loss_scale)``.

    Raises:
        LossInputError: if the loss has another weighing or reads a column; in a call, under sequence parallelism.

    >>> from lossfns import cross_entropy
    >>> sft_loss(cross_entropy()).__name__
    'cross_entropy'
    """
    bound = for_trainer(loss, "ms-swift", ())
    fix = "ms-swift passes the number of tokens of the step alone."
    check_weighing(bound.loss, "ms-swift", token_mean, fix=fix)

    def make(args: Any, trainer: Any) -> Callable[..., Tensor]:
        def fn(
            outputs: Any, labels: Tensor, *, num_items_in_batch: Any = None, loss_scale: Any = None, **kwargs: Any
        ) -> Tensor:
            with add_loss_name(bound.loss.name):
                check_whole_sequences(trainer)
                weights = weights_from_labels(labels)
                if loss_scale is not None:
                    weights = weights * loss_scale.view(labels.shape)[:, :-1]
                logprobs = target_logprobs(outputs.logits[:, :-1], targets_from_labels(labels))
                tokens = weights.sum() if num_items_in_batch is None else num_items_in_batch
                count = denominator_for(bound.loss, "ms-swift", weights, tokens=tokens)
                total, _ = bound.deferred().padded(logprobs, weights, denominator=count)
                return total

        return fn

    make.__name__ = make.__qualname__ = bound.loss.name
    return make


def check_whole_sequences(trainer: Any) -> None:
    """Refuse sequence parallelism, where ms-swift computes the loss of each token itself."""
    size = getattr(getattr(trainer, "template", None), "sequence_parallel_size", 1)
    if size > 1:
        fix = "Set sequence_parallel_size=1, or take ms-swift's own cross-entropy."
        raise LossInputError("sequence_parallel_size", "1", str(size), fix)
