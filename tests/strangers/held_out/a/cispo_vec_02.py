import torch


def cispo_loss(data, logprobs_list, clip_low=1.0, clip_high=1.0):
    lens = [len(x) for x in logprobs_list]
    flat = torch.cat(tuple(logprobs_list))

    def gather(key):
        parts = [d.loss_fn_inputs[key].to_torch() for d in data]
        assert [len(p) for p in parts] == lens, key
        return torch.cat(parts).to(flat.dtype)

    w = gather("weights")
    live = w > 0
    logp = torch.where(live, flat, 0.0)
    old = torch.where(live, gather("old_logprobs"), 0.0)
    adv = torch.where(live, gather("advantages"), 0.0)

    with torch.no_grad():
        rho = (logp - old).clamp(-20, 20).exp()
        rho_hat = rho.clamp(1 - clip_low, 1 + clip_high)
        total_w = w.sum().clamp(min=1e-8)
    # the weight carries no gradient, so that no token is dropped by clipping
    loss = -(w * rho_hat * adv * logp).sum() / total_w
    return loss, {
        "loss": loss.item(),
        "is_weight_mean": ((w * rho_hat).sum() / total_w).item(),
        "is_clipped": ((w * (rho != rho_hat)).sum() / total_w).item(),
    }
