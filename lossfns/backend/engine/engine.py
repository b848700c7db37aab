"""What a training client executes: forward, loss, backward, optimizer step, on one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lossfns.backend.engine import passes, state
from lossfns.backend.engine.batch import Batch, Rows, apart, batch_of, with_targets, without_targets
from lossfns.backend.engine.builtins import bind_builtin
from lossfns.backend.engine.differentiate import LossFn, Outputs, Value
from lossfns.backend.engine.gradients import Gradients, dropped_gradients, summed_in_float32
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
        self.gradients = Gradients(model)
        self.start_optimizer()

    def start_optimizer(self) -> None:
        """Afresh: no moments, no steps, no gradient."""
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.steps = 0
        self.gradients.clear()

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

    def forward_backward(self, data: list[Any], loss_fn: Any, config: Any) -> Value:
        """A built-in loss: forward, backward, gradients added to what is accumulated."""
        work = self.logprobs(data)
        bound = bind_builtin(loss_fn, config, data, multi_target=work.rows.targets[0].ndim == 2)
        return self.backward(bound, data, work)

    def backward(self, loss_fn: LossFn | Loss | BoundLoss, data: list[Any], work: Work) -> Value:
        """Any callable of the contract, at the price of a built-in; within ``gradients.all_or_nothing``.

        The loss sees outputs cut off from the model; its gradient then continues through the graph that
        the forward left, so parameters get exactly the gradient of the whole.
        """
        with torch.enable_grad():  # a loss that switches gradients off does so for itself
            parts = self.parts(work, loss_fn)
            peak = self.peak(work, parts)
            with summed_in_float32(self.model) if len(parts) > 1 else nullcontext():
                value = passes.step(self.ranks.everywhere(loss_fn), data, work, parts)
            self.gradients.accumulated = self.gradients.accumulated.add(loss_fn, value)
        return value._replace(micro_batches=len(parts), peak_memory=peak)

    # Memory

    def parts(self, work: Work, loss_fn: LossFn | Loss | BoundLoss | None = None) -> list[slice]:
        """Micro-batches that fit the budget; pairs stay together where the loss is one of pairs, and each fits."""
        rows = work.rows
        left = self.budget - self.aside(rows)
        room = self.ranks.least(self.footprint(rows).tokens(left) if left >= self.gradients.compensation_bytes else 0)
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
        return self.aside(rows) + max(self.footprint(rows).of(tokens), self.gradients.compensation_bytes)

    def room(self, rows: Rows, tokens: int) -> float:
        """Bytes that a step over so many of a call's tokens leaves of the budget."""
        if not torch.is_grad_enabled():
            return 0.0  # without a backward pass, nothing has a use for it
        return max(0.0, self.budget - self.aside(rows) - self.footprint(rows).of(tokens))

    def aside(self, rows: Rows) -> int:
        """Bytes that a call takes, in however many steps: the gradients, and what the loss makes of the values."""
        return self.gradient_bytes + LOSS * sum(rows.counts) * (rows.choices if rows.targets else self.dim)

    @property
    def budget(self) -> float:
        """What is planned with."""
        return self.margin * (free(self.device) if self.memory_budget is None else self.memory_budget)

    @property
    def margin(self) -> float:
        return HOLES if getattr(self.model, "checkpointing", False) else MARGIN

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of one call, if they are summed over micro-batches."""
        return sum(shard_of(p).numel() * max(p.itemsize, 4) for p in self.trained)

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
            self.gradients.clear()
            fix = "The gradient is dropped and the weights are as they were; a smaller batch may be in range."
            raise LossInputError("optim_step", "a finite gradient", f"a norm of {norm}", fix)
        clip = float(adam.grad_clip_norm)
        for group in self.optimizer.param_groups:
            group.update(knobs)
        with scaled(parameters, min(1.0, clip / (norm + 1e-6) if clip else 1.0) / divisor):
            self.optimizer.step()
        self.gradients.clear()
        self.steps += 1
        return OptimStepResponse({"grad_norm": norm, "lr": knobs["lr"]})

    def divisor(self, normalization: Any) -> int:
        """What the accumulated gradient is divided by; 1 where nothing has a gradient."""
        mode, accumulated = normalization_mode(normalization), self.gradients.accumulated
        if mode == "none":
            return 1
        if accumulated.mean is not None:
            got = f"{mode!r} for the gradient of {accumulated.mean!r}, which divides by a count of its own"
            fix = "Pass None, or weigh the loss with token_sum: normalised twice, a gradient is too small."
            raise LossInputError("grad_accumulation_normalization", "None for a mean", got, fix)
        if mode == "num_loss_tokens" and accumulated.pooled:
            got, fix = "'num_loss_tokens' for a loss over embeddings", "Pass 'num_sequences' or None."
            raise LossInputError("grad_accumulation_normalization", "a count of sequences", got, fix)
        return max(
            1,
            int(accumulated.positions if mode == "num_loss_tokens" else accumulated.sequences),
        )

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


def taken(x: Tensor, rows: Tensor | None) -> Tensor:
    """x[rows]; None takes all."""
    return x if rows is None else x.index_select(0, rows)


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
