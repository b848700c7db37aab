import torch


def slic_hf(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1, delta=1.0):
    """Hinge on the scaled log-ratio margin (SLiC-HF as in RSO)."""
    margin = beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps))
    per_pair = torch.relu(delta - margin)
    metrics = {
        "margin": margin.mean().item(),
        "hinge_active": (margin < delta).float().mean().item(),
        "accuracy": (margin > 0).float().mean().item(),
    }
    return per_pair.mean(), metrics
