import torch


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum().clamp(min=1e-8)


def compute_policy_loss(old_log_prob, log_prob, advantages, response_mask,
                        cliprange_low=0.2, cliprange_high=0.2, clip_ratio_c=3.0,
                        loss_agg_mode="token-mean"):
    """Dual-clip loss as used for REINFORCE++ (advantages come already whitened)."""
    assert clip_ratio_c > 1.0
    response_mask = response_mask.to(log_prob.dtype)
    negative_approx_kl = ((log_prob - old_log_prob) * (response_mask > 0)).clamp(-20.0, 20.0)
    ratio = torch.exp(negative_approx_kl)
    ppo_kl = masked_mean(-negative_approx_kl.detach(), response_mask)

    pg_losses1 = -advantages * ratio
    pg_losses2 = -advantages * torch.clamp(ratio, 1 - cliprange_low, 1 + cliprange_high)
    clip_pg_losses1 = torch.maximum(pg_losses1, pg_losses2)
    pg_clipfrac = masked_mean(torch.gt(pg_losses2, pg_losses1).float(), response_mask)

    pg_losses3 = -advantages * clip_ratio_c
    clip_pg_losses2 = torch.minimum(pg_losses3, clip_pg_losses1)
    negative = advantages < 0
    pg_clipfrac_lower = masked_mean((torch.gt(clip_pg_losses1, pg_losses3) & negative).float(), response_mask)
    pg_losses = torch.where(negative, clip_pg_losses2, clip_pg_losses1)

    if loss_agg_mode == "token-mean":
        pg_loss = masked_mean(pg_losses, response_mask)
    elif loss_agg_mode in ("seq-mean-token-sum", "seq-mean-token-mean"):
        n_tok = response_mask.sum(-1)
        per_seq = (pg_losses * response_mask).sum(-1)
        if loss_agg_mode == "seq-mean-token-mean":
            per_seq = per_seq / n_tok.clamp(min=1e-8)
        pg_loss = per_seq.sum() / (n_tok > 0).sum().clamp(min=1)
    else:
        raise ValueError(f"unknown loss_agg_mode: {loss_agg_mode}")
    return pg_loss, pg_clipfrac, ppo_kl, pg_clipfrac_lower
