import torch
import torch.nn.functional as F


def make_dpo_loss(ref_logprobs, weights, beta=0.1):
    """Data order: chosen, rejected, chosen, rejected, ... The reference's margins are computed once."""
    weights = [torch.as_tensor(w, dtype=torch.float32) for w in weights]

    def total(lp, w):
        return (torch.where(w > 0, lp, torch.zeros_like(lp)) * w).sum()

    def margins(logprobs):
        s = torch.stack([total(lp, w) for lp, w in zip(logprobs, weights, strict=True)])
        return s[0::2] - s[1::2]

    ref_margins = margins([torch.as_tensor(r, dtype=torch.float32) for r in ref_logprobs])

    def loss_fn(data, logprobs_list):
        logits = margins(logprobs_list).mul(beta) - ref_margins.mul_(beta)
        loss = -F.logsigmoid(logits).mean()
        return loss, {
            "dpo/margin": logits.mean().item(),
            "dpo/accuracy": (logits > 0).float().mean().item(),
        }

    return loss_fn
