"""NeMo-RL: an object with the ``LossFunction`` protocol.

Fields and scaling as in NeMo-RL at 7ea279abf, 2026-08-22 (``nemo_rl/algorithms/loss``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lossfns.errors import add_loss_name
from lossfns.integrations.trainer import columns_for, counts_rows, denominator_for, for_trainer, trial_terms
from lossfns.loss import BoundLoss, Loss
from lossfns.weigh import weight_sum

FIELDS = {
    "advantages": "advantages",
    "old_logprobs": "prev_logprobs",
    "sampler_logprobs": "generation_logprobs",
    "ref_logprobs": "reference_policy_logprobs",
}
"""The name in NeMo-RL's batch of each column. Position j of a batch is token j, so its first entry is left out."""


class LossFn:
    """A loss as NeMo-RL calls it, with metrics that add up over micro-batches and ranks.

    NeMo-RL undoes the average over ranks. The denominator is its ``global_valid_toks`` or ``global_valid_seqs``.
    ``token_mult_prob_error``, which its GRPO reads, is the mean of exp(|generation − prev|), at least 1.

    Args:
        loss: a loss of tokens with any weighing but ``token_sum``.

    Raises:
        LossInputError: if the loss is a raw sum, or is not one of tokens; in a call, if it reads a column that the
            batch does not have.
    """

    def __init__(self, loss: Loss | BoundLoss) -> None:
        from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType, MetricNormalizer

        # A raw sum is refused: NeMo-RL may call the loss with counts of 1, and divide the gradients by its own.
        self.bound = for_trainer(loss, "NeMo-RL", tuple(FIELDS), ("tokens", "sequences"))
        self.loss_type = LossType.TOKEN_LEVEL if self.bound.loss.count is weight_sum else LossType.SEQUENCE_LEVEL
        self.input_type = LossInputType.LOGPROB
        by_tokens = dict.fromkeys(("token_mult_prob_error", *trial_terms(self.bound.loss)[1]), MetricNormalizer.TOKENS)
        self.metric_normalizations = {**by_tokens, "num_valid_samples": MetricNormalizer.NONE}

    def __call__(
        self, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor, *, next_token_logprobs: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        loss = self.bound.loss
        with add_loss_name(loss.name):
            mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
            given = {name: data[field][:, 1:] for name, field in FIELDS.items() if field in data}
            columns = columns_for(self.bound, "NeMo-RL", **given)
            counts = {"tokens": global_valid_toks, "sequences": global_valid_seqs}
            count = denominator_for(loss, "NeMo-RL", mask, **counts)
            total, metrics = self.bound.deferred().padded(next_token_logprobs, mask, denominator=count, **columns)
            numbers = metrics.finalise()
            part = numbers["tokens"] / max(float(global_valid_toks), 1.0)
            statistics = {name: numbers[name] * part for name in metrics.sums if not counts_rows(name)}
            samples = numbers["sequences"] - numbers["sequences_empty"]
            extra = mismatch(given, mask, global_valid_toks)
            return total, {"loss": numbers["loss"], "num_valid_samples": samples, **statistics, **extra}


def mismatch(columns: Mapping[str, Tensor], mask: Tensor, tokens: Tensor) -> dict[str, float]:
    """Return this part's share of the mean exp(|generation − prev|), where the batch has both logprobs."""
    if not {"old_logprobs", "sampler_logprobs"} <= columns.keys():
        return {}
    distance = (columns["sampler_logprobs"] - columns["old_logprobs"]).abs()
    factor = torch.where(mask != 0, distance, 0).exp()
    return {"token_mult_prob_error": float((factor * mask).sum() / tokens.clamp(min=1))}
