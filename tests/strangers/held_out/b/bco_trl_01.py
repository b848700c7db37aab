import torch
import torch.nn.functional as F


def bco_pair_loss(policy_chosen_logps, policy_rejected_logps,
                  reference_chosen_logps, reference_rejected_logps, beta=0.1):
    """Binary classifier optimisation on pairs, reward shift taken from this batch.

    Returns (losses, chosen_rewards, rejected_rewards, delta); losses is one per pair.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    with torch.no_grad():
        delta = torch.cat([chosen_rewards, rejected_rewards]).mean()
    losses = -F.logsigmoid(chosen_rewards - delta) - F.logsigmoid(-(rejected_rewards - delta))
    return losses, chosen_rewards.detach(), rejected_rewards.detach(), delta
