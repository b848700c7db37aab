import torch


def ppo_tis_loss(logprobs, old_logprobs, sampler_logprobs, advantages, mask,
                 clip_eps=0.2, imp_ratio_cap=2.0):
    """PPO with a truncated importance weight min(pi_old / pi_sampler, imp_ratio_cap) on each token."""
    mask_f = mask.to(torch.float32)
    bool_mask = mask_f > 0
    logprobs = torch.where(bool_mask, logprobs, 0.0)
    old_logprobs = torch.where(bool_mask, old_logprobs, 0.0)
    sampler_logprobs = torch.where(bool_mask, sampler_logprobs, 0.0)
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1).expand_as(logprobs)
    advantages = torch.where(bool_mask, advantages, 0.0)

    ratio = torch.exp((logprobs - old_logprobs).clamp(-20, 20))
    surrogate = torch.min(ratio * advantages,
                          ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)

    imp_ratio = torch.exp(torch.clamp(old_logprobs - sampler_logprobs, min=-20.0, max=imp_ratio_cap))
    imp_ratio = imp_ratio.detach()

    n_tokens = mask_f.sum().clamp(min=1e-8)
    loss = -(surrogate * imp_ratio * mask_f).sum() / n_tokens
    info = {
        "imp_ratio": ((imp_ratio * mask_f).sum() / n_tokens).item(),
        "policy_loss": loss.item(),
    }
    return loss, info
