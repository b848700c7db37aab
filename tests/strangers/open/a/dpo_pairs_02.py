import torch
import torch.nn.functional as F


def preference_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
):
    """DPO (cDPO if label_smoothing > 0)."""
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    h = beta * (chosen - rejected)
    losses = (1 - label_smoothing) * F.softplus(-h) + label_smoothing * F.softplus(h)
    with torch.no_grad():
        metrics = {
            "rewards/chosen": (beta * chosen).mean().item(),
            "rewards/rejected": (beta * rejected).mean().item(),
            "rewards/margins": h.mean().item(),
            "rewards/accuracies": (h > 0).float().mean().item(),
        }
    return losses.mean(), metrics
