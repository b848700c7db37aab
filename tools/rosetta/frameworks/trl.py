"""TRL 1.16.0: GRPOTrainer and RLOOTrainer."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.installed import Peer
from tools.rosetta.row import Framework

GRPO, RLOO, UTILS = "trainer/grpo_trainer.py", "trainer/rloo_trainer.py", "trainer/utils.py"
GMPO = "experimental/gmpo/gmpo_trainer.py"
trl = Framework("TRL 1.16.0, online", f"trl/{GRPO}")

ACCELERATOR = SimpleNamespace(
    num_processes=1,
    sync_gradients=True,
    device=torch.device("cpu"),
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
    pad_across_processes=lambda x, dim, pad_index: x,
)
"""What a trainer asks of its accelerator in one process."""

MAX_LENGTH = 16
"""``max_completion_length``, beyond the width of the inputs."""


def trainer(b: Batch, **settings: Any) -> SimpleNamespace:
    """Return the attributes that the losses of TRL's online trainers read, at their defaults."""
    args = {
        "delta": None,
        "use_bias_correction_kl": False,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
        "steps_per_generation": 1,
    }
    attributes = {
        "loss_type": "dapo",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "importance_sampling_level": "token",
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "max_completion_length": MAX_LENGTH,
        "current_gradient_accumulation_steps": 1,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False,
        "entropy_coef": 0.0,
        "accelerator": ACCELERATOR,
        "_metrics": {"train": defaultdict(list)},
        "model": SimpleNamespace(training=True),
    }
    own = {key: value for key, value in settings.items() if key in args}
    args.update(own)
    attributes.update({key: value for key, value in settings.items() if key not in own})
    entropy = getattr(b, "entropy", torch.zeros_like(b.mask))
    return SimpleNamespace(
        args=SimpleNamespace(**args),
        _get_per_token_logps_and_entropies=lambda *_, **__: (b.lp, entropy, None),
        **attributes,
    )


def inputs(b: Batch) -> dict[str, Any]:
    """Return the batch under TRL's names."""
    ids = torch.zeros_like(b.mask).long()
    return {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": b.mask,
        "advantages": b.advantages,
        "old_per_token_logps": b.old_logprobs,
        "ref_per_token_logps": b.ref_logprobs,
        "old_logps": (b.old_logprobs * b.mask).sum(1),
        "num_items_in_batch": b.mask.sum(),
    }


METHODS = ("get_gamma_weights", "get_off_policy_mask", "get_high_entropy_mask", "_compute_loss")
NANS = ((UTILS, "nanmin"), (UTILS, "nanmax"))


def grpo(tis: dict[str, Any] | None = None, **settings: Any) -> Peer:
    """Return the loss of GRPOTrainer."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        self, columns = trainer(b, use_vllm=tis is not None, **settings), inputs(b)
        self.get_gamma_weights = torch.no_grad()(names["get_gamma_weights"])  # as its decorator says
        self.get_off_policy_mask = names["get_off_policy_mask"]
        self.get_high_entropy_mask = lambda *a: names["get_high_entropy_mask"](self, *a)
        if settings.get("off_policy_mask_threshold") is not None:
            columns["sampling_per_token_logps"] = b.sampler_logprobs
        if tis is not None:
            columns["importance_sampling_ratio"] = rollout_ratio(b, **tis)
        return names["_compute_loss"](self, None, columns)

    definitions = (*NANS, *((GRPO, f"GRPOTrainer.{name}") for name in METHODS))
    return Peer("trl", definitions, run, {"torch": torch, "math": math})


def rollout_ratio(b: Batch, mode: str, low: float | None, high: float) -> Tensor:
    """The factor of ``vllm_importance_sampling_mode``, which TRL computes with the samples."""
    gap = (b.old_logprobs - b.sampler_logprobs) * b.mask
    ratio = (gap.sum(-1, keepdim=True) if mode.startswith("sequence") else gap).exp()
    if mode.endswith("truncate"):
        return ratio.clamp(min=low, max=high)
    inside = (ratio <= high) if low is None else (ratio <= high) & (ratio >= low)
    return ratio * inside


def rloo() -> Peer:
    """Return the loss of RLOOTrainer."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        return names["_compute_loss"](trainer(b), None, inputs(b))

    return Peer("trl", (*NANS, (RLOO, "RLOOTrainer._compute_loss")), run, {"torch": torch})


