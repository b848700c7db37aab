import torch
import torch.nn.functional as F
from torch import nn


class SimPOLoss(nn.Module):
    """Reference-free preference loss on length-normalised logprobs with a target margin."""

    def __init__(self, beta: float = 2.0, gamma_beta_ratio: float = 0.5):
        super().__init__()
        self.beta = beta
        self.gamma_beta_ratio = gamma_beta_ratio

    @staticmethod
    def average(logprobs, mask):
        mask = mask.to(logprobs.dtype)
        n = mask.sum(-1)
        return (logprobs * mask).sum(-1) / n.clamp(min=1e-8), n > 0

    def forward(self, chosen_logprobs, rejected_logprobs, chosen_mask, rejected_mask):
        chosen, has_c = self.average(chosen_logprobs, chosen_mask)
        rejected, has_r = self.average(rejected_logprobs, rejected_mask)
        ok = (has_c & has_r).to(chosen.dtype)
        n_pairs = ok.sum().clamp(min=1.0)
        logits = chosen - rejected - self.gamma_beta_ratio
        loss = -(F.logsigmoid(self.beta * logits) * ok).sum() / n_pairs
        with torch.no_grad():
            metrics = {
                "rewards/chosen": (self.beta * (chosen * ok).sum() / n_pairs).item(),
                "rewards/rejected": (self.beta * (rejected * ok).sum() / n_pairs).item(),
                "rewards/margins": (self.beta * ((chosen - rejected) * ok).sum() / n_pairs).item(),
                "rewards/accuracies": (((chosen > rejected).float() * ok).sum() / n_pairs).item(),
            }
        return loss, metrics
