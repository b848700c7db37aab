import numpy as np
import torch


def _normalise_runs(w):
    """Scale each run of trained tokens (one packed example) to a total weight of 1."""
    out = np.zeros_like(w)
    on = w > 0
    edges = np.flatnonzero(np.diff(np.r_[0, on.astype(np.int8), 0]))
    for a, b in zip(edges[::2], edges[1::2]):
        out[a:b] = w[a:b] / w[a:b].sum()
    return out, len(edges) // 2


def packed_example_mean_nll(data, logprobs_list):
    """SFT on packed rows in which every packed example counts the same, short or long."""
    loss, examples = 0.0, 0
    for d, logprobs in zip(data, logprobs_list, strict=True):
        w = np.asarray(d.loss_fn_inputs["weights"].data, dtype=np.float32)
        if len(w) != logprobs.shape[0]:
            raise ValueError("weights and logprobs differ in length")
        w = np.append(w[1:], np.float32(0.0))
        scaled, n = _normalise_runs(w)
        scaled = torch.from_numpy(scaled)
        loss = loss - (scaled * torch.where(scaled > 0, logprobs, 0.0)).sum()
        examples += n
    loss = loss / max(examples, 1)
    return loss, {"nll_per_example": loss.item(), "examples": float(examples)}
