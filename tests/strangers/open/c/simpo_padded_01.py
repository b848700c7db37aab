import torch
import torch.nn.functional as F


def simpo_loss(chosen_logprobs, rejected_logprobs, chosen_mask, rejected_mask, beta=2.0, gamma=1.0):
    """SimPO (Meng et al., 2024): -log sigmoid(beta * (avg logp_w - avg logp_l) - gamma)."""
    cm = chosen_mask.to(chosen_logprobs.dtype)
    rm = rejected_mask.to(rejected_logprobs.dtype)
    n_chosen, n_rejected = cm.sum(-1), rm.sum(-1)
    usable = (n_chosen > 0) & (n_rejected > 0)
    length = n_chosen.clamp(min=1e-8)

    reward_chosen = beta * (torch.where(cm > 0, chosen_logprobs, 0.0) * cm).sum(-1) / length
    reward_rejected = beta * (torch.where(rm > 0, rejected_logprobs, 0.0) * rm).sum(-1) / length
    margin = torch.where(usable, reward_chosen - reward_rejected, 0.0)
    losses = -F.logsigmoid(margin - gamma)
    count = usable.sum().clamp(min=1)
    loss = torch.where(usable, losses, 0.0).sum() / count
    acc = ((margin > 0) & usable).sum() / count
    return loss, {"rewards/accuracies": acc.item(), "rewards/margins": (margin.detach().sum() / count).item()}
