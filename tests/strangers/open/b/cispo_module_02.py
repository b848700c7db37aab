import torch
from torch import nn


class CISPO(nn.Module):
    def __init__(self, eps_max: float = 4.0):
        super().__init__()
        self.eps_max = eps_max

    def forward(self, logprobs, old_logprobs, advantages, mask):
        if advantages.dim() == 1:
            advantages = advantages[:, None].expand_as(logprobs)
        m = mask.to(logprobs.dtype)
        keep = m > 0
        lp = torch.where(keep, logprobs, 0.0)
        old = torch.where(keep, old_logprobs, 0.0)
        adv = torch.where(keep, advantages, 0.0)

        with torch.no_grad():
            is_ratio = torch.exp((lp - old).clamp(max=20.0))
            is_weight = is_ratio.clamp(max=self.eps_max)

        n = m.sum()
        n = torch.where(n > 0, n, torch.ones_like(n))
        loss = -(is_weight * adv * lp * m).sum() / n
        capped = ((is_ratio > self.eps_max) * m).sum() / n
        return loss, {"cispo/capped_frac": capped.item(),
                      "cispo/ratio_mean": ((is_ratio * m).sum() / n).item()}
