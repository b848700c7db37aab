import torch
import torch.nn.functional as F


def dpo_loss_fn(data, logprobs_list, beta=0.1):
    """DPO on a flat batch of pairs: per-sequence log-ratios by one index_add."""
    if len(data) % 2 or len(data) != len(logprobs_list):
        raise ValueError("DPO needs whole pairs")
    lengths = torch.tensor([lp.shape[0] for lp in logprobs_list])
    owner = torch.arange(len(data)).repeat_interleave(lengths)
    w = torch.cat([d.loss_fn_inputs["weights"].to_torch() for d in data])
    ref = torch.cat([d.loss_fn_inputs["ref_logprobs"].to_torch() for d in data])
    pol = torch.cat(list(logprobs_list))
    sel = w > 0
    log_ratio = torch.where(sel, pol, 0.0) - torch.where(sel, ref, 0.0)
    seq = torch.zeros(len(data)).index_add(0, owner, w * log_ratio)

    chosen, rejected = seq.chunk(2)
    margin = beta * (chosen - rejected)
    loss = -F.logsigmoid(margin).mean()
    m = margin.detach()
    return loss, {
        "dpo/loss": loss.item(),
        "dpo/accuracy": (m > 0).float().mean().item(),
        "dpo/margin": m.mean().item(),
    }
