import torch


def cispo(data, logprobs_list, eps_high=2.0):
    """CISPO: REINFORCE with a clipped importance weight, token mean over the batch."""
    get = lambda k: torch.cat([d.loss_fn_inputs[k].to_torch() for d in data])  # noqa: E731
    lp = torch.cat(list(logprobs_list))
    old, adv, w = get("old_logprobs"), get("advantages"), get("weights")
    on = w > 0
    lp = torch.where(on, lp, torch.zeros_like(lp))
    old = torch.where(on, old, torch.zeros_like(old))
    adv = torch.where(on, adv, torch.zeros_like(adv))

    is_weight = (lp - old).clamp(-20, 20).exp().clamp(max=1.0 + eps_high)
    denom = w.sum().clamp(min=1e-8)
    loss = -(w * is_weight * adv * lp).sum() / denom
    capped = (w * (is_weight >= 1.0 + eps_high)).sum() / denom
    return loss, {"cispo/loss": loss.item(), "cispo/capped": capped.item()}
