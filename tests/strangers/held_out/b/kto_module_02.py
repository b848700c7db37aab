import torch
import torch.nn as nn


class KTOLoss(nn.Module):
    def __init__(self, beta=0.1, lambda_d=1.0, lambda_u=1.0):
        super().__init__()
        self.beta = beta
        self.lambda_d = lambda_d
        self.lambda_u = lambda_u

    def forward(self, logprobs, ref_logprobs, labels, mask):
        """logprobs, ref_logprobs, mask: [B, T]; labels: [B], 1 for desirable."""
        on = mask > 0
        diff = torch.where(on, logprobs, 0.0) - torch.where(on, ref_logprobs, 0.0)
        log_ratio = (diff * mask).sum(-1)
        valid = on.any(-1).to(log_ratio.dtype)
        n = valid.sum().clamp(min=1.0)

        # reference point, estimated on the batch
        kl = ((log_ratio * valid).sum() / n).clamp(min=0.0)

        desirable = labels.to(log_ratio.dtype)
        sign = 2.0 * desirable - 1.0
        lam = self.lambda_d * desirable + self.lambda_u * (1.0 - desirable)
        value = torch.sigmoid(sign * self.beta * (log_ratio - kl))
        loss = (lam * (1.0 - value) * valid).sum() / n
        return loss, {"kl": kl.item(), "value": ((value * valid).sum() / n).item()}
