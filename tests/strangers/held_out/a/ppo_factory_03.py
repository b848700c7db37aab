import torch


def make_policy_loss(advantages, old_logprobs, weights, clip=0.2, dual_clip=3.0):
    """`advantages` holds a scalar or a tensor for each datum."""
    batch = list(zip(advantages, old_logprobs, weights, strict=True))

    def policy_loss(data, logprobs_list):
        if len(logprobs_list) != len(batch):
            raise ValueError(f"{len(logprobs_list)} logprobs for {len(batch)} rollouts")
        num, den, clipped = [], 0.0, 0.0
        for lp, (a, old, w) in zip(logprobs_list, batch):
            old = torch.as_tensor(old, dtype=lp.dtype, device=lp.device)
            w = torch.as_tensor(w, dtype=lp.dtype, device=lp.device)
            if old.shape != lp.shape or w.shape != lp.shape:
                raise ValueError("column and logprobs differ in length")
            a = torch.as_tensor(a, dtype=lp.dtype, device=lp.device).expand_as(lp)
            keep = w > 0
            a = torch.where(keep, a, 0.0)
            ratio = torch.where(keep, lp - old, 0.0).clamp(-20, 20).exp()
            inner = torch.min(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
            bounded = torch.where(a < 0, torch.max(inner, dual_clip * a), inner)
            num.append(-(bounded * w).sum())
            den += w.sum().item()
            clipped += (w * (inner < ratio * a)).sum().item()
        den = max(den, 1e-8)
        loss = torch.stack(num).sum() / den
        return loss, {"loss": loss.item(), "clip_frac": clipped / den}

    return policy_loss
