import torch


def make_ppo_entropy_loss(advantages, old_logprobs, clip=0.2, ent_coef=0.003):
    """
    PPO with a sampled entropy bonus. -ent_coef * H has the gradient ent_coef * E_old[r log pi grad log pi],
    hence the surrogate ent_coef * sg(r log pi) * log pi. `advantages`: a number or a row for each datum.
    """
    def loss_fn(data, logprobs_list):
        if not len(data) == len(logprobs_list) == len(advantages) == len(old_logprobs):
            raise ValueError("one entry for each datum expected")
        pg_sum, ent_sum, weight_sum, clip_sum, h_sum = 0.0, 0.0, 0.0, 0.0, 0.0
        for d, lp, a, old in zip(data, logprobs_list, advantages, old_logprobs):
            w = d.loss_fn_inputs["weights"].to_torch()
            old = torch.as_tensor(old, dtype=torch.float32)
            a = torch.as_tensor(a, dtype=torch.float32)
            a = a.expand_as(lp) if a.dim() == 0 or a.numel() == 1 else a
            if not w.shape == lp.shape == old.shape == a.shape:
                raise ValueError("row lengths differ")
            on = w > 0
            lp, old, a = (torch.where(on, x, 0.0) for x in (lp, old, a))
            ratio = torch.exp((lp - old).clamp(-20, 20))
            s1, s2 = ratio * a, ratio.clamp(1 - clip, 1 + clip) * a
            pg_sum = pg_sum - (w * torch.minimum(s1, s2)).sum()
            ent_sum = ent_sum + (w * (ratio * lp).detach() * lp).sum()
            weight_sum += w.sum().item()
            clip_sum += (w * (s2 < s1)).sum().item()
            h_sum += -(w * (ratio * lp).detach()).sum().item()
        n = max(weight_sum, 1e-8)
        loss = (pg_sum + ent_coef * ent_sum) / n
        return loss, {"loss": loss.item(), "clip_frac": clip_sum / n, "entropy_est": h_sum / n}

    return loss_fn
