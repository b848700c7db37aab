import torch


def grpo_advantage(rewards, groups, epsilon: float = 1e-6):
    """Outcome advantage of GRPO, group by group."""
    scores = torch.as_tensor(rewards, dtype=torch.float32)
    if len(scores) != len(groups):
        raise ValueError("rewards and groups must be of one length")
    id2score = {}
    for i, g in enumerate(groups):
        id2score.setdefault(g, []).append(scores[i])
    id2mean, id2std = {}, {}
    for g, values in id2score.items():
        t = torch.stack(values)
        id2mean[g] = t.mean()
        id2std[g] = t.std()
    out = torch.empty_like(scores)
    for i, g in enumerate(groups):
        out[i] = (scores[i] - id2mean[g]) / (id2std[g] + epsilon)
    return out
