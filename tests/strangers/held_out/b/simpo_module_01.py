import torch
from torch import nn
from torch.nn.functional import logsigmoid


class SimPO(nn.Module):
    """SimPO; gamma_beta_ratio is gamma / beta, as in the paper's hyperparameter table.

    forward: logprobs, mask of shape [2B, T], rows (chosen, rejected, chosen, rejected, ...).
    """

    def __init__(self, beta=2.5, gamma_beta_ratio=0.55, label_smoothing=0.0):
        super().__init__()
        self.beta, self.gamma_beta_ratio, self.label_smoothing = beta, gamma_beta_ratio, label_smoothing

    @staticmethod
    def sequence_mean(x, m):
        total = (torch.where(m > 0, x, torch.zeros_like(x)) * m).sum(-1)
        count = m.sum(-1)
        return total / torch.where(count > 0, count, torch.ones_like(count))

    def forward(self, logprobs, mask):
        avg = self.sequence_mean(logprobs, mask.to(logprobs))
        pi_logratios = avg[0::2] - avg[1::2]
        logits = self.beta * pi_logratios - self.gamma_beta_ratio
        losses = (-logsigmoid(logits) * (1 - self.label_smoothing)
                  - logsigmoid(-logits) * self.label_smoothing)
        return losses.mean(), {
            "logps/chosen": avg[0::2].detach().mean().item(),
            "logps/rejected": avg[1::2].detach().mean().item(),
            "accuracy": (pi_logratios > 0).float().mean().item(),
        }
