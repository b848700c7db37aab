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

VERSIONS = "0.38"
"""The SDK whose insides ``local_service`` knows."""


@contextmanager
def local_service(service: Service | None = None, **options: Any) -> Iterator[tinker.ServiceClient]:
    """Return the SDK's ``ServiceClient`` of a service in this process, for the length of a ``with`` block.

    The SDK's requests go to the application itself: nothing listens, and nothing is sent. Inside of the block every
    new ``ServiceClient`` goes there; afterwards the SDK is as it was before.

    Args:
        service: a ``Service``; None takes one with the embedded model, ``"Decoder"``. One with a ``state`` is restored,
            and saved at the end.
        options: of ``create_app``.

    Raises LossInputError for a version of the SDK whose insides are not known: use ``lossfns serve`` with it.
    """
    if not tinker.__version__.startswith(f"{VERSIONS}."):
        fix = "Start `lossfns serve` and pass base_url=, which works with any version."
        raise LossInputError("tinker", f"version {VERSIONS}", tinker.__version__, fix)
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
