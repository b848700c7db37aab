import torch
import torch.nn.functional as F


def seq_logps(x, mask):
    return (torch.where(mask > 0, x, torch.zeros_like(x)) * mask).sum(-1)


def dpo_loss(logprobs, ref_logprobs, mask, beta=0.1):
    """[2B, T] in, pairs interleaved (row 2i chosen, row 2i + 1 rejected)."""
    pi = seq_logps(logprobs, mask)
    with torch.no_grad():
        ref = seq_logps(ref_logprobs, mask)
        ref_chosen, ref_rejected = ref.chunk(2)
    pi_chosen, pi_rejected = pi[0::2], pi[1::2]

    chosen_reward = beta * (pi_chosen - ref_chosen)
    rejected_reward = beta * (pi_rejected - ref_rejected)
    margin = chosen_reward - rejected_reward
    loss = -F.logsigmoid(margin).mean()
    return loss, {
        "reward_chosen": chosen_reward.mean().item(),
        "reward_rejected": rejected_reward.mean().item(),
        "accuracy": (margin > 0).float().mean().item(),
    }
