import torch


def _avg(x, w):
    n = w.sum(-1)
    return (torch.where(w > 0, x, 0.0) * w).sum(-1) / torch.where(n > 0, n, torch.ones_like(n))


def ipo_loss_padded(logprobs, ref_logprobs, mask, tau=0.1):
    """IPO on per-token averages. Rows 2i / 2i+1 of the [2B, T] batch are chosen / rejected."""
    w = mask.to(logprobs.dtype)
    lr = _avg(logprobs, w) - _avg(ref_logprobs.detach(), w)
    h = lr[0::2] - lr[1::2]
    loss = (h - 1.0 / (2.0 * tau)).square().mean()
    return loss, {
        "ipo/margin": h.mean().item(),
        "ipo/acc": (h > 0).float().mean().item(),
    }
