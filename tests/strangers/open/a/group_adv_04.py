import math
from collections import defaultdict


def group_normalized_advantages(rewards, groups, eps=1e-6, scale_by_std=True):
    """GRPO advantages in the order of the samples; a group without spread gets zeros."""
    if len(rewards) != len(groups):
        raise ValueError("rewards and groups differ in length")
    members = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    result = [0.0] * len(rewards)
    for indices in members.values():
        values = [float(rewards[i]) for i in indices]
        mean = sum(values) / len(values)
        centred = [v - mean for v in values]
        scale = 1.0
        if scale_by_std:
            scale = math.sqrt(sum(c * c for c in centred) / len(values)) + eps
        for i, c in zip(indices, centred):
            result[i] = c / scale
    return result
