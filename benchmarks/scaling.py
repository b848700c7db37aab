"""The time and memory of a step of the local client: a thousand to a million tokens, on one process and on two.

A step is ``forward_backward_custom(data, grpo())`` and ``optim_step``: forward, loss, backward, AdamW. Sequences have
256 to 768 tokens. There is one batch of each size; ``--memory-budget`` decides its number of micro-batches. Two ranks
split each batch. They run on two GPUs if there are two, else on the CPU, where each gets half of the cores. Peak memory
is that of tensors on a GPU, and of the whole process on a CPU; for two ranks, it is the larger one. The first size also
runs once at the start, to warm up.

    python benchmarks/scaling.py [--max-tokens 1048576] [--memory-budget 1e9] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from side_by_side import device_name, save, seconds, table

from lossfns import datum_from_tokens, grpo
from lossfns.backend import AdamParams, Decoder, LocalTrainingClient
from lossfns.backend.engine.ranks import start

SIZES = [2**n for n in range(10, 21, 2)]
FEW = 2**16
"""Larger batches are timed once."""
SHAPE = {"vocab_size": 512, "dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 128}
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def batch(tokens: int) -> list[Any]:
    """Return datums with this total number of tokens."""
    rng, lengths = random.Random(0), []
    while sum(lengths) < tokens:
        lengths.append(min(rng.randint(256, 768), tokens - sum(lengths)))
    rows = [[rng.randrange(SHAPE["vocab_size"]) for _ in range(max(n, 2) + 1)] for n in lengths]
    return [datum_from_tokens(row, prompt_length=len(row) // 4) for row in rows]


def columns(data: list[Any]) -> dict[str, Any]:
    """Return advantages, and logprobs near those of an untrained model."""
    rng = random.Random(1)
    old = [[rng.uniform(-6.3, -6.2) for _ in range(d.model_input.length)] for d in data]
    return {"advantages": [rng.uniform(-1, 1) for _ in data], "old_logprobs": old, "ref_logprobs": old}


def peak() -> float:
    """Return the peak memory in MiB: of tensors on a GPU, else of the process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each size. All ranks call this."""
    mesh = start()
    client = LocalTrainingClient(Decoder(**SHAPE), memory_budget=args.memory_budget, mesh=mesh)
    ranks, rows = client.ranks, []

    def step(data: list[Any], loss: Any) -> dict[str, float]:
        pending, done = client.forward_backward_custom(data, loss), client.optim_step(AdamParams(learning_rate=1e-4))
        done.result()
        return pending.result().metrics

    for tokens in [SIZES[0], *(n for n in SIZES if n <= args.max_tokens)]:
        data = batch(tokens)
        loss = grpo().bind(**columns(data))
        times = 1 if tokens > FEW else args.rounds
        rounds = [seconds(lambda data=data, loss=loss: step(data, loss)) for _ in range(times)]
        rows.append(
            {
                "ranks": ranks.size,
                "tokens": tokens,
                "seconds": round(statistics.median(elapsed for elapsed, _ in rounds), 4),
                "micro_batches": int(rounds[0][1]["micro_batches"]),
                "peak_MiB": round(max(ranks.when_idle(ranks.gather, peak()))),
            }
        )
    return rows[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-tokens", type=int, default=SIZES[-1])
    parser.add_argument("--memory-budget", type=float, default=1e9, help="bytes for each rank")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", help=argparse.SUPPRESS)  # the file for the rows of a process that this one starts
    args = parser.parse_args()
    if args.rows:
        rows = measure(args)
        if int(os.environ.get("RANK", 0)) == 0:
            Path(args.rows).write_text(json.dumps(rows))
        return
    results = []
    cores = torch.get_num_threads()
    for launch, threads in (([], cores), (LAUNCH, max(1, cores // 2))):
        with tempfile.NamedTemporaryFile("r") as file:
            command = [sys.executable, *launch, __file__, *sys.argv[1:], "--rows", file.name]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
            results += json.load(file)
    one = {row["tokens"]: row for row in results if row["ranks"] == 1}
    shown = [
        [
            f"{row['tokens']:,}",
            str(row["ranks"]),
            f"{row['seconds']:.3f} s",
            f"{row['tokens'] / row['seconds']:,.0f}",
            f"{one[row['tokens']]['seconds'] / row['seconds']:.2f}x",
            str(row["micro_batches"]),
            f"{row['peak_MiB']:,} MiB",
        ]
        for row in sorted(results, key=lambda row: (row["tokens"], row["ranks"]))
    ]
    print(f"a step of grpo; {device_name()}, torch {torch.__version__}")
    print(table(["tokens", "ranks", "time", "tokens/s", "to one", "micro-batches", "peak"], shown))
    print(f"written: {save('scaling', results).name}")


if __name__ == "__main__":
    main()
