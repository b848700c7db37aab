from collections import defaultdict


def rloo_advantages(rewards, groups):
    """Leave-one-out baseline: reward minus the mean of the *other* samples of the prompt.

    A prompt with a single sample has no baseline, so it gets no learning signal (0).
    """
    if len(rewards) != len(groups):
        raise ValueError("one group id for each reward")
    total, count = defaultdict(float), defaultdict(int)
    for r, g in zip(rewards, groups):
        total[g] += float(r)
        count[g] += 1
    out = []
    for r, g in zip(rewards, groups):
        n = count[g]
        if n < 2:
            out.append(0.0)
        else:
            out.append(float(r) - (total[g] - float(r)) / (n - 1))
    return out
