import torch


def build_dft(weights, min_prob=0.0):
    """Dynamic fine-tuning: each token's NLL times its own (frozen) probability."""
    weights = [torch.as_tensor(w, dtype=torch.float32) for w in weights]

    def dft(data, logprobs):
        num, den, plain = 0.0, 0.0, 0.0
        for lp, w in zip(logprobs, weights, strict=True):
            scale = lp.detach().exp().clamp(min=min_prob)
            num = num - (w * scale * lp).sum()
            plain -= (w * lp.detach()).sum().item()
            den += w.sum().item()
        den = den if den > 0 else 1.0
        loss = num / den
        return loss, {"dft_loss": loss.item(), "nll": plain / den}

    return dft
