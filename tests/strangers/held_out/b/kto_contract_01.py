import torch


def kto_loss(data, logprobs_list, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """KTO with the batch's mean log-ratio as the reference point."""
    ratios, good = [], []
    zero = 0.0
    for datum, lp in zip(data, logprobs_list, strict=True):
        cols = datum.loss_fn_inputs
        w = cols["weights"].to_torch()
        ref = cols["ref_logprobs"].to_torch()
        on = w > 0
        diff = torch.where(on, lp, 0.0) - torch.where(on, ref, 0.0)
        logratio = (diff * w).sum()
        zero = zero + 0.0 * logratio
        if not on.any():
            continue
        ratios.append(logratio)
        good.append(bool(cols["labels"].to_torch()[-1] > 0.5))

    if not ratios:
        return zero, {"kto/kl": 0.0, "kto/reward_desirable": 0.0, "kto/reward_undesirable": 0.0}

    z = torch.stack(ratios).detach().mean().clamp(min=0)
    losses = []
    for r, g in zip(ratios, good):
        if g:
            losses.append(desirable_weight * (1 - torch.sigmoid(beta * (r - z))))
        else:
            losses.append(undesirable_weight * (1 - torch.sigmoid(beta * (z - r))))
    pos = [beta * r.item() for r, g in zip(ratios, good) if g]
    neg = [beta * r.item() for r, g in zip(ratios, good) if not g]
    return torch.stack(losses).mean(), {
        "kto/kl": z.item(),
        "kto/reward_desirable": sum(pos) / max(len(pos), 1),
        "kto/reward_undesirable": sum(neg) / max(len(neg), 1),
    }
