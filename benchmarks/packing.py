"""The cost of padding: one step over sequences of mixed lengths, from tokens to gradients.

- packed: the sequences are concatenated, as in the local client
- padded: every row has the length of the longest; the padding at its end needs no mask under causal attention
- sorted buckets: buckets of four sequences of similar length, padded to the longest of the four; one forward and
  backward pass for each bucket

All use the same model and compute the same logprobs. Padding does not enter the loss, but goes through the head. All
compute the same gradients. The script checks this before it times them (relative norm, to 1e-5 in float32 and 2e-2 in
bfloat16).

    python benchmarks/packing.py [--rounds 5] [--dtype float32] [--lengths "mostly short"]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from memory import elsewhere, peak
from side_by_side import device_name, keep_freed_memory, load, race, ratio, save, table
from torch import Tensor

from lossfns.backend.model.decoder import Decoder
from lossfns.logprobs.linear import linear_logprobs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODEL: dict[str, Any] = {"vocab_size": 4096, "dim": 256, "layers": 4, "heads": 4, "kv_heads": 2, "hidden": 704}
LENGTHS = {
    "evenly spread": [round(16 + 1008 * i / 15) for i in range(16)],
    "mostly short": [round(16 * 64 ** (i / 15)) for i in range(16)],
}
"""16 sequences of 16 to 1024 tokens, by equal differences or by equal ratios."""

Way = Callable[[Decoder, list[Tensor]], None]


def case(lengths: list[int], dtype: torch.dtype) -> tuple[Decoder, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    rows = [torch.randint(MODEL["vocab_size"], (lengths[i] + 1,), generator=generator).to(DEVICE) for i in order]
    return Decoder(**MODEL).to(DEVICE, dtype), rows


def backward(model: Decoder, inputs: Tensor, lengths: list[int], targets: Tensor, weights: Tensor) -> None:
    logprobs = linear_logprobs(model(inputs, lengths), model.head, targets)
    (-(weights * logprobs).sum()).backward()


def packed(model: Decoder, rows: list[Tensor]) -> None:
    targets = torch.cat([row[1:] for row in rows])
    lengths = [len(row) - 1 for row in rows]
    backward(model, torch.cat([row[:-1] for row in rows]), lengths, targets, torch.ones(len(targets), device=DEVICE))


def padded(model: Decoder, rows: list[Tensor]) -> None:
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    inputs, targets = batch[:, :-1].flatten(), batch[:, 1:].flatten()
    backward(model, inputs.clamp(0), [batch.shape[1] - 1] * len(rows), targets.clamp(0), (targets >= 0).float())


def sorted_buckets(model: Decoder, rows: list[Tensor]) -> None:
    rows = sorted(rows, key=len)
    for i in range(0, len(rows), 4):
        padded(model, rows[i : i + 4])


WAYS: dict[str, Way] = {
    "packed": packed,
    "padded": padded,
    "sorted buckets": sorted_buckets,
}


def step(way: Way, model: Decoder, rows: list[Tensor]) -> None:
    model.zero_grad(set_to_none=True)
    way(model, rows)


def gradient(run: Callable[[], None], model: Decoder) -> Tensor:
    run()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def measure(lengths: list[int], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    model, rows = case(lengths, dtype)
    runs = {name: partial(step, way, model, rows) for name, way in WAYS.items()}
    gradients = {name: gradient(run, model) for name, run in runs.items()}
    ours = gradients["packed"]
    apart = {name: float((g - ours).norm() / ours.norm()) for name, g in gradients.items()}
    assert max(apart.values()) < (1e-5 if dtype == torch.float32 else 2e-2), apart
    times = race(runs, rounds)
    return {
        "milliseconds": {name: round(1e3 * statistics.median(t), 1) for name, t in times.items()},
        "times_packed": {name: round(ratio(times, name, "packed"), 3) for name in runs},
        "gradient_apart": apart,
    }


def prepare(way: Way, lengths: list[int], dtype: torch.dtype) -> Callable[[], None]:
    return partial(step, way, *case(lengths, dtype))


def mebibytes(row: dict[str, Any], way: str) -> str:
    return f"{row['peak_bytes'][way] / 2**20:.0f} MiB"


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=LENGTHS)
    options = parser.parse_args()
    results = []
    for kind in options.dtype:
        dtype = getattr(torch, kind)
        for name in options.lengths:
            lengths = LENGTHS[name]
            memory = {way: peak(partial(prepare, WAYS[way], lengths, dtype)) for way in WAYS}
            measured = elsewhere(partial(measure, lengths, dtype, options.rounds))
            tokens = {"tokens": sum(lengths), "padded_tokens": len(lengths) * max(lengths)}
            results.append({"lengths": name, "dtype": kind, **tokens, **measured, "peak_bytes": memory})
    print(f"forward + backward of {MODEL}; {device_name()}, torch {torch.__version__}")
    print("in brackets: times the time of packed; extra memory at the peak")
    lines = [
        [f"{row['lengths']}, {row['dtype']}", f"{row['padded_tokens'] / row['tokens']:.2f}x"]
        + [
            f"{row['milliseconds'][way]:.0f} ms ({row['times_packed'][way]:.2f}x; {mebibytes(row, way)})"
            for way in WAYS
        ]
        for row in results
    ]
    print(table(["lengths 16 to 1024", "padded / real", *WAYS], lines))
    done = [(row["lengths"], row["dtype"]) for row in results]
    rows = [row for row in load("packing") if (row["lengths"], row["dtype"]) not in done] + results
    print(f"written: {save('packing', rows).name}")


if __name__ == "__main__":
    main()
