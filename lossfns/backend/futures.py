"""Requests in submission order on one worker thread, each with a future."""

from __future__ import annotations

import asyncio
import atexit
import functools
import logging
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, TimeoutError
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any, Generic, ParamSpec, Self, TypeVar

from lossfns import LossInputError

T = TypeVar("T")
P = ParamSpec("P")

log = logging.getLogger("lossfns")


class APIFuture(Generic[T]):
    """The result of a request: ``.result(timeout)``, ``await``, ``.result_async(timeout)``; as often as wanted.

    Any number of threads and coroutines may wait. One that gives up raises TimeoutError and leaves the
    request as it is. An error is raised to each reader with the traceback of the request.
    """

    def __init__(self, future: Future[T], thread: int) -> None:
        self._future, self._thread = future, thread
        self._waiters: list[object] = []
        self.read = False

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result; raises the request's error, or TimeoutError."""
        self._refuse_to_wait_within()
        with self._waiting():
            self._future.exception(timeout)
            return self._value()

    async def result_async(self, timeout: float | None = None) -> T:
        """The same without blocking the event loop."""
        self._refuse_to_wait_within()
        waiter = asyncio.wrap_future(self._finished())
        with self._waiting():
            try:
                if not (await asyncio.wait([waiter], timeout=timeout))[0]:
                    raise TimeoutError
            finally:
                waiter.cancel()
            return self._value()

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    async def coroutine(self) -> T:
        """This future as a coroutine, for ``asyncio.create_task``."""
        return await self

    def future(self) -> Future[T]:
        """The same as a ``concurrent.futures.Future``; an error taken from it counts as unread."""
        return self._future

    @property
    def error(self) -> BaseException | None:
        """The error of a request that has failed, or was cancelled through ``future()``."""
        if self._future.cancelled():
            return CancelledError()
        return self._future.exception() if self._future.done() else None

    @property
    def unread(self) -> bool:
        """Whether the request has failed and nobody has read why."""
        return not (self.read or self.error is None or isinstance(self.error, KNOWN))

    @property
    def lost(self) -> bool:
        """Whether nobody waits to read it either."""
        return self.unread and not self._waiters

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Whoever waits will read the error: the next call need not raise it."""
        waiter = object()
        self._waiters.append(waiter)
        try:
            yield
        finally:
            self._waiters.remove(waiter)

    def _value(self) -> T:
        self.read = True
        if self.error is not None:
            raise own(self.error)
        return self._future.result()

    def _finished(self) -> Future[None]:
        """A future of its own for each waiter: one that is cancelled does not cancel the request."""
        finished: Future[None] = Future()

        def finish(_: Future[T]) -> None:
            if finished.set_running_or_notify_cancel():
                finished.set_result(None)

        self._future.add_done_callback(finish)
        return finished

    def _refuse_to_wait_within(self) -> None:
        """A loss function that waits for a request of its own client would wait for ever."""
        if get_ident() == self._thread and not self._future.done():
            fix = "A loss runs within a request of this client: it cannot wait for a later one."
            raise LossInputError("result", "a wait outside of the client's own requests", "one inside", fix)


class Worker:
    """One thread that executes requests in the order of their submission, from whatever thread that came.

    An error that nobody has read is raised by the next ``submit``; one that is left when the worker goes,
    at the end of the program at the latest, is logged with its traceback.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lossfns")
        self._lock = Lock()
        self._unread: list[APIFuture[Any]] = []
        self._thread = self._pool.submit(get_ident).result()
        WORKERS.add(self)

    def __del__(self) -> None:
        if self._unread:  # at the end of the program it is empty, and names such as log_errors are gone
            log_errors(self._unread)

    def submit(self, request: Callable[..., T], *args: Any) -> APIFuture[T]:
        """Queue a request. An error of an earlier one that nobody read is raised here rather than lost."""
        with self._lock:
            self._raise_unread()
            return self._queue(request, *args)

    def submit_dependent(self, request: Callable[..., T], *args: Any) -> APIFuture[T]:
        """Queue a request that is refused if one before it fails whose outcome is not yet known.

        An optimizer step is such a request: queued behind a forward_backward that fails, it would step on
        a part of the gradient.
        """
        with self._lock:
            self._raise_unread()
            return self._queue(after, tuple(self._unread), request, *args)

    def _queue(self, request: Callable[..., T], *args: Any) -> APIFuture[T]:
        submitted = APIFuture(self._pool.submit(request, *args), self._thread)
        self._unread.append(submitted)
        return submitted

    def _raise_unread(self) -> None:
        """Raise the first error that nobody has read; forget what is read or has succeeded."""
        failed = next((f for f in self._unread if f.lost), None)
        self._unread[:] = [f for f in self._unread if not f.future().done() or (f.unread and f is not failed)]
        if failed is not None:
            failed._value()


WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def log_all_errors() -> None:
    """At the end of the program. No finalizer: errors have frames that have the client, which would never go."""
    for worker in WORKERS:
        log_errors(worker._unread)


class NotRun(LossInputError):
    """A request that was not run, since one before it failed."""


KNOWN = (NotRun, CancelledError)
"""Errors that tell of nothing new: of another request's failure, of one's own wish."""


def after(before: tuple[APIFuture[Any], ...], request: Callable[..., T], *args: Any) -> T:
    """Run the request unless one of those before it has failed."""
    # A request that was not run was queued behind the one that failed; so is this one, or its caller may know of it.
    error = next((f.error for f in before if f.error is not None and not isinstance(f.error, NotRun)), None)
    if error is not None:
        fix = "The gradient is that of the requests that succeeded: submit the failed one and the step again."
        got = f"one that failed ({type(error).__name__}: {error})"
        raise NotRun("optim_step", "requests before it that succeed", got, fix) from error
    return request(*args)


def own(error: BaseException) -> BaseException:
    """The error with the request's own traceback, without those of earlier readers."""
    frames = error.__dict__.setdefault("_request_traceback", error.__traceback__)
    return error.with_traceback(frames)


def log_errors(futures: list[APIFuture[Any]]) -> None:
    """Say what went wrong in requests whose outcome nobody has read."""
    for future in futures:
        if future.unread:
            log.error("A request failed and nobody read its error.", exc_info=future.error)
    futures.clear()


class Ready:
    """A client that is there at once, for code that expects a future of it: ``.result()`` and ``await`` give itself."""

    def result(self, timeout: float | None = None) -> Self:
        return self

    async def result_async(self, timeout: float | None = None) -> Self:
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self.result_async().__await__()


def twin(method: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """``method_async``: a coroutine function that submits and returns what the method returns, a future as a rule."""

    @functools.wraps(method)
    async def submitted(*args: P.args, **kwargs: P.kwargs) -> T:
        return method(*args, **kwargs)

    submitted.__name__ = f"{method.__name__}_async"
    submitted.__qualname__ = f"{method.__qualname__}_async"
    submitted.__doc__ = f"``{method.__name__}`` for code that awaits the call itself as well as what it returns."
    return submitted


def awaited(method: Callable[P, APIFuture[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """``method_async``: a coroutine function that waits for the method's future and returns its result."""

    @functools.wraps(method)
    async def result(*args: P.args, **kwargs: P.kwargs) -> T:
        return await method(*args, **kwargs)

    result.__name__ = f"{method.__name__}_async"
    result.__qualname__ = f"{method.__qualname__}_async"
    result.__doc__ = f"The result of ``{method.__name__}``, awaited."
    return result
