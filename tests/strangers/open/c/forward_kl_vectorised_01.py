import torch


def forward_kl_distillation(data, logprobs_list, weight_cap=10.0):
    """
    KL(teacher || student), estimated on tokens that `old_logprobs` sampled: each token is re-weighted by
    teacher / sampler (truncated), a constant with respect to the student.
    """
    for d, lp in zip(data, logprobs_list, strict=True):
        for name in ("weights", "old_logprobs", "ref_logprobs"):
            if tuple(d.loss_fn_inputs[name].to_torch().shape) != tuple(lp.shape):
                raise ValueError(f"column {name} does not fit its logprobs")
    get = lambda name: torch.cat([d.loss_fn_inputs[name].to_torch().float() for d in data])

    w = get("weights")
    live = w > 0
    teacher = torch.where(live, get("ref_logprobs"), 0.0)
    sampler = torch.where(live, get("old_logprobs"), 0.0)
    student = torch.where(live, torch.cat(list(logprobs_list)), 0.0)

    rho = torch.exp((teacher - sampler).clamp(-20, 20)).clamp(max=weight_cap)
    denom = w.sum().clamp(min=1e-8)
    loss = (w * rho * (teacher - student)).sum() / denom
    return loss, {
        "distill/forward_kl": loss.item(),
        "distill/is_weight": ((w * rho).sum() / denom).item(),
        "distill/capped": ((w * (rho >= weight_cap)).sum() / denom).item(),
    }
