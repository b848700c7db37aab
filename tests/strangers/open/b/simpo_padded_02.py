import torch
import torch.nn.functional as F


def simpo(logprobs, mask, beta=2.0, gamma=1.0):
    """-log sigmoid(beta * (avg logp+ - avg logp-) - gamma), rows 2i = chosen and 2i+1 = rejected."""
    m = mask.to(logprobs.dtype)
    tok = torch.where(m > 0, logprobs, torch.zeros_like(logprobs)) * m

    chosen_tok, rejected_tok = tok[::2], tok[1::2]
    lengths = m[::2].sum(-1)
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    r_chosen = beta * chosen_tok.sum(-1) / lengths
    r_rejected = beta * rejected_tok.sum(-1) / lengths

    logits = r_chosen - r_rejected - gamma
    loss = F.softplus(-logits).mean()
    return loss, {
        "reward/chosen": r_chosen.mean().item(),
        "reward/rejected": r_rejected.mean().item(),
        "reward/acc": (r_chosen > r_rejected).float().mean().item(),
    }
