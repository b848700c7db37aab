import torch


def agg_loss(loss_mat, loss_mask, loss_agg_mode):
    if loss_agg_mode == "token-mean":
        return (loss_mat * loss_mask).sum() / loss_mask.sum().clamp_min(1e-8)
    seq_losses = (loss_mat * loss_mask).sum(dim=-1)
    if loss_agg_mode == "seq-mean-token-sum":
        return seq_losses.mean()
    if loss_agg_mode == "seq-mean-token-mean":
        return (seq_losses / loss_mask.shape[-1]).mean()
    raise ValueError(loss_agg_mode)


def grpo_policy_loss(old_log_prob, log_prob, advantages, response_mask,
                     clip_ratio=0.2, loss_agg_mode="seq-mean-token-mean"):
    """GRPO surrogate: average over the response tokens of each sample, then over samples."""
    on = response_mask > 0
    log_r = torch.where(on, log_prob - old_log_prob, 0.0)
    log_r = log_r.clamp(-20.0, 20.0)
    a = torch.where(on, advantages, 0.0)
    r = log_r.exp()
    unclipped, clipped = -a * r, -a * r.clamp(1 - clip_ratio, 1 + clip_ratio)
    pg_loss = agg_loss(torch.max(unclipped, clipped), response_mask, loss_agg_mode)
    pg_clipfrac = agg_loss((clipped > unclipped).float(), response_mask, "token-mean")
    ppo_kl = agg_loss(-log_r.detach(), response_mask, "token-mean")
    return pg_loss, {"actor/pg_clipfrac": pg_clipfrac.item(), "actor/ppo_kl": ppo_kl.item()}
