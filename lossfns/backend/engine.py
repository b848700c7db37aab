"""What a training client executes: forward, loss, backward, optimizer step, on one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lossfns import BoundLoss, Loss, LossInputError
from lossfns.backend import state
from lossfns.backend.batch import Batch, pack_datums, pack_tokens, wrapper
from lossfns.backend.builtins import builtin
from lossfns.backend.custom import LossFn, Outputs, Value, differentiate
from lossfns.backend.logprobs import linear_logprobs
from lossfns.backend.types import OptimStepResponse
from lossfns.checks import number
from lossfns.tokens import FlatLogprobs

T = TypeVar("T")


class Accumulated(NamedTuple):
    """What the gradient since the last step is made of: positions and sequences that have a gradient.

    ``mean`` is a loss among them that divides by a count of its own, ``pooled`` whether one is over embeddings.
    """

    positions: Tensor | int = 0
    sequences: Tensor | int = 0
    mean: str | None = None
    pooled: bool = False

    def add(self, loss_fn: LossFn | Loss | BoundLoss, value: Value) -> Accumulated:
        """With one more loss; the counts stay on the device until a step asks for them."""
        rows = (value.gradient.reshape(len(value.gradient), -1) != 0).any(1).float()
        lengths = torch.tensor(value.outputs.lengths, device=rows.device)
        loss = loss_fn.loss if isinstance(loss_fn, BoundLoss) else loss_fn
        mean = repr(loss) if isinstance(loss, Loss) and loss.count is not None else None
        return Accumulated(
            self.positions + rows.count_nonzero(),
            self.sequences + torch.segment_reduce(rows, "max", lengths=lengths, unsafe=True).count_nonzero(),
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
        self.rounded: dict[nn.Parameter, Tensor] = {}

    # Forward

    def logprobs(self, batch: Batch) -> Outputs:
        """Float32 logprobs of the targets, in their shape."""
        hidden = self.model(batch.inputs, batch.lengths)
        logprobs = linear_logprobs(hidden, batch.head, batch.targets)
        return Outputs("logprobs", logprobs, batch.lengths, batch.wrap)

    def embeddings(self, data: Sequence[Any], pool: Pool) -> Outputs:
        """Float32 hidden states after the final norm, pooled over each datum's tokens: [B, D]."""
        tokens, lengths = pack_tokens(data, self.model)
        hidden = self.model(tokens, lengths)
        pooled = pool(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), lengths)
        return Outputs("embedding", pooled, [1] * len(lengths), wrapper(data))

    @torch.no_grad()
    def forward(self, data: list[Any], loss_fn: Any, config: Any) -> Value:
        """Logprobs and the built-in's value, no gradient."""
        batch = pack_datums(data, self.model)
        loss_fn = builtin(loss_fn, config, data, batch.targets.ndim - 1)
        outputs = self.logprobs(batch)
        loss, metrics = loss_fn(data, FlatLogprobs(outputs.values.flatten(), outputs.shapes))
        return Value(float(loss), torch.zeros_like(outputs.values), metrics, outputs)

    # Backward

    def forward_backward(self, data: list[Any], loss_fn: Any, config: Any, report: Callable[[Value], T]) -> T:
        """A built-in loss: forward, backward, gradients added to what is accumulated."""
        batch = pack_datums(data, self.model)
        loss_fn = builtin(loss_fn, config, data, batch.targets.ndim - 1)
        return self.backward(loss_fn, data, self.logprobs(batch), report)

    def backward(
        self,
        loss_fn: LossFn | Loss | BoundLoss,
        data: list[Any],
        outputs: Outputs,
        report: Callable[[Value], T],
    ) -> T:
        """Any callable of the contract, in the same single forward and backward as a built-in.

        The loss sees outputs cut off from the model; its gradient then continues through the graph that
        the forward left, so parameters get exactly the gradient of the whole. What ``report`` makes of the
        loss is the result; if that fails, the gradient is not added either.
        """
        if not outputs.values.requires_grad:
            got, fix = "a model in which all that computes them is frozen", "Train a part that they depend on."
            raise LossInputError(outputs.name, "outputs that parameters can move", got, fix)
        if all(p.grad is None for p in self.model.parameters()):
            self.clear()  # whoever cleared the gradients by hand has cleared what is counted, too
        with torch.enable_grad(), self.all_or_nothing():  # a loss that switches gradients off does so for itself
            value = differentiate(loss_fn, data, outputs)
            result, accumulated = report(value), self.accumulated.add(loss_fn, value)
            torch.autograd.backward(outputs.values, value.gradient)
        self.accumulated = accumulated
        return result

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Add the gradients of a backward pass to those accumulated only once it is complete, and finite."""
        parameters = list(self.model.parameters())
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            yield
            check_finite_gradients(parameters)
            both = [(p, g, p.grad) for p, g in zip(parameters, before) if g is not None and p.grad is not None]
            self.rounded |= {p: torch.zeros_like(g) for p, g, _ in both if p not in self.rounded}
        except BaseException:
            for p, gradient in zip(parameters, before):
                p.grad = gradient
            raise
        if both:
            add_compensated([g for _, g, _ in both], [part for *_, part in both], [self.rounded[p] for p, *_ in both])
        for p, gradient in zip(parameters, before):
            if gradient is not None:
                p.grad = gradient

    # Step

    def optim_step(self, adam: Any, normalization: Any = None) -> OptimStepResponse:
        """Normalise, clip, step, clear: AdamW on the accumulated gradient."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        knobs = adam_knobs(adam, {p.dtype for p in parameters})
        divisor = self.divisor(normalization)
        if not parameters:
            fix = "Call forward_backward first."
            raise LossInputError("optim_step", "an accumulated gradient", "none since the last step", fix)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / divisor
        if not math.isfinite(norm):
            self.clear()
            fix = "The gradient is dropped and the weights are as they were; a smaller batch may be in range."
            raise LossInputError("optim_step", "a finite gradient", f"a norm of {norm}", fix)
        clip = float(adam.grad_clip_norm)
        for group in self.optimizer.param_groups:
            group.update(knobs)
        with scaled(parameters, min(1.0, clip / (norm + 1e-6) if clip else 1.0) / divisor):
            self.optimizer.step()
        self.clear()
        self.steps += 1
        return OptimStepResponse({"grad_norm": norm, "lr": knobs["lr"]})

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
        return max(1, int(self.accumulated.positions if mode == "num_loss_tokens" else self.accumulated.sequences))

    # State

    def state(self) -> dict[str, Tensor]:
        """The weights, the optimizer's moments and the state of torch's random numbers."""
        return state.weights(self.model) | state.moments(self.model, self.optimizer) | state.random(self.device)

    def load_weights(self, tensors: Mapping[str, Tensor], path: str) -> None:
        """Take over the weights, or refuse them and change nothing; the optimizer starts afresh."""
        state.load_weights(self.model, tensors, path)
        self.start_optimizer()

    def load_state(self, tensors: Mapping[str, Tensor], path: str, data: Mapping[str, Any]) -> None:
        """Take over everything of ``state``: training continues as if it had not been interrupted."""
        state.check_whole(self.model, tensors, data, path)
        self.load_weights(tensors, path)
        state.load_moments(self.model, self.optimizer, tensors)
        state.load_random(tensors, self.device)
        self.steps = data["steps"]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def add_compensated(totals: list[Tensor], parts: list[Tensor], rounded: list[Tensor]) -> None:
    """totals += parts in place; ``rounded`` carries over what rounding has taken from the totals (Kahan 1965).

    Thousands of micro-batches thus sum to the gradient of the whole batch to rounding, also in bfloat16.
    """
    torch._foreach_add_(parts, rounded)
    torch._foreach_copy_(rounded, totals)
    torch._foreach_add_(totals, parts)
    torch._foreach_sub_(rounded, totals)
    torch._foreach_add_(rounded, parts)


