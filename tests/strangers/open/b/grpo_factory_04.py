import torch


def make_grpo_loss(advantages, old_logprobs, weights, clip=0.2):
    """One advantage per datum. The batch is reduced to a (weighted) mean over tokens."""
    adv = [float(a) for a in advantages]
    old = [torch.as_tensor(o, dtype=torch.float32) for o in old_logprobs]
    weights = [torch.as_tensor(w, dtype=torch.float32) for w in weights]

    def grpo(data, logprobs_list):
        if not len(logprobs_list) == len(adv) == len(old) == len(weights):
            raise ValueError("batch size mismatch")
        terms, counts, clipped = [], [], []
        for a, o, w, lp in zip(adv, old, weights, logprobs_list):
            m = (w > 0).float()
            delta = torch.where(w > 0, lp - o, torch.zeros_like(lp)).clamp(-20, 20)
            ratio = delta.exp()
            unc, cl = ratio * a, ratio.clamp(1 - clip, 1 + clip) * a
            terms.append((-torch.min(unc, cl) * m).sum())
            clipped.append(((cl < unc) * m).sum())
            counts.append(m.sum())
        n = torch.stack(counts).sum()
        n = n if n > 0 else torch.ones_like(n)
        loss = torch.stack(terms).sum() / n
        return loss, {"clip_frac": (torch.stack(clipped).sum() / n).item(), "n_tokens": n.item()}

    return grpo
