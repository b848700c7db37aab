import torch


def packed_sft_loss(logprobs, mask):
    """
    Mean NLL over all trained tokens of the batch, independent of how the examples were packed into rows.
    logprobs, mask: [rows, row_length]
    """
    w = mask.to(logprobs.dtype)
    nll = -torch.where(w > 0, logprobs, 0.0) * w
    row_weight = w.sum(dim=-1)
    filled = row_weight > 0
    row_loss = nll.sum(dim=-1) / row_weight.clamp(min=1e-8)
    loss = row_loss.sum() / filled.sum().clamp(min=1)
    return loss, {"nll": loss.item(), "ppl": float(torch.exp(loss.detach().clamp(max=20)))}
