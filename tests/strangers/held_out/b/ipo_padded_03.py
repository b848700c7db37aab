import torch


def ipo(logprobs, ref_logprobs, mask, beta=0.1):
    """Identity preference optimisation on length-averaged log-ratios; [2B, T], pairs side by side."""
    two_b, _ = logprobs.shape
    assert two_b % 2 == 0, "need whole pairs"
    mask = mask.to(logprobs.dtype)
    log_ratio = logprobs - ref_logprobs
    n_tok = mask.sum(dim=1)
    n_tok = torch.where(n_tok == 0, torch.ones_like(n_tok), n_tok)
    avg = log_ratio.sum(dim=1) / n_tok
    avg_chosen, avg_rejected = avg.reshape(-1, 2).T
    h = avg_chosen - avg_rejected
    loss = torch.mean((h - 0.5 / beta) ** 2)
    return loss, {"h": h.mean().item(), "win_rate": (h > 0).float().mean().item()}
