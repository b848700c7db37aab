"""The cost of a loss without the model: GRPO with k3 KL and its metrics, forward and backward.

Each run takes ``TensorData`` and a list of leaf logprobs, and leaves the gradients on the leaves:

- ours: ``grpo(...)(data, logprobs_list)``
- loop: the hosted APIs' documented pattern, one datum at a time, reading ``.data``
- padded: a [B, T] implementation with the cheapest padding (one cat, one index_copy)
- pad_sequence: the same with ``pad_sequence``, whose backward holds B padded gradients of [B, T] at once. At 4096 x 256
  these take 25 GB, so it is left out there

All compute the same loss, gradients and metrics. The script checks this before it times them.

    python benchmarks/loss_overhead.py [--rounds 9] [--threads 1]
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from typing import Any

import torch
from side_by_side import device_name, keep_freed_memory, race, ratio, save, table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lossfns import Datum, ModelInput, TensorData, grpo

LOW, HIGH, BETA = 0.8, 1.2, 1e-3
SIZES = ((64, 512), (512, 512), (4096, 256))
COLUMNS = ("weights", "advantages", "old_logprobs", "ref_logprobs")


def batch(sequences: int, length: int) -> tuple[list[Datum], list[Tensor]]:
    """Return ragged sequences of ``length`` tokens on average. The first quarter of each is masked."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    data, leaves = [], []
    for _ in range(sequences):
        n = rng.randint(length // 2, length + length // 2)
        logprobs = -torch.rand(n, generator=generator) * 3
        weights = (torch.arange(n) >= n // 4).float()
        old = logprobs + torch.randn(n, generator=generator) / 10 - 0.5
        columns = (weights, torch.full((n,), rng.gauss(0, 1)), old, old - 0.1)
        inputs = {name: TensorData.from_torch(x) for name, x in zip(COLUMNS, columns)}
        inputs["target_tokens"] = TensorData.from_torch(torch.zeros(n, dtype=torch.long))
        data.append(Datum(ModelInput.from_ints([0] * n), inputs))
        leaves.append(logprobs.requires_grad_())
    return data, leaves


def equations(lp: Tensor, a: Tensor, old: Tensor, ref: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    d = lp - old
    r = d.clamp(-20, 20).exp()
    x = (ref - lp).clamp(-20, 20)
    kl = torch.expm1(x) - x
    loss = -torch.minimum(r * a, r.clamp(LOW, HIGH) * a) + BETA * kl
    r, d = r.detach(), d.detach()
    metrics = {
        "ratio": r,
        "ratio_capped": d.abs() > 20,
        "log_ratio_abs": d.abs(),
        "kl_old": torch.expm1(d) - d,
        "clip_low": (a < 0) & (r < LOW),
        "clip_high": (a > 0) & (r > HIGH),
        "kl_ref": kl.detach(),
    }
    return loss, metrics


def loop(data: list[Datum], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    total, tokens, sums = torch.tensor(0.0), 0.0, {}
    for datum, lp in zip(data, logprobs_list):
        weights, a, old, ref = (torch.tensor(datum.loss_fn_inputs[c].data, dtype=torch.float32) for c in COLUMNS)
        loss, metrics = equations(lp, a, old, ref)
        total = total + torch.dot(loss, weights)
        tokens += weights.sum().item()
        for name, x in metrics.items():
            sums[name] = sums.get(name, 0.0) + torch.dot(x.float(), weights).item()
    return total / tokens, {"loss": total.item() / tokens, **{name: s / tokens for name, s in sums.items()}}


def padded_with(pad: Callable[[list[list[Tensor]]], list[Tensor]]) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    def padded(data: list[Datum], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        rows = [[datum.loss_fn_inputs[c].to_torch() for datum in data] for c in COLUMNS]
        lp, weights, a, old, ref = pad([logprobs_list, *rows])
        loss, metrics = equations(lp, a, old, ref)
        tokens = weights.sum()
        total = (loss * weights).sum() / tokens
        means = torch.stack([total.detach(), *((x * weights).sum() / tokens for x in metrics.values())]).tolist()
        return total, dict(zip(("loss", *metrics), means))

    return padded


def by_index(columns: list[list[Tensor]]) -> list[Tensor]:
    lengths = torch.tensor([len(row) for row in columns[0]])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    slots = mask.flatten().nonzero().squeeze(1)
    return [torch.zeros(mask.numel()).index_copy(0, slots, torch.cat(rows)).view(mask.shape) for rows in columns]


def by_pad_sequence(columns: list[list[Tensor]]) -> list[Tensor]:
    return [pad_sequence(rows, batch_first=True) for rows in columns]


def step(loss_fn: Callable[..., Any], data: list[Datum], leaves: list[Tensor]) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
        for leaf in leaves:
            leaf.grad = None
        loss, metrics = loss_fn(data, leaves)
        loss.backward()
        return dict(metrics)

    return run


def gradient(run: Callable[[], Any], leaves: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    metrics = run()
    return torch.cat([leaf.grad for leaf in leaves if leaf.grad is not None]), metrics


def cell(row: dict[str, Any], name: str) -> str:
    if name not in row["milliseconds"]:
        return "-"
    return f"{row['milliseconds'][name]:.2f} ms ({row['times_ours'][name]:.2f}x)"


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--threads", type=int, default=1, help="1 by default, as OpenMP threads on shared cores stall one another"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    losses = {
        "ours": grpo(clip=(LOW, HIGH), kl_beta=BETA),
        "loop": loop,
        "padded": padded_with(by_index),
        "pad_sequence": padded_with(by_pad_sequence),
    }
    results = []
    for sequences, length in SIZES:
        data, leaves = batch(sequences, length)
        runs = {name: step(loss_fn, data, leaves) for name, loss_fn in losses.items()}
        if sequences > 1024:
            del runs["pad_sequence"]
        expected, metrics = gradient(runs["padded"], leaves)
        for run in runs.values():
            got, own = gradient(run, leaves)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-8)
            for name, value in metrics.items():
                assert abs(own[name] - value) <= 1e-4 * max(1, abs(value)), (name, own[name], value)
        times = race(runs, args.rounds)
        results.append(
            {
                "sequences": sequences,
                "length": length,
                "milliseconds": {name: round(1e3 * statistics.median(t), 2) for name, t in times.items()},
                "times_ours": {name: round(ratio(times, name, "ours"), 2) for name in runs},
            }
        )
    print(f"GRPO with k3 KL and metrics, forward + backward; {device_name()}, torch {torch.__version__}")
    rows = [[f"{row['sequences']}x{row['length']}"] + [cell(row, name) for name in losses] for row in results]
    print(table(["sequences x tokens", *losses], rows))
    print(f"written: {save('loss_overhead', results).name}")


if __name__ == "__main__":
    main()
