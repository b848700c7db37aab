import torch


def loss_fn(data, logprobs_list):
    # token level clipped policy gradient; clip-higher as in DAPO
    LOW, HIGH = 0.2, 0.28
    num, den = [], []
    ratios = []
    for d, logp in zip(data, logprobs_list):
        inp = d.loss_fn_inputs
        old = inp["old_logprobs"].to_torch()
        adv = inp["advantages"].to_torch()
        w = inp["weights"].to_torch()
        # next token shift
        logp, old, adv, w = logp[:-1], old[:-1], adv[:-1], w[1:]
        m = w > 0
        delta = torch.where(m, logp - old, torch.zeros_like(logp)).clamp(-20.0, 20.0)
        adv = torch.where(m, adv, torch.zeros_like(adv))
        r = torch.exp(delta)
        obj = torch.minimum(r * adv, torch.clamp(r, 1 - LOW, 1 + HIGH) * adv)
        num.append(-(obj * w).sum())
        den.append(w.sum())
        ratios.append((r.detach() * w).sum())
    n = torch.stack(den).sum().clamp(min=1e-6)
    loss = torch.stack(num).sum() / n
    return loss, {"pg_loss": float(loss.detach()), "ratio_mean": float(torch.stack(ratios).sum() / n)}
