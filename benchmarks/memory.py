"""What one call needs at its peak, what it returns included.

On a GPU by PyTorch's own account of it. On a CPU by the kernel's (Linux only), in a fresh process for each call: a
fork of this one, so that the packages are already imported. So measure before anything here has computed: threads do
not survive a fork.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from side_by_side import M_MMAP_THRESHOLD

Call = Callable[[], Any]


def peak(prepare: Callable[[], Call]) -> int:
    """Bytes that the call which ``prepare`` returns takes on top of what was there before it."""
    return on_gpu(prepare()) if torch.cuda.is_available() else int(elsewhere(lambda: on_cpu(prepare)))


def on_gpu(call: Call) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def on_cpu(prepare: Callable[[], Call]) -> int:
    give_back_freed_memory()
    call = prepare()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    result = call()
    taken = resident("VmHWM") - before
    del result
    return taken


def elsewhere(function: Call) -> Any:
    """What the function returns in a fork of this process."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: sender.send(function()))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("the process ended before it could answer: out of memory?") from None
    finally:
        process.join()


def give_back_freed_memory() -> None:
    """Freed tensors leave the process at once, instead of hiding the next ones."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)


def resident(field: str) -> int:
    """VmRSS or VmHWM in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
