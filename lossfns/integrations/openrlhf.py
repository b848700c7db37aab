"""OpenRLHF: a function in place of ``PolicyLoss``.

Signature, counts and result as in OpenRLHF 0.11.2 (``openrlhf/models/loss.py``, ``utils/loss_utils.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lossfns.errors import LossInputError, add_loss_name
from lossfns.integrations.trainer import columns_for, denominator_for, for_trainer, means
from lossfns.loss import BoundLoss, Loss

Result = tuple[Tensor, Tensor, Tensor, None, None]
"""The loss, the share of clipped tokens, the mean of old − lp, and two metrics of a correction that is not made."""


def policy_loss(loss: Loss | BoundLoss) -> Callable[..., Result]:
    """Write a loss as the ``actor_loss_fn`` of OpenRLHF's actor.

    OpenRLHF averages gradients over ranks, so the result is multiplied by ``dp_size``. The denominator is its
    ``batch_num_tokens`` or ``global_batch_size``, which undo the division by DeepSpeed's accumulation steps, too.
    Nothing waits for the device, so nothing checks the values either.

    Args:
        loss: a loss of tokens. ``sampler_logprobs`` are the rollout's logprobs. OpenRLHF's own correction is a part of
            the replaced ``PolicyLoss``: wrap the loss in ``with_tis`` in its place.

    Returns:
        ``fn(log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, dp_size, batch_num_tokens,
        global_batch_size)``, which returns the five values of ``PolicyLoss.forward``.

    Raises:
        LossInputError: if the loss reads another column or is a raw sum; in a call, if a count or the mask is None.

    >>> from lossfns import ppo
    >>> policy_loss(ppo()).__name__
    'ppo'
    """
    columns = ("advantages", "old_logprobs", "sampler_logprobs")
    bound = for_trainer(loss, "OpenRLHF", columns, ("tokens", "sequences"))

    def fn(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Any = None,
        global_batch_size: Any = None,
    ) -> Result:
        with add_loss_name(bound.loss.name):
            if action_mask is None:
                raise LossInputError("action_mask", "the mask of the tokens to train", "None", "Pass experience's own.")
            counts = {"tokens": batch_num_tokens, "sequences": global_batch_size}
            count = denominator_for(bound.loss, "OpenRLHF", action_mask, **counts)
            given = {"advantages": advantages, "old_logprobs": old_log_probs, "sampler_logprobs": rollout_log_probs}
            columns = columns_for(bound, "OpenRLHF", **given)
            total, metrics = bound.deferred().padded(log_probs, action_mask, denominator=count, **columns)
            statistics = means(metrics)
            clipped = [x for name, x in statistics.items() if name.rpartition("/")[2] in ("clip_low", "clip_high")]
            clip_ratio = torch.stack([total.new_zeros(()), *clipped]).sum()
            return total * dp_size, clip_ratio, drift(log_probs, old_log_probs, action_mask), None, None

    fn.__name__ = fn.__qualname__ = bound.loss.name
    return fn


def drift(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of old − lp over the tokens of the mask, OpenRLHF's ``ppo_kl``."""
    active = mask != 0
    distance = torch.where(active, old_log_probs - log_probs.detach(), 0)
    return distance.sum() / active.sum().clamp(min=1)
