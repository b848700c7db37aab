import torch


def make_truncated_is_loss(advantages, old_logprobs, sampler_logprobs, weights, eps_low=0.2, eps_high=0.2, cap=2.0):
    """PPO-clip against old_logprobs; the sampler's mismatch enters as min(pi_old / pi_sampler, cap)."""
    def tens(v):
        return torch.as_tensor(v, dtype=torch.float32)

    def loss_fn(data, logprobs_list):
        pg, n_tok, cap_hits = 0.0, 0.0, 0.0
        for i, lp in enumerate(logprobs_list):
            w = tens(weights[i])
            on = w > 0
            lp = torch.where(on, lp, 0.0)
            old = torch.where(on, tens(old_logprobs[i]), 0.0)
            smp = torch.where(on, tens(sampler_logprobs[i]), 0.0)
            a = torch.where(on, tens(advantages[i]), 0.0)

            rho_raw = torch.exp((smp - old).clamp(-20.0, 20.0))
            rho = rho_raw.clamp(max=cap)
            r = torch.exp((lp - old).clamp(-20.0, 20.0))
            obj = torch.minimum(r * a, r.clamp(1 - eps_low, 1 + eps_high) * a)
            pg = pg - (w * rho * obj).sum()
            n_tok += float(w.sum())
            cap_hits += float((w * (rho_raw > cap)).sum())
        n_tok = n_tok if n_tok > 0 else 1.0
        return pg / n_tok, {"tis/cap_frac": cap_hits / n_tok}

    return loss_fn
