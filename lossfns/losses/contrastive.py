"""The contrastive loss of embeddings, a function of the outputs of ``forward_backward_custom(output="embedding")``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossfns.checks import check_knobs
from lossfns.errors import LossInputError
from lossfns.loss import LossFn


def info_nce(temperature: float = 0.05) -> LossFn:
    """Make the loss −log(e^(s_ii/τ) / Σ_j e^(s_ij/τ)), where s_ij is the cosine of query i and document j.

    It is the mean over queries. van den Oord et al. 2018, arXiv:1807.03748, equation 4, with the documents of the batch
    as candidates, as in Karpukhin et al. 2020 (arXiv:2004.04906). Datum 2i is a query, datum 2i + 1 its document. Every
    other document of the call is a negative, so the loss couples the batch: a batch cannot be split.

    Args:
        temperature: τ, a finite number above 0.

    Returns:
        ``loss_fn(data, embeddings) -> (loss, metrics)`` for embeddings ``[D]``, which it normalises. Metrics:

            accuracy: share of queries whose own document is the nearest, in [0, 1].
            similarity: mean cosine of a query and its document, in [−1, 1].

    Raises:
        LossInputError: from the loss function, if there are not two embeddings of one length for each query, or if a
            number is not finite.

    >>> import torch
    >>> near, far = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> loss, metrics = info_nce(temperature=1.0)([], [near, near, far, far])
    >>> round(float(loss), 4), metrics["accuracy"]  # log(1 + e⁻¹)
    (0.3133, 1.0)
    """
    check_knobs({"temperature": temperature})

    def loss_fn(data: list[Any], embeddings: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        check_embeddings(embeddings)
        unit = F.normalize(torch.stack(list(embeddings)).float(), dim=1)
        cosines = unit[0::2] @ unit[1::2].T
        target = torch.arange(len(cosines), device=cosines.device)
        loss = F.cross_entropy(cosines / temperature, target)
        nearest, similarity = (cosines.argmax(1) == target).float().mean(), cosines.diagonal().mean()
        accuracy, mean, value = torch.stack([nearest, similarity.detach(), loss.detach()]).tolist()
        if not math.isfinite(value):
            raise LossInputError("embeddings", "finite numbers", f"a loss of {value:g}", "Look for a nan or an inf.")
        return loss, {"accuracy": accuracy, "similarity": mean}

    return loss_fn


def check_embeddings(embeddings: Sequence[Any]) -> None:
    """Refuse anything but an even number of embeddings of one length."""
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else () for x in embeddings]
    if len(shapes) < 2 or len(shapes) % 2 or len(shapes[0]) != 1 or len(set(shapes)) > 1:
        got = f"{len(shapes)} outputs of shapes {sorted(set(shapes))}"
        fix = 'Datum 2i is a query, 2i + 1 its document; call with output="embedding".'
        raise LossInputError("embeddings", "two embeddings [D] for each query", got, fix)
