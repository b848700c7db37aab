import torch


def sequence_level_loss(per_token_logps, old_per_token_logps, advantages, completion_mask,
                        epsilon=3e-2, epsilon_high=4e-2):
    """importance_sampling_level == 'sequence': one length-normalised ratio for each completion."""
    mask = completion_mask.float()
    log_ratio = torch.where(mask > 0, per_token_logps - old_per_token_logps, 0.0)
    lengths = mask.sum(-1).clamp(min=1e-8)
    log_importance_weights = ((log_ratio * mask).sum(-1) / lengths).clamp(-10, 10)

    coef_1 = torch.exp(log_importance_weights)
    coef_2 = torch.clamp(coef_1, 1 - epsilon, 1 + epsilon_high)
    adv = advantages.unsqueeze(1)
    per_seq_loss = -torch.min(coef_1 * adv, coef_2 * adv)
    loss = per_seq_loss.mean()
    return loss, {"loss": loss.item(), "importance_ratio": coef_1.mean().item()}
