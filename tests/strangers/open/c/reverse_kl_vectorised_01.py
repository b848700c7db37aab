import torch


def reverse_kl_to_teacher(data, logprobs_list):
    """KL(student || teacher) on the student's own samples, minimised by gradient descent."""
    w = torch.cat([d.loss_fn_inputs["weights"].to_torch() for d in data])
    teacher = torch.cat([d.loss_fn_inputs["ref_logprobs"].to_torch() for d in data])
    student = torch.cat(list(logprobs_list))
    if not (w.shape == teacher.shape == student.shape):
        raise ValueError(f"shapes differ: {w.shape}, {teacher.shape}, {student.shape}")

    trained = w > 0
    student = torch.where(trained, student, 0.0)
    teacher = torch.where(trained, teacher, 0.0)
    kl = student - teacher
    n = w.sum().clamp(min=1e-8)
    loss = (w * kl).sum() / n
    return loss, {"reverse_kl": loss.item(), "student_nll": (-(w * student).sum() / n).item()}
