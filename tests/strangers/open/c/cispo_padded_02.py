import torch


def clipped_is_policy_loss(logprobs, old_logprobs, advantages, mask, epsilon_high=0.28):
    """CISPO objective: sg(min(r, 1 + eps_high)) * A * log pi, token mean."""
    m = mask.float()
    keep = m > 0
    zero = torch.zeros((), dtype=logprobs.dtype)
    if advantages.ndim < logprobs.ndim:
        advantages = advantages[:, None]
    cur = torch.where(keep, logprobs, zero)
    beh = torch.where(keep, old_logprobs, zero)
    adv = torch.where(keep, advantages.expand(logprobs.shape), zero)

    log_ratio = (cur - beh).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    coef = ratio.clamp(max=1.0 + epsilon_high).detach()
    token_loss = -coef * adv * ratio

    n = m.sum().clamp_min(1e-8)
    loss = (token_loss * m).sum() / n
    frac = ((ratio.detach() > 1.0 + epsilon_high).float() * m).sum() / n
    return loss, {"clip_ratio/high_mean": frac.item(), "num_tokens": m.sum().item()}
