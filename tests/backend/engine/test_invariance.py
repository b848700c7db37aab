"""A batch has one gradient: in one call, in many, in any order."""

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from tiny import BYTE_SHAPE, client, gradients, same, texts
from torch import Tensor

import lossfns
from lossfns import LossInputError
from lossfns.backend import Decoder, LocalTrainingClient
from lossfns.backend.engine.gradients import add_compensated

MODEL = Decoder(**BYTE_SHAPE)
TEXT = "A sum in floating point depends on its order; that of a gradient should not. "


@cache
def datums(count: int, longest: int = 200) -> list[Any]:
    """From 2 tokens to ``longest``: half of them random bytes, half of them text, in which a few bytes are frequent."""
    rng = Random(0)
    data = []
    for i in range(count):
        length, start = rng.randint(2, longest), rng.randrange(len(TEXT))
        ids = (
            list((TEXT * 4)[start : start + length].encode()) if i % 2 else [rng.randrange(257) for _ in range(length)]
        )
        data.append(lossfns.datum_from_tokens(ids, prompt_length=0))
    return data


def gradient(calls: Sequence[list[Any]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The gradient that the calls accumulate, in float64."""
    c = LocalTrainingClient(Decoder(**MODEL.shape), device="cpu", dtype=dtype)
    futures = [c.forward_backward(call, "cross_entropy") for call in calls]
    assert len(futures) == sum(len(future.result().loss_fn_outputs) > 0 for future in futures)
    return {name: p.grad.double() for name, p in c.model.named_parameters() if p.grad is not None}


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
    """‖a − b‖ / ‖b‖ over all parameters, and of each parameter."""
    of = {name: (a[name] - b[name]).norm().item() / b[name].norm().item() for name in b}
    difference = torch.stack([(a[name] - b[name]).norm() for name in b]).norm()
    return (difference / torch.stack([x.norm() for x in b.values()]).norm()).item(), of


def shuffled(data: list[Any], seed: int) -> list[Any]:
    return Random(seed).sample(data, len(data))


@cache
def whole(count: int) -> dict[str, Tensor]:
    return gradient([datums(count)])


@pytest.mark.parametrize(
    ("size", "seed"), [(1, None), (1, 2), (30, 3), (1000, 1)], ids=["1", "1 shuffled", "30 shuffled", "all shuffled"]
)
@pytest.mark.parametrize(
    "count", [pytest.param(100, marks=pytest.mark.repeated), pytest.param(250, marks=pytest.mark.exhaustive)]
)
def test_datums_have_one_gradient(count: int, size: int, seed: int | None) -> None:
    """Compare one call with all datums with calls of ``size`` datums."""
    data = datums(count) if seed is None else shuffled(datums(count), seed)
    difference, of = apart(gradient([data[i : i + size] for i in range(0, len(data), size)]), whole(count))
    print(f"\n{difference:.1e} as a whole;", ", ".join(f"{name} {x:.1e}" for name, x in of.items()))
    assert difference < 1e-6
    assert difference > 0 or size >= count, "other calls sum in another order"


@pytest.mark.parametrize(
    "count", [pytest.param(60, marks=pytest.mark.repeated), pytest.param(300, marks=pytest.mark.exhaustive)]
)
def test_many_calls_in_bfloat16_lose_no_more_than_its_last_rounding(count: int) -> None:
    """Compare with the same gradients, read after each call and summed in float64. In bfloat16, 1 + 1/257 is 1."""
    c = LocalTrainingClient(Decoder(**MODEL.shape), device="cpu", dtype=torch.bfloat16)
    data, parts = datums(count, longest=20), []
    for datum in data:
        c.forward_backward([datum], "cross_entropy").result()
        parts.append({name: p.grad.double() for name, p in c.model.named_parameters() if p.grad is not None})
        c._engine.gradients.clear()
    sums = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
    difference, _ = apart(gradient([[datum] for datum in data], torch.bfloat16), sums)
    print(f"\n{difference:.1e}")
    assert difference < torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rounding_takes_from_a_sum_is_given_back(dtype: torch.dtype) -> None:
    """Add to 1 a thousand times a number that is too small to change it."""
    small = torch.finfo(dtype).eps / 4
    total, rounded = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    for _ in range(1000):
        add_compensated([total], [torch.tensor(small, dtype=dtype)], [rounded])
    assert (total + rounded).item() == pytest.approx(1 + 1000 * small, rel=torch.finfo(dtype).eps)
    assert torch.ones((), dtype=dtype) + small == 1


def test_a_request_that_fails_leaves_no_trace_in_the_sum() -> None:
    """The later requests agree bit for bit, too."""

    def fails(data: Any, logprobs_list: list[Tensor]) -> Any:
        return sum(1e38 * (lp - lp.detach()).sum() for lp in logprobs_list), {}  # too large for the model

    through, smooth = client(), client()
    for i in range(20):
        for c in (through, smooth):
            c.forward_backward(texts(Random(i)), "cross_entropy").result()
        with pytest.raises(LossInputError, match="gradient"):
            through.forward_backward_custom(texts(Random(-i)), fails).result()
    assert same(gradients(through), gradients(smooth))


def test_a_gradient_that_is_cleared_by_hand_leaves_no_trace_either() -> None:
    c, fresh = client(), client()
    for i in range(5):
        c.forward_backward(texts(Random(i)), "cross_entropy").result()
    c.model.zero_grad(set_to_none=True)
    for i in range(5, 9):
        for each in (c, fresh):
            each.forward_backward(texts(Random(i)), "cross_entropy").result()
    assert same(gradients(c), gradients(fresh))
