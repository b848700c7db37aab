import torch


def masked_mean(values, mask):
    n = mask.sum()
    return (values * mask).sum() / torch.where(n > 0, n, torch.ones_like(n))


def compute_policy_loss(old_log_prob, log_prob, advantages, response_mask,
                        cliprange=0.2, cliprange_low=None, cliprange_high=None, clip_ratio_c=3.0,
                        loss_agg_mode="token-mean"):
    """Dual-clip PPO; returns pg_loss, pg_clipfrac, ppo_kl, pg_clipfrac_lower (token means over the response)."""
    assert loss_agg_mode == "token-mean" and clip_ratio_c > 1.0
    low = cliprange if cliprange_low is None else cliprange_low
    high = cliprange if cliprange_high is None else cliprange_high
    mask = response_mask.to(log_prob.dtype)
    on = mask > 0
    log_prob, old_log_prob, advantages = (
        torch.where(on, t, torch.zeros_like(t)) for t in (log_prob, old_log_prob, advantages))

    negative_approx_kl = torch.clamp(log_prob - old_log_prob, min=-20.0, max=20.0)
    ratio = torch.exp(negative_approx_kl)
    ppo_kl = masked_mean(-negative_approx_kl.detach(), mask)

    pg_losses1 = -advantages * ratio
    pg_losses2 = -advantages * torch.clamp(ratio, 1 - low, 1 + high)
    clip_pg_losses1 = torch.maximum(pg_losses1, pg_losses2)
    pg_clipfrac = torch.gt(pg_losses2, pg_losses1).float().mean()

    pg_losses3 = -advantages * clip_ratio_c
    clip_pg_losses2 = torch.minimum(pg_losses3, clip_pg_losses1)
    pg_clipfrac_lower = masked_mean((torch.gt(clip_pg_losses1, pg_losses3) & (advantages < 0)).float(), mask)
    pg_losses = torch.where(advantages < 0, clip_pg_losses2, clip_pg_losses1)
    return masked_mean(pg_losses, mask), pg_clipfrac, ppo_kl, pg_clipfrac_lower
