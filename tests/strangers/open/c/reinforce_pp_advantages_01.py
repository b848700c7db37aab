import numpy as np


def reinforce_plus_plus_baseline(rewards, groups):
    """
    REINFORCE++-baseline: subtract the prompt's mean reward, then whiten over the whole batch.
    Works on sorted blocks, which is quicker than masks for big batches.
    """
    r = np.asarray(rewards, dtype=np.float64)
    g = np.asarray(groups)
    if r.shape != g.shape:
        raise ValueError("rewards and groups must have one length")
    order = np.argsort(g, kind="stable")
    r_sorted, g_sorted = r[order], g[order]
    starts = np.flatnonzero(np.r_[True, g_sorted[1:] != g_sorted[:-1]])
    sizes = np.diff(np.r_[starts, len(r)])
    means = np.add.reduceat(r_sorted, starts) / sizes
    centred = r_sorted - np.repeat(means, sizes)
    whitened = (centred - centred.mean()) / (centred.std() + 1e-8)
    return whitened.tolist()
