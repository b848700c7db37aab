import torch


def masked_mean(x, mask):
    return (x * mask).sum() / (mask.sum() + 1e-8)


def compute_policy_loss(old_log_prob, log_prob, advantages, response_mask,
                        clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0,
                        loss_agg_mode="token-mean"):
    """Dual-clip PPO loss with decoupled clip range."""
    assert loss_agg_mode in ("token-mean", "seq-mean-token-sum")
    valid = response_mask > 0
    negative_approx_kl = torch.where(valid, log_prob - old_log_prob, 0.0).clamp(-20.0, 20.0)
    advantages = torch.where(valid, advantages, 0.0)
    ratio = torch.exp(negative_approx_kl)
    ppo_kl = masked_mean(-negative_approx_kl, response_mask)

    pg_losses1 = -advantages * ratio
    pg_losses2 = -advantages * torch.clamp(ratio, 1 - clip_ratio_high, 1 + clip_ratio_low)
    clip_pg_losses1 = torch.maximum(pg_losses1, pg_losses2)
    pg_clipfrac = masked_mean((pg_losses2 > pg_losses1).float(), response_mask)

    pg_losses3 = -advantages * clip_ratio_c
    clip_pg_losses2 = torch.min(pg_losses3, clip_pg_losses1)
    pg_clipfrac_lower = masked_mean(((clip_pg_losses1 > pg_losses3) & (advantages < 0)).float(), response_mask)
    pg_losses = torch.where(advantages < 0, clip_pg_losses2, clip_pg_losses1)

    if loss_agg_mode == "token-mean":
        pg_loss = masked_mean(pg_losses, response_mask)
    else:
        pg_loss = (pg_losses * response_mask).sum(-1).mean()
    return pg_loss, pg_clipfrac, ppo_kl.detach(), pg_clipfrac_lower
