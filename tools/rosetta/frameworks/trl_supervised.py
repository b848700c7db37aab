"""TRL 1.16.0: trainers of reward models, supervised ones, distillation and A*-PO."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.frameworks.trl_preference import NAMES, SFT, halves, model, preference, self_of, trained
from tools.rosetta.installed import Peer

GKD, A2PO = "experimental/gkd/gkd_trainer.py", "experimental/a2po/a2po_trainer.py"
REWARD = "trainer/reward_trainer.py"


def gkd(beta: float) -> Peer:
    """Return the loss of GKDTrainer over a whole vocabulary."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        active = b.mask[..., 0] > 0
        return names["generalized_jsd_loss"](
            b.leaf[active][None], b.teacher_logprobs[active][None], torch.zeros(1, int(active.sum())), beta=beta
        )

    return Peer("trl", ((GKD, "GKDTrainer.generalized_jsd_loss"),), run, NAMES)


def reward(coefficient: float | None = None) -> Peer:
    """Return the loss of RewardTrainer."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        self = self_of()
        self.args.center_rewards_coefficient = coefficient
        return names["compute_loss"](self, lambda **_: SimpleNamespace(logits=halves(b.leaf)), trained(b.mask, halves))

    return Peer("trl", ((REWARD, "RewardTrainer.compute_loss"),), run, NAMES)


def sft(loss_type: str) -> Peer:
    """Return the loss of SFTTrainer."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        self = self_of(compute_loss_func=None, label_smoother=None)
        self.args.loss_type, self.args.average_tokens_across_devices = loss_type, False
        inputs = {**trained(b.mask, lambda x: x), "labels": None}
        return names["compute_loss"](self, model(b.lp, b.mask), inputs)

    versions = {"Version": str, "accelerate": SimpleNamespace(__version__="1.11"), "transformers": None}
    return Peer("trl", ((SFT, "SFTTrainer.compute_loss"),), run, {**NAMES, **versions})


def a2po() -> Peer:
    """Return the loss of A2POTrainer with V* = 0."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        self = self_of(_get_sequence_logps=lambda *_: (b.lp * b.mask).sum(1))
        self.args.beta2 = 1e-3
        inputs = {
            "input_ids": None,
            "attention_mask": None,
            "logits_to_keep": None,
            "rewards": b.rewards,
            "ref_logps": (b.ref_logprobs * b.mask).sum(1),
            "v_star": b.reference_point,
        }
        return names["compute_loss"](self, None, inputs)

    return Peer("trl", ((A2PO, "A2POTrainer.compute_loss"),), run, NAMES)


def reverse_kl(b: Batch) -> Tensor:
    """Mean over positions of Σ p·(log p − log q) over the vocabulary."""
    divergence = (b.lp.exp() * (b.lp - b.teacher_logprobs) * b.mask).sum()
    return divergence / b.mask[..., 0].sum()


def rows() -> None:
    """Add the rows."""
    preference.equal(
        "RewardConfig()",
        "bradley_terry()",
        reward(),
        inputs="scores",
        source=f"trl/{REWARD}",
    )
    preference.equal(
        "RewardConfig(center_rewards_coefficient=0.01)",
        "bradley_terry(center_weight=0.01)",
        reward(0.01),
        inputs="scores",
        source=f"trl/{REWARD}",
    )
    preference.equal(
        "SFTConfig(), loss_type=nll",
        "cross_entropy()",
        sft("nll"),
        source=f"trl/{SFT}",
        inputs="policy",
    )
    preference.equal(
        "SFTConfig(loss_type=dft)",
        "dft()",
        sft("dft"),
        source=f"trl/{SFT}",
        inputs="policy",
    )
    per_position = {"inputs": "vocabulary", "source": f"trl/{GKD}"}
    preference.equal(
        "GKDConfig(beta=0.5), candidates = vocabulary", "top_k_jsd(support=raw_support)", gkd(0.5), **per_position
    )
    preference.equal("GKDConfig(beta=0.0)", "top_k_forward_kl(support=raw_support)", gkd(0.0), **per_position)
    preference.equal("GKDConfig(beta=1.0)", "top_k_reverse_kl(support=raw_support)", gkd(1.0), **per_position)
    preference.equal("A2POConfig(), V* = 0", "a2po()", a2po(), source=f"trl/{A2PO}", inputs="no_reference_point")
    preference.equal(
        "DistillationConfig() (beta=1.0), candidates = vocabulary",
        "top_k_reverse_kl(support=raw_support)",
        reverse_kl,
        inputs="vocabulary",
        source="trl/trainer/distillation_trainer.py",
    )


rows()
