import torch
import torch.nn as nn


class DrGRPOLoss(nn.Module):
    """Dr. GRPO: no length bias, tokens are summed and divided by a constant budget."""

    def __init__(self, clip_eps: float = 0.2, max_tokens: int = 256, kl_coef: float = 0.0):
        super().__init__()
        self.clip_eps, self.max_tokens, self.kl_coef = clip_eps, max_tokens, kl_coef

    def forward(self, logprobs, old_logprobs, advantages, mask, ref_logprobs=None):
        on = mask > 0
        log_ratio = torch.where(on, logprobs - old_logprobs, 0.0).clamp(-20.0, 20.0)
        adv = torch.where(on, advantages, 0.0)
        ratio = log_ratio.exp()
        low, high = 1.0 - self.clip_eps, 1.0 + self.clip_eps
        per_token = torch.maximum(-adv * ratio, -adv * ratio.clamp(low, high))
        if self.kl_coef:
            if ref_logprobs is None:
                raise ValueError("kl_coef needs ref_logprobs")
            gap = torch.where(on, ref_logprobs - logprobs, 0.0).clamp(-20.0, 20.0)
            per_token = per_token + self.kl_coef * (gap.exp() - gap - 1.0)
        per_seq = (per_token * mask).sum(dim=1) / self.max_tokens
        return per_seq.mean()
