import torch


def dapo_token_loss(
    logprobs, old_logprobs, advantages, mask,
    eps_low: float = 0.2, eps_high: float = 0.28,
):
    """
    Token-level clipped loss with asymmetric bounds. Long answers count in proportion to
    their tokens: the denominator is the number of response tokens in the whole batch.
    """
    weights = mask.to(logprobs.dtype)
    inside = weights > 0
    safe = torch.where(inside, logprobs, 0.0)
    safe_old = torch.where(inside, old_logprobs, 0.0)
    # [B] or [B, T]
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand_as(logprobs)
    safe_adv = torch.where(inside, advantages, 0.0)

    ratio = (safe - safe_old).clamp(-20, 20).exp()
    bounded = ratio.clamp(min=1 - eps_low, max=1 + eps_high)
    gain = torch.minimum(ratio * safe_adv, bounded * safe_adv)
    denom = weights.sum().clamp(min=1e-8)
    loss = -(gain * weights).sum() / denom

    with torch.no_grad():
        up = (weights * ((ratio > 1 + eps_high) & (safe_adv > 0))).sum() / denom
        down = (weights * ((ratio < 1 - eps_low) & (safe_adv < 0))).sum() / denom
    return loss, {"clip_high": up.item(), "clip_low": down.item(), "ratio_max": ratio.max().item()}
