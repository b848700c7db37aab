"""The cost of one leaf tensor for each sequence: GRPO with k3 KL and its metrics over 4,096 sequences.

Each run takes the concatenated logprobs of the model and returns the concatenated gradient of the loss:

- separate: the way of the hosted SDKs: one leaf for each datum, and the gradients of the leaves are concatenated
- client: the way of the local client: one leaf for all datums
- wrapped: the way of the local client for a function that calls the loss: the function gets a tensor for each datum,
  and these tensors are parts of one leaf

The columns of the datums (weights, advantages, old and reference logprobs, as ``TensorData``) do not depend on the
logprobs, so ``bind`` packs them once, in advance. The first two runs are timed with packed columns and with packing in
every call. The third packs in every call. ``packing`` is the time of packing alone.

All compute the same loss, gradient and metrics. The script checks this before it times them.

    python benchmarks/flat_leaf.py [--rounds 15] [--sequences 4096]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from loss_overhead import batch
from side_by_side import device_name, keep_freed_memory, race, ratio, save, table
from torch import Tensor

from lossfns import BoundLoss, Datum, TensorData, grpo
from lossfns.backend.engine.differentiate import Differentiated, Outputs, objective_of
from lossfns.loss import LossFn
from lossfns.pack import PackedColumns, pack_side_columns

LENGTHS = (16, 64, 256)
RATIOS = {
    "separate / client": ("separate", "client"),
    "with packing": ("separate + packing", "client + packing"),
    "wrapped": ("separate + packing", "wrapped"),
}


def bind(loss: LossFn, data: list[Datum], form: Outputs) -> Callable[[Outputs], Differentiated]:
    return objective_of(loss, agreeing=lambda loss_fn: loss_fn).bind(data, form)


def differentiate(loss: LossFn, data: list[Datum], outputs: Outputs) -> Differentiated:
    return bind(loss, data, outputs)(outputs)


def separate(loss: Callable[[list[Tensor]], tuple[Tensor, dict[str, float]]], outputs: Outputs) -> Differentiated:
    leaves = [part.clone().requires_grad_() for part in torch.split(outputs.values, outputs.lengths)]
    total, metrics = loss(leaves)
    torch.autograd.backward(total)
    gradient = torch.cat([leaf.grad for leaf in leaves if leaf.grad is not None])
    return Differentiated(total.item(), gradient, metrics, outputs)


def of_columns(loss: BoundLoss, columns: PackedColumns, leaves: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return loss.evaluate_packed(columns.with_logprobs(torch.cat(leaves)))


def alternatives(loss: BoundLoss, data: list[Datum], outputs: Outputs) -> dict[str, Callable[[], Differentiated]]:
    columns = packing(loss, data, outputs)
    return {
        "separate": partial(separate, partial(of_columns, loss, columns), outputs),
        "client": partial(bind(loss, data, outputs), outputs),
        "separate + packing": partial(separate, partial(loss, data), outputs),
        "client + packing": partial(differentiate, loss, data, outputs),
        "wrapped": partial(differentiate, lambda data, logprobs_list: loss(data, logprobs_list), data, outputs),
    }


def packing(loss: BoundLoss, data: list[Datum], outputs: Outputs) -> PackedColumns:
    return pack_side_columns(data, outputs.shapes, outputs.values, loss.loss.reads, loss.columns)


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sequences", type=int, default=4096)
    args = parser.parse_args()
    loss = grpo(clip=(0.8, 1.2), kl_beta=1e-3).bind()
    results = []
    for length in LENGTHS:
        data, leaves = batch(args.sequences, length)
        outputs = Outputs("logprobs", torch.cat(leaves).detach(), [len(leaf) for leaf in leaves], TensorData)
        runs = alternatives(loss, data, outputs)
        expected = runs["separate + packing"]()
        for name, run in runs.items():
            got = run()
            assert (got.loss, got.metrics) == (expected.loss, expected.metrics), name
            assert torch.equal(got.gradient, expected.gradient), name
        times = race({**runs, "packing": partial(packing, loss, data, outputs)}, args.rounds)
        results.append(
            {
                "sequences": args.sequences,
                "length": length,
                "milliseconds": {name: round(1e3 * statistics.median(t), 2) for name, t in times.items()},
                "ratios": {name: round(ratio(times, *pair), 1) for name, pair in RATIOS.items()},
            }
        )
    print(f"GRPO with k3 KL and metrics, loss and gradient, ms; {device_name()}, torch {torch.__version__}")
    rows = [
        [f"{row['sequences']}x{row['length']}"]
        + [f"{t:.2f}" for t in row["milliseconds"].values()]
        + [f"{x:.1f}x" for x in row["ratios"].values()]
        for row in results
    ]
    print(table(["sequences x tokens", *results[0]["milliseconds"], *RATIOS], rows))
    print(f"written: {save('flat_leaf', results).name}")


if __name__ == "__main__":
    main()
