"""Time alternatives side by side: every round runs each of them once, in an order that changes."""

from __future__ import annotations

import ctypes
import json
import math
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let the C library reuse freed memory: requests to the kernel for the same pages would add noise to the times.

    This needs glibc. Without it, the function does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    """Return the name of the accelerator, or the name and core count of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the time of a run and its result."""
    synchronize()
    start = time.perf_counter()
    result = run()
    synchronize()
    return time.perf_counter() - start, result


def race(
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    patience: float = math.inf,
    look: Callable[[str, Any], None] = lambda name, result: None,
) -> dict[str, list[float]]:
    """Return the seconds of every run in every round, after one warm-up round. The order of the runs rotates.

    ``look`` gets the name and the result of each run in the warm-up. A run that has taken more than ``patience``
    seconds in total skips the other rounds.
    """
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds + 1):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            if sum(times[name]) > patience:
                continue
            elapsed, result = seconds(runs[name])
            if r:
                times[name].append(elapsed)
            else:
                look(name, result)
            del result
    return times


def ratio(times: dict[str, list[float]], name: str, to: str) -> float:
    """Return the median over rounds of time(name) / time(to). Noise that affects a whole round cancels."""
    return statistics.median(a / b for a, b in zip(times[name], times[to]))


def table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in [header, *rows]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def results_file(benchmark: str) -> Path:
    """Return the path ``results/<benchmark>.<device>.json``."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    return RESULTS / f"{benchmark}.{slug}.json"


def load(benchmark: str) -> list[dict[str, Any]]:
    """Return the rows that were saved on this device before."""
    path = results_file(benchmark)
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return rows


def save(benchmark: str, rows: list[dict[str, Any]]) -> Path:
    """Save the rows with the device and the versions; return the path."""
    device, path = device_name(), results_file(benchmark)
    RESULTS.mkdir(exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    path.write_text(json.dumps({"benchmark": benchmark, "device": device, **versions, "rows": rows}, indent=1) + "\n")
    return path
