"""OpenRLHF 0.11.2."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.rosetta.batch import Batch
from tools.rosetta.formulas import pair_sums
from tools.rosetta.installed import Peer
from tools.rosetta.row import Framework

LOSS, UTILS = "models/loss.py", "models/utils.py"
openrlhf = Framework("OpenRLHF 0.11.2", f"openrlhf/{LOSS}")
NAMES = {"torch": torch, "nn": nn, "F": F}
SHARED = ((UTILS, "masked_mean"), (LOSS, "aggregate_loss"))


def policy(**settings: Any) -> Peer:
    """Return PolicyLoss."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        loss = names["PolicyLoss"](**settings)
        return loss(b.lp, b.old_logprobs, b.A, b.mask, b.sampler_logprobs)[0]

    return Peer("openrlhf", (*SHARED, (LOSS, "PolicyLoss")), run, NAMES)


def dpo(**settings: Any) -> Peer:
    """Return DPOLoss."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        return names["DPOLoss"](0.1, **settings)(*pair_sums(b, b.lp), *pair_sums(b, b.ref_logprobs))[0]

    return Peer("openrlhf", ((LOSS, "DPOLoss"),), run, NAMES)


def reward(name: str, margin: bool = False) -> Peer:
    """Return a loss of a reward model."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        scores = b.leaf[:, 0]
        margins = (b.target_margin[0::2],) if margin else ()
        return names[name]()(scores[0::2], scores[1::2], *margins)

    return Peer("openrlhf", ((LOSS, name),), run, NAMES)


def rows() -> None:
    """Add the rows."""
    openrlhf.equal("policy_loss_type=ppo (default)", "ppo()", policy())
    openrlhf.equal("dual_clip=3", "ppo(dual_clip=3.0)", policy(dual_clip=3.0))
    openrlhf.equal("token_level_loss=False", "ppo(weigh=sequence_mean)", policy(token_level_loss=False))
    openrlhf.equal("policy_loss_type=gspo", "gspo(clip=(0.8, 1.2))", policy(policy_loss_type="gspo"))
    openrlhf.equal(
        "is_correction_level=token, mode=clip, 0.5 to 5",
        "with_rollout_weight(ppo(), rollout.truncated((0.5, 5.0)))",
        policy(is_correction_level="token", is_correction_mode="clip"),
    )
    openrlhf.equal(
        "is_correction_level=token, mode=mask, 0.5 to 2 (IcePop)",
        "with_rollout_weight(ppo(), rollout.masked((0.5, 2.0)))",
        policy(is_correction_level="token", is_correction_threshold=(0.5, 2.0)),
    )
    openrlhf.equal(
        "is_correction_level=seq, mode=mask, 0.9 to 1.1 (seq-mask-tis)",
        "with_rollout_weight(ppo(), rollout.ratio() * rollout.inside((0.9, 1.1), geometric_level))",
        policy(is_correction_level="seq", is_correction_threshold=(0.9, 1.1)),
    )
    openrlhf.different(
        "policy_loss_type=gspo, is_correction_level=token",
        "gspo(clip=(0.8, 1.2))",
        policy(policy_loss_type="gspo", is_correction_level="token"),
        why="the ratio is then to the sampler, and no correction is applied",
    )
    pairs: dict[str, Any] = {"inputs": "pairs"}
    openrlhf.equal("DPOLoss(0.1)", "dpo()", dpo(), **pairs)
    openrlhf.equal("DPOLoss(0.1, label_smoothing=0.1)", "dpo(label_smoothing=0.1)", dpo(label_smoothing=0.1), **pairs)
    openrlhf.equal("DPOLoss(0.1, ipo=True)", "ipo()", dpo(ipo=True), why="sums, as the paper's equation", **pairs)
    openrlhf.equal("PairWiseLoss", "bradley_terry()", reward("PairWiseLoss"), inputs="scores")
    openrlhf.equal("PairWiseLoss with margin", "bradley_terry_margin()", reward("PairWiseLoss", True), inputs="scores")
    openrlhf.equal("LogExpLoss", "bradley_terry()", reward("LogExpLoss"), inputs="scores")


rows()
