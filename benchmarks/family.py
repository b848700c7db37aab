"""Time every loss of the library on one padded batch, beside grpo or dpo.

    python benchmarks/family.py                   # 4096 sequences of 256 tokens; takes some minutes
    python benchmarks/family.py --rows 512 --columns 64 --rounds 3

Each call computes the loss, its metrics, and the gradient of the logprobs, in eager mode. Losses over tokens are
compared with grpo, losses over pairs or datums with dpo, and losses over K candidates, of as many numbers, with
top_k_forward_kl. The script prints a table, and writes JSON and a picture to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from side_by_side import device_name, race, ratio, save, table
from torch import Tensor

from lossfns import Loss
from lossfns.describe import presets
from lossfns.tokens import DATUM_COLUMNS, PAIRS, SEQUENCES, TARGETS

K = 16
"""Candidates of a position."""
AIM = 2.0
"""The largest ratio that a loss may have to its reference."""
REFERENCES = {PAIRS: "dpo", SEQUENCES: "dpo", TARGETS: "top_k_forward_kl"}
TO = ("grpo", "dpo", "top_k_forward_kl")


def reference(loss: Loss) -> str:
    """Return the name of the loss that this loss is compared with."""
    return REFERENCES.get(loss.rows, "grpo")


def batch_for(loss: Loss, rows: int, columns: int) -> dict[str, Tensor]:
    """Return logprobs, weights and the columns that the loss reads, with padding on the right."""
    g = torch.Generator().manual_seed(0)
    shape = (rows, columns // K, K) if loss.rows is TARGETS else (rows, columns)
    rand = partial(torch.rand, generator=g)
    logprobs = -3 * rand(shape) - (3 if loss.rows is TARGETS else 0.01)  # so that K probabilities sum to less than 1
    lengths = (shape[1] * (0.5 + 0.5 * rand(rows))).long()
    mask = (torch.arange(shape[1]) < lengths[:, None]).float()
    batch = {"logprobs": logprobs, "weights": mask[..., None].expand(shape) if loss.rows is TARGETS else mask}
    for name in loss.reads:
        if name == "groups":
            batch[name] = (torch.arange(rows) // 8).float()
        elif name in DATUM_COLUMNS or name == "advantages":
            batch[name] = (rand(rows) > 0.5).float() if name == "labels" else torch.randn(rows, generator=g)
        elif name.endswith("logprobs"):
            batch[name] = (logprobs + 0.2 * torch.randn(shape, generator=g)).clamp(max=0)
        else:
            batch[name] = rand(shape)
    return batch


def step(loss: Loss, batch: dict[str, Tensor]) -> Tensor:
    """Compute loss, metrics and gradient."""
    leaf = batch["logprobs"].requires_grad_()
    leaf.grad = None
    total, _ = loss.padded(leaf, **{name: x for name, x in batch.items() if name != "logprobs"})
    total.backward()
    assert leaf.grad is not None
    return leaf.grad


def measure(names: list[str], rows: int, columns: int, rounds: int) -> list[dict[str, Any]]:
    """Time losses with one reference in turns; return a row for each."""
    runs: dict[str, Callable[[], Any]] = {}
    for name in names:
        loss = presets()[name]()
        runs[name] = partial(step, loss, batch_for(loss, rows, columns))
    times, to = race(runs, rounds), reference(presets()[names[0]]())
    return [
        {
            "loss": name,
            "reference": to,
            "milliseconds": round(1e3 * statistics.median(times[name]), 2),
            "ratio": round(ratio(times, name, to), 3),
        }
        for name in names
    ]


def picture(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the ratio of each loss to its reference, one panel for each reference."""
    from matplotlib.figure import Figure

    panels = {to: sorted((r for r in rows if r["reference"] == to), key=lambda r: r["ratio"]) for to in TO}
    figure = Figure(figsize=(11, 1.4 + 0.16 * max(map(len, panels.values()))), layout="constrained")
    axes: Any = figure.subplots(1, len(panels))
    for panel, (to, members) in zip(axes, panels.items()):
        panel.plot([r["ratio"] for r in members], range(len(members)), "o", markersize=4, color="#0072b2")
        panel.axvline(1, color="0.6", linewidth=1)
        panel.axvline(AIM, color="#d55e00", linewidth=1, linestyle="--")
        panel.set_yticks(range(len(members)), [r["loss"] for r in members], fontsize=7)
        panel.set_xlim(0, max(1.1 * AIM, *(1.1 * r["ratio"] for r in members)))
        panel.set_xlabel(f"time / time of {to}", fontsize=8)
        panel.grid(axis="x", color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for to in TO:
        names = [name for name, preset in presets().items() if reference(preset()) == to]
        rows += measure(names, args.rows, args.columns, args.rounds)
    cells = [
        [
            r["loss"],
            f"{r['milliseconds']:.1f}",
            f"{r['ratio']:.2f}",
            r["reference"],
            "above" * (r["ratio"] > AIM),
        ]
        for r in sorted(rows, key=lambda r: r["ratio"])
    ]
    size = f"{args.rows} x {args.columns} tokens, {device_name()}, torch {torch.__version__}"
    print(f"Loss, metrics and gradient: {size}")
    print(table(["loss", "ms", "ratio", "to", f"aim {AIM:g}"], cells))
    path = save("family", [{"sequences": args.rows, "length": args.columns, **row} for row in rows])
    picture(rows, f"Loss, metrics and gradient of every loss: {size}", path.with_suffix(".png"))


if __name__ == "__main__":
    main()
