import torch
from torch import nn
import torch.nn.functional as F


class SimPOLoss(nn.Module):
    """Reference free, length-normalised. Interleaved pairs: even rows chosen, odd rows rejected."""

    def __init__(self, beta: float = 2.0, gamma_beta_ratio: float = 0.5, sft_weight: float = 0.0):
        super().__init__()
        self.beta = beta
        self.gamma_beta_ratio = gamma_beta_ratio
        self.sft_weight = sft_weight

    def forward(self, logprobs: torch.Tensor, mask: torch.Tensor):
        w = mask.float()
        lengths = w.sum(dim=1)
        summed = (logprobs.masked_fill(w == 0, 0.0) * w).sum(dim=1)
        avg = summed / lengths.masked_fill(lengths == 0, 1.0)
        chosen, rejected = avg.view(-1, 2).unbind(dim=1)

        logits = chosen - rejected - self.gamma_beta_ratio
        loss = -F.logsigmoid(self.beta * logits).mean()
        if self.sft_weight:
            loss = loss - self.sft_weight * chosen.mean()

        r_c, r_r = self.beta * chosen.detach(), self.beta * rejected.detach()
        return loss, {
            "rewards/chosen": float(r_c.mean()),
            "rewards/rejected": float(r_r.mean()),
            "rewards/accuracies": float((r_c > r_r).float().mean()),
        }
