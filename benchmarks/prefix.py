"""The time that a common prompt saves in the local client: GRPO over groups, shared and as independent sequences.

- shared: the client, which computes a common prefix once
- independent: the same client with a model that cannot continue a segment, so that it computes every sequence whole

Both compute the same logprobs and gradients. In float32 the script checks this before it times them (logprobs to 1e-5,
gradients to 1e-4 in relative norm). "tokens" is the ratio of the computed tokens, which bounds the gain.

    python benchmarks/prefix.py [--rounds 5] [--dtype float32] [--case "8 of 512 + 128"]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from memory import elsewhere, peak
from side_by_side import device_name, keep_freed_memory, load, race, ratio, save, table
from torch import Tensor

from lossfns import Datum, datum_from_tokens, grpo
from lossfns.backend import LocalTrainingClient
from lossfns.backend.model.decoder import Decoder

MODEL: dict[str, Any] = {"vocab_size": 4096, "dim": 512, "layers": 4, "heads": 8, "kv_heads": 4, "hidden": 1408}


class Case(NamedTuple):
    """Groups of sequences. The sequences of a group have a common prompt, and completions of these lengths."""

    name: str
    groups: int
    prompt: int
    completions: list[int]


CASES = (
    Case("8 of 512 + 128", 1, 512, [128] * 8),
    Case("8 of 512 + 72 to 184", 1, 512, [72 + 16 * i for i in range(8)]),
    Case("8 of 256 + 256", 1, 256, [256] * 8),
    Case("8 pairs of 256 + 96, 160", 8, 256, [96, 160]),
)


class Independent(Decoder):
    """A decoder that takes whole sequences only."""

    def forward(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:  # type: ignore[override]
        return super().forward(tokens, lengths)


MODELS: dict[str, type[Decoder]] = {"shared": Decoder, "independent": Independent}


def datums(case: Case) -> list[Any]:
    """Return datums with random tokens and advantages, and logprobs near those of an untrained model."""
    rng = np.random.default_rng(0)
    data = []
    for _ in range(case.groups):
        prompt = rng.integers(0, MODEL["vocab_size"], case.prompt)
        for length in case.completions:
            tokens = np.append(prompt, rng.integers(0, MODEL["vocab_size"], length))
            sampled, reference = (rng.normal(-np.log(MODEL["vocab_size"]), 0.2, len(tokens) - 1) for _ in range(2))
            fields = {
                "logprobs": sampled,
                "ref_logprobs": reference,
                "advantages": rng.normal(size=1).repeat(len(sampled)),
            }
            data.append(datum_from_tokens(tokens.tolist(), prompt_length=case.prompt, **fields))
    return data


def prepare(case: Case, kind: str, dtype: torch.dtype) -> tuple[LocalTrainingClient, Callable[[], None]]:
    """Return a client and a request to it, which takes it from tokens to gradients."""
    client = LocalTrainingClient(MODELS[kind](**MODEL), dtype=dtype)
    return client, partial(request_grpo, client, datums(case))


def request_grpo(client: LocalTrainingClient, data: list[Any]) -> None:
    """Compute new gradients of GRPO."""
    client.model.zero_grad(set_to_none=True)
    client.forward_backward_custom(data, grpo()).result()


def logprobs(client: LocalTrainingClient, datums: list[Any]) -> np.ndarray:
    """Return the logprobs of all targets, datum by datum."""
    data = [Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in datums]
    outputs = client.forward(data, "cross_entropy").result().loss_fn_outputs
    return np.concatenate([output["logprobs"].to_numpy() for output in outputs])


def gradient(client: LocalTrainingClient, request: Callable[[], None]) -> Tensor:
    request()
    return torch.cat([p.grad.flatten().double() for p in client.model.parameters() if p.grad is not None])


def measure(case: Case, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    both = {kind: prepare(case, kind, dtype) for kind in MODELS}
    ours, theirs = (logprobs(client, datums(case)) for client, _ in both.values())
    a, b = (gradient(*each) for each in both.values())
    apart = {"logprobs": float(np.abs(ours - theirs).max()), "gradient": float((a - b).norm() / b.norm())}
    if dtype == torch.float32:
        assert apart["logprobs"] < 1e-5 and apart["gradient"] < 1e-4, apart
    times = race({kind: request for kind, (_, request) in both.items()}, rounds)
    return {
        "milliseconds": {kind: round(1e3 * statistics.median(t), 1) for kind, t in times.items()},
        "faster": round(ratio(times, "independent", "shared"), 3),
        "apart": apart,
    }


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--case", nargs="+", default=[case.name for case in CASES])
    options = parser.parse_args()
    results = []
    for name in options.dtype:
        dtype = getattr(torch, name)
        for case in (case for case in CASES if case.name in options.case):
            memory = {kind: peak(lambda of=(case, kind, dtype): prepare(*of)[1]) for kind in MODELS}
            whole, own = case.groups * (case.prompt * len(case.completions)), case.groups * sum(case.completions)
            fewer = (whole + own) / (case.groups * case.prompt + own)
            measured = elsewhere(partial(measure, case, dtype, options.rounds))
            results.append(
                {"case": case.name, "dtype": name, "tokens": round(fewer, 2), **measured, "peak_bytes": memory}
            )
    print(f"grpo, forward + backward of {MODEL}; {device_name()}, torch {torch.__version__}")
    header = ["group", "tokens", "shared", "independent", "faster", "logprobs apart", "gradient apart"]
    lines = [
        [f"{row['case']}, {row['dtype']}", f"{row['tokens']:.2f}x"]
        + [f"{row['milliseconds'][kind]:.0f} ms, {row['peak_bytes'][kind] / 2**20:.0f} MiB" for kind in MODELS]
        + [f"{row['faster']:.2f}x", f"{row['apart']['logprobs']:.1e}", f"{row['apart']['gradient']:.1e}"]
        for row in results
    ]
    print(table(header, lines))
    done = [(row["case"], row["dtype"]) for row in results]
    rows = [row for row in load("prefix") if (row["case"], row["dtype"]) not in done] + results
    print(f"written: {save('prefix', rows).name}")


if __name__ == "__main__":
    main()
