"""Memory of a step beyond the weights: measured once on a few tokens, then computed for any batch."""

from __future__ import annotations

import ctypes
import math
import re
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

PROBE_TOKENS = 251
"""Tokens of the measurement: a prime that divides no weight's size, so that sizes tell activations from weights."""


class Footprint(NamedTuple):
    """Bytes that a step over n tokens takes at its peak: ``fixed + per_token·n``."""

    fixed: int
    per_token: int

    def of(self, tokens: int) -> int:
        """Return the bytes of a step over so many tokens."""
        return self.fixed + self.per_token * tokens

    def tokens(self, budget: float) -> float:
        """Return how many tokens fit a budget."""
        return (budget - self.fixed) // self.per_token if math.isfinite(budget) else math.inf


def footprint(step: Callable[[], Any], weights: Sequence[Tensor]) -> Footprint:
    """Measure the footprint of ``step()``, which is over ``PROBE_TOKENS`` tokens.

    A tensor that has the size of one of the ``weights`` (a gradient, a converted copy) counts as fixed. Any other grows
    with the number of tokens. The
    peaks of the two kinds may come at different times, so their sum is an upper bound.
    """
    with AllocationTracker({x.nbytes for x in weights}) as tracker:
        step()
    return Footprint(tracker.fixed.peak, math.ceil(tracker.growing.peak / PROBE_TOKENS))


class ByteCount:
    """Bytes in use, now and at the peak."""

    def __init__(self) -> None:
        self.total = self.peak = 0

    def add(self, size: int) -> None:
        self.total += size
        self.peak = max(self.peak, self.total)


class AllocationTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory of every tensor that an operation makes, until it is freed.

    Attributes:
        fixed: bytes of the tensors whose size is in ``fixed_sizes``.
        growing: bytes of all other tensors.
    """

    def __init__(self, fixed_sizes: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fixed_sizes, self.tracked = fixed_sizes, set[int]()
        self.fixed, self.growing = ByteCount(), ByteCount()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        input_storages = {x.untyped_storage()._cdata for x in strided_tensors((args, kwargs))}
        for x in strided_tensors(result):
            storage = x.untyped_storage()
            if storage._cdata not in input_storages and storage._cdata not in self.tracked:
                self.allocated(storage)
        return result

    def allocated(self, storage: torch.UntypedStorage) -> None:
        self.tracked.add(storage._cdata)
        count = self.fixed if storage.nbytes() in self.fixed_sizes else self.growing
        count.add(storage.nbytes())
        weakref.finalize(storage, self.freed, count, storage._cdata, storage.nbytes())

    def freed(self, count: ByteCount, key: int, size: int) -> None:
        self.tracked.discard(key)
        count.add(-size)


def strided_tensors(tree: Any) -> list[Tensor]:
    """Return the dense tensors of nested arguments or results."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.layout == torch.strided]


def available_bytes(device: torch.device) -> float:
    """Return the bytes that can still be allocated on a device; infinity where the system does not report them."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    table = Path("/proc/meminfo")
    available = re.search(r"MemAvailable:\s+(\d+)", table.read_text()) if table.exists() else None
    return min(1024 * float(available[1]) if available else math.inf, cgroup_headroom(Path("/sys/fs/cgroup")))


def cgroup_headroom(folder: Path) -> float:
    """Return the bytes that the container may still allocate (cgroup v2); infinity if it has no limit."""
    if not (folder / "memory.max").exists():
        return math.inf
    limit, used, table = ((folder / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
    cached = dict(line.split() for line in table.splitlines())["inactive_file"]  # which the kernel frees when needed
    return math.inf if limit.strip() == "max" else float(int(limit) - int(used) + int(cached))


def trim_heap(device: torch.device) -> None:
    """Return freed memory to the system. Otherwise glibc keeps it, in holes that the next tensors do not fit in."""
    trim = getattr(LIBC, "malloc_trim", None)
    if trim is not None and device.type == "cpu":
        trim(0)
