"""How much memory a step takes beyond the weights: measured once on a few tokens, then known for any batch."""

from __future__ import annotations

import ctypes
import math
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lossfns.checks import is_real
from lossfns.errors import LossInputError

C = ctypes.CDLL(None) if sys.platform == "linux" else None

FEW = 251
"""Tokens of the measurement; a prime, so that no activation has the size of a weight."""

MARGIN = 0.7
"""What is planned of a budget: an allocator takes more than the tensors in it, glibc's up to 1.3 times as much."""

HOLES = 0.6
"""The same with checkpointing: in what layers make and free on the way back, glibc leaves holes of some 64 MB."""

LOSS = 56
"""Bytes that a loss takes for each value of the batch, however that is cut: those of GRPO with its metrics."""


class Footprint(NamedTuple):
    """Bytes that a step over n tokens takes at its peak: ``fixed + each·n``."""

    fixed: int
    each: int

    def of(self, tokens: int) -> int:
        return self.fixed + self.each * tokens

    def tokens(self, budget: float) -> float:
        """How many tokens fit a budget."""
        return (budget - self.fixed) // self.each if math.isfinite(budget) else math.inf


def footprint(step: Callable[[], Any], weights: Sequence[Tensor]) -> Footprint:
    """That of ``step()``, over ``FEW`` tokens; what has the size of one of the ``weights`` does not grow with them.

    The two peaks need not come at the same time, so their sum is a bound.
    """
    with Watch({x.nbytes for x in weights}) as watch:
        step()
    return Footprint(watch.fixed.peak, math.ceil(watch.growing.peak / FEW))


class Count:
    """Bytes that are there, and the most that there were."""

    def __init__(self) -> None:
        self.total = self.peak = 0

    def add(self, size: int) -> None:
        self.total += size
        self.peak = max(self.peak, self.total)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory of every tensor that an operation makes, until it is freed; ``fixed`` has certain sizes."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes, self.known = sizes, set[int]()
        self.fixed, self.growing = Count(), Count()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
        for x in tensors(result):
            storage = x.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.known:
                self.made(storage)
        return result

    def made(self, storage: torch.UntypedStorage) -> None:
        self.known.add(storage._cdata)
        count = self.fixed if storage.nbytes() in self.sizes else self.growing
        count.add(storage.nbytes())
        weakref.finalize(storage, self.freed, count, storage._cdata, storage.nbytes())

    def freed(self, count: Count, key: int, size: int) -> None:
        self.known.discard(key)
        count.add(-size)


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.layout == torch.strided]


def free(device: torch.device) -> float:
    """Bytes that can be had on a device; without bound where a system does not tell."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + reserved)
    table = Path("/proc/meminfo")
    lines = dict(line.split(":") for line in table.read_text().splitlines()) if table.exists() else {}
    available = 1024 * float(lines["MemAvailable"].split()[0]) if "MemAvailable" in lines else math.inf
    return min(available, left(Path("/sys/fs/cgroup")))


def left(folder: Path) -> float:
    """Bytes that a container (cgroup v2) is below its limit, which its system does not tell of; inf without one."""
    if not (folder / "memory.max").exists():
        return math.inf
    limit, used, table = ((folder / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
    cached = dict(line.split() for line in table.splitlines())["inactive_file"]  # which is given up when asked for
    return math.inf if limit.strip() == "max" else float(int(limit) - int(used) + int(cached))


def give_back(device: torch.device) -> None:
    """Hand freed memory back to the system: glibc keeps it, with holes that the next tensors do not fit in."""
    trim = getattr(C, "malloc_trim", None)
    if trim is not None and device.type == "cpu":
        trim(0)


def cut(lengths: Sequence[int], room: float, together: int) -> list[slice]:
    """The datums in order, as many at a time as have ``room`` tokens; ``together`` of them stay so if they all fit."""
    groups = [sum(lengths[start : start + together]) for start in range(0, len(lengths), together)]
    if together > 1 and max(groups) > room:
        return cut(lengths, room, 1)
    parts, first, filled = [], 0, 0
    for start, own in zip(range(0, len(lengths), together), groups):
        if filled and filled + own > room:
            parts.append(slice(first, start))
            first, filled = start, 0
        filled += own
    return [*parts, slice(first, len(lengths))]


def check_budget(budget: Any) -> None:
    if budget is not None and not (is_real(budget) and budget > 0):
        fix = "None takes what is free."
        raise LossInputError("memory_budget", "bytes, a number above 0, or None", repr(budget), fix)


def too_small(budget: float, needed: float, datum: int) -> LossInputError:
    expected = f"at least {needed + 1:,.0f} bytes, for this datum by itself and the loss of all"
    fix = "Raise it, shorten the datum, pass fewer at a time, or turn on checkpointing."
    return LossInputError("memory_budget", expected, f"{budget:,.0f}", fix, datum=datum)
