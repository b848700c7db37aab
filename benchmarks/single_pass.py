"""The cost of a custom loss in the local client: the same step with a built-in loss, a custom loss, and two passes.

- built-in: ``forward_backward(data, "cross_entropy")``
- custom: ``forward_backward_custom(data, cross_entropy(weigh=token_sum))``
- per datum: the same loss as the documentation of the hosted APIs writes it, with one ``torch.dot`` for each datum
- two passes: the protocol of the hosted services: ``forward``, the gradient of the loss in the logprobs, and a built-in
  loss with weights −gradient

All compute the same gradients of the parameters. The script checks this (to 1e-6) before it times them.

    python benchmarks/single_pass.py [--rounds 11]
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from side_by_side import device_name, keep_freed_memory, race, ratio, save, table
from torch import Tensor

from lossfns import Datum, TensorData, cross_entropy, datum_from_tokens, token_sum
from lossfns.backend import LocalTrainingClient

SIZES = ((8, 64), (32, 128), (128, 64))


def documented(data: list[Any], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    total = torch.tensor(0.0)
    for datum, logprobs in zip(data, logprobs_list):
        weights = torch.tensor(datum.loss_fn_inputs["weights"].data, dtype=torch.float32)
        total = total - torch.dot(logprobs, weights)
    return total, {}


def two_passes(client: LocalTrainingClient, data: list[Any]) -> None:
    forward = client.forward(data, "cross_entropy").result()
    leaves = [o["logprobs"].to_torch().requires_grad_() for o in forward.loss_fn_outputs]
    cross_entropy(weigh=token_sum)(data, leaves)[0].backward()
    surrogate = []
    for datum, leaf in zip(data, leaves):
        assert leaf.grad is not None
        targets = datum.loss_fn_inputs["target_tokens"]
        fields = {"target_tokens": targets, "weights": TensorData.from_torch(-leaf.grad)}
        surrogate.append(Datum(datum.model_input, fields))
    client.forward_backward(surrogate, "cross_entropy").result()


def fresh(client: LocalTrainingClient, request: Callable[[], Any]) -> None:
    client.model.zero_grad(set_to_none=True)
    request()


def batch(sequences: int, length: int) -> list[Any]:
    rng = random.Random(0)
    rows = [[rng.randrange(256) for _ in range(rng.randint(length // 2, 3 * length // 2))] for _ in range(sequences)]
    return [datum_from_tokens(row, prompt_length=len(row) // 4) for row in rows]


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    client = LocalTrainingClient()
    ours = cross_entropy(weigh=token_sum)
    results = []
    for sequences, length in SIZES:
        data = batch(sequences, length)
        requests: dict[str, Callable[[], Any]] = {
            "built-in": lambda data=data: client.forward_backward(data, "cross_entropy").result(),
            "custom": lambda data=data: client.forward_backward_custom(data, ours).result(),
            "per datum": lambda data=data: client.forward_backward_custom(data, documented).result(),
            "two passes": lambda data=data: two_passes(client, data),
        }

        runs = {name: partial(fresh, client, request) for name, request in requests.items()}
        gradients = {}
        for name, run in runs.items():
            run()
            gradients[name] = torch.cat([p.grad.flatten() for p in client.model.parameters() if p.grad is not None])
        scale = gradients["built-in"].abs().max()
        apart = {name: float((g - gradients["built-in"]).abs().max() / scale) for name, g in gradients.items()}
        assert max(apart.values()) < 1e-6, apart
        times = race(runs, rounds)
        results.append(
            {
                "sequences": sequences,
                "length": length,
                "milliseconds": {name: round(1e3 * statistics.median(t), 2) for name, t in times.items()},
                "times_built_in": {name: round(ratio(times, name, "built-in"), 3) for name in runs},
                "gradient_apart": apart,
            }
        )
    info = client.get_info()
    print(f"a step's forward + backward, {info.parameters:,} parameters; {device_name()}, torch {torch.__version__}")
    names = list(results[0]["milliseconds"])
    rows = [
        [f"{row['sequences']}x{row['length']}"]
        + [f"{row['milliseconds'][name]:.1f} ms ({row['times_built_in'][name]:.2f}x)" for name in names]
        for row in results
    ]
    print(table(["sequences x tokens", *names], rows))
    print(f"written: {save('single_pass', results).name}")


if __name__ == "__main__":
    main()
