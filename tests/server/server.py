"""A server in a thread of the test, for the length of a ``with`` block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

for name in ("starlette", "uvicorn"):
    pytest.importorskip(name)
tinker = pytest.importorskip("tinker", "0.38")

import uvicorn

from lossfns.server.app import create_app
from lossfns.server.command import listening_socket
from lossfns.server.service import Service


@contextmanager
def served(service: Service | None = None, **options: Any) -> Iterator[str]:
    """Return the address of a server."""
    service = service or Service(device="cpu")
    server = uvicorn.Server(uvicorn.Config(create_app(service, **options), log_level="warning", access_log=False))
    with listening_socket("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
