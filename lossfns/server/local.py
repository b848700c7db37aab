"""The SDK's own ``ServiceClient`` on a service of this process, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import tinker
from tinker.lib import internal_client_holder as holder

from lossfns.errors import LossInputError
from lossfns.server.app import create_app
from lossfns.server.service import Service

URL = "http://local"

VERSION = "0.38"
"""The version of the SDK whose internal classes ``local_service`` replaces."""


@contextmanager
def local_service(service: Service | None = None, **options: Any) -> Iterator[tinker.ServiceClient]:
    """Yield the SDK's ``ServiceClient`` of a service in this process, for the length of a ``with`` block.

    The SDK's requests go to the application itself: nothing listens, and nothing is sent. Inside the block every new
    ``ServiceClient`` does the same; afterwards the SDK is as it was before.

    Args:
        service: a ``Service``; None takes one with the embedded model, ``"Decoder"``. One with a ``state`` is restored,
            and saved at the end.
        options: of ``create_app``.

    Raises:
        LossInputError: for another version of the SDK than 0.38. Use ``lossfns serve`` with it.
    """
    if not tinker.__version__.startswith(f"{VERSION}."):
        fix = "Start `lossfns serve` and pass base_url=, which works with any version."
        raise LossInputError("tinker", f"version {VERSION}", tinker.__version__, fix)
    app = create_app(service or Service(), **options)
    transport, lifespan = httpx.ASGITransport(app), app.router.lifespan_context(app)
    inside: Any = holder
    original = inside.AsyncTinker
    loop = inside._internal_client_holder_thread_singleton.get_loop()

    class InProcess(original):  # type: ignore[misc, valid-type]
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs, http_client=httpx.AsyncClient(transport=transport, base_url=URL))

    asyncio.run_coroutine_threadsafe(lifespan.__aenter__(), loop).result()
    inside.AsyncTinker = InProcess
    try:
        with tinker.ServiceClient(base_url=URL, api_key="tml-local") as client:
            yield client
    finally:
        inside.AsyncTinker = original
        asyncio.run_coroutine_threadsafe(lifespan.__aexit__(None, None, None), loop).result()
