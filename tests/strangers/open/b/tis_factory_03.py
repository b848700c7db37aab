import torch


def make_tis_ppo_loss(advantages, old_logprobs, sampler_logprobs, weights, clip_eps=0.2, tis_cap=2.0):
    """PPO surrogate, corrected for the trainer / inference-engine mismatch by a truncated weight."""
    as_f = lambda x: torch.as_tensor(x, dtype=torch.float32)
    cols = [tuple(map(as_f, c)) for c in zip(advantages, old_logprobs, sampler_logprobs, weights, strict=True)]

    def loss_fn(data, logprobs_list):
        num, den, clipped, tis_sum = 0.0, 0.0, 0.0, 0.0
        for lp, (adv, old, sampler, w) in zip(logprobs_list, cols, strict=True):
            on = w > 0
            lp, old, sampler, adv = (torch.where(on, x, 0.0) for x in (lp, old, sampler, adv))
            tis = torch.exp((old - sampler).clamp(-20, 20)).clamp(max=tis_cap)
            ratio = torch.exp((lp - old).clamp(-20, 20))
            s1 = ratio * adv
            s2 = ratio.clamp(1 - clip_eps, 1 + clip_eps) * adv
            num = num - (w * tis * torch.minimum(s1, s2)).sum()
            clipped += (w * (s2 < s1)).sum().item()
            tis_sum += (w * tis).sum().item()
            den += w.sum().item()
        den = den or 1.0
        return num / den, {"clip_frac": clipped / den, "tis_mean": tis_sum / den}

    return loss_fn
