"""Trinity-RFT: a ``PolicyLossFn`` class, named by its import path in ``algorithm.policy_loss_fn``.

Signature as in Trinity-RFT 0.6.0 (``trinity/algorithm/policy_loss_fn``, ``trinity/trainer/verl/losses.py``).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lossfns.errors import add_loss_name
from lossfns.integrations.trainer import columns_for, counts_rows, denominator_for, for_trainer
from lossfns.loss import BoundLoss, Loss


def policy_loss(loss: Loss | BoundLoss) -> type:
    """Write a loss as a class of Trinity-RFT's policy losses.

    Trinity-RFT passes no counts of the whole batch. As for its own losses, each call is averaged by itself, and
    Trinity-RFT scales or adds the micro-batches. A split is exact only if all its parts have the same count.

    Args:
        loss: a loss of tokens that reads ``advantages`` and ``old_logprobs``. Its knobs are fixed here:
            ``policy_loss_fn_args`` stays empty.

    Returns:
        A subclass of ``PolicyLossFn``. An instance is called with ``logprob``, ``old_logprob``, ``action_mask`` and
        ``advantages``, each ``[B, T]`` or ``[T]``, and returns the loss and its statistics.

    Raises:
        LossInputError: if the loss reads another column, or is a raw sum.
    """
    from trinity.algorithm.policy_loss_fn.policy_loss_fn import PolicyLossFn

    bound = for_trainer(loss, "Trinity-RFT", ("advantages", "old_logprobs"), ("tokens", "sequences"))

    class LossFn(PolicyLossFn):  # type: ignore[misc]
        # Trinity-RFT reads the names of these parameters, to select the columns of its batch.
        def __call__(
            self, logprob: Tensor, old_logprob: Tensor, action_mask: Tensor, advantages: Tensor, **kwargs: Any
        ) -> tuple[Tensor, dict[str, float]]:
            with add_loss_name(bound.loss.name):
                columns = columns_for(bound, "Trinity-RFT", advantages=advantages, old_logprobs=old_logprob)
                rows = {name: x.view(-1, x.shape[-1]) for name, x in columns.items()}
                lp, mask = (x.view(-1, logprob.shape[-1]) for x in (logprob, action_mask))
                counts = {"tokens": mask.sum(), "sequences": (mask != 0).any(-1).sum()}
                count = denominator_for(bound.loss, "Trinity-RFT", mask, **counts)
                total, metrics = bound.deferred().padded(lp, mask, denominator=count, **rows)
                numbers = metrics.finalise()
                statistics = {name: numbers[name] for name in metrics.sums if not counts_rows(name)}
                return total, {"pg_loss": numbers["loss"], **statistics}

        @classmethod
        def default_args(cls) -> dict[str, Any]:
            return {}

    LossFn.__name__ = LossFn.__qualname__ = bound.loss.name
    return LossFn
