from typing import Dict, List, Tuple

import torch
from torch import Tensor


def gspo_sequence_loss(data, logprobs_list: List[Tensor]) -> Tuple[Tensor, Dict[str, float]]:
    """GSPO (Zheng et al., 2025). s_i = (pi / pi_old) ** (1 / |y_i|)."""
    EPS_LOW, EPS_HIGH = 3e-4, 4e-4
    assert len(data) == len(logprobs_list)
    pick = lambda k: torch.nn.utils.rnn.pad_sequence(
        [d.loss_fn_inputs[k].to_torch().float() for d in data], batch_first=True)
    lp = torch.nn.utils.rnn.pad_sequence(list(logprobs_list), batch_first=True)
    lens = torch.tensor([x.shape[0] for x in logprobs_list], dtype=torch.float32)
    w, old, adv = pick("weights"), pick("old_logprobs"), pick("advantages")
    on = w > 0
    delta = torch.where(on, lp, 0.0) - torch.where(on, old, 0.0)

    n_tok = w.sum(dim=1)
    has = n_tok > 0
    safe = n_tok.masked_fill(~has, 1.0)
    log_s = (w * delta).sum(dim=1) / lens
    s = log_s.clamp(-20, 20).exp()
    A = (w * torch.where(on, adv, 0.0)).sum(dim=1) / safe

    obj = torch.min(s * A, torch.clamp(s, 1 - EPS_LOW, 1 + EPS_HIGH) * A)
    obj = obj.masked_fill(~has, 0.0)
    loss = -obj.sum() / has.sum().clamp(min=1)
    out = s.detach()[has]
    return loss, {
        "gspo/ratio_max": out.max().item() if out.numel() else 1.0,
        "gspo/ratio_min": out.min().item() if out.numel() else 1.0,
        "gspo/loss": loss.item(),
    }
