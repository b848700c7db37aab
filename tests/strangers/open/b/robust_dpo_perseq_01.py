import torch.nn.functional as F


def rdpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta=0.1, flip_rate=0.2):
    """Provably robust DPO (Chowdhury et al. 2024): de-biased for labels flipped with prob. flip_rate."""
    if not 0 <= flip_rate < 0.5:
        raise ValueError("flip_rate must be in [0, 0.5)")
    h = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    as_labelled = -F.logsigmoid(h)
    as_flipped = -F.logsigmoid(-h)
    losses = ((1 - flip_rate) * as_labelled + flip_rate * as_flipped) / (1 - 2 * flip_rate)
    info = {
        "loss/labelled": as_labelled.mean().item(),
        "loss/flipped": as_flipped.mean().item(),
        "acc": h.detach().gt(0).float().mean().item(),
    }
    return losses.mean(), info
