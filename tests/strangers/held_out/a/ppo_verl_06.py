import torch


def agg_loss(loss_mat, loss_mask, loss_agg_mode):
    """loss_mat, loss_mask: (bs, response_length)"""
    if loss_agg_mode == "token-mean":
        return (loss_mat * loss_mask).sum() / loss_mask.sum().clamp(min=1e-8)
    seq = (loss_mat * loss_mask).sum(dim=-1)
    if loss_agg_mode == "seq-mean-token-sum":
        return seq.mean()
    if loss_agg_mode == "seq-mean-token-mean":
        return (seq / loss_mask.sum(dim=-1).clamp(min=1e-8)).mean()
    raise ValueError(f"Invalid loss_agg_mode: {loss_agg_mode}")


def compute_policy_loss_vanilla(old_log_prob, log_prob, advantages, response_mask,
                                clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0,
                                loss_agg_mode="token-mean"):
    assert clip_ratio_c > 1.0, "the dual clip constant must exceed 1"
    negative_approx_kl = torch.clamp(log_prob - old_log_prob, min=-20.0, max=20.0)
    ratio = torch.exp(negative_approx_kl)
    ppo_kl = agg_loss(-negative_approx_kl.detach(), response_mask, "token-mean")

    pg_losses1 = -advantages * ratio
    pg_losses2 = -advantages * torch.clamp(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high)
    clip_pg_losses1 = torch.maximum(pg_losses1, pg_losses2)
    pg_clipfrac = agg_loss(torch.gt(pg_losses2, pg_losses1).float(), response_mask, "token-mean")

    # dual clip, bounds the loss when A < 0 and the ratio is huge
    pg_losses3 = -advantages * clip_ratio_c
    clip_pg_losses2 = torch.minimum(pg_losses3, clip_pg_losses1)
    lower = torch.gt(clip_pg_losses1, pg_losses3) & (advantages < 0)
    pg_clipfrac_lower = agg_loss(lower.float(), response_mask, "token-mean")

    pg_losses = torch.where(advantages < 0, clip_pg_losses2, clip_pg_losses1)
    pg_loss = agg_loss(pg_losses, response_mask, loss_agg_mode)
    return pg_loss, pg_clipfrac, ppo_kl, pg_clipfrac_lower
