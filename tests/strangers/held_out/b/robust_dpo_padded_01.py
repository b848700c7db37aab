import torch
import torch.nn.functional as F


def robust_dpo(logprobs, ref_logprobs, mask, beta=0.1, label_smoothing=0.1):
    # [2B, T]; even rows are the preferred ones. rDPO, unbiased under flip rate `label_smoothing`
    eps = label_smoothing
    assert 0.0 <= eps < 0.5
    keep = mask > 0
    delta = torch.where(keep, logprobs, 0.0) - torch.where(keep, ref_logprobs, 0.0)
    seq = (delta * mask).sum(dim=-1)
    reward = beta * seq
    h = reward[::2] - reward[1::2]
    loss = (-(1 - eps) * F.logsigmoid(h) + eps * F.logsigmoid(-h)) / (1 - 2 * eps)
    h_ = h.detach()
    stats = dict(
        margin=h_.mean().item(),
        accuracy=(h_ > 0).float().mean().item(),
    )
    return loss.mean(), stats
