import torch


def on_policy_distill(data, logprobs_list, kl_penalty_coef=1.0):
    """
    On-policy distillation: the per-token reverse KL to the teacher is the (negative)
    advantage; the policy gradient is importance weighted against the sampling policy.
    """
    pg_terms = []
    rkl_sum, w_sum = 0.0, 0.0
    for datum, lp in zip(data, logprobs_list):
        cols = datum.loss_fn_inputs
        w = cols["weights"].to_torch()
        on = w > 0
        zero = torch.zeros_like(lp)
        student_old = torch.where(on, cols["old_logprobs"].to_torch(), zero)
        teacher = torch.where(on, cols["ref_logprobs"].to_torch(), zero)
        reverse_kl = (student_old - teacher).detach()
        adv = -kl_penalty_coef * reverse_kl
        ratio = (torch.where(on, lp, zero) - student_old).clamp(-20, 20).exp()
        pg_terms.append(-(w * ratio * adv).sum())
        rkl_sum += (w * reverse_kl).sum().item()
        w_sum += w.sum().item()
    w_sum = max(w_sum, 1e-8)
    loss = torch.stack(pg_terms).sum() / w_sum
    return loss, {"loss": loss.item(), "teacher_kl": rkl_sum / w_sum}
