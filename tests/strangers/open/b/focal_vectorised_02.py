import torch


def focal_nll(data, logprobs_list, gamma=2.0):
    """-(1-p)^gamma log p, weighted mean over the trained tokens; gradient goes through both factors."""
    logp = torch.cat(list(logprobs_list))
    w = torch.cat([d.loss_fn_inputs["weights"].to_torch() for d in data])
    p = logp.exp()
    focal = (1.0 - p).clamp(min=0.0) ** gamma
    denom = w.sum()
    if denom == 0:
        denom = torch.ones_like(denom)
    loss = -(w * focal * logp).sum() / denom
    with torch.no_grad():
        nll = -(w * logp).sum() / denom
        mean_p = (w * p).sum() / denom
    return loss, {"loss": loss.item(), "nll": nll.item(), "mean_prob": mean_p.item()}
