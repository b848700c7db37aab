"""Logprobs and gradients of an unembedding with a low-rank adapter: the adapter beside the weight, or added to it.

- one weight: ``linear_logprobs`` with W + scale·B·A, in bfloat16; autograd then makes the gradient of this sum
- beside it: ``linear_logprobs(adapter=(A, B, scale))``
- separable: the same, with the gradient of the loss known in the forward pass and 32 MiB of logits at a time

W is frozen. Times are from hidden states to the gradients of hidden states, A and B; the peak memory is that of the
tensors which this makes.

    python benchmarks/lora_head.py [--shape 2048x1024x65536] [--rank 16] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from side_by_side import device_name, keep_freed_memory, load, race, ratio, save, table
from torch import Tensor

from lossfns import linear_logprobs
from lossfns.backend.engine.memory import AllocationTracker

SCALE, BLOCK = 0.5, 2**25
LIMITS = {"one weight": (1.0, 1.0), "beside it": (0.8, 0.15), "separable": (0.6, 0.15)}
"""The largest time and peak memory, relative to one weight."""


def functions(n: int, width: int, vocabulary: int, rank: int) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    hidden, weight = (
        normal(n, width).bfloat16().requires_grad_(),
        normal(vocabulary, width, scale=width**-0.5).bfloat16(),
    )
    a, b = normal(rank, width).requires_grad_(), normal(vocabulary, rank, scale=0.02).requires_grad_()
    targets, g = torch.randint(vocabulary, (n,), generator=generator), normal(n)

    def gradients(logprobs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(logprobs, (hidden, a, b), g)

    def one_weight() -> Any:
        return gradients(linear_logprobs(hidden, weight + (SCALE * (b @ a)).bfloat16(), targets))

    def beside(**options: Any) -> Any:
        return gradients(linear_logprobs(hidden, weight, targets, adapter=(a, b, SCALE), **options))

    known = {"gradient": lambda _, rows: g[rows], "memory_budget": BLOCK}
    return {"one weight": one_weight, "beside it": beside, "separable": lambda: beside(**known)}


def peak(call: Callable[[], Any]) -> int:
    with AllocationTracker(set()) as tracker:
        call()
    return int(tracker.growing.peak)


def cells(row: dict[str, Any]) -> list[str]:
    time = [f"{row['milliseconds']} ms", f"{row['time']:.2f}x", f"{row['time_limit']:.2f}x"]
    memory = [f"{row['peak_bytes'] / 2**20:.0f} MiB", f"{row['peak']:.2f}x", f"{row['peak_limit']:.2f}x"]
    return [row["name"], *time, *memory]


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2048x1024x65536", help="tokens x width x vocabulary")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    n, width, vocabulary = map(int, options.shape.split("x"))
    runs = functions(n, width, vocabulary, options.rank)
    peaks = {name: peak(run) for name, run in runs.items()}
    found: dict[str, Any] = {}
    times = race(runs, options.rounds, look=found.setdefault)
    apart = {
        name: max(float((x - y).float().norm() / y.float().norm()) for x, y in zip(found[name], found["one weight"]))
        for name in runs
    }
    assert max(apart.values()) < 0.02, apart  # the rounding of bfloat16
    rows = [
        {
            "shape": options.shape,
            "rank": options.rank,
            "name": name,
            "milliseconds": round(1e3 * statistics.median(times[name])),
            "time": round(ratio(times, name, "one weight"), 3),
            "time_limit": LIMITS[name][0],
            "peak_bytes": peaks[name],
            "peak": round(peaks[name] / peaks["one weight"], 3),
            "peak_limit": LIMITS[name][1],
            "load": round(os.getloadavg()[0], 1),
        }
        for name in runs
    ]
    print(f"LoRA of rank {options.rank} on {options.shape}, bfloat16; {device_name()}, torch {torch.__version__}")
    print(table(["adapter", "time", "ratio", "limit", "peak memory", "ratio", "limit"], [cells(row) for row in rows]))
    others = [row for row in load("lora_head") if (row["shape"], row["rank"]) != (options.shape, options.rank)]
    print(f"written: {save('lora_head', [*others, *rows]).name}")


if __name__ == "__main__":
    main()
