import torch


def grpo_compute_loss(per_token_logps, old_per_token_logps, ref_per_token_logps, advantages, completion_mask,
                      epsilon_low=0.2, epsilon_high=0.2, beta=0.04, loss_type="grpo", max_completion_length=1024):
    # on-policy: old logps are the current ones
    if old_per_token_logps is None:
        old_per_token_logps = per_token_logps.detach()
    completion_mask = completion_mask.to(per_token_logps.dtype)

    coef_1 = torch.exp((per_token_logps - old_per_token_logps).clamp(-20, 20))
    coef_2 = torch.clamp(coef_1, 1 - epsilon_low, 1 + epsilon_high)
    adv = advantages.unsqueeze(1)
    per_token_loss = -torch.min(coef_1 * adv, coef_2 * adv)

    metrics = {}
    if beta != 0.0:
        diff = (ref_per_token_logps - per_token_logps).clamp(-20, 20)
        per_token_kl = torch.exp(diff) - diff - 1
        per_token_loss = per_token_loss + beta * per_token_kl
        mean_kl = (per_token_kl * completion_mask).sum() / completion_mask.sum().clamp(min=1e-8)
        metrics["kl"] = mean_kl.item()

    masked = per_token_loss * completion_mask
    if loss_type == "grpo":
        loss = (masked.sum(-1) / completion_mask.sum(-1).clamp(min=1e-8)).mean()
    elif loss_type == "bnpo":
        loss = masked.sum() / completion_mask.sum().clamp(min=1e-8)
    elif loss_type == "dr_grpo":
        loss = masked.sum() / (per_token_loss.size(0) * max_completion_length)
    else:
        raise ValueError(f"Unknown loss type: {loss_type}")

    is_low = (coef_1 < 1 - epsilon_low) & (adv < 0)
    is_high = (coef_1 > 1 + epsilon_high) & (adv > 0)
    clipped = (is_low | is_high).float() * completion_mask
    metrics["clip_ratio"] = (clipped.sum() / completion_mask.sum().clamp(min=1e-8)).item()
    return loss, metrics
