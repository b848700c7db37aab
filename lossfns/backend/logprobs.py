"""Log-probabilities of chosen tokens, from hidden states and the unembedding weight."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T) at ``targets``: [N, D], [V, D], [N] or [N, K] -> targets' shape."""
    logits = hidden.to(weight.dtype) @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(1, targets.reshape(len(targets), -1))
    return (chosen - logits.logsumexp(1, keepdim=True)).view_as(targets)
