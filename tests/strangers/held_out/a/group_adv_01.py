import numpy as np


def compute_grpo_advantages(rewards, groups, eps=1e-6):
    """(r - mean) / (std + eps) in each prompt's group."""
    rewards = np.asarray(rewards, dtype=np.float64)
    groups = np.asarray(groups)
    out = []
    for g in np.unique(groups):
        r = rewards[groups == g]
        out.extend(((r - r.mean()) / (r.std() + eps)).tolist())
    return out
