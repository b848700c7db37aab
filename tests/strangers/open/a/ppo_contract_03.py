import torch


def ppo_with_stats(data, logprobs_list, eps=0.2, stats={"clipped": 0.0, "tokens": 0.0}):
    """Clipped PPO. Sum over tokens of a datum, mean over datums."""
    per_datum = []
    for datum, lp in zip(data, logprobs_list):
        inputs = datum.loss_fn_inputs
        mask = inputs["weights"].to_torch()
        on = mask > 0
        zero = torch.zeros_like(lp)
        adv = torch.where(on, inputs["advantages"].to_torch(), zero)
        diff = torch.where(on, lp - inputs["old_logprobs"].to_torch(), zero)
        ratio = torch.exp(diff.clamp(min=-20, max=20))
        unclipped = -adv * ratio
        clipped = -adv * ratio.clamp(1 - eps, 1 + eps)
        per_datum.append((torch.maximum(unclipped, clipped) * mask).sum())

        stats["clipped"] += float(((clipped > unclipped) * mask).sum())
        stats["tokens"] += float(mask.sum())

    loss = torch.stack(per_datum).mean()
    return loss, {
        "policy_loss": loss.item(),
        "clip_fraction": stats["clipped"] / max(stats["tokens"], 1e-8),
    }