def gmpo() -> Peer:
    """Return the loss of GMPOTrainer, whose epsilon is 0.4 in the logarithm."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        return names["_compute_loss"](trainer(b, epsilon_low=0.4, epsilon_high=0.4), None, inputs(b))

    return Peer("trl", (*NANS, (GMPO, "GMPOTrainer._compute_loss")), run, {"torch": torch})


def rows() -> None:
    """Add the rows."""
    trl.equal("GRPOConfig() (loss_type=dapo, epsilon 0.2)", "bnpo(log_ratio_cap=None)", grpo())
    trl.different(
        "GRPOConfig(), for DAPO's paper", "dapo()", grpo(), why="epsilon_high is 0.2 unless set; the paper has 0.28"
    )
    trl.equal("GRPOConfig(epsilon_high=0.28)", "dapo(log_ratio_cap=None)", grpo(epsilon_high=0.28))
    trl.equal("loss_type=dapo, log-ratios beyond ±20", "bnpo(log_ratio_cap=None)", grpo(), inputs="far")
    trl.different(
        "loss_type=dapo, log-ratios beyond ±20, our cap",
        "bnpo()",
        grpo(),
        inputs="far",
        why="TRL has no bound of the log-ratio; ours is ±20 unless log_ratio_cap=None",
    )
    trl.equal("loss_type=grpo", "grpo(kl_beta=0.0, weigh=sequence_mean, log_ratio_cap=None)", grpo(loss_type="grpo"))
    trl.equal(
        "loss_type=grpo, beta=0.04",
        "grpo(kl_beta=0.04, kl=k3_uncapped, weigh=sequence_mean, log_ratio_cap=None)",
        grpo(loss_type="grpo", beta=0.04),
    )
    trl.equal(
        "loss_type=grpo, beta=0.04, k3 above 10",
        "grpo(kl_beta=0.04, kl=k3_uncapped, weigh=sequence_mean, log_ratio_cap=None)",
        grpo(loss_type="grpo", beta=0.04),
        inputs="far_reference",
    )
    trl.factor(
        "loss_type=grpo, a row masked whole",
        "grpo(kl_beta=0.0, weigh=sequence_mean, log_ratio_cap=None)",
        grpo(loss_type="grpo"),
        inputs="masked_row",
        factor="(lengths > 0).sum() / B",
        why="sequences with a token / sequences: TRL's mean counts those that are masked whole",
    )
    trl.factor(
        "loss_type=grpo, gradient_accumulation_steps=4",
        "grpo(kl_beta=0.0, weigh=sequence_mean, log_ratio_cap=None)",
        grpo(loss_type="grpo", current_gradient_accumulation_steps=4),
        factor="1 / 4",
        why="1 / accumulation steps: a mean of means, unequal micro-batches count alike",
    )
    trl.equal(
        "loss_type=bnpo",
        "bnpo(log_ratio_cap=None)",
        grpo(loss_type="bnpo"),
        why="in one micro-batch; TRL's denominator is that of each micro-batch",
    )
    trl.equal(
        "loss_type=dr_grpo", f"dr_grpo(weigh=fixed_length({MAX_LENGTH}), log_ratio_cap=None)", grpo(loss_type="dr_grpo")
    )
    trl.equal(
        "importance_sampling_level=sequence, loss_type=grpo",
        "gspo(clip=(0.8, 1.2), log_ratio_cap=None)",
        grpo(loss_type="grpo", importance_sampling_level="sequence"),
    )
    trl.equal(
        "loss_type=cispo, epsilon_high=5",
        "cispo(clip=(0.0, 5.0), log_ratio_cap=None)",
        grpo(loss_type="cispo", epsilon_high=5.0),
        why="epsilon_high is the bound itself, not 1 + ε",
    )
    trl.different(
        "loss_type=cispo, defaults",
        "cispo(clip=(0.0, 1.2), log_ratio_cap=None)",
        grpo(loss_type="cispo"),
        why="epsilon_high=0.2 is an absolute bound: it cuts nearly every weight to 0.2",
    )
    trl.equal(
        "loss_type=cispo, defaults, as they are", "cispo(clip=(0.0, 0.2), log_ratio_cap=None)", grpo(loss_type="cispo")
    )
    trl.equal(
        "loss_type=cispo, sequence level, epsilon_high=5",
        "cispo_sequence(clip=(0.0, 5.0), log_ratio_cap=None)",
        grpo(loss_type="cispo", epsilon_high=5.0, importance_sampling_level="sequence"),
    )
    trl.equal("loss_type=sapo", "sapo(log_ratio_cap=None)", grpo(loss_type="sapo"))
    trl.equal("loss_type=vespo", "vespo()", grpo(loss_type="vespo"))
    trl.equal(
        "loss_type=luspo, sequence level",
        "luspo(clip=(0.8, 1.2), log_ratio_cap=None)",
        grpo(loss_type="luspo", importance_sampling_level="sequence"),
    )
    trl.equal(
        "delta=3",
        "bnpo(dual_clip=3.0, log_ratio_cap=None)",
        grpo(delta=3.0),
        why="with delta above 1 + epsilon_high it is the dual clip",
    )
    trl.different(
        "delta=1.1",
        "bnpo(dual_clip=1.1, log_ratio_cap=None)",
        grpo(delta=1.1),
        why="below 1 + epsilon_high it also bounds ratios of positive advantages",
    )
    trl.equal(
        "loss_type=grpo, off_policy_mask_threshold=0.01",
        'with_opsm(grpo(kl_beta=0.0, weigh=sequence_mean, log_ratio_cap=None), 0.01, "sampler_logprobs")',
        grpo(loss_type="grpo", off_policy_mask_threshold=0.01),
    )
    trl.equal(
        "beta=0.04, use_bias_correction_kl=True",
        'with_kl(bnpo(log_ratio_cap=None), 0.04, k3_uncapped, rollout.ratio_to("old_logprobs", None))',
        grpo(beta=0.04, use_bias_correction_kl=True),
    )
    modes = {
        "token_truncate": "rollout.truncated((0.0, 3.0))",
        "token_mask": "rollout.masked((0.0, 3.0))",
        "sequence_truncate": "rollout.truncated((0.0, 3.0), sequence_level)",
        "sequence_mask": "rollout.masked((0.0, 3.0), sequence_level)",
    }
    for mode, weight in modes.items():
        why = "the default with vLLM" if mode == "sequence_mask" else ""
        trl.equal(
            f"vllm_importance_sampling_mode={mode}",
            f"with_rollout_weight(bnpo(log_ratio_cap=None), {weight})",
            grpo(tis={"mode": mode, "low": None, "high": 3.0}),
            why=why,
        )
    bonus = grpo(_entropy_bonus_enabled=True, entropy_coef=0.01)
    trl.equal("entropy_coef=0.01", "with_entropy(bnpo(log_ratio_cap=None), 0.01)", bonus, inputs="token_of_logits")
    trl.equal(
        "top_entropy_quantile=0.2",
        "with_top_entropy(bnpo(log_ratio_cap=None), 0.2)",
        grpo(top_entropy_quantile=0.2),
        inputs="one_group",
    )
    trl.different(
        "top_entropy_quantile=0.2, entropy_coef=0.01",
        "with_top_entropy(with_entropy(bnpo(log_ratio_cap=None), 0.01), 0.2)",
        grpo(top_entropy_quantile=0.2, _entropy_bonus_enabled=True, entropy_coef=0.01),
        inputs="token_of_logits",
        why="TRL divides the bonus by the kept tokens; ours divides it by all",
    )
    trl.equal("GMPOConfig()", "gmpo(log_ratio_cap=None)", gmpo(), source=f"trl/{GMPO}")
    trl.equal("RLOOConfig()", "rloo(log_ratio_cap=None)", rloo(), source=f"trl/{RLOO}")
    trl.different(
        "RLOOConfig(), for RLOO's paper",
        "reinforce(weigh=sequence_sum_mean)",
        rloo(),
        source=f"trl/{RLOO}",
        why="clips the product of the ratios of a sequence; on-policy its gradient is the paper's",
    )


rows()
