"""The maths of every loss under torch.fx and torch.compile: the eager values and gradients."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from batches import CASES, Case, apart
from torch import Tensor

from lossfns import Loss, Tokens, evaluate, pack


def maths(loss: Loss) -> Callable[..., Tensor]:
    """The loss as a function of flat tensors: logprobs, weights, lengths and the columns it reads."""

    def fn(logprobs: Tensor, weights: Tensor, lengths: Tensor, columns: list[Tensor]) -> Tensor:
        t = Tokens(logprobs, weights, lengths, dict(zip(loss.reads, columns)))
        total, _ = evaluate(loss, t)
        return total

    return fn


def packed(case: Case, seed: int) -> Tokens:
    batch, reads = case.batch(Random(seed)), case.loss.reads
    return pack(batch.data(), batch.tensors(), reads, batch.bound(reads), rows=case.loss.rows)


def arguments(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    t = packed(case, seed)
    assert t.lengths is not None
    return t.logprobs.detach().requires_grad_(), t.weights, t.lengths, [getattr(t, name) for name in case.loss.reads]


def value_and_gradient(fn: Callable[..., Tensor], args: tuple[Tensor, ...]) -> tuple[float, list[float]]:
    args[0].grad = None
    total = fn(*args)
    total.backward()
    return total.item(), args[0].grad.tolist()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fx_equals_eager(case: Case) -> None:
    """One trace serves every batch: nothing of the example is baked in."""
    fn = maths(case.loss)
    count = len(case.loss.reads)

    class Root(torch.nn.Module):
        def forward(self, logprobs: Tensor, weights: Tensor, lengths: Tensor, *columns: Tensor) -> Tensor:
            return fn(logprobs, weights, lengths, [columns[i] for i in range(count)])

    traced = torch.fx.symbolic_trace(Root())
    for seed in (1, 2, 3):
        args = arguments(case, seed)
        eager = value_and_gradient(fn, args)
        again = value_and_gradient(lambda a, b, c, columns: traced(a, b, c, *columns), args)
        assert apart(list(eager[1]), again[1]) == 0 and eager[0] == again[0]


COMPILER = "inductor" if shutil.which("g++") else "aot_eager"  # inductor needs a C++ compiler
DISTINCT = {case.loss.name: case for case in reversed(CASES)}
"""One case of each method and combinator."""
KINDS = {
    (case.loss.rows, case.loss.couples_groups, "advantages" in case.loss.reads): case for case in DISTINCT.values()
}
"""One of them for each kind of row, with and without groups and advantages."""


@pytest.mark.exhaustive
def test_compile_equals_eager() -> None:
    """The graphs that torch.compile finds, run as they are: kernels would take minutes. Ten losses make one graph."""
    some = list(DISTINCT.values())
    for i in range(0, len(some), 10):
        check_compiled(some[i : i + 10], "eager")


@pytest.mark.exhaustive
def test_a_kernel_of_each_kind_equals_eager() -> None:
    check_compiled(list(KINDS.values()), COMPILER)


def check_compiled(cases: list[Case], backend: str) -> None:
    """Compile the losses of some cases into one graph without breaks, and compare each with the eager loss.

    Each loss has its own leaf, so that the sum of the losses gives each of them its own gradient.
    """
    losses = [case.loss for case in cases]

    def every(batches: list[Tokens]) -> list[Any]:
        return [evaluate(loss, t) for loss, t in zip(losses, batches)]

    torch.compiler.reset()
    batches = [packed(case, 1) for case in cases]
    eager = numbers_and_gradients(every, batches)
    again = numbers_and_gradients(torch.compile(every, fullgraph=True, backend=backend), batches)
    for loss, expected, found in zip(losses, eager, again):
        assert apart(expected, found) < 1e-12, loss


def numbers_and_gradients(fn: Callable[..., list[Any]], batches: list[Tokens]) -> list[list[Any]]:
    """Return for each loss its value and the sums of its statistics, and the gradient."""
    leaves = [t.logprobs.detach().requires_grad_() for t in batches]
    found = fn([replace(t, logprobs=leaf) for t, leaf in zip(batches, leaves)])
    torch.stack([total for total, _ in found]).sum().backward()
    numbers = [[x.item() for x in (total, *sums.values())] for total, sums in found]
    return [[row, leaf.grad.tolist()] for row, leaf in zip(numbers, leaves)]
