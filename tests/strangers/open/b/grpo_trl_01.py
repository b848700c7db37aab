import torch


def compute_grpo_loss(per_token_logps, old_per_token_logps, ref_per_token_logps, advantages, completion_mask,
                      epsilon=0.2, beta=0.04):
    """Token-mean GRPO with the k3 penalty against the reference; advantages has shape (B,)."""
    mask = completion_mask.float()
    keep = mask.bool()
    logps = per_token_logps.masked_fill(~keep, 0.0)
    old_logps = old_per_token_logps.masked_fill(~keep, 0.0)
    ref_logps = ref_per_token_logps.masked_fill(~keep, 0.0)

    log_ratio = (logps - old_logps).clamp(-20.0, 20.0)
    coef_1 = log_ratio.exp()
    coef_2 = coef_1.clamp(1 - epsilon, 1 + epsilon)
    per_token_loss = -torch.minimum(coef_1 * advantages[:, None], coef_2 * advantages[:, None])

    diff = (logps - ref_logps).clamp(-20.0, 20.0)
    per_token_kl = diff.exp() - diff - 1
    if beta != 0.0:
        per_token_loss = per_token_loss + beta * per_token_kl

    n = mask.sum()
    n = torch.where(n > 0, n, torch.ones_like(n))
    loss = (per_token_loss * mask).sum() / n
    is_clipped = ((coef_1 < 1 - epsilon) & (advantages[:, None] < 0)) | (
        (coef_1 > 1 + epsilon) & (advantages[:, None] > 0))
    return loss, {
        "kl": ((per_token_kl * mask).sum() / n).item(),
        "clip_ratio": ((is_clipped * mask).sum() / n).item(),
    }
