import numpy as np
import torch


def ppo_whitened(data, logprobs_list, clip_range=0.2):
    """PPO on advantages whitened over the trained tokens of the batch (statistics in numpy)."""
    adv_all = [np.asarray(d.loss_fn_inputs["advantages"].data, dtype=np.float64) for d in data]
    w_all = [np.asarray(d.loss_fn_inputs["weights"].data, dtype=np.float64) for d in data]
    flat = np.concatenate(adv_all)
    mean, std = flat.mean(), flat.std()

    num, den = 0.0, 0.0
    for d, lp, a, w in zip(data, logprobs_list, adv_all, w_all):
        a = torch.as_tensor(np.where(w > 0, (a - mean) / (std + 1e-8), 0.0), dtype=lp.dtype)
        w_t = torch.as_tensor(w, dtype=lp.dtype)
        delta = torch.where(w_t > 0, lp - d.loss_fn_inputs["old_logprobs"].to_torch(), torch.zeros_like(lp))
        ratio = delta.clamp(-20, 20).exp()
        surr = torch.min(ratio * a, ratio.clamp(1 - clip_range, 1 + clip_range) * a)
        num = num - (surr * w_t).sum()
        den += float(w.sum())
    loss = num / max(den, 1e-8)
    return loss, {"loss": loss.item(), "adv_mean": float(mean), "adv_std": float(std)}
