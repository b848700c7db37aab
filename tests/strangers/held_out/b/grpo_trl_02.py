import torch


def grpo_loss(per_token_logps, old_per_token_logps, ref_per_token_logps, advantages, completion_mask,
              epsilon_low=0.2, epsilon_high=0.28, beta=0.04):
    """advantages: (B,). Mean over the tokens of a completion, then over completions."""
    mask = completion_mask.to(per_token_logps.dtype)
    on = mask > 0
    zeros = torch.zeros_like(per_token_logps)
    logps = torch.where(on, per_token_logps, zeros)
    old = logps.detach() if old_per_token_logps is None else torch.where(on, old_per_token_logps, zeros)
    ref = torch.where(on, ref_per_token_logps, zeros)

    coef_1 = torch.exp((logps - old).clamp(-20, 20))
    coef_2 = torch.clamp(coef_1, 1 - epsilon_low, 1 + epsilon_high)
    adv = advantages.unsqueeze(1)
    per_token_loss = -torch.min(coef_1 * adv, coef_2 * adv)

    d = (ref - logps).clamp(-20, 20)
    per_token_kl = torch.exp(d) - d - 1
    per_token_loss = per_token_loss + beta * per_token_kl

    lengths = mask.sum(1)
    n_seqs = (lengths > 0).sum().clamp(min=1)
    safe_len = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    loss = ((per_token_loss * mask).sum(1) / safe_len).sum() / n_seqs

    total = mask.sum() if mask.sum() > 0 else torch.ones(())
    low = (coef_1 < 1 - epsilon_low) & (adv < 0)
    high = (coef_1 > 1 + epsilon_high) & (adv > 0)
    metrics = {
        "kl": ((per_token_kl * mask).sum() / total).item(),
        "clip_ratio/low_mean": ((low * mask).sum() / total).item(),
        "clip_ratio/high_mean": ((high * mask).sum() / total).item(),
    }
    return loss, metrics
