import torch.nn.functional as F


def cdpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
              beta: float = 0.1, label_smoothing: float = 0.1):
    """cDPO. label_smoothing is the probability that a preference label is flipped (0 <= eps < 0.5)."""
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError("label_smoothing must be in [0, 0.5)")
    pi_logratios = policy_chosen_logps - policy_rejected_logps
    ref_logratios = (reference_chosen_logps - reference_rejected_logps).detach()
    logits = pi_logratios - ref_logratios
    losses = (
        -F.logsigmoid(beta * logits) * (1 - label_smoothing)
        - F.logsigmoid(-logits) * label_smoothing
    )
    chosen_rewards = (beta * (policy_chosen_logps - reference_chosen_logps)).detach()
    rejected_rewards = (beta * (policy_rejected_logps - reference_rejected_logps)).detach()
    return losses.mean(), {
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float().mean().item(),
        "rewards/margins": (chosen_rewards - rejected_rewards).mean().item(),
    }
