import torch


def kto_loss(policy_chosen_logps, policy_rejected_logps, policy_KL_logps,
             reference_chosen_logps, reference_rejected_logps, reference_KL_logps,
             beta=0.1, desirable_weight=1.0, undesirable_weight=1.5):
    """chosen / rejected may have different sizes (unpaired); KL logps come from mismatched completions."""
    kl = (policy_KL_logps - reference_KL_logps).mean().detach().clamp(min=0)

    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps

    chosen_losses = 1 - torch.sigmoid(beta * (chosen_logratios - kl))
    rejected_losses = 1 - torch.sigmoid(beta * (kl - rejected_logratios))

    losses = torch.cat((undesirable_weight * chosen_losses, desirable_weight * rejected_losses), 0)
    metrics = {"kl": kl.item()}
    if chosen_logratios.numel():
        metrics["rewards/chosen"] = beta * chosen_logratios.detach().mean().item()
    if rejected_logratios.numel():
        metrics["rewards/rejected"] = beta * rejected_logratios.detach().mean().item()
    return losses.mean(), metrics
