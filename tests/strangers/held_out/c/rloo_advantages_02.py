import numpy as np
import torch


def compute_rloo(rewards, groups):
    """REINFORCE leave-one-out advantages (Ahmadian et al., 2024). Groups may come in any order."""
    r = np.asarray(rewards, dtype=np.float64)
    _, idx = np.unique(np.asarray(groups), return_inverse=True)
    assert r.shape == idx.shape, "rewards and groups differ in length"
    n = np.bincount(idx)[idx]
    s = np.bincount(idx, weights=r)[idx]
    baseline = (s - r) / n
    adv = np.where(n > 1, r - baseline, 0.0)
    return torch.tensor(adv, dtype=torch.float32)
