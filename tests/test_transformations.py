"""Losses inside what a caller transforms: per-example gradients by torch.func, compiled steps, and CUDA graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_tensors import PAIR_LOSSES, TOKEN_LOSSES, B, batch, columns_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lossfns
from lossfns import Loss, LossInputError
from lossfns.export import as_datum_fn

LOSSES = [*TOKEN_LOSSES, *PAIR_LOSSES]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)
every_token_loss = pytest.mark.parametrize("loss", TOKEN_LOSSES, ids=repr)


def gradient(fn: Callable[..., Tensor], logprobs: Tensor, *args: Any) -> Tensor:
    leaf = logprobs.clone().requires_grad_()
    fn(leaf, *args).backward()
    assert leaf.grad is not None
    return leaf.grad


# Per-example gradients


def one_row(loss: Loss, divisor: float) -> Callable[..., Tensor]:
    """The loss of one row of a padded batch, as its part of the batch with this denominator."""

    def fn(logprobs: Tensor, columns: dict[str, Tensor]) -> Tensor:
        rows = {name: x[None] for name, x in columns.items()}
        return loss.deferred().padded(logprobs[None], **rows, denominator=divisor)[0]

    return fn


@every_token_loss
def test_per_example_gradients_of_rows_sum_to_that_of_the_batch(loss: Loss) -> None:
    """vmap(grad) equals a loop of backward calls, bit for bit, and its rows are those of the gradient of the batch."""
    given = batch(loss)
    logprobs, columns = given["logprobs"], columns_of(given)
    _, metrics = loss.padded(logprobs, **columns)
    fn = one_row(loss, metrics.get("count", 1.0))
    together = torch.func.vmap(torch.func.grad(fn))(logprobs, columns)
    loop = [gradient(fn, logprobs[i], {name: x[i] for name, x in columns.items()}) for i in range(B)]
    assert torch.equal(together, torch.stack(loop))
    whole = gradient(lambda x: loss.padded(x, **columns)[0], logprobs)
    torch.testing.assert_close(together, whole, rtol=1e-13, atol=1e-16)
    torch.testing.assert_close(together.sum(0), whole.sum(0), rtol=1e-13, atol=1e-15)


@every_token_loss
def test_per_example_gradients_of_the_function_of_one_datum(loss: Loss) -> None:
    """as_datum_fn under vmap(grad): as the loop, and for a loss of tokens as the rows of the raw sum."""
    given = batch(loss)
    fn = as_datum_fn(loss)
    shape = given["logprobs"].shape
    columns = {name: x if x.shape == shape else x[:, None].expand(shape) for name, x in columns_of(given).items()}
    columns["share"] = columns["weights"] / 7
    names = fn.__code__.co_varnames[1:]
    args = [columns[name].double() for name in names]

    def value(logprobs: Tensor, *args: Tensor) -> Tensor:
        return fn(logprobs, *args)[0]

    together = torch.func.vmap(torch.func.grad(value))(given["logprobs"], *args)
    loop = [gradient(value, given["logprobs"][i], *(x[i] for x in args)) for i in range(B)]
    assert torch.equal(together, torch.stack(loop)) and together.any()
    assert not together[given["weights"] == 0].any()


@pytest.mark.parametrize("loss", PAIR_LOSSES, ids=repr)
def test_per_example_gradients_of_pairs(loss: Loss) -> None:
    """An example is a pair: vmap runs over [P, 2, T]."""
    given = batch(loss)
    pairs = {name: x.unflatten(0, (-1, 2)) for name, x in given.items()}
    divisor = float(B // 2) if loss.count is not None else 1.0

    def fn(logprobs: Tensor, columns: dict[str, Tensor]) -> Tensor:
        return loss.deferred().padded(logprobs, **columns, denominator=divisor)[0]

    together = torch.func.vmap(torch.func.grad(fn))(pairs["logprobs"], columns_of(pairs))
    whole = gradient(lambda x: loss.padded(x, **columns_of(given))[0], given["logprobs"])
    torch.testing.assert_close(together.flatten(0, 1), whole, rtol=1e-13, atol=1e-16)


# Compiled steps


def forms(loss: Loss) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    given = batch(loss)
    columns = columns_of(given)
    flat = {name: x.flatten(0, 1) if x.ndim > 1 else x for name, x in given.items()}
    logprobs, lengths = flat.pop("logprobs"), torch.full((B,), given["logprobs"].shape[1])
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return {
        "padded": (lambda x: loss.deferred().padded(x, **columns)[0], [given["logprobs"]]),
        "lengths": (lambda x, lengths: loss.deferred().packed(x, lengths=lengths, **flat)[0], [logprobs, lengths]),
        "cu_seqlens": (lambda x, ends: loss.deferred().packed(x, cu_seqlens=ends, **flat)[0], [logprobs, ends]),
    }


def check_step(loss: Loss, form: str) -> None:
    fn, (logprobs, *bounds) = forms(loss)[form]
    torch.compiler.reset()
    step = torch.compile(fn, fullgraph=True, backend="aot_eager")
    expected = gradient(fn, logprobs, *bounds)
    torch.testing.assert_close(gradient(step, logprobs, *bounds), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", ["padded", "lengths", "cu_seqlens"])
def test_the_tensor_form_is_a_part_of_a_compiled_step(form: str) -> None:
    check_step(lossfns.ppo(weigh=lossfns.sequence_mean), form)


@pytest.mark.exhaustive
@pytest.mark.parametrize("loss", LOSSES[::3], ids=repr)
def test_more_losses_are_parts_of_a_compiled_step(loss: Loss) -> None:
    """``test_trace.py`` compiles the maths of every loss; this is the path from the tensors to it."""
    for form in ("padded", "lengths"):
        check_step(loss, form)


def test_lengths_in_a_compiled_step_are_judged_with_the_metrics() -> None:
    def step(logprobs: Tensor, lengths: Tensor) -> Any:
        return lossfns.cross_entropy().deferred().packed(logprobs, torch.ones(6), lengths=lengths)[1].extras

    extras = torch.compile(step, fullgraph=True, backend="eager")(torch.full((6,), -1.0), torch.tensor([4, 3]))
    assert {name: bool(x) for name, x in extras.items()} == {"lengths fit": False}


# No number leaves the device


class Waits(TorchDispatchMode):
    """Collect the operations that wait for a device, or whose result has a size that depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "index.Tensor", "equal.default", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        to_cpu = "_to_copy" in str(func) and (kwargs or {}).get("device") is not None
        if to_cpu or any(name in str(func) for name in self.NAMES):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@every_loss
def test_a_deferred_loss_waits_for_nothing(loss: Loss) -> None:
    given = batch(loss)
    leaf = given["logprobs"].clone().requires_grad_()
    with Waits() as waits:
        total, metrics = loss.deferred().padded(leaf, **columns_of(given))
        total.backward()
        assert metrics.tensors
    assert waits.found == []
    with Waits() as waits:
        metrics.finalise()
    assert len(metrics.tensors) > 3  # tolist() makes its one copy below the dispatcher
    assert waits.found == []


def test_lengths_on_the_host_are_checked_there() -> None:
    with pytest.raises(LossInputError, match="sum to 3"):
        lossfns.cross_entropy().deferred().packed(torch.full((3,), -1.0), torch.ones(3), lengths=[1, 1])
