import torch


def grpo_sequence_mean(data, logprobs_list, eps_low=0.2, eps_high=0.2, kl_coef=0.01):
    losses = []
    kl_total, seq = 0.0, 0
    for d, lp in zip(data, logprobs_list):
        c = d.loss_fn_inputs
        mask = c["weights"].to_torch().float()
        active = mask > 0
        old, ref = c["old_logprobs"].to_torch(), c["ref_logprobs"].to_torch()
        adv = torch.where(active, c["advantages"].to_torch(), 0.0)

        log_ratio = torch.where(active, lp - old, 0.0).clamp(-20, 20)
        ratio = log_ratio.exp()
        surrogate = torch.min(ratio * adv, ratio.clamp(1 - eps_low, 1 + eps_high) * adv)

        ref_gap = torch.where(active, ref - lp, 0.0).clamp(-15, 15)
        kl = torch.expm1(ref_gap) - ref_gap

        n = mask.sum()
        losses.append((-(surrogate - kl_coef * kl) * mask).sum() / n)
        kl_total += ((kl.detach() * mask).sum() / n).item()
        seq += 1

    loss = sum(losses) / seq
    return loss, {"loss": loss.item(), "kl_ref": kl_total / seq, "num_seq": float(seq)}
