import torch


def agg(loss_mat, loss_mask, mode):
    if mode == "token-mean":
        return (loss_mat * loss_mask).sum() / loss_mask.sum().clamp(min=1e-8)
    if mode == "seq-mean-token-sum":
        return (loss_mat * loss_mask).sum(dim=-1).mean()
    if mode == "seq-mean-token-mean":
        per_seq = (loss_mat * loss_mask).sum(dim=-1) / loss_mask.sum(dim=-1).clamp(min=1e-8)
        return per_seq.mean()
    raise ValueError(f"unknown loss_agg_mode {mode!r}")


def dual_clip_policy_loss(old_log_prob, log_prob, advantages, response_mask, cliprange=0.2,
                          clip_ratio_c=3.0, loss_agg_mode="token-mean"):
    assert clip_ratio_c > 1.0
    keep = response_mask > 0
    log_ratio = torch.where(keep, log_prob - old_log_prob, torch.zeros_like(log_prob))
    log_ratio = torch.clamp(log_ratio, min=-20.0, max=20.0)
    adv = torch.where(keep, advantages, torch.zeros_like(advantages))
    ratio = log_ratio.exp()

    losses1 = -adv * ratio
    losses2 = -adv * ratio.clamp(1 - cliprange, 1 + cliprange)
    clipped = torch.max(losses1, losses2)
    losses3 = -adv * clip_ratio_c
    pg_losses = torch.min(losses3, clipped)

    pg_loss = agg(pg_losses, response_mask, loss_agg_mode)
    with torch.no_grad():
        pg_clipfrac = agg((losses2 > losses1).float(), response_mask, "token-mean")
        ppo_kl = agg(-log_ratio, response_mask, "token-mean")
    return pg_loss, pg_clipfrac, ppo_kl
