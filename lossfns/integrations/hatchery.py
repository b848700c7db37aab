"""Hatchery: a loss for the entry point ``hatchery.losses``, or for ``register_loss``.

Fields and scaling as in hatchery-core at 8ecd8ed, 2026-07-10 (``hatchery/core/losses.py``, ``worker.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lossfns.errors import add_loss_name
from lossfns.integrations.trainer import check_weighing, columns_for, for_trainer, means_as_floats
from lossfns.logprobs.target import target_logprobs
from lossfns.loss import BoundLoss, Loss
from lossfns.weigh import token_sum

IGNORED = -100


def loss_fn(loss: Loss | BoundLoss) -> Callable[[Any], tuple[Tensor, dict[str, float]]]:
    """Write a loss as one that Hatchery's server offers by name: Σ weight · term / targets.

    A server that splits a request multiplies each part's loss by its share of the targets that are not −100. So each
    part is divided by its number of such targets, whatever their weights, and any split gives the same gradient.

    Args:
        loss: a loss of tokens weighed by ``token_sum``. ``old_logprobs`` are the field ``logprobs`` of the datums.

    Returns:
        ``fn(inputs)``, for Hatchery's ``LossInputs``, which returns the loss and the mean of each statistic.

    Raises:
        LossInputError: if the loss has another weighing or reads another column; in a call, if the request has none.

    >>> from lossfns import ppo, token_sum
    >>> loss_fn(ppo(weigh=token_sum)).__name__
    'ppo'
    """
    bound = for_trainer(loss, "Hatchery", ("advantages", "old_logprobs"))
    fix = "Hatchery divides by its number of targets, which also counts those of weight 0."
    check_weighing(bound.loss, "Hatchery", token_sum, fix=fix)

    def fn(inputs: Any) -> tuple[Tensor, dict[str, float]]:
        with add_loss_name(bound.loss.name):
            valid = inputs.target_tokens != IGNORED
            logprobs = target_logprobs(inputs.logits, inputs.target_tokens.masked_fill(~valid, 0))
            weights = valid if inputs.weights is None else inputs.weights * valid
            given = {"advantages": inputs.advantages, "old_logprobs": inputs.old_logprobs}
            columns = columns_for(bound, "Hatchery", **given)
            total, metrics = bound.deferred().padded(logprobs, weights, denominator=1.0, **columns)
            return total / valid.sum().clamp(min=1), means_as_floats(metrics)

    fn.__name__ = fn.__qualname__ = bound.loss.name
    return fn
