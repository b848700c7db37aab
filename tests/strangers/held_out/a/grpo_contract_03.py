"""GRPO with a reference penalty (k3 estimator, Schulman 2020)."""
import torch


def grpo(data, logprobs_list, epsilon=0.2, beta=0.04):
    seq_loss = []
    m_kl, m_clip = [], []
    for datum, lp in zip(data, logprobs_list):
        f = datum.loss_fn_inputs
        w = f["weights"].to_torch().to(lp.dtype)
        keep = w != 0
        zeros = torch.zeros_like(lp)
        # everything outside of the completion is replaced before any exp
        lp_ = torch.where(keep, lp, zeros)
        old = torch.where(keep, f["old_logprobs"].to_torch(), zeros)
        ref = torch.where(keep, f["ref_logprobs"].to_torch(), zeros)
        adv = torch.where(keep, f["advantages"].to_torch(), zeros)

        ratio = (lp_ - old).clamp(-20, 20).exp()
        per_tok = -torch.min(ratio * adv, ratio.clamp(1 - epsilon, 1 + epsilon) * adv)

        t = (ref - lp_).clamp(-20, 20)
        k3 = t.exp() - t - 1
        per_tok = per_tok + beta * k3

        n = w.sum().clamp(min=1e-8)
        seq_loss.append((per_tok * w).sum() / n)
        low = (ratio < 1 - epsilon) & (adv < 0)
        high = (ratio > 1 + epsilon) & (adv > 0)
        m_clip.append(((low | high).float() * w).sum() / n)
        m_kl.append((k3.detach() * w).sum() / n)
    loss = torch.stack(seq_loss).mean()
    return loss, {
        "loss": loss.item(),
        "kl": torch.stack(m_kl).mean().item(),
        "clip_ratio": torch.stack(m_clip).mean().item(),
    }
