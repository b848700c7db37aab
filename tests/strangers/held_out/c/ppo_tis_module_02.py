import torch
import torch.nn as nn


def masked_mean(x, m):
    return (x * m).sum() / m.sum().clamp(min=1e-8)


class PolicyLossWithRolloutCorrection(nn.Module):
    def __init__(self, clip_ratio_low=0.2, clip_ratio_high=0.28, rollout_is_threshold=2.0):
        super().__init__()
        self.lo = clip_ratio_low
        self.hi = clip_ratio_high
        self.threshold = rollout_is_threshold

    def rollout_weight(self, old, sampler):
        # truncated importance sampling, vLLM against FSDP
        return torch.exp(torch.clamp(sampler - old, -20, 20)).clamp(max=self.threshold).detach()

    def forward(self, logprobs, old_logprobs, sampler_logprobs, advantages, mask):
        m = mask.float()
        sel = m > 0
        lp = logprobs.masked_fill(~sel, 0.0)
        old = old_logprobs.masked_fill(~sel, 0.0)
        smp = sampler_logprobs.masked_fill(~sel, 0.0)
        adv = (advantages if advantages.dim() == 2 else advantages.unsqueeze(1).expand_as(lp))
        adv = adv.masked_fill(~sel, 0.0)

        r = torch.exp(torch.clamp(lp - old, -20, 20))
        a = -adv * r
        b = -adv * torch.clamp(r, 1 - self.lo, 1 + self.hi)
        w = self.rollout_weight(old, smp)
        loss = masked_mean(torch.max(a, b) * w, m)
        return loss, {
            "pg_loss": loss.item(),
            "pg_clipfrac": masked_mean((b > a).float(), m).item(),
            "ppo_kl": masked_mean(old - lp.detach(), m).item(),
        }
