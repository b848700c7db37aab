import torch


class ClipHigherPPO(torch.nn.Module):
    """PPO surrogate with decoupled clip range (DAPO), token mean over the batch."""

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.28):
        super().__init__()
        self.clip_low = clip_low
        self.clip_high = clip_high

    def forward(self, logprobs, old_logprobs, advantages, mask):
        on = mask > 0
        zero = logprobs.new_zeros(())
        lp = torch.where(on, logprobs, zero)
        old = torch.where(on, old_logprobs, zero)
        adv = torch.where(on, advantages, zero)

        log_ratio = torch.clamp(lp - old, -20.0, 20.0)
        ratio = torch.exp(log_ratio)
        lower, upper = 1.0 - self.clip_high, 1.0 + self.clip_low
        clipped = torch.clamp(ratio, lower, upper)
        surrogate = torch.minimum(ratio * adv, clipped * adv)

        denom = mask.sum()
        denom = torch.where(denom > 0, denom, torch.ones_like(denom))
        loss = -(surrogate * mask).sum() / denom
        hit = (clipped * adv < ratio * adv).to(mask.dtype)
        return loss, {
            "clip_frac": ((hit * mask).sum() / denom).item(),
            "approx_kl": (((ratio - 1 - log_ratio) * mask).sum() / denom).item(),
        }
