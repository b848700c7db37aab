import torch
import torch.nn as nn


class ForwardKLDistillLoss(nn.Module):
    """
    Forward KL(teacher || student) by importance sampling: tokens were drawn from the behaviour policy
    (old_logprobs), E_teacher[f] = E_old[(teacher / old) f].
    """

    def __init__(self, max_weight: float = 10.0):
        super().__init__()
        self.max_weight = max_weight

    @torch.no_grad()
    def importance(self, teacher, old):
        return torch.exp((old - teacher).clamp(-20, 20)).clamp(max=self.max_weight)

    def forward(self, logprobs, old_logprobs, ref_logprobs, mask):
        mask = mask.to(logprobs.dtype)
        on = mask > 0
        student = torch.where(on, logprobs, 0.0)
        old = torch.where(on, old_logprobs, 0.0)
        teacher = torch.where(on, ref_logprobs, 0.0)
        rho = self.importance(teacher, old)
        total = mask.sum().clamp(min=1e-8)
        loss = (mask * rho * (teacher - student)).sum() / total
        return loss, {"forward_kl": loss.item(), "rho_mean": ((mask * rho).sum() / total).item()}
