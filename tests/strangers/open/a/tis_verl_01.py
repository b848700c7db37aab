from typing import Optional

import torch
from torch import Tensor


def policy_loss_with_tis(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    rollout_log_probs: Optional[Tensor] = None,
    clip_ratio: float = 0.2,
    tis_imp_ratio_cap: float = 2.0,
):
    """PPO clip corrected for the mismatch of trainer and inference engine (truncated IS)."""
    live = response_mask > 0
    n_tok = response_mask.sum().clamp(min=1e-8)

    def token_mean(x: Tensor) -> Tensor:
        return (torch.where(live, x, 0.0) * response_mask).sum() / n_tok

    log_ratio = torch.where(live, log_prob - old_log_prob.detach(), 0.0).clamp(-20, 20)
    adv = torch.where(live, advantages, 0.0)
    ratio = log_ratio.exp()
    surr, surr_clip = -adv * ratio, -adv * ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    pg_losses = torch.maximum(surr, surr_clip)

    tis_mean = torch.ones(())
    if rollout_log_probs is not None:
        gap = torch.where(live, old_log_prob - rollout_log_probs, 0.0).clamp(-20, 20)
        tis = gap.exp().clamp(max=tis_imp_ratio_cap).detach()
        pg_losses = pg_losses * tis
        tis_mean = token_mean(tis)

    return token_mean(pg_losses), {
        "actor/pg_clipfrac": token_mean((surr_clip > surr).float()).item(),
        "actor/ppo_kl": token_mean(-log_ratio.detach()).item(),
        "actor/tis_mean": tis_mean.item(),
    }
