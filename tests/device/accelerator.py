"""The device under test, ``LOSSFNS_DEVICE=rehearsal`` or a real one such as ``cuda``, and the host's waits for it."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

NAME = os.environ.get("LOSSFNS_DEVICE", "rehearsal")
REHEARSED = NAME == "rehearsal"
if REHEARSED:
    import rehearsal

DEVICE = torch.device(NAME, 0)
CPU = torch.device("cpu")
DTYPE = torch.float64 if REHEARSED else torch.float32
"""The dtype of models: not all kernels of a GPU have float64."""
TOLERANCE = 1e-6 if REHEARSED else 1e-4
"""How far results may be from those of the CPU."""


@contextmanager
def recorded_waits() -> Iterator[list[str]]:
    """Fill a list with every wait of the host for the device."""
    waits: list[str] = []
    if REHEARSED:
        before = len(rehearsal.waits)
        yield waits
        waits += rehearsal.waits[before:]
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits += [f"{w.message} at {w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]


def waits_of(call: Callable[[], Any]) -> list[str]:
    """Return the waits of a call, the second of its kind: the first may measure memory, or compile."""
    call()
    with recorded_waits() as waits:
        call()
    return waits


def on_device(x: Any) -> Any:
    """Return tensors on the device, in lists, tuples and dicts, too. Return anything else as it is."""
    if isinstance(x, dict):
        return {name: on_device(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(map(on_device, x))
    return x.detach().to(DEVICE).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def assert_same(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Compare tensors of the device, and numbers, with those of the CPU."""
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(found, (list, tuple)):
        for x, y in zip(found, expected, strict=True):
            assert_same(x, y, tolerance)
        return
    found, expected = (torch.as_tensor(x).detach().cpu() for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
