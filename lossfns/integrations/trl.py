"""Losses in the trainers of TRL: each class is TRL's own with an argument ``loss=``.

    from lossfns.integrations.trl import GRPOTrainer
    trainer = GRPOTrainer(model, reward_funcs=..., args=..., train_dataset=..., loss=dapo())

The trainer runs its own forward passes and logs, and the loss is computed from the same logprobs. TRL's settings of its
own loss have no effect then, and are refused unless they are left at their defaults. docs/integrations.md has a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING
from typing import Any

from torch import Tensor

from lossfns.errors import LossInputError, add_loss_name
from lossfns.integrations.trainer import columns_for, denominator_for
from lossfns.integrations.transformers import LoggedLoss
from lossfns.labels import weights_from_labels
from lossfns.tokens import ON_POLICY, PAIRS

try:
    import trl
except ImportError as error:
    raise ImportError('lossfns.integrations.trl needs the extra trl: pip install "lossfns[trl]"') from error


DPO_SETTINGS = (
    "loss_type",
    "loss_weights",
    "label_smoothing",
    "f_divergence_type",
    "ld_alpha",
    "use_weighting",
    "precompute_ref_log_probs",
)
"""Settings that must have their defaults. TRL precomputes only sums of the reference's logprobs."""

GRPO_SETTINGS = (
    "loss_type",
    "epsilon",
    "epsilon_high",
    "delta",
    "importance_sampling_level",
    "top_entropy_quantile",
    "entropy_coef",
    "use_adaptive_entropy",
    "off_policy_mask_threshold",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
)
"""Settings that must have their defaults. ``beta`` must be 0 for a loss without a reference: TRL would run one."""


KNOBS_FIX = "The loss does not use it: leave it out, and set the loss's knobs by the table in docs/integrations.md."


@contextmanager
def recorded_logprobs(*models: Any) -> Iterator[list[Tensor]]:
    """Collect the logprobs ``[B, T − 1]`` of every forward pass of the models inside the block, in order."""
    logprobs: list[Tensor] = []

    def keep(module: Any, args: Any, outputs: Any) -> None:
        if getattr(outputs, "log_probs", None) is not None:
            logprobs.append(outputs.log_probs)

    handles = [model.register_forward_hook(keep) for model in dict.fromkeys(models)]
    try:
        yield logprobs
    finally:
        for handle in handles:
            handle.remove()
    if not logprobs:
        fix = "Set use_liger_kernel=False."
        raise LossInputError("model", "outputs with log_probs, as TRL's own head gives them", "none", fix)


def loss_of(
    trainer: Any, logprobs: Tensor, mask: Tensor, counts: dict[str, Any], layout: str | None = None, **columns: Any
) -> Tensor:
    """Return the loss of the last tokens, which the mask covers, and keep its metrics for the trainer's log."""
    bound, name = trainer.loss_fn, trainer.hook[0]
    with add_loss_name(bound.loss.name):
        given = columns_for(bound, name, **columns)
        count = denominator_for(bound.loss, name, mask, **counts)
        last = logprobs[:, -mask.shape[1] :]
        total, metrics = bound.padded(last, mask, layout=layout, denominator=count, **given)
    trainer.record(metrics)
    return total  # type: ignore[no-any-return]


def check_reads_advantages(trainer: Any) -> None:
    """Refuse a loss that does not depend on the rewards."""
    loss = trainer.loss_fn.loss
    if "advantages" not in loss.reads:
        fix = "Take a policy loss, such as dapo(); SFTTrainer takes cross_entropy()."
        raise LossInputError("loss", "a loss that reads advantages, since this trainer has rewards", repr(loss), fix)


def check_sampler(trainer: Any) -> None:
    """Refuse a correction without vLLM's logprobs, and TRL's correction for a loss that makes none."""
    reads = "sampler_logprobs" in trainer.loss_fn.loss.reads
    if reads and not trainer.use_vllm:
        fix = "GRPO has sampler_logprobs with use_vllm=True alone: leave with_tis out."
        raise LossInputError("sampler_logprobs", "use_vllm=True in the trainer's args", "use_vllm=False", fix)
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction and not reads:
        fix = "Wrap it in with_tis, or set vllm_importance_sampling_correction=False."
        raise LossInputError("loss", "one that corrects for vLLM's logprobs", repr(trainer.loss_fn.loss), fix)


