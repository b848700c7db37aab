"""TRL 1.16.0: trainers of reward models, supervised ones, distillation and A*-PO."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.rosetta.frameworks.trl_preference import NAMES, SFT, preference
from tools.rosetta.inputs import Batch
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


def reward(b: Batch) -> tuple[Tensor, Tensor]:
    """Scores of chosen and rejected."""
    return b.leaf[0::2, 0], b.leaf[1::2, 0]


def a2po(b: Batch) -> Tensor:
    """Mean of (β₂·(log π − log ref) − (r − V*))² with V* = 0."""
    gap = ((b.lp - b.ref_logprobs) * b.mask).sum(1)
    return (1e-3 * gap - b.rewards).square().mean()


def rows() -> None:
    """Add the rows."""
    preference.equal(
        "RewardConfig()",
        "bradley_terry()",
        lambda b: -F.logsigmoid(reward(b)[0] - reward(b)[1]).mean(),
        inputs="scores",
        source=f"trl/{REWARD}",
    )
    preference.equal(
        "RewardConfig(center_rewards_coefficient=0.01)",
        "bradley_terry(center_weight=0.01)",
        lambda b: (-F.logsigmoid(reward(b)[0] - reward(b)[1]) + 0.01 * sum(reward(b)) ** 2).mean(),
        inputs="scores",
        source=f"trl/{REWARD}",
    )
    preference.equal(
        "SFTConfig(), loss_type=nll",
        "cross_entropy()",
        lambda b: -(b.lp * b.mask).sum() / b.mask.sum(),
        source=f"trl/{SFT}",
        inputs="policy",
    )
    preference.equal(
        "SFTConfig(loss_type=dft)",
        "dft()",
        lambda b: -(b.lp.detach().exp() * b.lp * b.mask).sum() / b.mask.sum(),
        source=f"trl/{SFT}",
        inputs="policy",
    )
    per_position = {"inputs": "vocabulary", "source": f"trl/{GKD}"}
    preference.equal(
        "GKDConfig(beta=0.5), candidates = vocabulary", "top_k_jsd(support=raw_support)", gkd(0.5), **per_position
    )
    preference.equal("GKDConfig(beta=0.0)", "top_k_forward_kl(support=raw_support)", gkd(0.0), **per_position)
    preference.equal("GKDConfig(beta=1.0)", "top_k_reverse_kl(support=raw_support)", gkd(1.0), **per_position)
    preference.equal("A2POConfig(), V* = 0", "a2po()", a2po, source=f"trl/{A2PO}", inputs="no_reference_point")


rows()
