import numpy as np
import torch


def dft_loss(data, logprobs_list):
    """Dynamic fine-tuning: each token's nll is scaled by its own (frozen) probability."""
    pieces = []
    weight_total, nll_total = 0.0, 0.0
    for datum, lp in zip(data, logprobs_list):
        w = np.asarray(datum.loss_fn_inputs["weights"].data, dtype=np.float32)
        lp_np = lp.detach().cpu().numpy()
        p = np.exp(np.minimum(lp_np, 0.0))
        coef = torch.from_numpy(w * p).to(lp)
        pieces.append(-(coef * lp).sum())
        weight_total += float(w.sum())
        nll_total += float(-(w * lp_np).sum())
    denom = max(weight_total, 1e-8)
    loss = torch.stack(pieces).sum() / denom
    return loss, {"dft_loss": loss.item(), "nll": nll_total / denom}
