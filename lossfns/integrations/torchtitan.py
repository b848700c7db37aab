"""torchtitan: the call of a loss of its RL trainer.

Signature and scaling as in torchtitan 0.3.0 (``torchtitan/experiments/rl/losses/dapo.py``, ``components/loss.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lossfns.errors import add_loss_name
from lossfns.integrations.trainer import (
    check_tokenwise,
    check_weighing,
    columns_for,
    denominator_for,
    for_trainer,
    shares,
)
from lossfns.loss import BoundLoss, Loss
from lossfns.weigh import token_mean


def rl_loss(loss: Loss | BoundLoss) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """Write a loss as the ``__call__`` of a loss of torchtitan's RL trainer.

    The denominator is ``global_valid_tokens``; torchtitan adds gradients over ranks. Like its own losses, this drops
    tokens whose generator logprob is not finite, which the count leaves out, too. torchtitan computes the logprobs, as
    its logits may be sharded. Nothing waits for the device, so nothing checks the values either.

    Args:
        loss: a loss weighed by ``token_mean``, in which no token depends on its sequence: rows hold several. Its
            ``old_logprobs`` are those of the generator.

    Returns:
        ``fn(logits, labels, global_valid_tokens, *, generator_logprobs, advantages, loss_mask)``, which returns the
        loss, and metrics that add up over ranks: ``loss/mean``, and ``loss/<statistic>/mean`` for each statistic.

    Raises:
        LossInputError: if the loss has another weighing, reads another column or depends on whole sequences; in a
            call, if ``global_valid_tokens`` is None.

    >>> from lossfns import dapo
    >>> rl_loss(dapo()).__name__
    'dapo'
    """
    bound = for_trainer(loss, "torchtitan", ("advantages", "old_logprobs"))
    fix = "torchtitan passes the number of tokens of the step alone."
    check_weighing(bound.loss, "torchtitan", token_mean, fix=fix)
    check_tokenwise(bound.loss, "torchtitan")

    def fn(
        logits: Any,
        labels: Tensor,
        global_valid_tokens: Any = None,
        *,
        generator_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        from torchtitan.components.loss import compute_logprobs

        with add_loss_name(bound.loss.name):
            columns = columns_for(bound, "torchtitan", advantages=advantages, old_logprobs=generator_logprobs)
            mask = loss_mask & torch.isfinite(generator_logprobs)
            count = denominator_for(bound.loss, "torchtitan", mask, tokens=global_valid_tokens)
            total, metrics = bound.deferred().padded(
                compute_logprobs(logits, labels), mask, denominator=count, **columns
            )
            statistics = {f"loss/{name}/mean": x for name, x in shares(metrics, count).items()}
            return total, {"loss/mean": total.detach(), **statistics}

    fn.__name__ = fn.__qualname__ = bound.loss.name
    return fn
