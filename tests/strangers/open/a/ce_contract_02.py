import math

import torch


def sft_loss(data, logprobs_list):
    """Token-weighted cross-entropy, normalised by the total weight of the batch."""
    weighted_nll = []
    total_weight = 0.0
    tokens = 0
    for datum, lp in zip(data, logprobs_list):
        w = datum.loss_fn_inputs["weights"].to_torch().to(lp.device, torch.float32)
        assert w.shape == lp.shape, f"weights {w.shape} vs logprobs {lp.shape}"
        trained = w > 0
        nll = -torch.where(trained, lp, lp.new_zeros(()))
        weighted_nll.append(torch.dot(w, nll))
        total_weight += float(w.sum())
        tokens += int(trained.sum())
    loss = torch.stack(weighted_nll).sum() / max(total_weight, 1e-8)
    nll = loss.item()
    return loss, {
        "train/nll": nll,
        "train/ppl": math.exp(min(nll, 50.0)),
        "train/weight": total_weight,
        "train/tokens": float(tokens),
    }
