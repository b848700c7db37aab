import torch


def build_importance_loss(advantages, old_logprobs, weights, eps=0.2):
    old_t = [torch.as_tensor(o, dtype=torch.float32) for o in old_logprobs]
    w_t = [torch.as_tensor(w, dtype=torch.float32) for w in weights]
    adv_t = [float(a) for a in advantages]

    def loss_fn(data, logprobs_list):
        num, den = [], 0.0
        for i, lp in enumerate(logprobs_list):
            n = min(len(lp), len(old_t[i]), len(w_t[i]))
            lp_i, old, w = lp[:n], old_t[i][:n], w_t[i][:n]
            delta = torch.where(w > 0, lp_i - old, torch.zeros_like(lp_i))
            ratio = torch.exp(delta.clamp(-20, 20))
            adv = adv_t[i]
            surrogate = torch.min(ratio * adv, ratio.clamp(1 - eps, 1 + eps) * adv)
            num.append((surrogate * w).sum())
            den += w.sum().item()
        loss = -torch.stack(num).sum() / max(den, 1e-8)
        return loss, {"objective": -loss.item(), "tokens": den}

    return loss_fn
