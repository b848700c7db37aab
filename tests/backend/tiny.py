"""Small clients, and datums for them.

``SHAPE`` is the smallest, for tests that make very many requests. ``BYTE_SHAPE`` reads bytes.
"""

from random import Random
from typing import Any

import torch
from torch import Tensor

import lossfns
from lossfns.backend import AdamParams, Decoder, LocalReferenceClient, LocalTrainingClient
from lossfns.backend.model.tokenizer import ByteTokenizer

SHAPE: dict[str, Any] = {"vocab_size": 31, "dim": 8, "layers": 1, "heads": 2, "kv_heads": 1, "hidden": 12}
BYTE_SHAPE: dict[str, Any] = {"vocab_size": 257, "dim": 32, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 48}


def client(seed: int = 0, **options: Any) -> LocalTrainingClient:
    return LocalTrainingClient(Decoder(**SHAPE, seed=seed), tokenizer=ByteTokenizer(), device="cpu", **options)


def byte_client(seed: int = 0, **options: Any) -> LocalTrainingClient:
    return LocalTrainingClient(Decoder(**BYTE_SHAPE, seed=seed), tokenizer=ByteTokenizer(), device="cpu", **options)


def texts(rng: Random, count: int = 2, sdk: Any = lossfns, longest: int = 6, targets: int = 0) -> list[Any]:
    """Make datums of 2 to ``longest`` tokens, with last weight 1; with ``targets`` K, targets are [N, K]."""
    return [text(rng, rng.randint(2, longest), sdk, targets) for _ in range(count)]


def text(rng: Random, length: int, sdk: Any = lossfns, targets: int = 0) -> Any:
    ids = [rng.randrange(SHAPE["vocab_size"]) for _ in range(length)]
    n, k = length - 1, targets or 1
    shape = [n, k] if targets else [n]
    chosen = ids[1:] if not targets else [rng.randrange(SHAPE["vocab_size"]) for _ in range(n * k)]
    weights = [rng.choice((0.0, 0.5, 1.0)) for _ in range(n * k - 1)] + [1.0]
    fields = {
        "target_tokens": sdk.TensorData(data=chosen, dtype="int64", shape=shape),
        "weights": sdk.TensorData(data=weights, dtype="float32", shape=shape),
    }
    return sdk.Datum(model_input=sdk.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=fields)


def byte_texts(sdk: Any = lossfns, count: int = 4) -> list[Any]:
    """Make datums of 3 to 12 random bytes with targets and weights, of an SDK's classes."""
    rng = Random(3)
    data = []
    for _ in range(count):
        ids = [rng.randrange(256) for _ in range(rng.randint(3, 12))]
        n = len(ids) - 1
        fields = {
            "target_tokens": sdk.TensorData(ids[1:], "int64", [n]),
            "weights": sdk.TensorData([float(i >= n // 3) for i in range(n)], "float32", [n]),
        }
        data.append(sdk.Datum(sdk.ModelInput.from_ints(ids[:-1]), fields))
    return data


def own_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return metrics without passes, micro-batches and memory."""
    return {name: x for name, x in metrics.items() if name.partition(":")[0] not in COST}


COST = ("passes", "micro_batches", "peak_memory")


def weights(c: LocalTrainingClient) -> list[Tensor]:
    return [p.detach().clone() for p in c.model.parameters()]


def gradients(c: LocalTrainingClient) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in c.model.parameters()]


def take_gradients(c: LocalTrainingClient) -> list[Tensor]:
    """Return the accumulated gradients, 0 where a parameter has none, and clear them."""
    taken = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in c.model.parameters()]
    c.model.zero_grad(set_to_none=True)
    return taken


def assert_same_gradients(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-6) -> None:
    assert any(x.abs().max() > 1e-6 for x in a)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    """Whether two lists are equal bit for bit, with None in the same places."""
    return len(a) == len(b) and all(x is y if x is None or y is None else torch.equal(x, y) for x, y in zip(a, b))


DATA = texts(Random(0), count=4, longest=12)
RATE = AdamParams(learning_rate=1e-2)


def train(c: LocalTrainingClient, steps: int = 3) -> list[float]:
    """Train some steps on ``DATA`` and return their losses."""
    losses = []
    for _ in range(steps):
        losses.append(c.forward_backward_custom(DATA, lossfns.cross_entropy()).result().metrics["loss:sum"])
        c.optim_step(RATE).result()
    return losses


def logprobs(c: LocalReferenceClient) -> list[Tensor]:
    """Return the logprobs of ``DATA``."""
    return [o["logprobs"].to_torch() for o in c.forward(DATA, "cross_entropy").result().loss_fn_outputs]
