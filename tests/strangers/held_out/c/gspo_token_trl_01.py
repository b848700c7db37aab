import torch


def compute_loss(per_token_logps, old_per_token_logps, ref_per_token_logps, advantages, completion_mask,
                 epsilon_low=3e-4, epsilon_high=4e-4, beta=0.0, importance_sampling_level="sequence_token"):
    """GRPO-style loss; `importance_sampling_level` is one of "token", "sequence", "sequence_token" (GSPO-token)."""
    mask = completion_mask.to(per_token_logps.dtype)
    lengths = mask.sum(-1, keepdim=True)
    present = (lengths.squeeze(-1) > 0).to(mask.dtype)
    lengths = lengths.masked_fill(lengths == 0, 1.0)

    log_ratio = (per_token_logps - old_per_token_logps) * (mask > 0)
    if importance_sampling_level == "token":
        log_weights = log_ratio
    elif importance_sampling_level in ("sequence", "sequence_token"):
        log_weights = (log_ratio * mask).sum(-1, keepdim=True) / lengths
        if importance_sampling_level == "sequence_token":
            log_weights = log_weights.detach() + (per_token_logps - per_token_logps.detach())
    else:
        raise ValueError(f"unknown importance_sampling_level {importance_sampling_level!r}")

    coef_1 = torch.exp(log_weights.clamp(-20, 20))
    coef_2 = torch.clamp(coef_1, 1 - epsilon_low, 1 + epsilon_high)
    adv = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    per_token_loss = -torch.min(coef_1 * adv, coef_2 * adv)
    if beta != 0.0:
        delta = ((ref_per_token_logps - per_token_logps) * (mask > 0)).clamp(-20, 20)
        per_token_loss = per_token_loss + beta * (torch.exp(delta) - delta - 1)

    per_seq = (per_token_loss * mask).sum(-1) / lengths.squeeze(-1)
    return (per_seq * present).sum() / present.sum().clamp(min=1.0)
