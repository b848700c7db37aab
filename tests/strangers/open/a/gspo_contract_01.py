import torch


def gspo_loss(data, logprobs_list, eps_low=3e-2, eps_high=4e-2):
    """
    Group Sequence Policy Optimization.
    s_i = exp( 1/|y_i| * sum_t (log pi - log pi_old) ); clip on s_i; mean over sequences.
    """
    objective, clip_hits, s_vals = [], [], []
    for datum, lp in zip(data, logprobs_list):
        inp = datum.loss_fn_inputs
        w = inp["weights"].to_torch()
        resp = w > 0
        n = w.sum().clamp(min=1e-8)
        gap = torch.where(resp, lp - inp["old_logprobs"].to_torch(), torch.zeros_like(lp))
        log_s = ((gap * w).sum() / n).clamp(-10.0, 10.0)
        s = torch.exp(log_s)
        # one advantage for a sequence; constant over its tokens
        adv_tok = torch.where(resp, inp["advantages"].to_torch(), torch.zeros_like(lp))
        a = (adv_tok * w).sum() / n
        s_clip = torch.clamp(s, 1 - eps_low, 1 + eps_high)
        objective.append(torch.minimum(s * a, s_clip * a))
        clip_hits.append(float((s_clip * a < s * a).item()))
        s_vals.append(s.item())
    loss = -torch.stack(objective).mean()
    k = len(s_vals)
    return loss, {"loss": loss.item(), "seq_clip_frac": sum(clip_hits) / k, "seq_ratio": sum(s_vals) / k}
