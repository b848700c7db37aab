import torch


def grpo_loss(data, logprobs_list, clip=0.2, beta=0.05):
    """GRPO: clipped surrogate + beta * KL(pi || ref), mean over tokens then over completions."""
    seq_losses, kls = [], []
    for datum, logp in zip(data, logprobs_list):
        x = {k: v.to_torch() for k, v in datum.loss_fn_inputs.items()}
        w = x["weights"]
        m = w > 0
        z = torch.zeros_like(logp)

        ratio = torch.where(m, logp - x["old_logprobs"], z).clamp(-20, 20).exp()
        adv = torch.where(m, x["advantages"], z)
        pg = -torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)

        with torch.no_grad():
            d = torch.where(m, x["ref_logprobs"] - logp, z).clamp(-10, 10)
            kl = d.exp() - d - 1

        n = w.sum().clamp(min=1e-8)
        seq_losses.append(((pg + beta * kl) * w).sum() / n)
        kls.append(float((kl * w).sum() / n))
    loss = torch.stack(seq_losses).mean()
    return loss, {"loss": float(loss.detach()), "kl": sum(kls) / len(kls)}
