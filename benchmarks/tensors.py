"""The cost of a loss on tensors as loops hold them: GRPO with a k3 penalty and its metrics, forward and backward.

Beside a hand-written loss on the same padded tensors (1.00): ours padded, packed and compiled; other libraries'
functions, where they are installed; ours through datums; and the hosted APIs' documented loop over ``TensorData.data``.
All compute the same loss and gradient, which the script checks first. Ours and the hand-written loss have the same
metrics, the others have their own.

The allocator and the number of threads are the defaults that a user has. A run is repeated in several processes,
because the state of the allocator lasts as long as its process. Each time is a median over rounds and processes.

``buffers`` is the largest memory of new tensors alive at once in the eager form, in units of N floats.

    python benchmarks/tensors.py [--rounds 9] [--processes 3]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from loss_overhead import BETA, HIGH, LOW, loop
from policy_rivals import RIVALS, Batch, by_hand
from rivals import installed
from side_by_side import device_name, race, ratio, save, table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lossfns import Datum, ModelInput, TensorData, grpo

SIZES = ((64, 512), (512, 512), (4096, 256))
LOSS = grpo(clip=(LOW, HIGH), kl_beta=BETA)
COLUMNS = ("advantages", "old_logprobs", "ref_logprobs")


def batch_of(sequences: int, length: int) -> Batch:
    """Return a padded batch: lengths from half of ``length`` to all of it, of which the first quarter is the prompt."""
    draw = torch.Generator().manual_seed(0)
    shape = (sequences, length)
    ends = torch.randint(length // 2, length + 1, (sequences, 1), generator=draw)
    position = torch.arange(length)
    logprobs = -3 * torch.rand(shape, generator=draw)

    def noisy_logprobs() -> Tensor:
        return (logprobs + torch.randn(shape, generator=draw) / 5).clamp(max=0)

    return {
        "weights": ((position >= length // 4) & (position < ends)).float(),
        "advantages": torch.randn(sequences, generator=draw),
        "old_logprobs": noisy_logprobs(),
        "ref_logprobs": noisy_logprobs(),
        "logprobs": logprobs.requires_grad_(),
    }


def as_datums(batch: Batch) -> tuple[list[Datum], list[Tensor]]:
    """Return the rows without their padding as datums, and their logprobs as leaves."""
    data, leaves = [], []
    for i, weights in enumerate(batch["weights"]):
        n = int(weights.nonzero()[-1]) + 1
        rows = {name: batch[name][i, :n] for name in ("weights", "old_logprobs", "ref_logprobs")}
        rows |= {"advantages": batch["advantages"][i].expand(n), "target_tokens": torch.zeros(n, dtype=torch.long)}
        inputs = {name: TensorData.from_torch(row.clone()) for name, row in rows.items()}
        data.append(Datum(ModelInput.from_ints([0] * n), inputs))
        leaves.append(batch["logprobs"][i, :n].detach().clone().requires_grad_())
    return data, leaves


def forms(batch: Batch) -> dict[str, Callable[[], Any]]:
    """Return forward and backward of each form of the loss. Each leaves its gradient on the leaves of its logprobs."""
    columns = {name: batch[name] for name in COLUMNS}
    lp, weights = batch["logprobs"], batch["weights"]
    packed = {name: x.flatten() if x.ndim == 2 else x for name, x in columns.items()}
    lengths = torch.full((len(lp),), lp.shape[1])
    compiled = LOSS.compiled()
    data, leaves = as_datums(batch)
    rivals, _ = installed(RIVALS)
    on_tensors = {
        "by hand": lambda: by_hand(batch),
        "padded": lambda: LOSS.padded(lp, weights, **columns),
        "packed": lambda: LOSS.packed(lp.flatten(), weights.flatten(), lengths=lengths, **packed),
        "compiled": lambda: compiled.padded(lp, weights, **columns),
        **{name: (lambda rival=rival: rival(batch)) for name, rival in rivals.items()},
    }
    on_datums = {
        "datums": lambda: LOSS(data, leaves),
        "datums, compiled": lambda: compiled(data, leaves),
        "documents' loop": lambda: loop(data, leaves),
    }

    def step(call: Callable[[], Any], inputs: list[Tensor]) -> Callable[[], Any]:
        def run() -> Any:
            for leaf in inputs:
                leaf.grad = None
            loss, metrics = call()
            loss.backward()
            return loss.item(), torch.cat([leaf.grad.flatten() for leaf in inputs]), metrics

        return run

    runs = {name: step(call, [lp]) for name, call in on_tensors.items()}
    return runs | {name: step(call, leaves) for name, call in on_datums.items()}


class AliveBuffers(TorchDispatchMode):
    """Measure the bytes of new tensors of at least N/2 entries that are alive at once."""

    def __init__(self, given: Batch) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in given.values()}
        self.entries = given["logprobs"].numel()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.numel() >= self.entries // 2:
                self.add(x.untyped_storage())
        return out

    def add(self, storage: Any) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.bytes += size
            weakref.finalize(storage, self.remove, key, size)
        self.peak = max(self.peak, self.bytes)

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


def alive_buffers(batch: Batch) -> float:
    with AliveBuffers(batch) as alive:
        loss, _ = LOSS.padded(batch["logprobs"], batch["weights"], **{name: batch[name] for name in COLUMNS})
        loss.backward()
    return alive.peak / (4 * alive.entries)


def check(runs: dict[str, Callable[[], Any]], batch: Batch) -> None:
    """Check that all runs have one loss and one gradient, and that ours have the metrics of the hand-written loss."""
    expected, gradient, metrics = runs["by hand"]()
    active = batch["weights"].flatten() > 0
    for name, run in runs.items():
        loss, found, found_metrics = run()
        assert abs(loss - expected) <= 1e-5 * max(1, abs(expected)), (name, loss, expected)
        on_datums = name.startswith(("datums", "documents"))
        assert on_datums or torch.allclose(found[active], gradient[active], rtol=1e-3, atol=1e-9), name
        if name in ("padded", "packed", "compiled", "datums", "datums, compiled"):
            for metric, value in metrics.items():
                found_value = found_metrics[metric]
                assert abs(found_value - value) <= 1e-4 * max(1, abs(value)), (name, metric, found_value, value)


def measure(sequences: int, length: int, rounds: int) -> dict[str, Any]:
    batch = batch_of(sequences, length)
    runs = forms(batch)
    check(runs, batch)
    times = race(runs, rounds, patience=60)
    return {"times": times, "buffers": alive_buffers(batch)}


def in_processes(sequences: int, length: int, rounds: int, processes: int) -> dict[str, Any]:
    """Return the times of several processes, joined, and the buffers of one."""
    command = [sys.executable, __file__, "--one", f"{sequences}x{length}", "--rounds", str(rounds)]
    parts = []
    for _ in range(processes):
        parts.append(
            json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        )
        print(f"{sequences}x{length}: {len(parts)} of {processes} processes", file=sys.stderr)
    names = parts[0]["times"]
    times = {name: [seconds for part in parts for seconds in part["times"][name]] for name in names}
    return {"times": times, "buffers": parts[0]["buffers"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        sequences, length = map(int, args.one.split("x"))
        print(json.dumps(measure(sequences, length, args.rounds)))
        return
    rows = []
    for sequences, length in SIZES:
        measured = in_processes(sequences, length, args.rounds, args.processes)
        times = measured["times"]
        rows.append(
            {
                "sequences": sequences,
                "length": length,
                "milliseconds": {name: round(1e3 * sorted(t)[len(t) // 2], 3) for name, t in times.items()},
                "times_by_hand": {name: round(ratio(times, name, "by hand"), 3) for name in times},
                "loop_over_datums": round(ratio(times, "documents' loop", "datums"), 2),
                "loop_over_compiled": round(ratio(times, "documents' loop", "datums, compiled"), 2),
                "buffers": round(measured["buffers"], 2),
            }
        )
    names = list(rows[0]["times_by_hand"])
    print(f"GRPO with k3 KL and metrics, forward + backward; {device_name()}, torch {torch.__version__}")
    print("time / time of the loss by hand")
    header = ["", *(f"{row['sequences']}x{row['length']}" for row in rows)]
    lines = [[name, *(f"{row['times_by_hand'].get(name, float('nan')):.2f}" for row in rows)] for name in names]
    lines += [
        ["by hand, ms", *(f"{row['milliseconds']['by hand']:.2f}" for row in rows)],
        ["loop / datums", *(f"{row['loop_over_datums']:.1f}" for row in rows)],
        ["loop / compiled", *(f"{row['loop_over_compiled']:.1f}" for row in rows)],
        ["buffers", *(f"{row['buffers']:.2f}" for row in rows)],
    ]
    print(table(header, lines))
    for name, reason in installed(RIVALS)[1].items():
        print(f"not measured: {name} ({reason})")
    print(f"written: {save('tensors', rows).name}")


if __name__ == "__main__":
    main()
