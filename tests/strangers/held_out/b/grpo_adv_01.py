from itertools import groupby

import numpy as np


def group_normalised_advantages(rewards, groups, eps=1e-4):
    """(r - mean of its group) / (std of its group + eps), in the order of the input."""
    if len(rewards) != len(groups):
        raise ValueError("one group id per reward")
    advantages = []
    for _, members in groupby(zip(groups, rewards), key=lambda pair: pair[0]):
        r = np.array([x for _, x in members], dtype=np.float64)
        if len(r) == 1:
            advantages.append(0.0)
            continue
        advantages.extend(((r - r.mean()) / (r.std() + eps)).tolist())
    return advantages
