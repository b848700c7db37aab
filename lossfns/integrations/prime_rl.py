"""prime-rl: a loss function for ``[trainer.loss] type = "custom"``.

Fields and scaling as in prime-rl at 559b44772, 2026-08-21 (``src/prime_rl/trainer/rl/loss.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from lossfns.errors import add_loss_name
from lossfns.integrations.trainer import check_weighing, columns_for, for_trainer, means, scaled_by
from lossfns.loss import BoundLoss, Loss
from lossfns.weigh import token_mean, token_sum


class LossOutputs(NamedTuple):
    """The 0-d loss and 0-d metrics of one sequence, with the field names of prime-rl's class of this name."""

    loss: Tensor
    metrics: dict[str, Tensor]


def loss_fn(loss: Loss | BoundLoss) -> Callable[[Any], LossOutputs]:
    """Write a loss as a custom loss of prime-rl: the masked sum over one sequence.

    prime-rl adds these sums, and divides by its count of the tokens of the step. ``loss_weights`` multiply the term of
    each token. Nothing waits for the device, so nothing checks the values either.

    Args:
        loss: a loss weighed by ``token_mean`` or ``token_sum``. ``old_logprobs`` are the inference logprobs.

    Returns:
        ``fn(inputs)``, for the ``LossInputs`` of one sequence. It returns the loss, and the mean of each statistic.

    Raises:
        LossInputError: if the loss has another weighing or reads another column; in a call, if ``ref_logprobs`` are
            read and the algorithm computes none.

    >>> from lossfns import dapo
    >>> loss_fn(dapo()).__name__
    'dapo'
    """
    bound = for_trainer(loss, "prime-rl", ("advantages", "old_logprobs", "ref_logprobs"))
    fix = "prime-rl divides the sum by the number of tokens of the step: take weigh=token_mean."
    check_weighing(bound.loss, "prime-rl", token_mean, token_sum, fix=fix)
    weighted = scaled_by(bound, "loss_weights")

    def fn(inputs: Any) -> LossOutputs:
        with add_loss_name(bound.loss.name):
            used = bound if inputs.loss_weights is None else weighted
            given = {name: getattr(inputs, name) for name in ("advantages", "ref_logprobs", "loss_weights")}
            columns = columns_for(used, "prime-rl", old_logprobs=inputs.inference_logprobs, **given)
            rows = {name: x[None] for name, x in columns.items()}
            logprobs, mask = inputs.trainer_logprobs[None], inputs.loss_mask[None]
            total, metrics = used.deferred().padded(logprobs, mask, denominator=1.0, **rows)
            return LossOutputs(total, means(metrics))

    fn.__name__ = fn.__qualname__ = bound.loss.name
    return fn
