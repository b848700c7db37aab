import torch


def compute_grpo_loss(per_token_logps, old_per_token_logps, ref_per_token_logps, advantages,
                      completion_mask, epsilon_low=0.2, epsilon_high=0.2, beta=0.04):
    """advantages: (B,), everything else (B, T)"""
    mask = completion_mask.to(per_token_logps.dtype)
    keep = mask.bool()

    ref_diff = torch.where(keep, ref_per_token_logps - per_token_logps, 0.0).clamp(-20, 20)
    per_token_kl = torch.exp(ref_diff) - ref_diff - 1

    log_ratio = torch.where(keep, per_token_logps - old_per_token_logps, 0.0).clamp(-20, 20)
    coef_1 = torch.exp(log_ratio)
    coef_2 = torch.clamp(coef_1, 1 - epsilon_low, 1 + epsilon_high)
    per_token_loss1 = coef_1 * advantages.unsqueeze(1)
    per_token_loss2 = coef_2 * advantages.unsqueeze(1)
    per_token_loss = -(torch.min(per_token_loss1, per_token_loss2) + beta * per_token_kl)

    loss = ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1e-8)).mean()
    n = mask.sum().clamp(min=1e-8)
    metrics = {
        "kl": ((per_token_kl.detach() * mask).sum() / n).item(),
        "clip_ratio/region_mean": (((per_token_loss2 < per_token_loss1) * mask).sum() / n).item(),
    }
    return loss, metrics
