import torch
from torch import nn


class PackedSFTLoss(nn.Module):
    """
    Token-weighted NLL over packed rows. With gradient accumulation give `num_items_in_batch`, the total
    weight of all micro-batches, so that the sum over micro-batches is the mean over the whole batch.
    """

    def __init__(self, eps: float = 1e-8):
        super().__init__()
        self.eps = eps

    def forward(self, logprobs, weights, num_items_in_batch=None):
        if logprobs.shape != weights.shape:
            raise ValueError(f"logprobs {tuple(logprobs.shape)}, weights {tuple(weights.shape)}")
        weights = weights.to(logprobs.dtype)
        nll = -(logprobs * weights).sum()
        denom = weights.sum() if num_items_in_batch is None else torch.as_tensor(float(num_items_in_batch))
        loss = nll / denom.clamp(min=self.eps)
        return loss, {
            "nll_sum": nll.item(),
            "trained_weight": weights.sum().item(),
            "packing_efficiency": (weights > 0).float().mean().item(),
        }
