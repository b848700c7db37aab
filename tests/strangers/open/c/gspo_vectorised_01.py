import torch


def gspo_loss(data, logprobs_list, clip_low=3e-4, clip_high=4e-4):
    """Group Sequence Policy Optimization: one length-normalised ratio for each sequence."""
    def column(name):
        out = [d.loss_fn_inputs[name].to_torch().float() for d in data]
        for c, lp in zip(out, logprobs_list, strict=True):
            if c.shape != lp.shape:
                raise ValueError(f"{name}: {tuple(c.shape)} against {tuple(lp.shape)}")
        return torch.cat(out)

    n = len(data)
    lengths = torch.tensor([lp.numel() for lp in logprobs_list])
    seq_id = torch.repeat_interleave(torch.arange(n), lengths)
    w = column("weights")
    keep = w > 0
    logprobs = torch.where(keep, torch.cat(list(logprobs_list)), 0.0)
    old = torch.where(keep, column("old_logprobs"), 0.0)
    adv = torch.where(keep, column("advantages"), 0.0)

    def per_seq(x):
        return torch.zeros(n, dtype=x.dtype).index_add(0, seq_id, x)

    tokens = per_seq(w)
    alive = (tokens > 0).float()
    denom = torch.where(tokens > 0, tokens, 1.0)
    seq_log_ratio = per_seq(w * (logprobs - old)) / denom
    s = torch.exp(seq_log_ratio.clamp(-20.0, 20.0))
    seq_adv = per_seq(w * adv) / denom
    surr1 = s * seq_adv
    surr2 = s.clamp(1 - clip_low, 1 + clip_high) * seq_adv
    n_alive = alive.sum().clamp(min=1.0)
    loss = -(torch.minimum(surr1, surr2) * alive).sum() / n_alive
    with torch.no_grad():
        clipped = ((surr2 < surr1).float() * alive).sum() / n_alive
        metrics = {
            "loss": loss.item(),
            "seq_clip_frac": clipped.item(),
            "seq_ratio_mean": ((s * alive).sum() / n_alive).item(),
        }
    return loss, metrics
