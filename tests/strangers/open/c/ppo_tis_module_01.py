import torch
from torch import nn


class TruncatedISPPOLoss(nn.Module):
    """
    PPO clip on pi / pi_old, and a truncated importance weight pi_old / pi_sampler
    for the mismatch between trainer and inference engine.
    """

    def __init__(self, clip_eps: float = 0.2, tis_cap: float = 2.0):
        super().__init__()
        self.clip_eps = clip_eps
        self.tis_cap = tis_cap

    def forward(self, logprobs, old_logprobs, sampler_logprobs, advantages, mask):
        weights = mask.to(logprobs.dtype)
        keep = weights > 0
        if advantages.dim() == 1:
            advantages = advantages[:, None].expand_as(logprobs)
        new = torch.where(keep, logprobs, 0.0)
        old = torch.where(keep, old_logprobs, 0.0)
        sampler = torch.where(keep, sampler_logprobs, 0.0)
        adv = torch.where(keep, advantages, 0.0)

        with torch.no_grad():
            raw = torch.exp((old - sampler).clamp(-20, 20))
            tis = raw.clamp(max=self.tis_cap)
        ratio = torch.exp((new - old).clamp(-20, 20))
        unclipped = ratio * adv
        clipped = ratio.clamp(1 - self.clip_eps, 1 + self.clip_eps) * adv
        per_token = -torch.minimum(unclipped, clipped) * tis

        denom = weights.sum().clamp(min=1e-8)
        mean = lambda x: (x * weights).sum() / denom
        loss = mean(per_token)
        metrics = {
            "actor/pg_loss": loss.item(),
            "actor/pg_clipfrac": mean((clipped < unclipped).float()).item(),
            "tis/mean": mean(tis).item(),
            "tis/truncated_frac": mean((raw > self.tis_cap).float()).item(),
        }
        return loss, metrics
