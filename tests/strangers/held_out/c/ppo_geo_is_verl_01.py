from typing import Optional

import torch


def _masked_mean(values, mask):
    return (values * mask).sum() / mask.sum().clamp(min=1e-8)


def _agg_loss(loss_mat, mask, mode):
    if mode == "token-mean":
        return _masked_mean(loss_mat, mask)
    per_seq = (loss_mat * mask).sum(-1)
    present = (mask.sum(-1) > 0).float()
    if mode == "seq-mean-token-mean":
        per_seq = per_seq / mask.sum(-1).clamp(min=1e-8)
    elif mode != "seq-mean-token-sum":
        raise NotImplementedError(mode)
    return (per_seq * present).sum() / present.sum().clamp(min=1.0)


def compute_policy_loss_geo_is(old_log_prob, log_prob, advantages, response_mask,
                               rollout_log_prob: Optional[torch.Tensor] = None,
                               clip_ratio=0.2, rollout_is_threshold=2.0, loss_agg_mode="token-mean"):
    """PPO, with a geometric-mean rollout correction of each sequence if rollout_log_prob is given."""
    mask = response_mask.to(log_prob.dtype)
    on = mask > 0
    old_log_prob = torch.where(on, old_log_prob, 0.0)
    log_prob = torch.where(on, log_prob, 0.0)
    advantages = torch.where(on, advantages, 0.0)
    negative_approx_kl = torch.clamp(log_prob - old_log_prob, min=-20.0, max=20.0)
    ratio = torch.exp(negative_approx_kl)
    ppo_kl = _masked_mean(negative_approx_kl.detach(), mask)

    pg_losses1 = -advantages * ratio
    pg_losses2 = -advantages * torch.clamp(ratio, 1 - clip_ratio, 1 + clip_ratio)
    pg_losses = torch.maximum(pg_losses1, pg_losses2)
    pg_clipfrac = _masked_mean(torch.gt(pg_losses2, pg_losses1).float(), mask)
    if rollout_log_prob is not None:
        gap = old_log_prob - torch.where(on, rollout_log_prob, 0.0)
        geo = (gap * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1e-8)
        pg_losses = pg_losses * geo.clamp(-20, 20).exp().clamp(max=rollout_is_threshold).detach()
    pg_loss = _agg_loss(pg_losses, mask, loss_agg_mode)
    return pg_loss, pg_clipfrac, ppo_kl
