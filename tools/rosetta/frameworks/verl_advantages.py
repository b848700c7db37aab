"""verl 0.9.1: estimators of advantages."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.frameworks.verl import CORE, MASKED, NAMES, ActorConfig, functions, verl
from tools.rosetta.installed import Peer


def by_token(name: str, arguments: Any) -> Peer:
    """Return verl's advantage of each token that counts; the reward is at the last one."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        functions(names)
        tokens = torch.zeros_like(b.mask)
        tokens[torch.arange(len(tokens)), b.lengths.long() - 1] = b.rewards
        return names[name](tokens, **arguments(b))[0] * b.mask

    return Peer("verl", (*MASKED, (CORE, name)), run, NAMES)


def advantage(name: str, rewards: str = "rewards", groups: str = "groups", **settings: Any) -> Peer:
    """Return verl's advantage of each answer, that of its first token."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        functions(names)
        tokens = torch.zeros_like(b.mask)
        tokens[:, 0] = getattr(b, rewards)
        labels = np.array(getattr(b, groups).tolist())
        result, _ = names[name](tokens, b.mask, index=labels, **settings)
        return result[:, 0]

    return Peer("verl", (*MASKED, (CORE, name)), run, NAMES)


def rows() -> None:
    """Add the rows."""
    grpo = "compute_grpo_outcome_advantage"
    verl.equal("adv_estimator=grpo", "group_advantages(rewards, groups)", advantage(grpo), inputs="samples")
    verl.equal(
        "grpo, norm_adv_by_std_in_grpo=False",
        'group_advantages(rewards, groups, scale="none")',
        advantage(grpo, norm_adv_by_std_in_grpo=False),
        inputs="samples",
    )
    verl.equal(
        "adv_estimator=rloo",
        "leave_one_out_advantages(rewards, groups)",
        advantage("compute_rloo_outcome_advantage"),
        inputs="samples",
    )
    verl.equal(
        "adv_estimator=grpo_passk",
        "pass_at_k_advantages(rewards, groups, scale='std')",
        advantage("compute_grpo_passk_outcome_advantage", config={"norm_adv_by_std_in_grpo": True}),
        inputs="samples",
    )
    verl.equal(
        "adv_estimator=reinforce_plus_plus_baseline",
        "reinforce_plus_plus_baseline_advantages(rewards, groups, lengths=lengths)",
        advantage("compute_reinforce_plus_plus_baseline_outcome_advantage"),
        inputs="samples",
    )
    verl.equal(
        "adv_estimator=opo",
        "opo_advantages(rewards, groups, lengths)",
        advantage("compute_opo_outcome_advantage"),
        inputs="samples",
    )
    verl.equal(
        "adv_estimator=gpg",
        'gpg_advantages(rewards, groups, alpha="nonzero")',
        advantage("compute_gpg_outcome_advantage"),
        inputs="samples",
    )
    at_last = "token_rewards(rewards, mask)"
    verl.equal(
        "adv_estimator=gae",
        f"whiten(gae({at_last}, values, mask, gamma=1.0, lam=1.0)[0], mask)",
        by_token(
            "compute_gae_advantage_return",
            lambda b: {"values": b.values, "response_mask": b.mask, "gamma": 1.0, "lam": 1.0},
        ),
        inputs="samples",
        why="whitened over the tokens of the batch",
    )
    verl.equal(
        "adv_estimator=reinforce_plus_plus",
        f"reinforce_plus_plus_advantages({at_last}, mask)",
        by_token(
            "compute_reinforce_plus_plus_outcome_advantage",
            lambda b: {"response_mask": b.mask, "config": ActorConfig(gamma=1.0)},
        ),
        inputs="samples",
    )
    verl.equal("adv_estimator=remax", "remax_advantages(rewards, greedy_rewards)", remax(), inputs="samples")
    verl.equal(
        "adv_estimator=optimal_token_baseline",
        f"optimal_token_advantages({at_last}, logprobs, sum_square_probs, mask, groups)",
        by_token("compute_optimal_token_baseline_advantage", otb),
        inputs="samples",
    )


def remax() -> Peer:
    """Return the advantage of each answer over the greedy one."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        tokens = torch.zeros_like(b.mask)
        tokens[torch.arange(len(tokens)), b.lengths.long() - 1] = b.rewards
        return names["compute_remax_outcome_advantage"](tokens, b.greedy_rewards, b.mask)[0][:, 0]

    return Peer("verl", ((CORE, "compute_remax_outcome_advantage"),), run, NAMES)


def otb(b: Batch) -> dict[str, Any]:
    """Return what the optimal token baseline reads."""
    return {
        "response_mask": b.mask,
        "index": np.array(b.groups.tolist()),
        "old_log_probs": b.logprobs,
        "sum_pi_squared": b.sum_square_probs,
        "handle_zero_tail": False,
    }


rows()
