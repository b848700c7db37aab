"""What a training client executes: forward, loss, backward, optimizer step, on one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from functools import partial
from inspect import signature
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lossfns.backend.engine import passes, state
from lossfns.backend.engine.batch import Batch, Rows, apart, batch_of, with_targets, without_targets
from lossfns.backend.engine.builtins import bind_builtin
from lossfns.backend.engine.differentiate import LossFn, Outputs, Value
from lossfns.backend.engine.memory import FEW, HOLES, LOSS, MARGIN, Footprint, cut, footprint, free, too_small
from lossfns.backend.engine.passes import Work
from lossfns.backend.engine.ranks import Alone, Ranks, entire, shard_of
from lossfns.backend.model.prefixes import share_prefixes
from lossfns.backend.types import OptimStepResponse
from lossfns.checks import number
from lossfns.errors import LossInputError
from lossfns.logprobs.linear import model_logprobs
from lossfns.loss import BoundLoss, Loss
from lossfns.tokens import PAIRS, FlatLogprobs

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

    def __init__(self, model: nn.Module, ranks: Alone | Ranks, memory_budget: float | None = None) -> None:
        self.model, self.ranks, self.memory_budget = model, ranks, memory_budget
        with torch.no_grad():
            head: Tensor = model.head  # type: ignore[assignment]
        (self.vocabulary, self.dim), self.width = head.shape, head[0].nbytes
        self.dtype = torch.promote_types(head.dtype, torch.float32)
        self.footprints = FOOTPRINTS if getattr(model, "shape", None) else {}  # for one kind of model, or for this one
        ranks.hold(model)
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

    def logprobs(self, data: Sequence[Any]) -> Work:
        """Float32 logprobs of the targets, in their shape."""
        rows = self.readable(with_targets(data, self.vocabulary))
        run = partial(self.run_logprobs, room=partial(self.room, rows))
        return Work("logprobs", rows, partial(self.ranks.run, run), self.like)

    def embeddings(self, data: Sequence[Any], pool: Pool) -> Work:
        """Float32 hidden states after the final norm, pooled over each datum's tokens: [B, D]."""
        rows = self.readable(without_targets(data, self.vocabulary))
        return Work("embedding", rows, partial(self.ranks.run, partial(self.run_embeddings, pool=pool)), self.like)

    def readable(self, rows: Rows) -> Rows:
        """Refuse what is longer than the model can read: here, on all ranks, before one of them finds out."""
        context = getattr(self.model, "context", math.inf)
        for i, length in enumerate(rows.lengths):
            if length > context:
                expected = f"sequences of at most {context} tokens, the context of the model"
                raise LossInputError("model_input", expected, f"{length}", "Cut it.", datum=i)
        return rows

    def values(self, work: Work) -> Outputs:
        """The values of all datums, no gradient."""
        with torch.no_grad():
            return work.outputs(passes.forward(work, self.parts(work)))

    def run_logprobs(self, rows: Rows, room: Callable[[int], float]) -> Tensor:
        """With ``room(tokens)`` bytes for logits that are kept for the backward pass."""
        batch, hidden = self.run(rows)
        assert batch.targets is not None
        logprobs = model_logprobs(self.model, taken(hidden, batch.read), batch.targets, room(len(hidden)))
        return taken(logprobs, batch.spread)

    def run_embeddings(self, rows: Rows, pool: Pool) -> Tensor:
        batch, hidden = self.run(rows)
        hidden = taken(hidden, batch.read)
        return pool(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), rows.lengths)

    def run(self, rows: Rows) -> tuple[Batch, Tensor]:
        """Hidden states after the final norm, of the tokens of a batch; prefixes in common are computed once."""
        if "parents" not in signature(self.model.forward).parameters:
            batch = batch_of(rows, apart, self.device)
            return batch, self.model(batch.inputs, batch.lengths)
        batch = batch_of(rows, share_prefixes, self.device)
        return batch, self.model(batch.inputs, batch.lengths, batch.parents)

    def forward(self, data: list[Any], loss_fn: Any, config: Any) -> Value:
        """Logprobs and the built-in's value, no gradient."""
        work = self.logprobs(data)
        bound = bind_builtin(loss_fn, config, data, multi_target=work.rows.targets[0].ndim == 2)
        outputs = self.values(work)
        loss, metrics = bound(data, FlatLogprobs(outputs.values.flatten(), outputs.shapes))
        return Value(float(loss), torch.zeros_like(outputs.values), metrics, outputs)

    # Backward

    def forward_backward(self, data: list[Any], loss_fn: Any, config: Any, report: Callable[[Value], T]) -> T:
        """A built-in loss: forward, backward, gradients added to what is accumulated."""
        work = self.logprobs(data)
        bound = bind_builtin(loss_fn, config, data, multi_target=work.rows.targets[0].ndim == 2)
        return self.backward(bound, data, work, report)

    def backward(
        self,
        loss_fn: LossFn | Loss | BoundLoss,
        data: list[Any],
        work: Work,
        report: Callable[[Value], T],
    ) -> T:
        """Any callable of the contract, at the price of a built-in.

        The loss sees outputs cut off from the model; its gradient then continues through the graph that
        the forward left, so parameters get exactly the gradient of the whole. What ``report`` makes of the
        loss is the result; if that fails, the gradient is not added either.
        """
        if all(p.grad is None for p in self.model.parameters()):
            self.clear()  # whoever cleared the gradients by hand has cleared what is counted, too
        with torch.enable_grad():  # a loss that switches gradients off does so for itself
            parts = self.parts(work, loss_fn)
            peak = self.peak(work, parts)
            with self.all_or_nothing():
                with summed_in_float32(self.model) if len(parts) > 1 else nullcontext():
                    value = passes.step(self.ranks.everywhere(loss_fn), data, work, parts)
                value = value._replace(micro_batches=len(parts), peak_memory=peak)
                result, accumulated = report(value), self.accumulated.add(loss_fn, value)
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

    # Memory

    def parts(self, work: Work, loss_fn: LossFn | Loss | BoundLoss | None = None) -> list[slice]:
        """Micro-batches that fit the budget; pairs stay together where the loss is one of pairs, and each fits."""
        rows = work.rows
        left = self.budget - self.aside(rows)
        room = self.ranks.least(self.footprint(rows).tokens(left) if left >= self.rounding else 0)
        if self.memory_budget is not None and rows.longest > room:
            datum = next(i for i, n in enumerate(rows.lengths) if n > room)
            raise too_small(self.memory_budget, self.needs(rows.lengths[datum], rows) / self.margin, datum)
        loss = loss_fn.loss if isinstance(loss_fn, BoundLoss) else loss_fn
        return self.ranks.abreast(cut(rows.lengths, room, 2 if isinstance(loss, Loss) and loss.rows == PAIRS else 1))

    def peak(self, work: Work, parts: list[slice]) -> int:
        """Bytes that the largest micro-batch takes, with the logits that are kept where there is room."""
        tokens = max(self.ranks.most(work.rows.lengths[part]) for part in parts)
        needed, kept = self.needs(tokens, work.rows), self.width * (self.vocabulary + tokens)
        return max(needed, int(min(self.budget, needed + kept)))

    def needs(self, tokens: int, rows: Rows) -> int:
        """Bytes that steps over so many of a call's tokens take, beyond the weights and what is accumulated."""
        return self.aside(rows) + max(self.footprint(rows).of(tokens), self.rounding)

    def room(self, rows: Rows, tokens: int) -> float:
        """Bytes that a step over so many of a call's tokens leaves of the budget."""
        if not torch.is_grad_enabled():
            return 0.0  # without a backward pass, nothing has a use for it
        return max(0.0, self.budget - self.needs(tokens, rows))

    def aside(self, rows: Rows) -> int:
        """Bytes that a call takes, in however many steps: the gradients, and what the loss makes of the values."""
        return self.gradients + LOSS * sum(rows.counts) * (rows.choices if rows.targets else self.dim)

    @property
    def budget(self) -> float:
        """What is planned with."""
        return self.margin * (free(self.device) if self.memory_budget is None else self.memory_budget)

    @property
    def margin(self) -> float:
        return HOLES if getattr(self.model, "checkpointing", False) else MARGIN

    @property
    def gradients(self) -> int:
        """Bytes of the gradients of one call, if they are summed over micro-batches."""
        return sum(shard_of(p).numel() * max(p.itemsize, 4) for p in self.trained)

    @property
    def rounding(self) -> int:
        """Bytes that compensate for rounding, where a gradient will be the first that is added to another."""
        return sum(shard_of(p).nbytes for p in self.trained if p.grad is not None and p not in self.rounded)

    @property
    def trained(self) -> list[nn.Parameter]:
        """What gets a gradient; nothing in a forward pass alone."""
        return [p for p in self.model.parameters() if p.requires_grad and torch.is_grad_enabled()]

    def footprint(self, rows: Rows) -> Footprint:
        """What the tokens of a step take, in sequences and with targets like these; measured at the first need."""
        # As long as a model with few positions can take, and odd: no activation is to have the size of a weight.
        piece = 2 ** ((min(rows.longest, FEW) + 1).bit_length() - 1) - 1
        kind = (type(self.model), repr(getattr(self.model, "shape", None)), getattr(self.model, "checkpointing", False))
        each = ((p.shape, p.dtype, p.requires_grad) for p in self.model.parameters())
        key = (piece, rows.choices, torch.is_grad_enabled(), self.device, self.ranks.size, *kind, *each)
        if key not in self.footprints:
            step = partial(self.trial, piece, rows.choices)
            self.footprints[key] = footprint(step, list(self.model.parameters()))
        return self.footprints[key]

    def trial(self, piece: int, choices: int) -> None:
        """A step over ``FEW`` tokens, in sequences of ``piece``, whose gradients are dropped as they come."""
        draw = partial(np.random.default_rng(0).integers, self.vocabulary)  # with no prefixes in common
        ends = range(piece, FEW, piece)
        rows = Rows(np.split(draw(size=FEW), ends), np.split(draw(size=(FEW, choices)), ends), None)
        with dropped_gradients(self.model), torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            values = self.ranks.whole(partial(self.run_logprobs, rows, lambda tokens: 0.0))
            if values.requires_grad:
                torch.autograd.backward(values.sum())

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
        norm = float(entire(torch.nn.utils.get_total_norm(gradients))) / divisor
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

    @property
    def like(self) -> Tensor:
        """No values, of the dtype and on the device of those that are to come."""
        return torch.empty(0, dtype=self.dtype, device=self.device)


