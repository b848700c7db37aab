import torch
import torch.nn.functional as F


def orpo_loss_factory(weights, lambda_or=0.1):
    """SFT on the preferred answers + lambda * odds-ratio term. `weights`: one vector per datum."""
    W = [torch.as_tensor(w, dtype=torch.float32) for w in weights]

    def avg_logp(lp, w):
        n = w.sum()
        if n == 0:
            return torch.where(w > 0, lp, 0.0).sum()
        return (torch.where(w > 0, lp, 0.0) * w).sum() / n

    def log_odds(a):
        a = a.clamp(max=-1e-6)
        return a - torch.log(-torch.expm1(a))

    def loss_fn(data, logprobs_list):
        avg = torch.stack([avg_logp(lp, w) for lp, w in zip(logprobs_list, W, strict=True)])
        nonempty = torch.stack([w.sum() > 0 for w in W])
        usable = (nonempty[0::2] & nonempty[1::2]).float()
        n_pairs = usable.sum().clamp(min=1.0)

        ratio = log_odds(avg[0::2]) - log_odds(avg[1::2])
        or_term = (-F.logsigmoid(ratio) * usable).sum() / n_pairs
        nll = -(avg * usable.repeat_interleave(2)).sum() / (2 * n_pairs)
        loss = nll + lambda_or * or_term
        return loss, {
            "nll_loss": nll.item(),
            "log_odds_ratio": ((ratio * usable).sum() / n_pairs).item(),
            "or_loss": or_term.item(),
        }

    return loss_fn
