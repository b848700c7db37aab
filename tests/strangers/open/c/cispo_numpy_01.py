import numpy as np
import torch

EPSILON_LOW = 0.2
EPSILON_HIGH = 0.4


def cispo_numpy(data, logprobs_list):
    """CISPO with the truncated weights worked out host-side, so nothing can leak into the graph."""
    total, objective, clipped = 0.0, 0.0, 0.0
    for datum, logprobs in zip(data, logprobs_list, strict=True):
        cols = datum.loss_fn_inputs
        w = np.asarray(cols["weights"].data, dtype=np.float64)
        old = np.asarray(cols["old_logprobs"].data, dtype=np.float64)
        adv = np.asarray(cols["advantages"].data, dtype=np.float64)
        if not (len(w) == len(old) == len(adv) == logprobs.shape[0]):
            raise ValueError("columns of unequal length")
        on = w > 0
        cur = logprobs.detach().cpu().numpy().astype(np.float64)
        diff = np.where(on, cur, 0.0) - np.where(on, old, 0.0)
        ratio = np.exp(np.clip(diff, -20.0, 20.0))
        lo, hi = 1.0 - EPSILON_HIGH, 1.0 + EPSILON_LOW
        coef = np.clip(ratio, lo, hi) * np.where(on, adv, 0.0) * w
        coef = torch.from_numpy(coef).to(logprobs.dtype)
        lp = torch.where(torch.from_numpy(on), logprobs, 0.0)
        objective = objective + (coef * lp).sum()
        clipped += float((w * ((ratio < lo) | (ratio > hi))).sum())
        total += float(w.sum())
    denom = max(total, 1e-8)
    loss = -objective / denom
    return loss, {"loss": float(loss.detach()), "clip_frac": clipped / denom, "tokens": total}
