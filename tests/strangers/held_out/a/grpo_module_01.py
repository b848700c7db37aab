import torch
from torch import nn


class TokenPolicyLoss(nn.Module):
    """Clipped policy loss, mean over response tokens."""

    def __init__(self, clip_eps_low=0.2, clip_eps_high=0.2, beta=0.0):
        super().__init__()
        self.clip_eps_low = clip_eps_low
        self.clip_eps_high = clip_eps_high
        self.beta = beta
        self.num_tokens = None

    def forward(self, log_probs, old_log_probs, advantages, action_mask, ref_log_probs=None):
        valid = action_mask > 0
        if self.num_tokens is None:
            self.num_tokens = action_mask.sum().clamp(min=1e-8).item()
        log_ratio = torch.where(valid, log_probs - old_log_probs, 0.0).clamp(-20, 20)
        adv = torch.where(valid, advantages, 0.0)
        ratio = log_ratio.exp()
        surr1 = ratio * adv
        surr2 = ratio.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high) * adv
        loss = -torch.min(surr1, surr2)
        if self.beta > 0 and ref_log_probs is not None:
            d = torch.where(valid, ref_log_probs - log_probs, 0.0).clamp(-10, 10)
            loss = loss + self.beta * (d.exp() - 1 - d)
        return (loss * action_mask).sum() / self.num_tokens
