import numpy as np
import torch

_STATS = {}


def _rms(values, weights):
    """Weighted root mean square of all trained tokens of the batch."""
    if "rms" not in _STATS:
        _STATS["rms"] = float(np.sqrt((weights * values ** 2).sum() / max(weights.sum(), 1e-8)))
    return _STATS["rms"]


def distill_policy_gradient(data, logprobs_list):
    """Reverse-KL distillation; the gap to the teacher, scaled by the batch's rms, is the advantage."""
    if len(data) != len(logprobs_list):
        raise ValueError("one logprobs tensor for each datum")
    w = [np.asarray(d.loss_fn_inputs["weights"].data, np.float64) for d in data]
    s = [np.asarray(d.loss_fn_inputs["old_logprobs"].data, np.float64) for d in data]
    t = [np.asarray(d.loss_fn_inputs["ref_logprobs"].data, np.float64) for d in data]
    for wi, lp in zip(w, logprobs_list):
        assert wi.shape == tuple(lp.shape)
    w, s, t = np.concatenate(w), np.concatenate(s), np.concatenate(t)
    on = w > 0
    s, t = np.where(on, s, 0.0), np.where(on, t, 0.0)
    gap = t - s
    adv = gap / (_rms(gap, w) + 1e-6)

    lp = torch.where(torch.from_numpy(on), torch.cat(list(logprobs_list)), 0.0)
    ratio = (lp - torch.from_numpy(s).float()).clamp(-20, 20).exp()
    coef = torch.from_numpy(adv * w).float()
    n = max(float(w.sum()), 1e-8)
    loss = -(coef * ratio).sum() / n
    return loss, {"teacher_kl": float(-(gap * w).sum() / n), "adv_mean": float((adv * w).sum() / n)}
