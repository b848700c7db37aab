import numpy as np
import torch


def kto_loss(data, logprobs_list, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """KTO with the reference point z0 taken from the batch (mean log-ratio, at least 0, no gradient)."""
    ratios, labels = [], []
    for d, lp in zip(data, logprobs_list, strict=True):
        cols = d.loss_fn_inputs
        w, ref = cols["weights"].to_torch(), cols["ref_logprobs"].to_torch()
        if not w.shape == ref.shape == lp.shape:
            raise ValueError("row lengths differ")
        on = w > 0
        if not bool(on.any()):
            continue
        ratios.append((w * (torch.where(on, lp, 0.0) - torch.where(on, ref, 0.0))).sum())
        label = np.asarray(cols["labels"].data, dtype=np.float64)[on.numpy()]
        labels.append(bool(label.mean() > 0.5))
    if not ratios:
        return sum((lp.nan_to_num() * 0.0).sum() for lp in logprobs_list), {"kl": 0.0, "n": 0.0}

    log_ratio = torch.stack(ratios)
    detached = log_ratio.detach().numpy().astype(np.float64)
    z0 = max(float(detached.mean()), 0.0)
    desirable = np.array(labels)
    sign = torch.from_numpy(np.where(desirable, 1.0, -1.0)).float()
    lam = torch.from_numpy(np.where(desirable, desirable_weight, undesirable_weight)).float()
    value = torch.sigmoid(beta * sign * (log_ratio - z0))
    loss = (lam * (1.0 - value)).mean()

    rewards = beta * detached
    metrics = {"loss": loss.item(), "kl": z0, "n": float(len(labels))}
    if desirable.any():
        metrics["rewards/chosen"] = float(rewards[desirable].mean())
    if (~desirable).any():
        metrics["rewards/rejected"] = float(rewards[~desirable].mean())
    return loss, metrics
