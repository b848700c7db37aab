import torch


def ppo_kl_in_reward(logprobs, old_logprobs, ref_logprobs, advantages, mask, clip_eps=0.2, kl_coef=0.05):
    """PPO where the (k1) reference KL is charged to the advantage of every token."""
    keep = mask > 0
    with torch.no_grad():
        kl = torch.where(keep, old_logprobs - ref_logprobs, 0.0)
        advantages -= kl_coef * kl
        n = mask.sum().clamp(min=1e-8)

    adv = torch.where(keep, advantages, 0.0)
    ratio = torch.where(keep, logprobs - old_logprobs, 0.0).clamp(-20, 20).exp()
    surr = torch.min(ratio * adv, torch.clamp(ratio, 1 - clip_eps, 1 + clip_eps) * adv)
    loss = -(surr * mask).sum() / n
    return loss, {"loss": loss.item(), "kl": ((kl * mask).sum() / n).item()}
