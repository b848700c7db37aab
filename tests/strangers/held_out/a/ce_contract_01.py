import torch


def weighted_cross_entropy(data, logprobs_list):
    """Weighted SFT loss: sum_t w_t * nll_t / sum_t w_t over the batch."""
    nll_sum = torch.zeros(())
    weight_sum = torch.zeros(())
    for datum, logprobs in zip(data, logprobs_list):
        weights = datum.loss_fn_inputs["weights"].to_torch()
        mask = (weights > 0).to(logprobs.dtype)
        nll = torch.where(mask.bool(), -logprobs, torch.zeros_like(logprobs))
        nll_sum = nll_sum + (nll * mask).sum()
        weight_sum = weight_sum + mask.sum()
    loss = nll_sum / weight_sum.clamp(min=1e-8)
    return loss, {"nll": loss.item(), "perplexity": loss.detach().clamp(max=50).exp().item()}
