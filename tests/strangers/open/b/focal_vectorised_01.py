import torch

GAMMA = 2.0


def focal_sft_loss(data, logprobs_list):
    """Focal-weighted SFT: easy tokens (p near 1) are damped by (1 - p) ** GAMMA."""
    lp = torch.cat([x.reshape(-1) for x in logprobs_list])
    w = torch.cat([d.loss_fn_inputs["weights"].to_torch().to(lp.dtype) for d in data])
    on = w > 0
    lp = torch.where(on, lp, torch.zeros_like(lp))
    modulator = (1.0 - lp).clamp(min=0) ** GAMMA
    n = w.sum()
    n = torch.where(n > 0, n, torch.ones_like(n))
    loss = (w * modulator * -lp).sum() / n
    metrics = {
        "loss": loss.item(),
        "nll": (-(w * lp).sum() / n).item(),
        "tokens": w.sum().item(),
    }
    return loss, metrics