@contextmanager
def scaled(parameters: Sequence[nn.Parameter], factor: float) -> Iterator[None]:
    """The gradients times a factor, for a step; if it fails they are as they were."""
    before = [p.grad for p in parameters]
    if factor != 1:
        for p, gradient in zip(parameters, before):
            p.grad = None if gradient is None else gradient * factor
    try:
        yield
    finally:
        for p, gradient in zip(parameters, before):
            p.grad = gradient


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
    name = "none" if given is None else given.value if isinstance(given, Enum) else given
    if not isinstance(name, str) or name.lower() not in NORMALIZATIONS:
        fix = (
            f"Unknown grad_accumulation_normalization {given!r}; expected one of: num_loss_tokens, num_sequences, none"
        )
        raise LossInputError("grad_accumulation_normalization", "the name of a mode, or None", repr(given), fix)
    return name.lower()


def check_finite_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Refuse a gradient that has overflowed on its way through the model: it would spoil what is accumulated."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not torch.nn.utils.get_total_norm(gradients, norm_type=math.inf).isfinite():
        got, fix = "nan or inf in one of a parameter", "Are weights or advantages as large as they should be?"
        raise LossInputError("gradient", "finite gradients of the parameters", got, fix)


def adam_knobs(adam: Any, dtypes: set[torch.dtype]) -> dict[str, Any]:
    """AdamW's arguments; refuses what is no AdamParams, or would move the weights nowhere or up."""
    if not all(hasattr(adam, name) for name in ADAM):
        got, fix = f"a {type(adam).__name__}", "Expected AdamParams or OptimParamsBase; here only AdamW steps."
        raise LossInputError("adam_params", "AdamParams(learning_rate=...)", got, fix)
    for name, (expected, accept) in ADAM.items():
        number(name, getattr(adam, name), expected, accept, "AdamW has no use for it.")
    rate, beta1, beta2, eps, decay, _ = (float(getattr(adam, name)) for name in ADAM)
    for dtype in dtypes:
        if torch.tensor(eps, dtype=dtype) == 0:
            got, fix = f"{eps}, which is 0 in {dtype}", "A weight without gradient would become nan: pass a larger one."
            raise LossInputError("eps", "a number above 0 in the dtype of the weights", got, fix)
    return {"lr": rate, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay}


def not_negative(x: float) -> bool:
    return x >= 0


def fraction(x: float) -> bool:
    return 0 <= x < 1


ADAM: dict[str, tuple[str, Callable[[float], bool]]] = {
    "learning_rate": ("a finite number of at least 0", not_negative),
    "beta1": ("a number in [0, 1)", fraction),
    "beta2": ("a number in [0, 1)", fraction),
    "eps": ("a finite number above 0", not_negative),
    "weight_decay": ("a finite number of at least 0", not_negative),
    "grad_clip_norm": ("a finite number of at least 0", not_negative),
}
