import torch


def ipo_loss(data, logprobs_list, tau=0.1):
    """
    IPO (Azar et al., 2023) with token-averaged log-ratios: (h - 1 / (2 tau)) ** 2.
    Datum 2i is the chosen answer, 2i + 1 the rejected one. A pair with an untrained side is left out.
    """
    if len(data) != len(logprobs_list) or len(data) % 2:
        raise ValueError("expected an even number of data and as many logprobs")

    def mean_log_ratio(i):
        cols, lp = data[i].loss_fn_inputs, logprobs_list[i]
        w, ref = cols["weights"].to_torch(), cols["ref_logprobs"].to_torch()
        if not w.shape == ref.shape == lp.shape:
            raise ValueError(f"datum {i}: row lengths differ")
        on = w > 0
        diff = torch.where(on, lp, 0.0) - torch.where(on, ref, 0.0)
        return (w * diff).sum() / w.sum().clamp(min=1e-8), bool(on.any())

    losses, gaps = [], []
    for i in range(0, len(data), 2):
        chosen, ok_c = mean_log_ratio(i)
        rejected, ok_r = mean_log_ratio(i + 1)
        if not (ok_c and ok_r):
            continue
        h = chosen - rejected
        gaps.append(h.item())
        losses.append((h - 1.0 / (2.0 * tau)) ** 2)
    if losses:
        loss = torch.stack(losses).mean()
    else:
        loss = sum((lp.nan_to_num() * 0.0).sum() for lp in logprobs_list)
    n = max(len(gaps), 1)
    return loss, {"loss": loss.item(), "margin": sum(gaps) / n, "accuracy": sum(g > 0 for g in gaps) / n}
