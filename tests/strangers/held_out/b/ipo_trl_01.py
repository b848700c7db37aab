import torch


def ipo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
             beta: float = 0.1):
    """IPO: squared distance of the log-ratio margin to 1/(2 beta). Logps are averages over tokens."""
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    logits = chosen_rewards - rejected_rewards

    losses = (logits - 1 / (2 * beta)) ** 2
    return losses.mean(), {
        "rewards/chosen": chosen_rewards.detach().mean().item(),
        "rewards/rejected": rejected_rewards.detach().mean().item(),
        "rewards/margins": logits.detach().mean().item(),
        "rewards/accuracies": (logits > 0).float().mean().item(),
    }
