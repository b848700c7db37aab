"""The threads of OpenMP with which PyTorch computes on a CPU. Each thread that computes has a team of them."""

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

import torch

SOFT = 1
"""``omp_pause_soft`` of OpenMP: settings such as the number of threads stay."""


def end_team() -> None:
    """End the team of the calling thread, if PyTorch uses GNU's OpenMP. Its next operation starts another.

    With the teams of two threads there are more threads than cores. GNU's OpenMP then lets the threads sleep at the end
    of each operation, where they would wait actively otherwise. Small operations take up to twice as long.
    """
    library = gnu_openmp()
    if library is not None:
        library.omp_pause_resource_all(SOFT)


@cache
def gnu_openmp() -> ctypes.CDLL | None:
    """Return the library of GNU's OpenMP that PyTorch has loaded; None if it uses another one."""
    if sys.platform != "linux":
        return None
    package = Path(torch.__file__).parent
    for found in (*package.glob("lib/libgomp*"), *package.parent.glob("torch.libs/libgomp*"), "libgomp.so.1"):
        try:
            library = ctypes.CDLL(str(found), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:  # not loaded
            continue
        if hasattr(library, "omp_pause_resource_all"):
            return library
    return None
