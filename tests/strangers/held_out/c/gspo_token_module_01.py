import torch
from torch import nn


class GSPOTokenLoss(nn.Module):
    """
    GSPO-token: the sequence's ratio in value, the token's own logprob in gradient,
    s_{i,t} = sg[s_i] * pi_t / sg[pi_t].
    """

    def __init__(self, eps_low: float = 3e-4, eps_high: float = 4e-4):
        super().__init__()
        self.eps_low, self.eps_high = eps_low, eps_high

    def forward(self, logprobs, old_logprobs, advantages, mask):
        mask = mask.to(logprobs.dtype)
        keep = mask > 0
        lp = torch.where(keep, logprobs, 0.0)
        log_ratio = lp - torch.where(keep, old_logprobs, 0.0)
        if advantages.dim() == 1:
            advantages = advantages.unsqueeze(1).expand_as(lp)
        adv = torch.where(keep, advantages, 0.0)

        n_tok = mask.sum(-1)
        nonempty = n_tok > 0
        denom = torch.where(nonempty, n_tok, 1.0)
        seq_log_ratio = (log_ratio * mask).sum(-1) / denom
        log_s = seq_log_ratio.unsqueeze(-1) + lp - lp.detach()
        s = torch.exp(log_s.clamp(max=10.0))

        obj = torch.minimum(s * adv, s.clamp(1 - self.eps_low, 1 + self.eps_high) * adv)
        seq_obj = (obj * mask).sum(-1) / denom
        loss = -(seq_obj * nonempty).sum() / nonempty.sum().clamp(min=1)
        return loss, {"seq_kl": -(seq_log_ratio.detach() * nonempty).sum().item() / max(1, int(nonempty.sum()))}
