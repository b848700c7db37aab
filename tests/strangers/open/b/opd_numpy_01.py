import numpy as np
import torch


def on_policy_distill(data, logprobs_list, kl_coef=1.0):
    """Reverse-KL distillation on sampled tokens, as a policy gradient with a per-token advantage."""
    num, den, gap_sum = 0.0, 0.0, 0.0
    for d, lp in zip(data, logprobs_list, strict=True):
        f = d.loss_fn_inputs
        w = np.asarray(f["weights"].data, dtype=np.float32)
        on = w > 0
        teacher = np.where(on, np.asarray(f["ref_logprobs"].data, dtype=np.float32), 0.0)
        behav = np.where(on, np.asarray(f["old_logprobs"].data, dtype=np.float32), 0.0)
        student = np.where(on, lp.detach().cpu().numpy(), 0.0)

        gap = student - teacher
        adv = torch.from_numpy((-kl_coef * gap * w).astype(np.float32))
        lp = torch.where(torch.from_numpy(on), lp, torch.zeros_like(lp))
        ratio = torch.exp((lp - torch.from_numpy(behav.astype(np.float32))).clamp(-20, 20))
        num = num - (ratio * adv).sum()
        gap_sum += float((gap * w).sum())
        den += float(w.sum())
    den = den if den > 0 else 1.0
    return num / den, {"teacher_gap": gap_sum / den}
