"""Log-probabilities of chosen tokens, entropy and Σp² from logits ``[..., V]``, without a float32 copy of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lossfns.checks import check_number
from lossfns.errors import LossInputError
from lossfns.logprobs.head import compute_dtype
from lossfns.logprobs.plans import apply, no_double_backward
from lossfns.logprobs.tiles import TILE_TOKENS, TILE_VOCAB, blocks, row_blocks


def target_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    return_sum_square_probs: bool = False,
) -> Any:
    """Return log softmax(logits / temperature) at the targets: float32, or float64 for logits in float64.

    The softmax is taken in blocks of rows. The only new tensor as large as the logits is their gradient, in their
    dtype. Autograd makes another one for the gradient of a slice such as ``logits[:, :-1]``: to avoid it, pass all
    logits, and give weight 0 to the last token. There is no second derivative.

    Args:
        logits: ``[..., V]``, floating point.
        targets: ``[...]``, ids in [0, V).
        temperature: a finite number above 0.
        return_entropy: also return the entropy −Σ p·log p of each row, ``[...]``, in nats, at least 0.
        return_sum_square_probs: also return Σ p² over the vocabulary for each row, ``[...]``, in (0, 1].

    Returns:
        Logprobs ``[...]``. With ``return_entropy`` or ``return_sum_square_probs`` a tuple: the logprobs, and the ones
        asked for, in this order. All carry gradients. p is the softmax of logits / temperature.

    Raises:
        LossInputError: if shapes, dtypes, devices or the temperature do not fit, or, on the CPU, if an id is outside of
            [0, V). A GPU checks the ids itself, in ``gather``.
        RuntimeError: in the backward pass, under ``create_graph``.

    >>> target_logprobs(torch.tensor([[[0.0, 0.0], [2.0, 0.0]]]), torch.tensor([[1, 0]]))
    tensor([[-0.6931, -0.1269]])
    >>> target_logprobs(torch.zeros(1, 4), torch.tensor([0]), return_entropy=True)  # log 4
    (tensor([-1.3863]), tensor([1.3863]))
    """
    check_arguments(logits, targets)
    check_number("temperature", temperature, "a finite number above 0", lambda x: x > 0, "Use 1 for the model itself.")
    shape = targets.shape
    if logits.is_contiguous():  # a block may then span several sequences
        logits, targets = logits.view(-1, logits.shape[-1]), targets.reshape(-1)
    results = apply(TargetLogprobs, logits, targets, float(temperature), return_entropy, return_sum_square_probs)
    logprobs, *others = (x.view(shape) for x in results if x is not None)
    return (logprobs, *others) if others else logprobs


def check_arguments(logits: Any, targets: Any) -> None:
    """Refuse logits that are no floating point tensor, and targets that are not one id for each row of them."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim < 1 or not logits.shape[-1]:
        got = f"{logits.dtype} of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise LossInputError("logits", "a floating point tensor [..., V]", got, "Pass the model's logits.")
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
        got = str(targets.dtype) if isinstance(targets, Tensor) else f"a {type(targets).__name__}"
        raise LossInputError("targets", "a tensor of token ids", got, "Pass integers.")
    if targets.shape != logits.shape[:-1]:
        expected, got = f"shape {tuple(logits.shape[:-1])}, that of logits[..., 0]", f"shape {tuple(targets.shape)}"
        fix = "Logits at position j are of token j + 1: use logits[:, :-1] with targets_from_labels(labels)."
        raise LossInputError("targets", expected, got, fix)
    if targets.device != logits.device:
        got = f"{targets.device}, while the logits are on {logits.device}"
        raise LossInputError("targets", "the device of the logits", got, "Move them with .to().")
    if targets.device.type == "cpu" and targets.numel() and not torch.compiler.is_compiling():
        low, high = map(int, targets.long().aminmax())  # a GPU checks them itself, in gather
        if low < 0 or high >= logits.shape[-1]:
            fix = "Labels of -100 are no ids: use targets_from_labels and weights_from_labels."
            raise LossInputError("targets", f"ids from 0 to {logits.shape[-1] - 1}", f"{low} to {high}", fix)


class TargetLogprobs(torch.autograd.Function):
    """Keep the logits and a few numbers for each row; compute the softmax again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, entropy: bool, squares: bool
    ) -> tuple[Tensor | None, ...]:
        target_logits = logits.gather(-1, targets.long()[..., None]).squeeze(-1)
        lse = torch.empty_like(target_logits, dtype=compute_dtype(logits))
        mean, square_sum = (torch.empty_like(lse) if asked else None for asked in (entropy, squares))
        for rows in block_indices(logits):
            z = logits[rows].to(lse.dtype) / temperature
            lse[rows] = z.logsumexp(-1)
            if mean is not None or square_sum is not None:
                p = (z - lse[rows][..., None]).exp_()
            if mean is not None:
                mean[rows] = torch.linalg.vecdot(p, z)
            if square_sum is not None:
                square_sum[rows] = torch.linalg.vecdot(p, p)
        ctx.save_for_backward(logits, targets, lse, mean, square_sum)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        row_entropy = None if mean is None else (lse - mean).clamp_(min=0)
        return target_logits.to(lse.dtype) / temperature - lse, row_entropy, square_sum

    @staticmethod
    @no_double_backward
    def backward(
        ctx: Any, g: Tensor | None, d_entropy: Tensor | None, d_squares: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """∂loss/∂z = g·[v = target] − p·(g + e·(z − Σ p·z) − 2f·(p − Σp²)), as in ``lossfns.logprobs.tiles``."""
        logits, targets, lse, mean, square_sum = ctx.saved_tensors
        d_logits = torch.empty_like(logits)
        g = torch.zeros_like(lse) if g is None else g
        for rows in block_indices(logits):
            scale = (g[rows] / ctx.temperature)[..., None]
            p = (logits[rows].to(lse.dtype) / ctx.temperature).sub_(lse[rows][..., None]).exp_()
            mass, inert = scale, scale == 0
            if d_entropy is not None:
                e = (d_entropy[rows] / ctx.temperature)[..., None]
                z = logits[rows].to(lse.dtype) / ctx.temperature
                mass, inert = mass + e * (z - mean[rows][..., None]), inert & (e == 0)
            if d_squares is not None:
                f = (d_squares[rows] / ctx.temperature)[..., None]
                mass, inert = mass - 2 * f * (p - square_sum[rows][..., None]), inert & (f == 0)
            d = p.mul_(-mass).scatter_add_(-1, targets[rows].long()[..., None], scale)
            d_logits[rows] = d.masked_fill_(inert, 0)  # where no gradient arrives, even if logits are inf or nan
        return d_logits, None, None, None, None


def block_indices(logits: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield indices of the leading dimensions. Each selects ``[n, V]``, whose softmax fits into a small buffer."""
    if logits.ndim == 1:
        yield ()
        return
    for outer in product(*map(range, logits.shape[:-2])):
        for rows in small_blocks(logits[outer]):
            yield (*outer, rows)


def small_blocks(x: Tensor) -> Iterator[slice]:
    """Split the rows of logits [n, V] into blocks: as ``row_blocks`` on a CPU, as large as a tile on a GPU."""
    return row_blocks(x) if x.device.type == "cpu" else blocks(len(x), max(1, TILE_TOKENS * TILE_VOCAB // x.shape[1]))
