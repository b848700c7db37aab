import numpy as np
import torch


def reinforce_whitened(data, logprobs_list, eps=1e-6):
    """REINFORCE with importance ratio; advantages are whitened over the trained tokens of the batch."""
    col = lambda d, k: np.asarray(d.loss_fn_inputs[k].data, dtype=np.float64)
    w = [col(d, "weights") for d in data]
    adv = [np.where(wi > 0, col(d, "advantages"), 0.0) for d, wi in zip(data, w)]

    flat_adv, flat_w = np.concatenate(adv), np.concatenate(w)
    n = float(flat_w.sum())
    if n > 0:
        mu = flat_adv.mean()
        sigma = np.sqrt(((flat_adv - mu) ** 2).mean())
    else:
        mu, sigma, n = 0.0, 1.0, 1.0

    loss, kl = 0.0, 0.0
    for d, lp, wi, ai in zip(data, logprobs_list, w, adv, strict=True):
        on = torch.from_numpy(wi > 0)
        old = torch.where(on, d.loss_fn_inputs["old_logprobs"].to_torch(), 0.0)
        lp = torch.where(on, lp, 0.0)
        coef = torch.from_numpy(wi * (ai - mu) / (sigma + eps)).to(lp.dtype)
        ratio = torch.exp((lp - old).clamp(-20, 20))
        loss = loss - (coef * ratio).sum()
        kl += float((torch.from_numpy(wi) * (old - lp.detach())).sum())
    return loss / n, {"adv_mean": float(mu), "adv_std": float(sigma), "kl_k1": kl / n}
