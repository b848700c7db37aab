"""∂L/∂logprob of a few tokens at a time, for losses in which no token's term depends on another token's logprob.

Code that computes the logprobs of some tokens can then compute their gradient at once, and keeps nothing for a
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossfns.errors import LossInputError, add_loss_name, show
from lossfns.loss import BoundLoss, Loss, name_or_repr
from lossfns.pack import check_data, find_column
from lossfns.tokens import ON_POLICY, Tokens

TokenGradient = Callable[[Tensor, Any], Tensor]
"""A function ``(logprobs of some tokens, their index in the batch) -> ∂L/∂logprob``, of the shape of the logprobs."""


@dataclass(frozen=True)
class TokenwiseTokens(Tokens):
    """``Tokens`` without sequences: a loss whose terms read ``lengths`` is refused."""

    def __getattribute__(self, name: str) -> Any:
        if name == "lengths":
            raise LossInputError("loss", "a loss whose tokens stand for themselves", "a loss over whole sequences", FIX)
        return super().__getattribute__(name)


FIX = "Its gradient needs the logprobs of all tokens: take another plan."


def check_device(device: Any) -> None:
    """Refuse a device that holds no tensors here."""
    try:
        usable = not torch.zeros(0, device=device).is_meta
    except Exception:  # torch has several types of error for what is no device
        usable = False
    if not usable:
        fix = "Pass 'cpu', 'cuda' or a torch.device, where the logprobs will be."
        raise LossInputError("device", "a device that holds tensors", show(device), fix)


def token_gradient(loss: Loss | BoundLoss, data: Sequence[Any], device: torch.device | str = "cpu") -> TokenGradient:
    """Write the gradient of a loss as a function of any part of the batch's tokens.

    ``linear_logprobs(plan="separable")`` takes this function. Its backward pass refuses a term of your own that mixes
    tokens in a way that ``token_gradient`` cannot detect.

    Args:
        loss: a loss of tokens or targets, with its side columns. The denominator is the bound one, or else that
            of the batch.
        data: B datums with ``target_tokens``.
        device: where the logprobs will be.

    Returns:
        ``gradient(logprobs, index)``, which returns ∂L/∂logprob in the shape of ``logprobs``. ``logprobs`` are ``[n]``
        or ``[n, K]``, in float32 at least. ``index`` (a slice or a tensor) is their place among the tokens of the
        batch, concatenated over the datums.

    Raises:
        LossInputError: if a token's term depends on its sequence, as in gspo, dpo and orpo.

    >>> from lossfns import datum_from_tokens, reinforce
    >>> data = [datum_from_tokens([5, 6, 7, 8], prompt_length=2)]
    >>> gradient = token_gradient(reinforce().bind(advantages=[2.0]), data)
    >>> gradient(torch.tensor([-1.0, -2.0]), slice(1, 3))  # the two tokens of the completion
    tensor([-1., -1.])
    """
    check_device(device)
    if not isinstance(loss, Loss | BoundLoss):
        raise LossInputError(
            "loss", "a Loss such as ppo()", name_or_repr(loss), "The parts of any other function are unknown."
        )
    bound = loss.bind() if isinstance(loss, Loss) else loss
    if bound.loss.gradient_columns:
        got = f"{bound.loss!r}, whose gradient goes through {bound.loss.gradient_columns[0]}"
        raise LossInputError("loss", "a loss of the logprobs and of constants", got, "Take another plan.")
    if bound.loss.parts:
        return sum_of_gradients(bound, data, device)
    if not bound.loss.rows.per_token:
        got = f"{bound.loss!r}, over {bound.loss.rows}"
        raise LossInputError("loss", "a loss whose tokens stand for themselves", got, FIX)
    with add_loss_name(bound.loss.name):
        check_data(data, bound.loss.rows)
        zeros = [torch.zeros(row.shape, device=device) for row in find_column("target_tokens", data, bound.columns)]
        t = bound.pack(data, zeros)
        if len(t.logprobs) < sum(lp.numel() for lp in zeros):
            fix = "An index counts all targets: bring the rows of each datum to their length."
            raise LossInputError("align", "rows as long as target_tokens", "'truncate', which cuts them", fix)
    divisor = 1.0 if bound.loss.count is None else bound.divisor or bound.denominator(data)
    share = bound.loss.share(t) / divisor
    on_policy = [name for name in bound.loss.reads if bound.columns.get(name) is ON_POLICY]

    def gradient(logprobs: Tensor, index: Any) -> Tensor:
        def select(x: Tensor) -> Tensor:
            return x.view(-1, *logprobs.shape[1:])[index].flatten()

        with torch.enable_grad():
            lp = logprobs.detach().requires_grad_()
            blanked = torch.where(select(t.active), lp.flatten(), 0)
            columns = {name: blanked.detach() if name in on_policy else select(x) for name, x in t.columns.items()}
            targets = logprobs.shape[1] if logprobs.ndim == 2 else 1
            part = TokenwiseTokens(blanked, select(t.weights), None, columns, targets=targets)
            term, _ = bound.loss.terms(part)
            (g,) = torch.autograd.grad(torch.dot(select(share).to(term.dtype), term), lp)
        return g

    with add_loss_name(bound.loss.name):
        gradient(zeros[0][:1], slice(0, 1))  # refuses a loss of another kind before any work
    return gradient


def sum_of_gradients(bound: BoundLoss, data: Sequence[Any], device: torch.device | str) -> TokenGradient:
    """Write the gradient of a sum of losses, part by part."""
    with add_loss_name(bound.loss.name):
        by_part = bound.by_part(data)
    gradients = [token_gradient(by_part[name], data, device) for name in by_part]
    coefficients = [part.coefficient for part in bound.loss.parts.values()]

    def gradient(logprobs: Tensor, index: Any) -> Tensor:
        return sum((c * each(logprobs, index) for c, each in zip(coefficients, gradients)), torch.zeros_like(logprobs))

    return gradient
