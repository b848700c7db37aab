import torch
import torch.nn.functional as F


def slic_loss(chosen_logps, rejected_logps, target_logps=None, margin=1.0, reg=0.1):
    """Rank calibration max(0, margin - logp(y+) + logp(y-)), plus likelihood of the SFT targets.

    All arguments: [B] sequence logps. Without target_logps the chosen answers are the targets.
    """
    if target_logps is None:
        target_logps = chosen_logps
    gap = chosen_logps - rejected_logps
    calibration = F.relu(margin - gap.mean())
    regulariser = -target_logps.mean()
    loss = calibration + reg * regulariser
    return loss, {
        "slic/calibration": calibration.item(),
        "slic/regulariser": regulariser.item(),
        "slic/accuracy": (gap > 0).float().mean().item(),
    }
