"""verl: a policy loss for ``register_policy_loss``.

Signature, ``global_batch_info`` and aggregation modes as in verl 0.9.1 (``verl/trainer/ppo/core_algos.py``,
``verl/workers/utils/losses.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lossfns.errors import LossInputError, add_loss_name, show
from lossfns.integrations.trainer import (
    columns_for,
    denominator_for,
    fixed_length_of,
    for_trainer,
    is_weighed,
    means_as_floats,
    scaled_by,
)
from lossfns.loss import BoundLoss, Loss
from lossfns.weigh import sequence_mean, sequence_sum_mean, token_mean, token_sum

AGGREGATION = {
    "token-mean": token_mean,
    "token-sum": token_sum,
    "seq-mean-token-mean": sequence_mean,
    "seq-mean-token-sum": sequence_sum_mean,
}
"""The weighing of each ``loss_agg_mode``. ``seq-mean-token-sum-norm`` is ``fixed_length(loss_scale_factor)``."""

PolicyLoss = Callable[..., tuple[Tensor, dict[str, float]]]


def policy_loss(loss: Loss | BoundLoss) -> PolicyLoss:
    """Write a loss as a policy loss of verl.

    verl averages gradients over ranks, so the result is multiplied by ``dp_size``. The denominator is its global
    ``batch_num_tokens`` or ``global_batch_size``. ``rollout_is_weights`` multiply the term of each token.

    Args:
        loss: a loss of tokens that reads ``advantages`` and ``old_logprobs``. verl adds its own KL and entropy terms,
            under the actor's ``loss_agg_mode``, so the weighing must be that of the mode.

    Returns:
        ``fn(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)``, which
        returns the loss and ``{"actor/<statistic>": mean over the micro-batch}``. verl averages the latter.

    Raises:
        LossInputError: if the loss reads another column; in a call, also if its weighing is not that of the mode.

    >>> from lossfns import ppo
    >>> policy_loss(ppo()).__name__
    'ppo'
    """
    bound = for_trainer(loss, "verl", ("advantages", "old_logprobs"), ("tokens", "sequences", "sum"))
    weighted = scaled_by(bound, "rollout_is_weights")

    def fn(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        with add_loss_name(bound.loss.name):
            batch = global_batch(config)
            check_mode(bound.loss, loss_agg_mode, batch["loss_scale_factor"])
            counts = {"tokens": batch["batch_num_tokens"], "sequences": batch["global_batch_size"], "sum": 1.0}
            count = denominator_for(bound.loss, "verl", response_mask, **counts)
            used = bound if rollout_is_weights is None else weighted
            given = {"advantages": advantages, "old_logprobs": old_log_prob, "rollout_is_weights": rollout_is_weights}
            columns = columns_for(used, "verl", **given)
            total, metrics = used.deferred().padded(log_prob, response_mask, denominator=count, **columns)
            return total * batch["dp_size"], {f"actor/{name}": x for name, x in means_as_floats(metrics).items()}

    fn.__name__ = fn.__qualname__ = bound.loss.name
    return fn


def global_batch(config: Any) -> dict[str, Any]:
    """Return the ``global_batch_info`` of the actor's configuration."""
    batch: dict[str, Any] = getattr(config, "global_batch_info", None) or {}
    missing = [name for name in ("dp_size", "batch_num_tokens", "global_batch_size") if name not in batch]
    if missing:
        fix = "verl fills it in ppo_loss before it calls the policy loss."
        raise LossInputError("config.global_batch_info", "dp_size and verl's counts", f"no {missing[0]}", fix)
    return {"loss_scale_factor": None, **batch}


def check_mode(loss: Loss, mode: str, factor: Any) -> None:
    """Refuse an aggregation mode that is not the weighing of the loss."""
    length = fixed_length_of(loss)
    same = is_weighed(loss, AGGREGATION[mode]) if mode in AGGREGATION else length is not None and length == factor
    if not same or (mode not in AGGREGATION and mode != "seq-mean-token-sum-norm"):
        got = f"{show(mode)}, with loss_scale_factor={factor}" if length is not None else show(mode)
        modes = ", ".join(f"{name} is {weigh.name}" for name, weigh in AGGREGATION.items())
        fix = f"{modes}; seq-mean-token-sum-norm is fixed_length(loss_scale_factor)."
        raise LossInputError("loss_agg_mode", f"the mode of {loss!r}", got, fix)
