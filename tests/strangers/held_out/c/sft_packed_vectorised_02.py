import torch


def packed_cross_entropy(data, logprobs_list):
    """Weighted token-level cross entropy over packed rows (weights may be fractional, e.g. per source)."""
    flat = torch.cat(list(logprobs_list))
    weights = torch.cat([d.loss_fn_inputs["weights"].to_torch() for d in data])
    if flat.shape != weights.shape:
        raise ValueError(f"{flat.shape[0]} logprobs, {weights.shape[0]} weights")
    mask = weights.bool()
    nll = -torch.where(mask, flat, torch.zeros_like(flat))
    n = mask.sum().clamp(min=1)
    loss = (nll * mask).sum() / n
    return loss, {"train/loss": loss.item(), "train/tokens": float(n)}
