import torch


def dynamic_fine_tuning(data, logprobs_list):
    """DFT (Wu et al., 2025): SFT loss times the token's own probability, without gradient through it."""
    if len(data) != len(logprobs_list):
        raise ValueError("one tensor of logprobs for each datum")
    rows = [d.loss_fn_inputs["weights"].to_torch() for d in data]
    if any(w.shape != lp.shape for w, lp in zip(rows, logprobs_list)):
        raise ValueError("weights and logprobs differ in length")
    weights = torch.cat(rows)
    logp = torch.where(weights > 0, torch.cat(list(logprobs_list)), 0.0)
    prob = logp.detach().exp()
    denom = weights.sum().clamp(min=1e-8)
    loss = -(weights * prob * logp).sum() / denom
    return loss, {
        "loss": loss.item(),
        "nll": (-(weights * logp.detach()).sum() / denom).item(),
        "mean_token_prob": ((weights * prob).sum() / denom).item(),
    }
