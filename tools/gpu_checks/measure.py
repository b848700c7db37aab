"""What the sections share: figures, their bounds, times, memory and errors."""

from __future__ import annotations

import math
import statistics
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from memory import on_cpu, on_gpu
from side_by_side import seconds

import lossfns

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(lossfns.__file__).resolve().parent

Figures = dict[str, Any]
"""The result of a check: ``found`` (an error or a count) and its ``limit``, ``milliseconds``, ``gibibytes`` at the
peak, and a ``note``. Each is optional."""

Checks = dict[str, Callable[[], Figures]]
"""The checks of a section by name. A section is a function of the device, "cuda" or "cpu", that returns them."""

BOUNDS = {torch.bfloat16: 1.5e-2, torch.float32: 2e-5}
"""The largest relative error of a value or gradient that is computed in a dtype."""


class Skipped(Exception):
    """A check that cannot run here, with the reason."""


def skip(why: str) -> Figures:
    raise Skipped(why)


def pick(device: str, cuda: Any, cpu: Any) -> Any:
    """Return the value for the device, such as a size, which is small for a CPU."""
    return cuda if device == "cuda" else cpu


def timed(call: Callable[[], Any]) -> Figures:
    """Return the median time of a call after one warm-up, and the memory that the call adds at its peak."""
    on_device = torch.cuda.is_available()
    call()
    times: list[float] = []
    while len(times) < (3 if on_device else 1) or (on_device and len(times) < 20 and sum(times) < 1):
        times.append(seconds(call)[0])
    taken = on_gpu(call) if on_device else on_cpu(lambda: call)
    return {"milliseconds": 1e3 * statistics.median(times), "gibibytes": taken / 2**30}


def compared(call: Callable[[], Any], reference: Callable[[], Any], limit: float) -> Figures:
    """Return the error of a call against a reference, its time and memory, and the time of a slow first call."""
    first, found = seconds(call)
    error = error_of(found, reference())
    del found
    note = {"note": f"first call {first:.1f} s"} if first > 1 else {}
    return {"found": error, "limit": limit, **note, **timed(call)}


def error_of(found: Any, expected: Any) -> float:
    """Return the largest relative error of tensors and numbers, over lists and over the names that are expected.

    The error of a tensor is a norm over a norm. The error of a single number below 1 is absolute, as it may be a sum of
    larger terms. It is infinite where a number is not finite.
    """
    if isinstance(expected, Mapping):
        return max(error_of(found[name], x) for name, x in expected.items())
    if isinstance(expected, (list, tuple)):
        return max(error_of(a, b) for a, b in zip(found, expected, strict=True))
    a, b = (torch.as_tensor(x).detach().double() for x in (found, expected))
    size = b.norm().clamp(min=1e-30 if b.ndim else 1)
    error = float((a.to(b.device) - b).norm() / size)
    return error if math.isfinite(error) else math.inf


def place(frames: Iterable[traceback.FrameSummary]) -> str:
    """Return file and line of the innermost frame in the checkout or in the package, which may be installed."""
    for frame in reversed([*frames]):
        path = Path(frame.filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE.parent)}:{frame.lineno}"
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "?"