def check_settings(trainer: Any, config: Any, names: tuple[str, ...], **values: Any) -> None:
    """Refuse settings of TRL's loss that differ from their defaults, or from these values, which the loss needs."""
    for name in (*names, *values):
        field, got = config.__dataclass_fields__[name], getattr(trainer.args, name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if got != values.get(name, default):
            fix = f"Pass {name}={values[name]!r}." if name in values else KNOBS_FIX
            expected = f"{values.get(name, default)!r} in the trainer's args"
            raise LossInputError(name, expected, repr(got), fix, loss=trainer.loss_fn.loss.name)
    if trainer.aux_loss_enabled:
        fix = "Set router_aux_loss_coef=0."
        raise LossInputError("aux_loss", "a model without an auxiliary loss", "a router's", fix)


class SFTTrainer(LoggedLoss, trl.SFTTrainer):  # type: ignore[misc]  # trl is not read by mypy
    """``trl.SFTTrainer`` with a loss that reads no columns and is divided by tokens, such as ``cross_entropy()``."""

    hook = ("TRL's SFTTrainer", (), ("tokens",))

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        check_settings(self, trl.SFTConfig, ("loss_type", "label_smoothing_factor"))
        if self.compute_loss_func is not None:
            raise LossInputError("compute_loss_func", "None beside loss=", "a function", "Pass one of the two.")

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss, divided by the trained tokens of all micro-batches and ranks."""
        if "shift_labels" in inputs:
            fix = "Leave context and sequence parallelism off."
            raise LossInputError("inputs", "labels that are not shifted", "shift_labels", fix)
        with recorded_logprobs(model) as logprobs:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        weights = weights_from_labels(inputs["labels"])
        in_evaluation = num_items_in_batch is None and not self.model.training  # where TRL counts each batch
        tokens = weights.sum() if in_evaluation else num_items_in_batch
        loss = loss_of(self, logprobs[0], weights, {"tokens": tokens})
        if self.args.average_tokens_across_devices and not in_evaluation:  # the average over ranks is undone
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, result[1]) if return_outputs else loss


class DPOTrainer(LoggedLoss, trl.DPOTrainer):  # type: ignore[misc]
    """``trl.DPOTrainer`` with a loss over pairs, such as ``dpo(beta=0.1)`` or ``orpo()``."""

    hook = ("TRL's DPOTrainer", ("ref_logprobs",), ("pairs",), PAIRS)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        beta = self.loss_fn.loss.knobs.get("beta", self.args.beta)  # TRL scales the rewards that it logs
        check_settings(self, trl.DPOConfig, DPO_SETTINGS, beta=beta)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """Return the loss, divided by the pairs of the micro-batch. The trainer averages micro-batches and ranks."""
        with recorded_logprobs(model, self.ref_model or self.model) as logprobs:
            result = super()._compute_loss(model, inputs, return_outputs)
        mask = inputs["completion_mask"][:, 1:]
        ref = logprobs[-1][:, -mask.shape[1] :]
        loss = loss_of(self, logprobs[0], mask, {"pairs": len(mask) // 2}, layout="halves", ref_logprobs=ref)
        return (loss, result[1]) if return_outputs else loss


class GRPOTrainer(LoggedLoss, trl.GRPOTrainer):  # type: ignore[misc]
    """``trl.GRPOTrainer`` with a policy loss, such as ``dapo()``, ``grpo(kl_beta=0.01)`` or ``gspo()``."""

    columns = ("advantages", "old_logprobs", "ref_logprobs", "sampler_logprobs")
    hook = ("TRL's GRPOTrainer", columns, ("tokens", "sequences"))

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        loss = self.loss_fn.loss
        beta = loss.knobs.get("kl_beta", self.args.beta if "ref_logprobs" in loss.reads else 0.0)
        check_settings(self, trl.GRPOConfig, GRPO_SETTINGS, beta=beta)
        check_reads_advantages(self)
        check_sampler(self)

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        """Return the loss, divided by the part of the trainer's counts that one optimizer step on this rank has."""
        with recorded_logprobs(model) as logprobs:
            super()._compute_loss(model, inputs)
        mode = "train" if self.model.training else "eval"
        for name in [name for name in self._metrics[mode] if name == "kl" or "clip_ratio" in name]:
            del self._metrics[mode][name]  # of TRL's own loss
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        part = steps / self.args.steps_per_generation if mode == "train" else 1.0  # of all that was generated at once
        tokens = inputs["num_items_in_batch"] * part / self.accelerator.num_processes
        old = inputs.get("old_per_token_logps", ON_POLICY)
        given = (inputs.get(name) for name in ("ref_per_token_logps", "sampling_per_token_logps"))
        columns = dict(zip(self.columns, (inputs["advantages"], old, *given)))
        return loss_of(self, logprobs[0], mask, {"tokens": tokens, "sequences": len(mask) * steps}, **columns)


class RLOOTrainer(LoggedLoss, trl.RLOOTrainer):  # type: ignore[misc]
    """``trl.RLOOTrainer`` with ``reinforce(weigh=sequence_sum_mean)``, TRL's loss for samples of the policy."""

    hook = ("TRL's RLOOTrainer", ("advantages",), ("sequences",))

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        check_settings(self, trl.RLOOConfig, ("epsilon", "epsilon_high"))
        check_reads_advantages(self)
        each = self.args.steps_per_generation * self.num_iterations
        if self.args.gradient_accumulation_steps % each:
            got = f"a new batch every {each} steps for {self.args.gradient_accumulation_steps} accumulated"
            fix = "Use GRPOTrainer, whose losses have a ratio of each token."
            raise LossInputError("args", "samples of the policy that is trained", got, fix)

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        """Return the loss, divided by the sequences of the micro-batch. The trainer averages over these and ranks."""
        with recorded_logprobs(model) as logprobs:
            super()._compute_loss(model, inputs)
        mask, advantages = inputs["completion_mask"], inputs["advantages"]
        return loss_of(self, logprobs[0], mask, {"sequences": len(mask)}, advantages=advantages)
