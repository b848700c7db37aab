import torch
import torch.nn as nn
import torch.nn.functional as F


class BCOLoss(nn.Module):
    """Pairwise BCO with an exponential moving average of the reward shift."""

    def __init__(self, beta: float = 0.1, momentum: float = 0.9):
        super().__init__()
        self.beta = beta
        self.momentum = momentum
        self.register_buffer("delta", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps):
        chosen = self.beta * (chosen_logps - ref_chosen_logps)
        rejected = self.beta * (rejected_logps - ref_rejected_logps)

        if self.training:
            batch_delta = 0.5 * (chosen.mean() + rejected.mean())
            if self.steps == 0:
                self.delta = batch_delta
            else:
                self.delta = self.momentum * self.delta + (1 - self.momentum) * batch_delta
            self.steps += 1

        loss = -(F.logsigmoid(chosen - self.delta) + F.logsigmoid(self.delta - rejected)).mean()
        return loss, {
            "delta": self.delta.item(),
            "rewards/chosen": chosen.mean().item(),
            "rewards/rejected": rejected.mean().item(),
        }
