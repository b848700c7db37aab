import torch


def gspo_compute_loss(per_token_logps, old_per_token_logps, ref_per_token_logps, advantages,
                      completion_mask, epsilon=3e-4, beta=0.04):
    mask = completion_mask.to(per_token_logps.dtype)
    keep = mask > 0
    logps = torch.where(keep, per_token_logps, 0.0)
    old = torch.where(keep, old_per_token_logps, 0.0)
    ref = torch.where(keep, ref_per_token_logps, 0.0)
    if advantages.dim() == 2:
        advantages = (torch.where(keep, advantages, 0.0) * mask).sum(1) / mask.sum(1).clamp(min=1e-8)

    # sequence-level importance weight
    log_ratio = logps - old
    seq_log_ratio = (log_ratio * mask).sum(-1) / mask.sum(-1)
    coef_1 = torch.exp(seq_log_ratio.clamp(-20, 20))
    coef_2 = torch.clamp(coef_1, 1 - epsilon, 1 + epsilon)
    loss = -torch.min(coef_1 * advantages, coef_2 * advantages)

    metrics = {"clip_ratio": (coef_1 * advantages > coef_2 * advantages).float().mean().item()}
    if beta:
        d = (ref - logps).clamp(-20, 20)
        kl = torch.exp(d) - d - 1
        seq_kl = (kl * mask).sum(-1) / mask.sum(-1).clamp(min=1e-8)
        loss = loss + beta * seq_kl
        metrics["kl"] = seq_kl.detach().mean().item()
    return loss.mean(), metrics
