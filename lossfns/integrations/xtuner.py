"""xtuner v1: a policy loss for ``policy_loss_cfg["loss_type"]``, which names it by its import path.

Signature and weights as in xtuner at b934f4620, 2026-08-21 (``xtuner/v1/rl/loss/loss_fn.py``, ``grpo_loss.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lossfns.errors import add_loss_name
from lossfns.integrations.trainer import check_tokenwise, check_weighing, columns_for, for_trainer
from lossfns.loss import BoundLoss, Loss
from lossfns.weigh import token_mean, token_sum


def policy_loss(loss: Loss | BoundLoss) -> Callable[..., Tensor]:
    """Write a loss as a policy loss of xtuner: Σ weight · term.

    xtuner's weights already hold 1 / (its count of the tokens of all ranks) and its importance weights. Nothing waits
    for the device, so nothing checks the values either.

    Args:
        loss: a loss weighed by ``token_mean`` or ``token_sum``, in which no token depends on its sequence.

    Returns:
        ``fn(log_prob, old_log_prob, advantages, loss_weights, policy_loss_cfg)``, which returns the 0-d loss. The
        configuration is not read: the loss has its own knobs.

    Raises:
        LossInputError: if the loss has another weighing, reads another column or depends on whole sequences.

    >>> from lossfns import dapo
    >>> policy_loss(dapo()).__name__
    'dapo'
    """
    bound = for_trainer(loss, "xtuner", ("advantages", "old_logprobs"))
    fix = "xtuner's weights hold 1 / tokens: take weigh=token_mean."
    check_weighing(bound.loss, "xtuner", token_mean, token_sum, fix=fix)
    check_tokenwise(bound.loss, "xtuner")

    def fn(
        log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, loss_weights: Tensor, policy_loss_cfg: Any
    ) -> Tensor:
        with add_loss_name(bound.loss.name):
            columns = columns_for(bound, "xtuner", advantages=advantages, old_logprobs=old_log_prob)
            total, _ = bound.deferred().padded(log_prob, loss_weights, denominator=1.0, **columns)
            return total

    fn.__name__ = fn.__qualname__ = bound.loss.name
    return fn
