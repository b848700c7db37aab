"""GRPO's loss with a k3 penalty on padded tensors, as other libraries compute it.

Each rival is a function ``(batch) -> (loss, metrics)``, with the metrics that its library computes. All rivals compute
the same loss: clip (0.8, 1.2), the penalty times β, the mean over tokens. A function for each rival imports the package
and returns the rival.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from loss_overhead import BETA, HIGH, LOW
from torch import Tensor

Batch = dict[str, Tensor]
Rival = Callable[[Batch], tuple[Tensor, dict[str, float]]]


def by_hand(batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Return the loss as a careful engineer writes it, with the metrics of ours and one transfer to the host."""
    mask = batch["weights"]
    advantages = batch["advantages"][:, None]
    tokens = mask.sum()

    def mean(x: Tensor) -> Tensor:
        return (x * mask).sum() / tokens

    log_ratio = batch["logprobs"] - batch["old_logprobs"]
    ratio = torch.exp(log_ratio)
    surrogate = -torch.min(ratio * advantages, ratio.clamp(LOW, HIGH) * advantages)
    difference = batch["ref_logprobs"] - batch["logprobs"]
    kl = torch.exp(difference) - difference - 1
    loss = mean(surrogate + BETA * kl)
    with torch.no_grad():
        metrics = {
            "loss": loss,
            "tokens": tokens,
            "sequences_empty": (mask.sum(1) == 0).sum().float(),
            "ratio": mean(ratio),
            "ratio_capped": mean((log_ratio.abs() > 20).float()),
            "log_ratio_abs": mean(log_ratio.abs()),
            "kl_old": mean(ratio - log_ratio - 1),
            "clip_low": mean(((advantages < 0) & (ratio < LOW)).float()),
            "clip_high": mean(((advantages > 0) & (ratio > HIGH)).float()),
            "kl_ref": mean(kl),
        }
        numbers = torch.stack(list(metrics.values())).tolist()
    return loss, dict(zip(metrics, numbers))


def polgrad() -> Rival:
    from polgrad import (
        Aggregation,
        ClipConfig,
        KLEstimator,
        KLLossConfig,
        PolicyLossConfig,
        RatioKind,
        SurrogateKind,
        policy_loss,
    )

    config = PolicyLossConfig(
        ratio=RatioKind.TOKEN,
        surrogate=SurrogateKind.PG_CLIP,
        clip=ClipConfig(eps_low=1 - LOW, eps_high=HIGH - 1),
        aggregation=Aggregation.TOKEN_MEAN,
        kl=KLLossConfig(kind=KLEstimator.K3, coef=BETA),
    )

    def loss(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        result = policy_loss(
            config,
            logprobs=batch["logprobs"],
            old_logprobs=batch["old_logprobs"],
            advantages=batch["advantages"][:, None].expand_as(batch["logprobs"]),
            response_mask=batch["weights"].bool(),
            ref_logprobs=batch["ref_logprobs"],
        )
        return result.loss, {"kl_ref": result.kl_loss.item()}

    return loss


def verl() -> Rival:
    from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_vanilla, kl_penalty

    config = SimpleNamespace(
        clip_ratio=0.2, clip_ratio_low=1 - LOW, clip_ratio_high=HIGH - 1, global_batch_info={"dp_size": 1}
    )
    config.get = lambda name, default: 1e9  # clip_ratio_c: no dual clip

    def loss(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        lp, mask = batch["logprobs"], batch["weights"]
        advantages = batch["advantages"][:, None].expand_as(lp)
        policy, metrics = compute_policy_loss_vanilla(
            batch["old_logprobs"], lp, advantages, mask, loss_agg_mode="token-mean", config=config
        )
        kl = agg_loss(kl_penalty(lp, batch["ref_logprobs"], "low_var_kl"), mask, "token-mean")
        return policy + BETA * kl, {**metrics, "kl_ref": kl.item()}

    return loss


def liger() -> Rival:
    """The function that Liger's fused GRPO loss calls on each chunk."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    def loss(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        total, metrics = LigerFusedLinearGRPOFunction.ppo_loss_fn(
            batch["logprobs"],
            batch["weights"],
            batch["advantages"],
            batch["weights"],
            ref_per_token_logps=batch["ref_logprobs"],
            old_per_token_logps=batch["old_logprobs"],
            epsilon_low=1 - LOW,
            epsilon_high=HIGH - 1,
            beta=BETA,
            loss_type="bnpo",
        )
        return total, {f"metric {i}": float(x) for i, x in enumerate(metrics)}

    return loss


def trl() -> Rival:
    """``GRPOTrainer._compute_loss`` on a stand-in for the trainer, whose model returns the logprobs of the batch."""
    from trl import GRPOConfig, GRPOTrainer

    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=BETA,
        loss_type="bnpo",
        epsilon_low=1 - LOW,
        epsilon_high=HIGH - 1,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
    )
    assert GRPOConfig.__dataclass_fields__["use_bias_correction_kl"].default, "off by default"

    def loss(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        lp, mask = batch["logprobs"], batch["weights"]
        trainer._get_per_token_logps_and_entropies = lambda *args, **options: (lp, lp.detach(), None)
        trainer._metrics = {"train": defaultdict(list)}
        inputs = {
            "prompt_ids": mask[:, :1],
            "prompt_mask": mask[:, :1],
            "completion_ids": mask,
            "completion_mask": mask,
            "advantages": batch["advantages"],
            "old_per_token_logps": batch["old_logprobs"],
            "ref_per_token_logps": batch["ref_logprobs"],
        }
        total = GRPOTrainer._compute_loss(trainer, None, inputs)
        return total, {name: values[0] for name, values in trainer._metrics["train"].items()}

    return loss


RIVALS: dict[str, tuple[str, Callable[[], Rival]]] = {
    "polgrad": ("polgrad", polgrad),
    "TRL": ("trl", trl),
    "verl": ("verl", verl),
    "Liger": ("liger-kernel", liger),
}
"""For each name, the package and a function that returns the rival."""
