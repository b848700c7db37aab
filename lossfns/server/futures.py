"""The results of accepted requests, kept until the client has read them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from lossfns.backend.types import ForwardBackwardOutput
from lossfns.server.session import session_of

REASON_CHARACTERS = 2000
"""The most characters of a reason, which may quote a request of any length."""


def printable(reason: str) -> str:
    """Return a reason on one line, shortened in the middle, with control characters as escapes."""
    if len(reason) > REASON_CHARACTERS:
        reason = f"{reason[: REASON_CHARACTERS - 500]} ... {reason[-400:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in reason)


class Refused(Exception):
    """A request that is not accepted: the status and the reason that the client gets.

    The SDKs send a request again after 408, 409, 429 and 5xx, and after no other status.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Future:
    """An accepted request: pending, then with a result or an error.

    Attributes:
        request_id: what the client asks for.
        digest: of the request's body, which tells a repeated request from another one; None matches any.
        result: what the request returned.
        error, category: why it failed, and who has to act: ``"user"`` or ``"server"``.
        waiters: how many requests wait for the outcome.
        nbytes: the bytes of the arrays of the result.
        done: set when there is an outcome, and for a moment by ``wake``.
        finished, retrieved: when it had its outcome, and when the client got it, by the monotonic clock; 0 before.
    """

    def __init__(self, request_id: str, digest: int | None) -> None:
        self.request_id, self.digest = request_id, digest
        self.result: Any = None
        self.error: str | None = None
        self.category = "user"
        self.finished = self.retrieved = 0.0
        self.nbytes = self.waiters = 0
        self.done = asyncio.Event()

    def set_result(self, result: Any) -> None:
        self.result = result
        self._finish()

    def set_error(self, error: str, category: str = "user") -> None:
        self.error, self.category = printable(error), category
        self._finish()

    def _finish(self) -> None:
        self.finished = time.monotonic()
        outputs = self.result.loss_fn_outputs if isinstance(self.result, ForwardBackwardOutput) else []
        self.nbytes = sum(x.to_numpy().nbytes for record in outputs for x in record.values())
        self.done.set()

    async def wait(self) -> None:
        """Wait for the outcome, or until ``wake``."""
        if not self.finished:
            self.waiters += 1
            try:
                await self.done.wait()
            finally:
                self.waiters -= 1

    def wake(self) -> None:
        """End all waits, also without an outcome."""
        self.done.set()
        if not self.finished:
            self.done.clear()


class Futures:
    """All futures by request id.

    A retrieved result is kept for another ``RETRIEVED_SECONDS``, since the response may have been lost. A result that
    nobody retrieves is kept for ``UNREAD_SECONDS``.

    Args:
        limit: the most futures, pending ones included; one session may hold half of them.
        limit_bytes: the most bytes of results; one session may hold half of them.
    """

    RETRIEVED_SECONDS, UNREAD_SECONDS = 60.0, 3600.0

    def __init__(self, limit: int, limit_bytes: int) -> None:
        self.limit, self.limit_bytes = limit, limit_bytes
        self.by_id: dict[str, Future] = {}
        self.bytes = 0
        self._retrieved: dict[str, Future] = {}  # in order
        self._finished: dict[str, Future] = {}  # in order

    def find(self, request_id: str) -> Future:
        if request_id not in self.by_id:
            reason = f"The request {request_id!r} is unknown here, or its result has expired. Submit it again."
            raise Refused(410, reason)
        return self.by_id[request_id]

    def repeated(self, request_id: str, digest: int | None) -> Future | None:
        """Return the future of a request that was accepted before; refuse another request of the same id."""
        future = self.by_id.get(request_id)
        if future is not None and None not in (digest, future.digest) and digest != future.digest:
            raise Refused(400, f"Another request was accepted under the id {request_id!r}. Take the next sequence id.")
        return future

    def begin(self, request_id: str, digest: int | None) -> Future:
        """Create the future of an accepted request."""
        self._expire()
        self._check_share(session_of(request_id))
        if len(self.by_id) >= self.limit or self.bytes >= self.limit_bytes:
            raise Refused(429, f"{len(self.by_id)} results with {self.bytes} bytes are not yet retrieved.")
        future = self.by_id[request_id] = Future(request_id, digest)
        return future

    def finish(self, future: Future) -> None:
        """Count the bytes of a future that has its outcome, and start its time to be retrieved."""
        self.bytes += future.nbytes
        self._finished[future.request_id] = future

    def retrieve(self, future: Future) -> None:
        """Mark an outcome as given to the client."""
        if not future.retrieved:
            future.retrieved = time.monotonic()
            self._finished.pop(future.request_id, None)
            self._retrieved[future.request_id] = future

    def release(self, session_id: str) -> None:
        """Count the outcomes of a session that has ended as read."""
        for future in [future for future in self._finished.values() if session_of(future.request_id) == session_id]:
            self.retrieve(future)

    def _check_share(self, session_id: str) -> None:
        """Refuse a session that holds half of the limit: a client that reads nothing must not stop the others."""
        if 2 * len(self.by_id) >= self.limit or 2 * self.bytes >= self.limit_bytes:
            sizes = [future.nbytes for name, future in self.by_id.items() if session_of(name) == session_id]
            if 2 * len(sizes) >= self.limit or 2 * sum(sizes) >= self.limit_bytes:
                reason = f"{len(sizes)} results of this session with {sum(sizes)} bytes are not yet retrieved."
                raise Refused(429, reason)

    def drop(self, request_id: str) -> None:
        future = self.by_id.pop(request_id, None)
        if future is not None:
            self._retrieved.pop(request_id, None)
            self._finished.pop(request_id, None)
            self.bytes -= future.nbytes

    def _expire(self) -> None:
        now = time.monotonic()
        full = len(self.by_id) >= self.limit or self.bytes >= self.limit_bytes
        retrieved_before = now - (0.0 if full else self.RETRIEVED_SECONDS)
        old = [i for i, future in self._retrieved.items() if future.retrieved <= retrieved_before]
        old += [i for i, future in self._finished.items() if future.finished <= now - self.UNREAD_SECONDS]
        for request_id in old:
            self.drop(request_id)
