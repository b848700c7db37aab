"""A server in a thread of the test, for the length of a ``with`` block, and datums for it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

for name in ("starlette", "uvicorn"):
    pytest.importorskip(name)
tinker = pytest.importorskip("tinker", "0.38")
httpx = pytest.importorskip("httpx")
zstandard = pytest.importorskip("zstandard")

import uvicorn

from lossfns.backend.model.decoder import Decoder
from lossfns.backend.model.tokenizer import ByteTokenizer
from lossfns.server.app import create_app
from lossfns.server.command import listening_socket
from lossfns.server.service import Service

KEY = "tml-local"


def tiny_model() -> Any:
    """A model that computes in a millisecond."""
    return Decoder(vocab_size=257, dim=16, layers=1, heads=2, kv_heads=1, hidden=32), ByteTokenizer()


def tiny_service(**options: Any) -> Service:
    return Service({"Tiny": tiny_model}, device="cpu", **options)


@contextmanager
def served(service: Service, *, port: int = 0, **options: Any) -> Iterator[str]:
    """Return the address of a server. At the end it stops as after SIGTERM."""
    server = uvicorn.Server(uvicorn.Config(create_app(service, **options), log_level="warning", access_log=False))
    with listening_socket("127.0.0.1", port) as sock:
        loops: list[asyncio.AbstractEventLoop] = []

        async def serve() -> None:
            loops.append(asyncio.get_running_loop())
            await server.serve(sockets=[sock])

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            loops[0].call_soon_threadsafe(service.begin_stop)
            server.should_exit = True
            thread.join()


@contextmanager
def sdk(service: Service | None = None, **options: Any) -> Iterator[Any]:
    """Return a ``ServiceClient`` of the SDK on a server of its own."""
    with served(service or tiny_service(), **options) as url, tinker.ServiceClient(base_url=url, api_key=KEY) as client:
        yield client


def datum(tokens: list[int], **fields: Any) -> Any:
    """A datum of a whole sequence; without ``target_tokens`` these are the next tokens."""
    inputs = {"target_tokens": tokens[1:], **fields}
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def batch() -> list[Any]:
    """Three datums of different lengths, with weights."""
    rows = [[1, 2, 3, 4], [9, 8, 7, 6, 5, 4], [100, 200]]
    return [datum(row, weights=[0.5 + 0.25 * i for i in range(len(row) - 1)]) for row in rows]
