import torch


def cdpo(logprobs, ref_logprobs, mask, beta=0.1, eps=0.1):
    """DPO with label noise eps. Even rows chosen, odd rows rejected, shape [2B, T]."""
    valid = mask > 0
    diff = torch.where(valid, logprobs, 0.0) - torch.where(valid, ref_logprobs, 0.0)
    reward = beta * (diff * mask).sum(-1)
    r_w, r_l = reward[0::2], reward[1::2]
    p_win = torch.sigmoid(r_w - r_l)
    p_lose = torch.sigmoid(r_l - r_w)
    loss = -((1 - eps) * torch.log(p_win) + eps * torch.log(p_lose))
    return loss.mean(), {
        "p_win": p_win.mean().item(),
        "accuracy": (r_w > r_l).float().mean().item(),
    }
