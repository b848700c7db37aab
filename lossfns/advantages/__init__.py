"""Advantages from rewards.

groups      relative to the group: GRPO, Dr. GRPO, RLOO; which groups have a signal
baselines   other baselines and scales: OPO, pass@k, MaxRL, GPG, AsymRE, ReMax
batches     normalised over the batch: PRPO, REINFORCE++-baseline, GDPO
agents      roles, episodes and steps: RAE, hierarchical, GiGPO
tokens      by token: returns to go, GAE, REINFORCE++, optimal token baseline, whitening, KL penalties
"""

from lossfns.advantages.agents import gigpo_advantages, hierarchical_advantages, rae_advantages
from lossfns.advantages.baselines import (
    asymre_advantages,
    gpg_advantages,
    maxrl_advantages,
    opo_advantages,
    pass_at_k_advantages,
    remax_advantages,
)
from lossfns.advantages.batches import batch_advantages, gdpo_advantages, reinforce_plus_plus_baseline_advantages
from lossfns.advantages.groups import group_advantages, group_metrics, groups_with_signal, leave_one_out_advantages
from lossfns.advantages.optimal import optimal_token_advantages
from lossfns.advantages.tokens import (
    gae,
    kl_penalties,
    reinforce_plus_plus_advantages,
    returns_to_go,
    token_rewards,
    whiten,
)

__all__ = [
    "asymre_advantages",
    "batch_advantages",
    "gae",
    "gdpo_advantages",
    "gigpo_advantages",
    "gpg_advantages",
    "group_advantages",
    "group_metrics",
    "groups_with_signal",
    "hierarchical_advantages",
    "kl_penalties",
    "leave_one_out_advantages",
    "maxrl_advantages",
    "opo_advantages",
    "optimal_token_advantages",
    "pass_at_k_advantages",
    "rae_advantages",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
    "remax_advantages",
    "returns_to_go",
    "token_rewards",
    "whiten",
]
