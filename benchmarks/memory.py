"""The peak memory of a call, including its result.

On a GPU, PyTorch's allocator reports it. On a CPU, the kernel reports it (Linux only). On a CPU, each call runs in a
fork of this process, in which the packages are already imported. Threads do not survive a fork, so measure before this
process computes anything.
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
    """Return the bytes that a call adds to the memory that was in use before it. ``prepare`` returns the call."""
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
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    result = call()
    taken = resident("VmHWM") - before
    del result
    return taken


def elsewhere(function: Call) -> Any:
    """Call the function in a fork of this process, and return its result."""
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
    """Let the C library return freed tensors to the kernel at once. Reused memory would not count as new."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)


def resident(field: str) -> int:
    """Return VmRSS or VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
