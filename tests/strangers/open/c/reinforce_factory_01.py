import torch


def make_reinforce_loss(advantages, reduction="mean"):
    """REINFORCE on whole answers: -A_i * log pi(y_i | x_i), one advantage for each datum."""
    adv = torch.tensor([float(torch.as_tensor(a, dtype=torch.float32).mean()) for a in advantages])
    adv = adv.reshape(-1, 1)

    def loss_fn(data, logprobs_list):
        if not len(data) == len(logprobs_list) == len(adv):
            raise ValueError(f"{len(data)} data, {len(logprobs_list)} logprobs, {len(adv)} advantages")
        seq_logprob = []
        for d, lp in zip(data, logprobs_list):
            w = d.loss_fn_inputs["weights"].to_torch()
            if w.shape != lp.shape:
                raise ValueError("weights do not fit the logprobs")
            seq_logprob.append((w * torch.where(w > 0, lp, 0.0)).sum())
        seq_logprob = torch.stack(seq_logprob)
        losses = -adv * seq_logprob
        loss = losses.mean() if reduction == "mean" else losses.sum()
        return loss, {"loss": loss.item(), "seq_logprob": seq_logprob.detach().mean().item()}

    return loss_fn
