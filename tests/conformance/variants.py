"""Correct servers that differ from the usual one: none of them may fail a check."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lossfns.backend.client.service import LocalServiceClient
from lossfns.backend.engine.budget import Budget
from lossfns.backend.model.decoder import Decoder
from lossfns.server import endpoints, service
from lossfns.server.app import App
from lossfns.server.futures import Refused


def bfloat16_weights() -> None:
    service.LocalServiceClient = partial(LocalServiceClient, dtype=torch.bfloat16)


def batches_of_two() -> None:
    """The datums of a request go through the model two at a time."""
    plan = Budget.plan

    def edited(self: Budget, inputs: Any, *args: Any) -> Any:
        n = len(inputs.tokens)
        return plan(self, inputs, *args)._replace(micro_batches=[slice(i, min(i + 2, n)) for i in range(0, n, 2)])

    Budget.plan = edited


def around_requests(wait: Callable[[str], float]) -> None:
    """Wait before each request is handled, for seconds that depend on its path."""
    guard = App.guarded

    def guarded(self: App, handler: Any) -> Any:
        right = guard(self, handler)

        async def late(request: Any) -> Any:
            await asyncio.sleep(wait(request.url.path))
            return await right(request)

        return late

    App.guarded = guarded


def delays() -> None:
    around_requests(lambda path: 0.02)


def shuffled_completion() -> None:
    """Results can be read in another order than that of the requests."""
    draw = random.Random(0)
    around_requests(lambda path: draw.uniform(0, 0.05) if path.endswith("retrieve_future") else 0.0)


class OtherTokenizer:
    """Tokens of 500 ids, of which those below 256 are the bytes in reverse order."""

    vocab_size = 500

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str) -> list[int]:
        return [255 - byte for byte in text.encode()]

    def decode(self, tokens: list[int]) -> str:
        return bytes(255 - token for token in tokens if token < 256).decode(errors="replace")


def other_tokenizer() -> None:
    size: dict[str, Any] = {"dim": 64, "layers": 2, "heads": 4, "kv_heads": 4, "hidden": 160}

    def build() -> Any:
        return Decoder(vocab_size=OtherTokenizer.vocab_size, seed=5, tied=False, **size), OtherTokenizer()

    service.LocalServiceClient = lambda models, **options: LocalServiceClient({"other": build}, **options)


def core_only() -> None:
    """Three losses, no metric but the loss, no [N, K] targets, no sampling, no uploaded losses."""
    run, config = endpoints.run_pass, endpoints.POST["client/config"]

    async def edited(client: Any, request: Any, losses: Any) -> Any:
        if request.loss_fn not in ("cross_entropy", "importance_sampling", "ppo"):
            raise endpoints.LossInputError("loss_fn", "cross_entropy, importance_sampling or ppo", request.loss_fn, "-")
        for datum in request.data if isinstance(request.data, list) else ():
            targets = datum.loss_fn_inputs.get("target_tokens")
            if targets is not None and targets.to_numpy().ndim > 1:
                raise endpoints.LossInputError("target_tokens", "one target for each position", "several", "-")
        result = await run(client, request, losses)
        result.metrics.update(kept := {"loss:sum": result.metrics["loss:sum"]})
        for name in set(result.metrics) - set(kept):
            del result.metrics[name]
        return result

    async def refused(*args: Any) -> Any:
        raise Refused(404, "this server does not have it")

    async def without_uploads(*args: Any) -> Any:
        return await config(*args) | {"custom_loss_server_side": False}

    endpoints.run_pass = edited
    endpoints.POST |= {"client/config": without_uploads, "save_weights_for_sampler": refused}
    endpoints.POST |= {"create_sampling_session": refused, "create_custom_loss": refused}


VARIANTS: dict[str, Callable[[], None]] = {
    "as it is": lambda: None,
    "bfloat16 weights": bfloat16_weights,
    "two datums at a time": batches_of_two,
    "delays of 20 ms": delays,
    "shuffled completion": shuffled_completion,
    "another tokenizer": other_tokenizer,
    "core losses only": core_only,
}
"""Name → function that patches this process's server."""
