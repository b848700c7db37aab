"""The memory budget: how many datums go through the model at a time, and how many bytes are left for logits."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lossfns.backend.engine.batch import ModelInputs
from lossfns.backend.engine.forward import can_share, compute_logprobs
from lossfns.backend.engine.gradients import dropped_gradients
from lossfns.backend.engine.memory import PROBE_TOKENS, AllocationTracker, Footprint, available_bytes, footprint
from lossfns.backend.engine.ranks import Ranks, SingleProcess, local_shards
from lossfns.checks import is_real
from lossfns.errors import LossInputError

T = TypeVar("T")

MARGIN = 0.7
"""The fraction of a budget to plan with. Allocators take more memory than tensors need, glibc up to 1.3 times."""

CHECKPOINTING_MARGIN = 0.6
"""The fraction with checkpointing: layers allocate and free in the backward pass, which leaves holes of some 64 MB."""

LOSS_BYTES_PER_VALUE = 56
"""Bytes that a loss takes for each output of the whole batch: the number for GRPO with its metrics."""

FOOTPRINTS: dict[Any, Footprint] = {}
"""Footprints of models that have a ``shape``: one measurement serves all models of the same shape."""

FEW_TOKENS = 2 * PROBE_TOKENS
"""Requests of at most this many tokens are not measured beforehand: that would take at least half of their time."""

GENEROUS_BYTES = 32
"""Bytes for each token and each row and column of a weight, several times what a step over a transformer takes."""

UNMEASURED = Footprint(0, 0)


class Costs(NamedTuple):
    """Bytes that a request takes beyond the weights and the accumulated gradient.

    Attributes:
        per_call_bytes: bytes that do not depend on micro-batches: the request's gradients, and the tensors of the loss.
        footprint: bytes for the tokens of a micro-batch.
        compensation_bytes: bytes for adding the gradients to the accumulated one, after the last micro-batch.
    """

    per_call_bytes: int
    footprint: Footprint
    compensation_bytes: int

    def step_bytes(self, tokens: int) -> int:
        """Return the bytes for a micro-batch of so many tokens."""
        return self.per_call_bytes + max(self.footprint.of(tokens), self.compensation_bytes)

    def max_tokens(self, budget: float) -> float:
        """Return how many tokens a micro-batch may have."""
        spare = budget - self.per_call_bytes
        return self.footprint.tokens(spare) if spare >= self.compensation_bytes else 0


class Plan(NamedTuple):
    """How a request is computed: decided once, before its first forward pass.

    Attributes:
        budget: bytes that the request may take.
        costs: bytes that the request takes.
        micro_batches: slices of the datums, which cover them in order.
        peak_memory: bytes that the largest micro-batch takes, kept logits included.
    """

    budget: float
    costs: Costs
    micro_batches: list[slice]
    peak_memory: int

    def spare_bytes(self, tokens: int) -> float:
        """Return the bytes that a micro-batch of so many tokens leaves free; 0 where there is no backward pass."""
        if not torch.is_grad_enabled():
            return 0.0
        return max(0.0, self.budget - self.costs.per_call_bytes - self.costs.footprint.of(tokens))


class Budget:
    """The memory that requests to a model may take.

    Args:
        model, head, ranks: the model, its head [V, D], and the processes that share it.
        limit: bytes beyond the weights and the accumulated gradient; None takes most of the free memory.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Tensor,
        ranks: SingleProcess | Ranks,
        limit: float | None,
    ) -> None:
        self.model, self.ranks, self.limit = model, ranks, limit
        (self.vocabulary, self.dim), self.bytes_per_hidden = head.shape, head[0].nbytes
        self.parameters = list(model.parameters())
        self.footprints = FOOTPRINTS if getattr(model, "shape", None) else {}
        self.small_footprints: dict[Any, tuple[int, Footprint]] = {}  # by kind of step: tokens, footprint

    def plan(
        self,
        inputs: ModelInputs,
        group: int = 1,
        compensation_bytes: int = 0,
        losses: int = 1,
        extras: tuple[str, ...] = (),
    ) -> Plan:
        """Decide how to compute a request.

        Args:
            inputs: the inputs of all datums.
            group: how many consecutive datums to keep in one micro-batch, if every such group fits.
            compensation_bytes: bytes for adding the request's gradient to the accumulated one.
            losses: how many losses the request adds up.
            extras: what is computed besides the logprobs.

        Raises:
            LossInputError: if there is a limit and a datum by itself exceeds it.
        """
        budget = self.planned_bytes()
        if self.surely_fits(inputs, budget):
            costs = self.costs(inputs, compensation_bytes, losses, extras, self.footprint_of_few(inputs, extras))
            everything = slice(0, len(inputs.tokens))
            return Plan(budget, costs, [everything], costs.step_bytes(sum(inputs.lengths)))
        costs = self.costs(inputs, compensation_bytes, losses, extras)
        max_tokens = self.ranks.min(costs.max_tokens(budget))
        if self.limit is not None:
            for i, length in enumerate(inputs.lengths):
                if length > max_tokens:
                    raise budget_too_small(self.limit, costs.step_bytes(length) / self.margin, i)
        tokens_of = partial(self.tokens_in_memory, inputs)
        micro_batches = self.ranks.one_per_rank(into_micro_batches(len(inputs.tokens), tokens_of, max_tokens, group))
        tokens = max([min(tokens_of(part), self.ranks.max_tokens(inputs.lengths[part])) for part in micro_batches])
        needed, kept_logits = costs.step_bytes(tokens), self.bytes_per_hidden * (self.vocabulary + tokens)
        return Plan(budget, costs, micro_batches, max(needed, int(min(budget, needed + kept_logits))))

    def tokens_in_memory(self, inputs: ModelInputs, part: slice) -> int:
        """Return the number of tokens that would take as much memory as this part if sequences shared nothing.

        Ranks count whole sequences: which prefixes they share depends on how they divide the datums.
        """
        tokens = sum(inputs.lengths[part])
        if self.ranks.size > 1 or not can_share(self.model):
            return tokens
        return min(inputs.part(part).shared.tokens_in_memory, tokens)

    def planned_bytes(self) -> float:
        """Return the bytes to plan with: a part of the limit or, without a limit, of the memory that is free now."""
        device = self.parameters[0].device
        return self.margin * (available_bytes(device) if self.limit is None else self.limit)

    @property
    def margin(self) -> float:
        """The part of the budget to plan with."""
        return CHECKPOINTING_MARGIN if getattr(self.model, "checkpointing", False) else MARGIN

    def costs(
        self,
        inputs: ModelInputs,
        compensation_bytes: int = 0,
        losses: int = 1,
        extras: tuple[str, ...] = (),
        footprint: Footprint | None = None,
    ) -> Costs:
        """Return the bytes that a request over these inputs takes; None measures the footprint, if it is not known."""
        trainable = [p for p in self.parameters if p.requires_grad and torch.is_grad_enabled()]
        gradients = sum([p.numel() * max(p.itemsize, 4) for p in local_shards(trainable)])  # summed in float32
        values = sum([x.size for x in inputs.targets]) if inputs.targets else len(inputs.tokens) * self.dim
        values = LOSS_BYTES_PER_VALUE * losses * (values + len(extras) * sum(inputs.lengths))
        footprint = self.footprint(inputs, extras) if footprint is None else footprint
        return Costs(gradients + values, footprint, compensation_bytes)

    def footprint(self, inputs: ModelInputs, extras: tuple[str, ...] = ()) -> Footprint:
        """Return the footprint of a step over inputs like these. It is measured once, when it is first needed."""
        # The sequences of the probe are no longer than the inputs, so the model can read them. Their length is odd, so
        # that no activation has the size of a weight.
        length = 2 ** ((min(max(inputs.lengths), PROBE_TOKENS) + 1).bit_length() - 1) - 1
        key = length, *self.step_kind(inputs, extras)
        if key not in self.footprints:
            step = partial(self.probe_step, length, inputs.targets_per_token, extras)
            self.footprints[key] = footprint(step, self.parameters)
        return self.footprints[key]

    def step_kind(self, inputs: ModelInputs, extras: tuple[str, ...]) -> tuple[Any, ...]:
        """Return what the footprint of a step depends on, apart from the length of its sequences."""
        model = (
            type(self.model),
            repr(getattr(self.model, "shape", None)),
            getattr(self.model, "checkpointing", False),
        )
        weights = [(p.shape, p.dtype, p.requires_grad) for p in self.parameters]
        step = inputs.targets_per_token, extras, torch.is_grad_enabled(), self.parameters[0].device, self.ranks.size
        return *step, *model, *weights

    # Few tokens are not measured before they are computed

    def surely_fits(self, inputs: ModelInputs, budget: float) -> bool:
        """Return whether a request of few tokens fits by a generous estimate, so that nothing has to be measured."""
        tokens = sum(inputs.lengths)
        if self.limit is not None or tokens > FEW_TOKENS or inputs.targets_per_token > 1:
            return False
        channels, weights = sum([sum(p.shape) for p in self.parameters]), sum([p.nbytes for p in self.parameters])
        return self.ranks.min(budget - GENEROUS_BYTES * tokens * channels - 4 * weights) > 0

    def footprint_of_few(self, inputs: ModelInputs, extras: tuple[str, ...]) -> Footprint:
        """Return the footprint that ``measured`` found for at least as many tokens, or ``UNMEASURED``."""
        tokens, measured = self.small_footprints.get(self.step_kind(inputs, extras), (0, UNMEASURED))
        return measured if tokens >= sum(inputs.lengths) else UNMEASURED

    def measured(
        self, step: Callable[[], T], plan: Plan, inputs: ModelInputs, extras: tuple[str, ...]
    ) -> tuple[T, Plan]:
        """Run the step of a request of few tokens and measure its footprint. Return its result and the plan with it."""
        with AllocationTracker({p.nbytes for p in self.parameters}) as tracker:
            result = step()
        gradients = sum([p.grad.nbytes for p in self.parameters if p.grad is not None])  # costs counts them
        tokens = sum(inputs.lengths)
        step_footprint = Footprint(max(0, tracker.fixed.peak - gradients), -(-tracker.growing.peak // tokens))
        self.small_footprints[self.step_kind(inputs, extras)] = tokens, step_footprint
        costs = plan.costs._replace(footprint=step_footprint)
        return result, plan._replace(costs=costs, peak_memory=costs.step_bytes(tokens))

    def probe_step(self, length: int, targets: int, extras: tuple[str, ...]) -> None:
        """Run a step over ``PROBE_TOKENS`` tokens, and drop each gradient as soon as it is computed.

        Sequences have ``length`` tokens, and each token has ``targets`` targets. Extras are differentiated,
        which takes the most memory.
        """
        draw = partial(np.random.default_rng(0).integers, self.vocabulary)  # random, so that few prefixes are shared
        ends = range(length, PROBE_TOKENS, length)
        tokens, ids = (np.split(draw(size=size), ends) for size in (PROBE_TOKENS, (PROBE_TOKENS, targets)))
        inputs = ModelInputs(tokens, ids)
        compute = partial(
            compute_logprobs, self.model, inputs, lambda tokens: 0.0, extras=extras, differentiates=extras
        )
        device = self.parameters[0].device
        with dropped_gradients(self.model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            logprobs = self.ranks.with_full_weights(compute)
            if logprobs.requires_grad:
                torch.autograd.backward(logprobs.sum())


def into_micro_batches(datums: int, tokens_of: Callable[[slice], int], max_tokens: float, group: int) -> list[slice]:
    """Split the datums, in order, into micro-batches of at most ``max_tokens`` tokens.

    Groups of ``group`` datums are kept whole if every group fits. A datum with more tokens is a micro-batch by itself.
    ``tokens_of`` counts the tokens of consecutive datums. It never falls when a datum is added.
    """
    if tokens_of(slice(0, datums)) <= max_tokens:
        return [slice(0, datums)]
    if group > 1 and any(tokens_of(slice(i, i + group)) > max_tokens for i in range(0, datums, group)):
        return into_micro_batches(datums, tokens_of, max_tokens, 1)
    micro_batches, first = [], 0
    while first < datums:
        ends = [*range(first + group, datums, group), datums]
        fitting = bisect_right(ends, max_tokens, key=lambda end: tokens_of(slice(first, end)))
        micro_batches.append(slice(first, ends[max(fitting, 1) - 1]))
        first = micro_batches[-1].stop
    return micro_batches


def check_budget(limit: Any) -> None:
    """Refuse a budget that is not a number of bytes above 0, or None."""
    if limit is not None and not (is_real(limit) and (0 < limit < 2**63 or limit == math.inf)):
        fix = "None takes what is free."
        raise LossInputError("memory_budget", "bytes, a number above 0 and below 2^63, or None", repr(limit), fix)


def budget_too_small(limit: float, needed: float, datum: int) -> LossInputError:
    """Return the error for a datum that does not fit the budget."""
    expected = f"at least {needed + 1:,.0f} bytes, for this datum by itself and the loss of all"
    fix = "Raise it, shorten the datum, pass fewer at a time, or turn on checkpointing."
    return LossInputError("memory_budget", expected, f"{limit:,.0f}", fix, datum=datum)
