import torch
from torch import nn


class PolicyGradientWithEntropy(nn.Module):
    """
    Policy gradient plus a sampled entropy bonus. Only the chosen token's logprob is known, so the bonus
    goes through the score function: grad H = -E[log pi * grad log pi].
    """

    def __init__(self, entropy_coef: float = 0.01):
        super().__init__()
        self.entropy_coef = entropy_coef

    def forward(self, logprobs, advantages, mask):
        w = mask.to(logprobs.dtype)
        on = w > 0
        if advantages.dim() == 1:
            advantages = advantages.unsqueeze(-1).expand_as(logprobs)
        lp = torch.where(on, logprobs, 0.0)
        adv = torch.where(on, advantages, 0.0)
        n = w.sum().clamp(min=1e-8)

        pg = -(w * adv * lp).sum() / n
        entropy_surrogate = (w * lp.detach() * lp).sum() / n
        loss = pg - self.entropy_coef * entropy_surrogate
        return loss, {"pg_loss": pg.item(), "entropy": (-(w * lp).sum() / n).item()}
