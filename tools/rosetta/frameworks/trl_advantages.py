"""TRL 1.16.0: advantages of GRPOTrainer and RLOOTrainer."""

from __future__ import annotations

from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.frameworks.trl import RLOO, trl


def scaled(b: Batch, scale: str) -> Tensor:
    """(r − group mean) / (standard deviation + 1e-4), as TRL computes it with the samples."""
    rewards = b.rewards.view(2, 4)
    centred = (rewards - rewards.mean(1, keepdim=True)).flatten()
    deviation = {"group": rewards.std(1).repeat_interleave(4), "batch": b.rewards.std(), "none": None}[scale]
    return centred if deviation is None else centred / (deviation + 1e-4)


def rloo_advantage(b: Batch) -> Tensor:
    """r − mean of the other rewards."""
    rewards = b.rewards.view(2, 4)
    return (rewards - (rewards.sum(1, keepdim=True) - rewards) / 3).flatten()


def gdpo(b: Batch) -> Tensor:
    """Each reward standardised in its group, summed, and standardised in the batch."""
    rewards = b.several_rewards.view(2, 4, 2)
    total = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).sum(2).flatten()
    return (total - total.mean()) / (total.std() + 1e-4)


def rows() -> None:
    """Add the rows."""
    trl.equal(
        "scale_rewards=group (default)",
        "group_advantages(rewards, groups, eps=1e-4)",
        lambda b: scaled(b, "group"),
        inputs="samples",
        why="eps is 1e-4 in TRL, 1e-6 in verl and here",
    )
    trl.different(
        "scale_rewards=group, our default eps",
        "group_advantages(rewards, groups)",
        lambda b: scaled(b, "group"),
        inputs="samples",
        why="eps is 1e-4 in TRL, 1e-6 here",
    )
    trl.equal(
        "scale_rewards=batch",
        'group_advantages(rewards, groups, scale="batch", eps=1e-4)',
        lambda b: scaled(b, "batch"),
        inputs="samples",
    )
    trl.equal(
        "scale_rewards=none",
        'group_advantages(rewards, groups, scale="none")',
        lambda b: scaled(b, "none"),
        inputs="samples",
    )
    trl.equal(
        "multi_objective_aggregation=normalize_then_sum (GDPO)",
        "gdpo_advantages(several_rewards, groups, eps=1e-4)",
        gdpo,
        inputs="samples",
    )
    trl.equal(
        "RLOOConfig(), advantages",
        "leave_one_out_advantages(rewards, groups)",
        rloo_advantage,
        inputs="samples",
        source=f"trl/{RLOO}",
    )


rows()
