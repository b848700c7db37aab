import torch


def masked_mean(x, mask):
    return (x * mask).sum() / (mask.sum() + 1e-8)


def compute_policy_loss_gspo(old_log_prob, log_prob, advantages, response_mask,
                             clip_ratio_low=3e-4, clip_ratio_high=4e-4,
                             loss_agg_mode="seq-mean-token-mean"):
    """Sequence-level importance ratio with token-level stop-gradient form."""
    negative_approx_kl = log_prob - old_log_prob
    seq_lengths = response_mask.sum(dim=-1)
    safe_lengths = torch.where(seq_lengths > 0, seq_lengths, torch.ones_like(seq_lengths))
    seq_kl = (negative_approx_kl * response_mask).sum(dim=-1) / safe_lengths

    log_seq_ratio = log_prob - log_prob.detach() + seq_kl.detach().unsqueeze(-1)
    seq_ratio = torch.exp(log_seq_ratio.clamp(max=10.0))

    pg_losses1 = -advantages * seq_ratio
    pg_losses2 = -advantages * torch.clamp(seq_ratio, 1 - clip_ratio_low, 1 + clip_ratio_high)
    pg_losses = torch.maximum(pg_losses1, pg_losses2)

    if loss_agg_mode == "seq-mean-token-mean":
        per_seq = (pg_losses * response_mask).sum(dim=-1) / safe_lengths
        pg_loss = per_seq.sum() / (seq_lengths > 0).sum().clamp(min=1)
    elif loss_agg_mode == "token-mean":
        pg_loss = masked_mean(pg_losses, response_mask)
    else:
        raise ValueError(f"unknown loss_agg_mode {loss_agg_mode}")

    pg_clipfrac = masked_mean(torch.gt(pg_losses2, pg_losses1).float(), response_mask)
    ppo_kl = masked_mean(-negative_approx_kl.detach(), response_mask)
    pg_clipfrac_lower = torch.zeros_like(pg_clipfrac)
    return pg_loss, pg_clipfrac, ppo_kl, pg_clipfrac_lower
