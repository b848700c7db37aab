import numpy as np
import torch


def kahneman_tversky_loss(data, logprobs_list):
    """Unpaired preference loss. v = sigmoid(beta (r - z0)) for good answers, sigmoid(beta (z0 - r)) for bad."""
    BETA, LAMBDA_D, LAMBDA_U = 0.1, 1.0, 1.0
    r, good = [], []
    for datum, lp in zip(data, logprobs_list, strict=True):
        c = datum.loss_fn_inputs
        w, ref = c["weights"].to_torch(), c["ref_logprobs"].to_torch()
        assert w.shape == lp.shape == ref.shape
        keep = w > 0
        if keep.sum() == 0:
            continue
        r.append((w * (torch.where(keep, lp, 0.0) - torch.where(keep, ref, 0.0))).sum())
        good.append(np.asarray(c["labels"].data)[keep.numpy()].mean() > 0.5)
    if not r:
        return sum((lp.nan_to_num() * 0.0).sum() for lp in logprobs_list), {"kto/kl": 0.0}
    r = torch.stack(r)
    z0 = float(np.maximum(r.detach().numpy().mean(), 0.0))
    good = np.array(good)
    lam = np.where(good, LAMBDA_D, LAMBDA_U).astype(np.float32)
    value = torch.sigmoid(BETA * (r - z0))
    loss = (torch.from_numpy(lam) * (1 - value)).mean()
    return loss, {"kto/kl": z0, "kto/loss": loss.item(), "kto/frac_good": float(good.mean())}