FOOTPRINTS: dict[Any, Footprint] = {}
"""What is known of models of one kind."""


@contextmanager
def dropped_gradients(model: nn.Module) -> Iterator[None]:
    """Without the gradients that are there, and without keeping those that come."""
    before = [(p, p.grad) for p in model.parameters()]
    hooks = [p.register_post_accumulate_grad_hook(drop) for p, _ in before if p.requires_grad]  # type: ignore[no-untyped-call]
    try:
        model.zero_grad(set_to_none=True)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for p, gradient in before:
            p.grad = gradient


def drop(p: Tensor) -> None:
    p.grad = None


@contextmanager
def summed_in_float32(model: nn.Module) -> Iterator[None]:
    """Gradients of many backward passes, rounded once to the dtype of narrower parameters: it counts no thousands."""
    totals: dict[nn.Parameter, Tensor] = {}

    def take(p: nn.Parameter) -> None:
        assert p.grad is not None
        totals[p] = totals[p].add_(p.grad) if p in totals else p.grad.float()
        p.grad = None

    narrow = [p for p in model.parameters() if p.requires_grad and p.itemsize < 4]
    hooks = [p.register_post_accumulate_grad_hook(take) for p in narrow]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    while totals:
        p, total = totals.popitem()
        p.grad = total.to(p.dtype)


def taken(x: Tensor, rows: Tensor | None) -> Tensor:
    """x[rows]; None takes all."""
    return x if rows is None else x.index_select(0, rows)


def add_compensated(totals: list[Tensor], parts: list[Tensor], rounded: list[Tensor]) -> None:
    """totals += parts in place; ``rounded`` carries over what rounding has taken from the totals (Kahan 1965).

    Thousands of micro-batches thus sum to the gradient of the whole batch to rounding, also in bfloat16.
    """
    totals, parts, rounded = ([shard_of(x) for x in tensors] for tensors in (totals, parts, rounded))
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
    if not entire(torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)).isfinite():
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
