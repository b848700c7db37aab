import numpy as np
import torch


def on_policy_distillation_loss(data, logprobs_list, kl_penalty_coef=1.0):
    """
    On-policy distillation: the student samples, the teacher scores the same tokens, and the negative
    reverse KL of each token is its advantage. Importance-sampled policy gradient, token mean.
    """
    loss_sum = torch.zeros(())
    n_tokens = 0.0
    kl_sum = 0.0
    for datum, lp in zip(data, logprobs_list, strict=True):
        inputs = datum.loss_fn_inputs
        w = np.array(inputs["weights"].data, dtype=np.float32)
        student = np.array(inputs["old_logprobs"].data, dtype=np.float32)
        teacher = np.array(inputs["ref_logprobs"].data, dtype=np.float32)
        if not w.shape == student.shape == teacher.shape == tuple(lp.shape):
            raise ValueError("columns and logprobs must have one length")
        action = w > 0
        student = np.where(action, student, 0.0).astype(np.float32)
        reverse_kl = student - np.where(action, teacher, 0.0).astype(np.float32)
        advantage = -kl_penalty_coef * reverse_kl

        lp = torch.where(torch.from_numpy(action), lp, 0.0)
        ratio = torch.exp(torch.clamp(lp - torch.from_numpy(student), -20.0, 20.0))
        loss_sum = loss_sum - (torch.from_numpy(advantage * w) * ratio).sum()
        kl_sum += float((reverse_kl * w).sum())
        n_tokens += float(w.sum())

    denom = max(n_tokens, 1e-8)
    loss = loss_sum / denom
    return loss, {"loss": loss.item(), "teacher_kl": kl_sum / denom, "n_tokens": n_tokens}
