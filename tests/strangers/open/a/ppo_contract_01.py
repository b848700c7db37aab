import torch


def ppo_loss(data, logprobs_list, clip_eps=0.2):
    """PPO clipped surrogate, summed over tokens and divided by the number of trained tokens."""
    total, n_tok, n_clip, kl = 0.0, 0.0, 0.0, 0.0
    for datum, lp in zip(data, logprobs_list):
        cols = datum.loss_fn_inputs
        w = cols["weights"].to_torch().to(lp)
        keep = w > 0
        adv = torch.where(keep, cols["advantages"].to_torch().to(lp), 0.0)
        log_ratio = torch.where(keep, lp - cols["old_logprobs"].to_torch().to(lp), 0.0)
        ratio = log_ratio.clamp(-20, 20).exp()
        surr1 = ratio * adv
        surr2 = ratio.clamp(1 - clip_eps, 1 + clip_eps) * adv
        total = total - (w * torch.max(surr1, surr2)).sum()
        with torch.no_grad():
            n_tok += w.sum().item()
            n_clip += (w * ((ratio - 1).abs() > clip_eps)).sum().item()
            kl += (w * (ratio - 1 - log_ratio)).sum().item()
    denom = max(n_tok, 1e-8)
    loss = total / denom
    return loss, {"loss": loss.item(), "clip_frac": n_clip / denom, "approx_kl": kl / denom}
