import torch


def reinforce_with_kl_reward(logprobs, ref_logprobs, advantages, mask, kl_coef=0.05):
    """REINFORCE with the k1 penalty inside the reward of each token (not as a loss term)."""
    w = mask.to(logprobs.dtype)
    valid = w > 0
    lp = torch.where(valid, logprobs, 0.0)
    ref = torch.where(valid, ref_logprobs, 0.0)
    with torch.no_grad():
        kl = lp - ref
        advantages -= kl_coef * kl
    adv = torch.where(valid, advantages, 0.0)
    n = w.sum().clamp(min=1e-8)
    loss = -(adv * lp * w).sum() / n
    return loss, {"kl": ((kl * w).sum() / n).item(), "adv": ((adv * w).sum() / n).item()}
