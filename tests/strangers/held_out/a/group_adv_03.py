from collections import defaultdict

import torch


def grpo_outcome_advantage(rewards, groups, epsilon=1e-6, norm_adv_by_std_in_grpo=True):
    scores = torch.as_tensor(rewards, dtype=torch.float32).clone()
    id2score = defaultdict(list)
    for i, g in enumerate(groups):
        id2score[g].append(scores[i])
    id2mean = {g: torch.stack(s).mean() for g, s in id2score.items()}
    id2std = {g: torch.stack(s).std() for g, s in id2score.items()}
    for i, g in enumerate(groups):
        scores[i] = scores[i] - id2mean[g]
        if norm_adv_by_std_in_grpo:
            scores[i] = scores[i] / (id2std[g] + epsilon)
    return scores
