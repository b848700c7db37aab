"""What a training client executes: forward, loss, backward, optimizer step, on one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lossfns import BoundLoss, Loss, LossInputError
from lossfns.backend import state
from lossfns.backend.batch import pack_datums, pack_tokens
from lossfns.backend.builtins import builtin
from lossfns.backend.custom import LossFn, Outputs, Value, differentiate
from lossfns.backend.logprobs import linear_logprobs
from lossfns.backend.types import OptimStepResponse
from lossfns.checks import number
from lossfns.tokens import FlatLogprobs


class Accumulated(NamedTuple):
    """What the gradient since the last step is made of: positions and sequences that have a gradient.

    ``mean`` is a loss among them that divides by a count of its own, ``pooled`` whether one is over embeddings.
    """

    positions: int = 0
    sequences: int = 0
    mean: str | None = None
    pooled: bool = False

    def plus(self, loss_fn: LossFn | Loss | BoundLoss, value: Value) -> Accumulated:
        moved = (value.gradient != 0).flatten(1).any(1) if value.gradient.ndim > 1 else value.gradient != 0
        rows = moved.cpu().numpy()
        lengths = value.outputs.lengths if value.outputs.name == "logprobs" else [1] * len(rows)
        starts = np.cumsum([0, *lengths[:-1]])
        loss = loss_fn.loss if isinstance(loss_fn, BoundLoss) else loss_fn
        mean = repr(loss) if isinstance(loss, Loss) and loss.count is not None else None
        return Accumulated(
            self.positions + int(rows.sum()),
            self.sequences + int(np.logical_or.reduceat(rows, starts).sum()),
            self.mean or mean,
            self.pooled or value.outputs.name == "embedding",
        )


class Engine:
    """A model with accumulated gradients and an AdamW optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.start_optimizer()

    def start_optimizer(self) -> None:
        """Afresh: no moments, no steps, no gradient."""
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.steps = 0
        self.clear()

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.accumulated = Accumulated()

    # Forward

    def logprobs(self, data: Sequence[Any]) -> Outputs:
        """Float32 logprobs of the targets, in their shape."""
        batch = pack_datums(data, self.model)
        hidden = self.model(batch.inputs, batch.lengths)
        logprobs = linear_logprobs(hidden, self.model.head, batch.targets)  # type: ignore[arg-type]
        return Outputs("logprobs", logprobs, batch.lengths)

    def embeddings(self, data: Sequence[Any], pool: Pool) -> Outputs:
        """Float32 hidden states after the final norm, pooled over each datum's tokens: [B, D]."""
        tokens, lengths = pack_tokens(data, self.model)
        hidden = self.model(tokens, lengths)
        pooled = pool(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), lengths)
        return Outputs("embedding", pooled, [1] * len(lengths))

    @torch.no_grad()
    def forward(self, data: list[Any], loss_fn: Any, config: Any) -> Value:
        """Logprobs and the built-in's value, no gradient."""
        outputs = self.logprobs(data)
        loss, metrics = builtin(loss_fn, config, data, outputs.values.ndim - 1)(
            data, FlatLogprobs(outputs.values.flatten(), outputs.shapes)
        )
        return Value(float(loss), torch.zeros_like(outputs.values), metrics, outputs)

    # Backward

    def forward_backward(self, data: list[Any], loss_fn: Any, config: Any) -> Value:
        """A built-in loss: forward, backward, gradients added to what is accumulated."""
        outputs = self.logprobs(data)
        return self.backward(builtin(loss_fn, config, data, outputs.values.ndim - 1), data, outputs)

    def backward(self, loss_fn: LossFn | Loss | BoundLoss, data: list[Any], outputs: Outputs) -> Value:
        """Any callable of the contract, in the same single forward and backward as a built-in.

        The loss sees outputs cut off from the model; its gradient then continues through the graph that
        the forward left, so parameters get exactly the gradient of the whole.
        """
        with self.all_or_nothing():
            value = differentiate(loss_fn, data, outputs)
            torch.autograd.backward(outputs.values, value.gradient)
        self.accumulated = self.accumulated.plus(loss_fn, value)
        return value

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Add the gradients of a backward pass to those accumulated only once it is complete."""
        parameters = list(self.model.parameters())
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            yield
        except BaseException:
            for p, gradient in zip(parameters, before):
                p.grad = gradient
            raise
        for p, gradient in zip(parameters, before):
            if gradient is not None:
                p.grad = gradient if p.grad is None else gradient.add_(p.grad)

    # Step

    def optim_step(self, adam: Any, normalization: Any = None) -> OptimStepResponse:
        """Normalise, clip, step, clear: AdamW on the accumulated gradient."""
        check_adam(adam)
        divisor = self.divisor(normalization)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if not parameters:
            fix = "Call forward_backward first."
            raise LossInputError("optim_step", "an accumulated gradient", "none since the last step", fix)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if divisor > 1:
            torch._foreach_div_(gradients, divisor)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not norm.isfinite():
            self.clear()
            fix = "The gradient is dropped and the weights are as they were; a smaller batch may be in range."
            raise LossInputError("optim_step", "a finite gradient", f"a norm of {float(norm)}", fix)
        if adam.grad_clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, adam.grad_clip_norm, norm)
        for group in self.optimizer.param_groups:
            group.update(
                lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay
            )
        self.optimizer.step()
        self.clear()
        self.steps += 1
        return OptimStepResponse({"grad_norm": float(norm), "lr": adam.learning_rate})

    def divisor(self, normalization: Any) -> int:
        """What the accumulated gradient is divided by; 1 where nothing has a gradient."""
        mode = normalization_mode(normalization)
        if mode == "none":
            return 1
        if self.accumulated.mean is not None:
            got = f"{mode!r} for the gradient of {self.accumulated.mean}, which divides by a count of its own"
            fix = "Pass None, or weigh the loss with token_sum: normalised twice, a gradient is too small."
            raise LossInputError("grad_accumulation_normalization", "None for a mean", got, fix)
        if mode == "num_loss_tokens" and self.accumulated.pooled:
            got, fix = "'num_loss_tokens' for a loss over embeddings", "Pass 'num_sequences' or None."
            raise LossInputError("grad_accumulation_normalization", "a count of sequences", got, fix)
        return max(1, self.accumulated.positions if mode == "num_loss_tokens" else self.accumulated.sequences)

    # State

    def state(self) -> dict[str, Tensor]:
        """The weights, the optimizer's moments and the state of torch's random numbers."""
        return state.weights(self.model) | state.moments(self.model, self.optimizer) | state.random(self.device)

    def load_weights(self, tensors: Mapping[str, Tensor], path: str) -> None:
        """Take over the weights, or refuse them and change nothing; the optimizer starts afresh."""
        state.load_weights(self.model, tensors, path)
        self.start_optimizer()

    def load_state(self, tensors: Mapping[str, Tensor], path: str, steps: int) -> None:
        """Take over everything of ``state``: training continues as if it had not been interrupted."""
        state.check_dtypes(self.model, tensors, path)
        self.load_weights(tensors, path)
        state.load_moments(self.model, self.optimizer, tensors)
        state.load_random(tensors, self.device)
        self.steps = steps

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


# Pooling

Pool = Callable[[Tensor, Sequence[int]], Tensor]


def mean_pool(hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """The mean over each sequence: [N, D] -> [B, D]."""
    return torch.segment_reduce(hidden, "mean", lengths=torch.tensor(lengths, device=hidden.device), unsafe=True)


def last_pool(hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """The last token of each sequence: [N, D] -> [B, D]."""
    return hidden[torch.tensor(lengths).cumsum(0).to(hidden.device) - 1]


POOLS: dict[str, Pool] = {"mean": mean_pool, "last": last_pool}

# Checks

NORMALIZATIONS = ("num_loss_tokens", "num_sequences", "none")


def normalization_mode(given: Any) -> str:
    """A mode by its name or by a service's enumeration of such names."""
    name = "none" if given is None else getattr(given, "value", given)
    if not isinstance(name, str) or name.lower() not in NORMALIZATIONS:
        fix = (
            f"Unknown grad_accumulation_normalization {given!r}; expected one of: num_loss_tokens, num_sequences, none"
        )
        raise LossInputError("grad_accumulation_normalization", "the name of a mode, or None", repr(given), fix)
    return name.lower()


def check_adam(adam: Any) -> None:
    """Refuse what is no AdamParams, or would move the weights nowhere or up."""
    if not all(hasattr(adam, name) for name in ADAM):
        got, fix = f"a {type(adam).__name__}", "Expected AdamParams or OptimParamsBase; here only AdamW steps."
        raise LossInputError("adam_params", "AdamParams(learning_rate=...)", got, fix)
    for name, (expected, accept) in ADAM.items():
        number(name, getattr(adam, name), expected, accept, "AdamW has no use for it.")


def not_negative(x: float) -> bool:
    return x >= 0


def fraction(x: float) -> bool:
    return 0 <= x < 1


ADAM: dict[str, tuple[str, Callable[[float], bool]]] = {
    "learning_rate": ("a finite number of at least 0", not_negative),
    "beta1": ("a number in [0, 1)", fraction),
    "beta2": ("a number in [0, 1)", fraction),
    "eps": ("a finite number of at least 0", not_negative),
    "weight_decay": ("a finite number of at least 0", not_negative),
    "grad_clip_norm": ("a finite number of at least 0", not_negative),
}
