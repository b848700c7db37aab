import numpy as np


def group_normalized_advantages(rewards, groups, eps=1e-6, scale_rewards=True):
    """GRPO: (r - mean) / (std + eps) inside each group; a group of one or of equal rewards gives 0."""
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 1 or len(rewards) != len(groups):
        raise ValueError("rewards must be a flat list with one group id each")
    advantages = np.zeros_like(rewards)
    members = {}
    for i, g in enumerate(groups):
        members.setdefault(g, []).append(i)
    for idx in members.values():
        if len(idx) < 2:
            continue
        x = rewards[idx]
        centred = x - x.mean()
        if scale_rewards:
            centred = centred / (x.std(ddof=1) + eps)
        advantages[idx] = centred
    return advantages.tolist()
