"""SkyRL: a policy loss for ``register_policy_loss``.

Signature and scaling as in SkyRL 0.3.0 (``skyrl/backends/skyrl_train/utils/ppo_utils.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lossfns.errors import LossInputError, add_loss_name
from lossfns.integrations.trainer import (
    check_scales_with_advantages,
    check_weighing,
    columns_for,
    for_trainer,
    means_as_floats,
)
from lossfns.loss import BoundLoss, Loss
from lossfns.weigh import token_sum

CORRECTIONS = (
    "tis_ratio_type",
    "sequence_mask_metric",
    "outlier_token_is_threshold_low",
    "outlier_token_is_threshold_high",
    "token_mask_is_threshold_low",
    "token_mask_is_threshold_high",
)
"""Settings of ``off_policy_correction`` that SkyRL's own losses apply themselves. None turns each of them off."""


def policy_loss(loss: Loss | BoundLoss) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """Write a loss as a policy loss of SkyRL: a masked sum.

    SkyRL divides the advantages of a mini-batch as ``loss_reduction`` says, adds the losses of its micro-batches, and
    undoes the average over ranks.

    Args:
        loss: a loss weighed by ``token_sum``, with terms proportional to the advantages. ``sampler_logprobs`` are the
            logprobs of the rollout.

    Returns:
        ``fn(log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs)``, which returns the loss and
        the mean of each statistic over the micro-batch.

    Raises:
        LossInputError: if the loss reads another column, is divided or is not proportional to the advantages; in a
            call, if the configuration asks for a correction that SkyRL leaves to the loss.

    >>> from lossfns import ppo, token_sum
    >>> policy_loss(ppo(weigh=token_sum)).__name__
    'ppo'
    """
    bound = for_trainer(loss, "SkyRL", ("advantages", "old_logprobs", "sampler_logprobs"))
    fix = "SkyRL has divided the advantages by the size of the batch: the loss is a sum."
    check_weighing(bound.loss, "SkyRL", token_sum, fix=fix)
    check_scales_with_advantages(bound.loss, "SkyRL")

    def fn(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        with add_loss_name(bound.loss.name):
            check_no_correction(config)
            if loss_mask is None:
                fix = "SkyRL makes it from the response masks of the generator."
                raise LossInputError("loss_mask", "the mask of the tokens to train", "None", fix)
            given = {"advantages": advantages, "old_logprobs": old_log_probs, "sampler_logprobs": rollout_logprobs}
            columns = columns_for(bound, "SkyRL", **given)
            total, metrics = bound.deferred().padded(log_probs, loss_mask, denominator=1.0, **columns)
            return total, means_as_floats(metrics)

    fn.__name__ = fn.__qualname__ = bound.loss.name
    return fn


def check_no_correction(config: Any) -> None:
    """Refuse a configuration with an off-policy correction, which would have no effect."""
    correction = getattr(config, "off_policy_correction", None)
    for name in CORRECTIONS:
        if getattr(correction, name, None) is not None:
            fix = "SkyRL leaves the correction to the loss: wrap the loss in with_tis, and set this to null."
            got = repr(getattr(correction, name))
            raise LossInputError(f"off_policy_correction.{name}", "None", got, fix)
