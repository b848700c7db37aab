"""Log-probabilities of chosen tokens from logits ``[..., V]``, without a float32 copy of the logits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lossfns.checks import check_number
from lossfns.errors import LossInputError
from lossfns.logprobs.linear import apply, no_double_backward
from lossfns.logprobs.tiles import TILE_TOKENS, TILE_VOCAB, blocks, compute_dtype, row_blocks


def target_logprobs(logits: Tensor, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return log softmax(logits / temperature) at the targets: float32, or float64 for logits in float64.

    The softmax is taken in blocks of rows. The only tensor of the size of the logits that is made is their gradient, in
    their dtype. Autograd makes one more for the gradient of a slice such as ``logits[:, :-1]``: to save it, pass all
    logits, and give weight 0 to the last token. There is no second derivative.

    Args:
        logits: ``[..., V]``, floating point.
        targets: ``[...]``, ids in [0, V).
        temperature: a finite number above 0.

    Raises:
        LossInputError: if shapes, dtypes, devices or the temperature do not fit, or, on the CPU, if an id is outside of
            [0, V). A GPU checks the ids itself, in ``gather``.
        RuntimeError: in the backward pass, under ``create_graph``.

    >>> target_logprobs(torch.tensor([[[0.0, 0.0], [2.0, 0.0]]]), torch.tensor([[1, 0]]))
    tensor([[-0.6931, -0.1269]])
    """
    check_arguments(logits, targets)
    check_number("temperature", temperature, "a finite number above 0", lambda x: x > 0, "Use 1 for the model itself.")
    shape = targets.shape
    if logits.is_contiguous():  # a block may then span several sequences
        logits, targets = logits.view(-1, logits.shape[-1]), targets.reshape(-1)
    result: Tensor = apply(TargetLogprobs, logits, targets, float(temperature))
    return result.view(shape)


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
    """Keep the logits and one log-sum-exp for each row; compute the softmax again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        target_logits = logits.gather(-1, targets.long()[..., None]).squeeze(-1)
        lse = torch.empty_like(target_logits, dtype=compute_dtype(logits))
        for rows in block_indices(logits):
            lse[rows] = (logits[rows].to(lse.dtype) / temperature).logsumexp(-1)
        ctx.save_for_backward(logits, targets, lse)
        ctx.temperature = temperature
        return target_logits.to(lse.dtype) / temperature - lse

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, lse = ctx.saved_tensors
        d_logits = torch.empty_like(logits)
        for rows in block_indices(logits):
            scale = (g[rows] / ctx.temperature)[..., None]
            p = (logits[rows].to(lse.dtype) / ctx.temperature).sub_(lse[rows][..., None]).exp_()
            d = p.mul_(-scale).scatter_add_(-1, targets[rows].long()[..., None], scale)
            d_logits[rows] = d.masked_fill_(scale == 0, 0)  # where no gradient arrives, even if logits are inf or nan
        return d_logits, None, None


def block_indices(logits: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield indices of the leading dimensions. Each selects ``[n, V]``, whose softmax fits into a small buffer."""
    if logits.ndim == 1:
        yield ()
        return
    for outer in product(*map(range, logits.shape[:-2])):
        for rows in small_blocks(logits[outer]):
            yield (*outer, rows)


def small_blocks(x: Tensor) -> Iterator[slice]:
    """Split the rows of logits [n, V] into blocks: those of ``row_blocks`` on a CPU, of the size of a tile on a GPU."""
    return row_blocks(x) if x.device.type == "cpu" else blocks(len(x), max(1, TILE_TOKENS * TILE_VOCAB // x.shape[1]))
