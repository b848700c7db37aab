"""The maths of every loss under torch.fx and torch.compile: the eager values and gradients."""

import shutil
from collections.abc import Callable
from random import Random

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


def arguments(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    batch = case.batch(Random(seed))
    reads = case.loss.reads
    t = pack(batch.data(), batch.tensors(), reads, batch.bound(reads), rows=case.loss.rows)
    assert t.lengths is not None
    return t.logprobs.detach().requires_grad_(), t.weights, t.lengths, [getattr(t, name) for name in reads]


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


BACKEND = "inductor" if shutil.which("g++") else "aot_eager"  # inductor needs a C++ compiler
DISTINCT = {case.loss.name: case for case in reversed(CASES)}


@pytest.mark.parametrize("name", sorted(DISTINCT))
def test_compile_equals_eager(name: str) -> None:
    """One graph, no breaks; one case of each method and combinator."""
    case = DISTINCT[name]
    torch.compiler.reset()
    compiled = torch.compile(maths(case.loss), fullgraph=True, backend=BACKEND)
    args = arguments(case, 1)
    eager = value_and_gradient(maths(case.loss), args)
    again = value_and_gradient(compiled, args)
    assert apart(eager[0], again[0]) < 1e-12
    assert apart(eager[1], again[1]) < 1e-12
