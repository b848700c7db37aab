"""The local client: how often the host waits for the device, and a training step of a large decoder."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from gpu_checks.losses import datums_of, padded_columns
from gpu_checks.measure import BOUNDS, ROOT, Checks, Figures, pick, place, timed
from single_pass import fresh, two_passes
from torch import Tensor

from lossfns import cross_entropy, datum_from_tokens, grpo, token_sum
from lossfns.backend import LocalTrainingClient
from lossfns.backend.model.decoder import Decoder
from lossfns.backend.types import AdamParams


def waits(device: str) -> Checks:
    """How often and where the host waits for the device in a call that is warmed up.

    Without a GPU, the calls run on the device of ``tests/device/rehearsal.py``.
    """
    target, dtype = (device, torch.bfloat16) if device == "cuda" else (str(rehearsed().DEVICE), torch.float32)
    loss = grpo()
    columns = padded_columns(loss, 4, 16, target)
    flat = {name: x.flatten() for name, x in columns.items()}
    lengths = torch.full((4,), 16, device=target)
    bound, data = datums_of(loss, columns)
    client = LocalTrainingClient(device=target, dtype=dtype)
    tokens = [datum_from_tokens(list(range(1, 40 + i)), prompt_length=8) for i in range(4)]
    cross = cross_entropy(weigh=token_sum)
    deferred = loss.deferred()
    calls: dict[str, tuple[int, Callable[[], Any]]] = {
        "loss and metrics of datums": (1, lambda: bound(data, list(columns["logprobs"].unbind()))),
        "padded": (1, lambda: loss.padded(**columns)),
        "packed": (1, lambda: loss.packed(**flat, lengths=lengths)),
        "padded, deferred": (0, lambda: deferred.padded(**columns)),
        "packed, deferred": (0, lambda: deferred.packed(**flat, lengths=lengths)),
        "forward": (1, lambda: client.forward(tokens, "cross_entropy").result()),
        "forward_backward": (2, lambda: client.forward_backward(tokens, "cross_entropy").result()),
        "forward_backward_custom": (2, lambda: client.forward_backward_custom(tokens, cross).result()),
    }

    def check(call: Callable[[], Any], limit: int) -> Figures:
        call()
        with recorded_waits(device) as places:
            call()
        return {"found": len(places), "limit": limit, "note": ", ".join(places)}

    def check_step() -> Figures:
        client.forward_backward(tokens, "cross_entropy").result()
        client.optim_step(AdamParams()).result()
        client.forward_backward(tokens, "cross_entropy").result()
        with recorded_waits(device) as places:
            client.optim_step(AdamParams()).result()
        return {"found": len(places), "limit": 1, "note": ", ".join(places)}

    checks: Checks = {name: partial(check, call, limit) for name, (limit, call) in calls.items()}
    return checks | {"optim_step": check_step}


def rehearsed() -> Any:
    """Register the rehearsed device of the tests in this process, and return its module."""
    sys.path.insert(0, str(ROOT / "tests/device"))
    return import_module("rehearsal")


@contextmanager
def recorded_waits(device: str) -> Iterator[list[str]]:
    """Yield a list that fills with the places where the host waits for the device."""
    if device == "cpu":
        rehearsed().waits.clear()
        yield rehearsed().waits
        return
    with recorded_warnings("called a synchronizing CUDA operation") as places:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def recorded_warnings(text: str) -> Iterator[list[str]]:
    """Yield a list that fills with the places of the warnings with this text, on any thread. Others are dropped."""
    places: list[str] = []

    def record(message: Any, *_: Any, **__: Any) -> None:
        if text in str(message):
            places.append(place(traceback.extract_stack()[:-1]))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = record
        yield places


# A training step

BILLION = {"vocab_size": 128_256, "dim": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "hidden": 8192}
TINY = {"vocab_size": 256, "dim": 32, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 64}


def step(device: str) -> Checks:
    """A training step of a decoder of 1.2 billion parameters in bfloat16: built-in, custom and two-pass gradients."""
    size, dtype = pick(device, (BILLION, torch.bfloat16), (TINY, torch.float32))
    sequences, length = pick(device, (16, 1024), (4, 32))
    with torch.device(device):
        model = Decoder(**size)
    client = LocalTrainingClient(model, device=device, dtype=dtype)
    route = model.attention
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size["vocab_size"], (sequences, length + 1), generator=generator).tolist()
    data, tokens = [datum_from_tokens(row, prompt_length=length // 4) for row in ids], sequences * length
    ours = cross_entropy(weigh=token_sum)
    requests: dict[str, Callable[[], Any]] = {
        "built-in": lambda: client.forward_backward(data, "cross_entropy").result(),
        "custom": lambda: client.forward_backward_custom(data, ours).result(),
        "two passes": lambda: two_passes(client, data),
    }

    def gradients(request: Callable[[], Any]) -> list[Tensor]:
        fresh(client, request)
        return [p.grad.detach().clone() for p in client.model.parameters() if p.grad is not None]

    expected = cache(lambda: gradients(requests["built-in"]))

    def with_speed(figures: Figures) -> Figures:
        return {"note": f"{1e3 * tokens / figures['milliseconds']:,.0f} tokens/s, attention by {route}", **figures}

    def check(request: Callable[[], Any]) -> Figures:
        error = distance(gradients(request), expected())
        return {"found": error, "limit": BOUNDS[dtype], **with_speed(timed(partial(fresh, client, request)))}

    def check_step() -> Figures:
        expected.cache_clear()  # frees the gradients

        def run() -> None:
            fresh(client, requests["custom"])
            client.optim_step(AdamParams(learning_rate=1e-6)).result()

        return with_speed(timed(run))

    checks: Checks = {f"{name} forward and backward": partial(check, run) for name, run in requests.items()}
    return checks | {"custom, with optim_step": check_step}


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the norm of the difference of two gradients over all parameters, relative to the norm of the second."""
    difference = sum(float((a - b).double().square().sum()) for a, b in zip(found, expected, strict=True))
    return float((difference / sum(float(b.double().square().sum()) for b in expected)) ** 0.5)
