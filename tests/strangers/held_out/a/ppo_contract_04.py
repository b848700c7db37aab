from typing import Any

import torch
from torch import Tensor

CLIP_LOW = 0.2
CLIP_HIGH = 0.2


def _col(datum: Any, name: str, like: Tensor) -> Tensor:
    t = datum.loss_fn_inputs[name].to_torch().to(device=like.device, dtype=like.dtype)
    if t.shape != like.shape:
        raise ValueError(f"{name}: {tuple(t.shape)} != {tuple(like.shape)}")
    return t


def clipped_ppo(data: list[Any], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """PPO clipped objective, weighted mean over all trained tokens of the batch."""
    if len(data) != len(logprobs_list):
        raise ValueError("one logprob tensor per datum is expected")
    num = den = torch.zeros(())
    clipped_tokens = kl_sum = 0.0
    for datum, lp in zip(data, logprobs_list):
        w = _col(datum, "weights", lp)
        on = w > 0
        log_ratio = torch.where(on, lp - _col(datum, "old_logprobs", lp), 0.0).clamp(-20, 20)
        adv = torch.where(on, _col(datum, "advantages", lp), 0.0)
        ratio = log_ratio.exp()
        plain = ratio * adv
        bounded = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * adv
        num = num - (w * torch.minimum(plain, bounded)).sum()
        den = den + w.sum()
        with torch.no_grad():
            clipped_tokens += (w * (bounded < plain)).sum().item()
            kl_sum -= (w * log_ratio).sum().item()
    den = den.clamp(min=1e-8)
    loss = num / den
    return loss, {"loss": loss.item(), "clip_frac": clipped_tokens / den.item(), "kl_k1": kl_sum / den.item()}
