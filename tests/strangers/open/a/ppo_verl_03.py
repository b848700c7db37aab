import torch


def vanilla_policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    cliprange: float = 0.2,
    loss_agg_mode: str = "token-mean",
):
    """Returns pg_loss, pg_clipfrac and ppo_kl, the k1 estimate of KL(old || new)."""
    mask = response_mask.to(log_prob.dtype)
    valid = mask > 0
    n = mask.sum().clamp(min=1e-8)
    delta = torch.where(valid, log_prob - old_log_prob, 0.0).clamp(-20, 20)
    adv = torch.where(valid, advantages, 0.0)
    ratio = delta.exp()

    pg1 = -adv * ratio
    pg2 = -adv * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    pg = torch.maximum(pg1, pg2)

    if loss_agg_mode == "token-mean":
        pg_loss = (pg * mask).sum() / n
    elif loss_agg_mode == "seq-mean-token-sum":
        pg_loss = (pg * mask).sum(-1).mean()
    else:
        raise NotImplementedError(loss_agg_mode)

    pg_clipfrac = ((pg2 > pg1).to(mask.dtype) * mask).sum() / n
    ppo_kl = (delta.detach() * mask).sum() / n
    return pg_loss, pg_clipfrac.item(), ppo_kl.item()
