import torch


def kl_penalty(log_prob, ref_log_prob, kind):
    if kind in ("mse", "k2"):
        return 0.5 * (log_prob - ref_log_prob).square()
    if kind in ("low_var_kl", "k3"):
        kl = torch.clamp(log_prob - ref_log_prob, min=-20, max=20)
        ratio = torch.exp(kl)
        return torch.clamp(ratio - kl - 1, min=-10, max=10)
    raise NotImplementedError(kind)


def actor_loss(old_log_prob, log_prob, advantages, response_mask, ref_log_prob,
               clip_ratio=0.2, kl_loss_coef=0.02, kl_loss_type="low_var_kl"):
    """PPO actor loss plus kl_loss_coef * KL(pi || ref) estimated on the sampled tokens."""
    m = response_mask
    valid = m > 0
    fill = lambda t: torch.where(valid, t, torch.zeros_like(t))  # noqa: E731
    old, new, ref, adv = map(fill, (old_log_prob, log_prob, ref_log_prob, advantages))
    mean = lambda t: (t * m).sum() / m.sum().clamp(min=1e-8)  # noqa: E731

    neg_kl = (new - old).clamp(-20, 20)
    ratio = neg_kl.exp()
    l1 = -adv * ratio
    l2 = -adv * ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    pg_loss = mean(torch.maximum(l1, l2))
    kl_loss = mean(kl_penalty(new, ref, kl_loss_type))
    total = pg_loss + kl_loss_coef * kl_loss
    return total, {
        "actor/pg_loss": pg_loss.item(),
        "actor/kl_loss": kl_loss.item(),
        "actor/ppo_kl": mean(-neg_kl.detach()).item(),
        "actor/pg_clipfrac": mean((l2 > l1).float()).item(),
    }
