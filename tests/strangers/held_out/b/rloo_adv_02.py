from collections import defaultdict


def rloo_advantages(rewards, groups):
    """Reward minus the mean reward of the other samples of its group; a lone sample gets 0."""
    total, count = defaultdict(float), defaultdict(int)
    for r, g in zip(rewards, groups, strict=True):
        total[g] += float(r)
        count[g] += 1
    out = []
    for r, g in zip(rewards, groups):
        k = count[g]
        if k == 1:
            out.append(0.0)
        else:
            out.append(float(r) - (total[g] - float(r)) / (k - 1))
    return out
