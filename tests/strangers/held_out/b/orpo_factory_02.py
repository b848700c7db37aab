import math
import torch
import torch.nn.functional as F


def _log1mexp(x):
    # log(1 - e^x), x < 0
    x = x.clamp(max=-1e-6)
    return torch.where(x > -math.log(2.0), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def make_orpo_loss(weights, lam=0.1):
    ws = [torch.as_tensor(w, dtype=torch.float32) for w in weights]

    def mean_logp(lp, w):
        return (torch.where(w > 0, lp, torch.zeros_like(lp)) * w).sum() / (w.sum() if w.sum() > 0 else 1.0)

    def loss_fn(data, logprobs_list):
        assert len(logprobs_list) == len(ws) and len(ws) % 2 == 0
        avgs = [mean_logp(lp, w) for lp, w in zip(logprobs_list, ws)]
        nlls, ors, wins = [], [], 0
        for i in range(0, len(avgs), 2):
            if ws[i].sum() == 0 or ws[i + 1].sum() == 0:
                continue  # a side was truncated away
            c, r = avgs[i], avgs[i + 1]
            log_odds = (c - r) - (_log1mexp(c) - _log1mexp(r))
            ors.append(-F.logsigmoid(log_odds))
            nlls.append(-c)
            wins += int(log_odds.item() > 0)
        if not ors:
            return sum(avgs) * 0.0, {"nll": 0.0, "or_loss": 0.0, "acc": 0.0}
        nll, or_loss = torch.stack(nlls).mean(), torch.stack(ors).mean()
        return nll + lam * or_loss, {"nll": nll.item(), "or_loss": or_loss.item(), "acc": wins / len(ors)}

    return loss_fn
