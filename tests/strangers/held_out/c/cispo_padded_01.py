import torch


def cispo_loss(logprobs, old_logprobs, advantages, mask, eps_low=1.0, eps_high=0.28):
    """
    CISPO (MiniMax-M1): REINFORCE with a clipped, stop-gradient importance weight.
    All tokens keep a gradient, also those whose weight is clipped. Token mean over the batch.
    """
    w = mask.to(logprobs.dtype)
    valid = w > 0
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(-1)
    advantages = advantages.expand_as(logprobs)
    lp = torch.where(valid, logprobs, 0.0)
    old = torch.where(valid, old_logprobs, 0.0)
    adv = torch.where(valid, advantages, 0.0)

    with torch.no_grad():
        ratio = torch.exp((lp - old).clamp(-20, 20))
        is_weight = ratio.clamp(1.0 - eps_low, 1.0 + eps_high)

    total = w.sum().clamp(min=1e-8)
    loss = -(is_weight * adv * lp * w).sum() / total

    with torch.no_grad():
        hit = (ratio > 1.0 + eps_high) | (ratio < 1.0 - eps_low)
        stats = {
            "cispo_clip_ratio": ((hit.to(w.dtype) * w).sum() / total).item(),
            "approx_kl": (((old - lp) * w).sum() / total).item(),
        }
    return loss, stats
