"""The rehearsed device keeps a GPU's rules, and records each wait."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerator import DEVICE, REHEARSED, recorded_waits

pytestmark = pytest.mark.skipif(not REHEARSED, reason="tests of the rehearsal")

HOST = torch.arange(1.0, 4.0)
MASK = torch.tensor([True, False, True])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: x + HOST, "same device"),
        (lambda x: torch.where(MASK, x, 0), "same device"),
        (lambda x: torch.cat([x, HOST]), "same device"),
        (lambda x: torch.dot(HOST, x), "same device"),
        (lambda x: x.index_select(0, torch.tensor([0])), "same device"),
        (lambda x: HOST[x.long() - 1], "same device"),
        (lambda x: torch.rand(3, device=DEVICE, generator=torch.Generator()), "generator"),
        (lambda x: x.exponential_(generator=torch.Generator("cpu")), "generator"),
        (lambda x: x.numpy(), "numpy"),
    ],
)
def test_the_devices_do_not_mix(call: Callable[[Any], Any], words: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match=words):
        call(HOST.to(DEVICE))


def test_a_number_of_no_dimension_is_taken_from_either_side() -> None:
    assert (HOST.to(DEVICE) * torch.tensor(2.0)).tolist() == [2.0, 4.0, 6.0]


def test_a_generator_of_the_device_draws_there() -> None:
    draws = [torch.rand(4, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(s)).tolist() for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_gradients_stay_on_the_device() -> None:
    """∂Σx²/∂x = 2x."""
    x = HOST.to(DEVICE).requires_grad_()
    x.square().sum().backward()
    assert x.grad.device == x.device == DEVICE and x.grad.tolist() == [2.0, 4.0, 6.0]


WAITS: dict[str, tuple[int, Callable[[Any, Any], Any]]] = {
    "arithmetic": (0, lambda x, mask: torch.where(mask, x * 2, 0).sum()),
    "item": (1, lambda x, mask: x[0].item()),
    "bool": (1, lambda x, mask: bool(x[0] > 0)),
    "tolist": (1, lambda x, mask: x.tolist()),
    "equal": (1, lambda x, mask: torch.equal(x, x)),
    "to the host": (1, lambda x, mask: x.cpu()),
    "into a tensor of the host": (1, lambda x, mask: torch.empty(3).copy_(x)),
    "to the device": (1, lambda x, mask: HOST.to(DEVICE)),
    "to the device, without a wait": (0, lambda x, mask: HOST.to(DEVICE, non_blocking=True)),
    "into a tensor of the device": (1, lambda x, mask: x.copy_(HOST)),
    "made from a list": (1, lambda x, mask: torch.tensor([1.0], device=DEVICE)),
    "made there": (0, lambda x, mask: torch.full((3,), 2.0, device=DEVICE)),
    "nonzero": (1, lambda x, mask: mask.nonzero()),
    "indexed by a mask": (1, lambda x, mask: x[mask]),
    "indexed by numbers": (0, lambda x, mask: x[x.long() - 1]),
    "indexed from the host": (1, lambda x, mask: x[torch.tensor([0, 1])]),
    "filled under a mask": (0, lambda x, mask: x.masked_fill(mask, 0)),
    "repeated": (1, lambda x, mask: torch.repeat_interleave(x, x.long())),
    "repeated to a known size": (0, lambda x, mask: torch.repeat_interleave(x, x.long(), output_size=6)),
    "unique": (1, lambda x, mask: x.unique()),
    "drawn from probabilities": (1, lambda x, mask: torch.multinomial(x / 6, 1)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", WAITS)
def test_each_wait_is_recorded(name: str, inference: bool) -> None:
    expected, call = WAITS[name]
    with torch.inference_mode(inference):
        given = HOST.to(DEVICE), MASK.to(DEVICE)
        with recorded_waits() as waits:
            call(*given)
    assert len(waits) == expected, waits
