import torch


def make_ppo_loss(advantages, old_logprobs, weights, clip=0.2):
    """advantages: one number for each datum; old_logprobs, weights: one tensor for each datum."""
    rollout = zip(advantages, old_logprobs, weights)

    def loss_fn(data, logprobs_list):
        total = torch.zeros((), requires_grad=True)
        count = 0.0
        for lp, (a, old, w) in zip(logprobs_list, rollout):
            w = torch.as_tensor(w, dtype=lp.dtype)
            old = torch.as_tensor(old, dtype=lp.dtype)
            ratio = torch.where(w > 0, lp - old, 0.0).clamp(-20, 20).exp()
            a = float(a)
            obj = torch.min(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
            total = total - (obj * w).sum()
            count += float(w.sum())
        loss = total / max(count, 1e-8)
        return loss, {"loss": loss.item()}

    return loss_fn
