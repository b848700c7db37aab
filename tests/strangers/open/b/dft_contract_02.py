import torch


def dft_loss(data, logprobs_list):
    """Dynamic fine-tuning (arXiv 2508.05629): SFT whose token loss is rescaled by the token's probability."""
    total_loss, total_nll, total_w = 0.0, 0.0, 0.0
    for datum, logprobs in zip(data, logprobs_list, strict=True):
        w = datum.loss_fn_inputs["weights"].to_torch().float()
        lp = torch.where(w > 0, logprobs, torch.zeros_like(logprobs))
        p = torch.exp(lp)
        total_loss = total_loss + (-p * lp * w).sum()
        total_nll += -(lp * w).sum().item()
        total_w += w.sum().item()
    if total_w == 0:
        total_w = 1.0
    loss = total_loss / total_w
    return loss, {"loss": loss.item(), "nll": total_nll / total_w}
