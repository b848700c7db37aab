from collections import defaultdict


def rloo_advantages(rewards, groups):
    """REINFORCE leave-one-out: reward minus the mean reward of the other samples of the prompt."""
    total, size = defaultdict(float), defaultdict(int)
    for r, g in zip(rewards, groups):
        total[g] += r
        size[g] += 1
    advantages = []
    for r, g in zip(rewards, groups):
        if size[g] == 1:
            advantages.append(0.0)
            continue
        baseline = (total[g] - r) / size[g]
        advantages.append(r - baseline)
    return advantages
