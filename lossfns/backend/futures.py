"""Requests in submission order on one worker thread, each with a future."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class APIFuture(Generic[T]):
    """The result of a request: ``.result(timeout)``, ``await``, ``.result_async(timeout)``; as often as wanted."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future
        self.read = False

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result; raises the request's error, or TimeoutError."""
        value_or_error = self._future.exception(timeout)
        self.read = True
        if value_or_error is not None:
            raise value_or_error
        return self._future.result()

    async def result_async(self, timeout: float | None = None) -> T:
        """The same without blocking the event loop; a waiter that gives up does not cancel the request."""
        waiter = asyncio.shield(asyncio.wrap_future(self._future))
        try:
            return await asyncio.wait_for(waiter, timeout)
        finally:
            self.read = self._future.done()

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    def future(self) -> Future[T]:
        return self._future

    @property
    def lost_error(self) -> BaseException | None:
        """The error of a request that has failed and that nobody has read."""
        return self._future.exception() if self._future.done() and not self.read else None


class Worker:
    """One thread that executes requests in the order of their submission, from whatever thread that came."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lossfns")
        self._lock = Lock()
        self._open: list[APIFuture[Any]] = []

    def submit(self, request: Callable[..., T], *args: Any) -> APIFuture[T]:
        """Queue a request. An error of an earlier one that nobody read is raised here rather than lost."""
        with self._lock:
            self._open = [future for future in self._open if not future.read]
            for future in self._open:
                if (error := future.lost_error) is not None:
                    future.read = True
                    raise error
            self._open = [future for future in self._open if not future.future().done()]
            submitted = APIFuture(self._pool.submit(request, *args))
            self._open.append(submitted)
            return submitted
