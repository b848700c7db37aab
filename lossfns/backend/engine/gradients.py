"""The gradient that requests accumulate until a step. A request adds its whole gradient or nothing.

The sums are kept exact to rounding: micro-batches are summed in float32, requests with compensation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lossfns.backend.engine.differentiate import Differentiated, Objective
from lossfns.backend.engine.ranks import full_tensor, local_shards
from lossfns.loss import Loss


class Accumulated(NamedTuple):
    """The losses whose gradients have been added up.

    Attributes:
        positions: how many rows of outputs (tokens, or embeddings) had a gradient other than 0.
        sequences: how many datums had such a row.
        mean: the first of the losses that divide by a count of their own, which a step names if it refuses to divide
            again; None if there is none.
        pooled: whether one of the losses is over embeddings.
    """

    positions: int = 0
    sequences: int = 0
    mean: Loss | None = None
    pooled: bool = False


class Gradients:
    """The accumulated gradient of a model's parameters, in their ``grad``.

    Attributes:
        accumulated: the losses whose gradients have been added.
        compensation: what rounding has taken from the sum of a parameter's gradients.
        set_aside: the accumulated gradients, while a request computes its own.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.clear()

    def clear(self) -> None:
        """Drop the gradient."""
        set_gradients(self.parameters, {})
        self.accumulated = Accumulated()
        self.compensation: dict[nn.Parameter, Tensor] = {}
        self.set_aside: dict[nn.Parameter, Tensor] = {}

    def record(self, objective: Objective, result: Differentiated) -> None:
        """Record a loss whose gradient has been added."""
        before = self.accumulated
        self.accumulated = Accumulated(
            before.positions + int(result.has_gradient.sum()),
            before.sequences + int(result.outputs.any_by_datum(result.has_gradient).sum()),
            before.mean or objective.mean,
            before.pooled or result.outputs.name == "embedding",
        )

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Run a request in a ``with`` block, and add its gradient if it succeeds.

        On any error the accumulated gradient is left as it was.
        """
        before = {p: p.grad for p in self.parameters if p.grad is not None}
        if not before:
            self.clear()  # gradients may have been cleared by hand, without the counts
        self.set_aside, accumulated = before, self.accumulated
        set_gradients(self.parameters, {})
        try:
            yield
            in_both = [p for p in before if p.grad is not None]
            self.compensation |= {p: torch.zeros_like(before[p]) for p in in_both if p not in self.compensation}
        except BaseException:
            set_gradients(self.parameters, before)
            self.accumulated = accumulated
            raise
        finally:
            self.set_aside = {}
        new = [p.grad for p in in_both if p.grad is not None]
        add_compensated([before[p] for p in in_both], new, [self.compensation[p] for p in in_both])
        set_gradients(before, before)  # the sums, updated in place; other parameters keep the request's

    def are_finite(self) -> Tensor:
        """Return whether the gradients of all parameters are finite, as a 0-d tensor on their device."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        finite: Tensor = full_tensor(torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)).isfinite()
        return finite

    @property
    def compensation_bytes(self) -> int:
        """The bytes that adding a request's gradient will take, beyond the gradient itself."""
        uncompensated = [p for p in self.set_aside if p.requires_grad and p not in self.compensation]
        return sum([x.nbytes for x in local_shards(uncompensated)])


def set_gradients(parameters: Iterable[nn.Parameter], gradients: Mapping[nn.Parameter, Tensor]) -> None:
    """Give each parameter its gradient; None where there is none."""
    for p in parameters:
        p.grad = gradients.get(p)


def add_compensated(totals: list[Tensor], parts: list[Tensor], compensation: list[Tensor]) -> None:
    """totals += parts in place; ``compensation`` carries what rounding has taken from the totals (Kahan 1965).

    The gradients of thousands of requests thus sum to that of one request with all their datums, also in bfloat16.
    """
    if not totals:
        return
    totals, parts, compensation = map(local_shards, (totals, parts, compensation))
    torch._foreach_add_(parts, compensation)
    torch._foreach_copy_(compensation, totals)
    torch._foreach_add_(totals, parts)
    torch._foreach_sub_(compensation, totals)
    torch._foreach_add_(compensation, parts)


@contextmanager
def summed_in_float32(model: nn.Module) -> Iterator[None]:
    """Sum the gradients of backward passes in float32, and round once to the dtype of narrower parameters.

    A sum in bfloat16 stops growing after 256 equal terms.
    """
    totals: dict[nn.Parameter, Tensor] = {}

    def add_to_total(p: nn.Parameter) -> None:
        assert p.grad is not None
        totals[p] = totals[p].add_(p.grad) if p in totals else p.grad.float()
        p.grad = None

    narrow = [p for p in model.parameters() if p.requires_grad and p.itemsize < 4]
    hooks = [p.register_post_accumulate_grad_hook(add_to_total) for p in narrow]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    while totals:
        p, total = totals.popitem()
        p.grad = total.to(p.dtype)


@contextmanager
def dropped_gradients(model: nn.Module) -> Iterator[None]:
    """Drop each gradient as soon as it is computed. Gradients from before are put back at the end."""
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
