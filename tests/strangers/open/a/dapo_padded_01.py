import torch


def dapo_loss(logprobs, old_logprobs, advantages, mask, clip_low=0.2, clip_high=0.28):
    """DAPO: clip-higher, token-level averaging over the responses of the batch. All [B, T]."""
    m = mask.to(logprobs.dtype)
    valid = m > 0
    diff = logprobs.sub(old_logprobs).masked_fill(~valid, 0.0).clamp(-20, 20)
    adv = advantages.masked_fill(~valid, 0.0)
    ratio = diff.exp()
    surrogate = torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    loss = -(surrogate * m).mean()
    with torch.no_grad():
        hit = ((ratio > 1 + clip_high) & (adv > 0)) | ((ratio < 1 - clip_low) & (adv < 0))
        clip_frac = (hit * m).sum() / m.sum().clamp(min=1e-8)
    return loss, {"clip_frac": clip_frac.item()}
