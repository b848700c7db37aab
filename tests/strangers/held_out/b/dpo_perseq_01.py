import torch
import torch.nn.functional as F


def preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    """
    chosen, rejected:         log pi(y|x) of each pair's two answers, [B]
    ref_chosen, ref_rejected: the same under the frozen reference, [B]
    """
    with torch.no_grad():
        ref_chosen = ref_chosen.clone()
        ref_rejected = ref_rejected.clone()
    win = chosen - ref_rejected
    lose = rejected - ref_chosen
    h = beta * (win - lose)
    loss = F.softplus(-h).mean()
    return loss, {"acc": (h > 0).float().mean().item(), "margin": h.mean().item()}
