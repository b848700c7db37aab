"""Requests in submission order on one worker thread, each with a future."""

from __future__ import annotations

import asyncio
import atexit
import functools
import logging
import os
import traceback
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, TimeoutError
from contextlib import contextmanager
from threading import Lock, get_ident
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar

from lossfns.errors import LossInputError

T = TypeVar("T")
P = ParamSpec("P")

log = logging.getLogger("lossfns")


class APIFuture(Generic[T]):
    """The result of a request: ``.result(timeout)``, ``await``, ``.result_async(timeout)``; as often as wanted.

    Any number of threads and coroutines may wait. One that gives up raises TimeoutError and leaves the
    request as it is. An error is raised to each reader with the traceback of the request.
    """

    def __init__(self, worker: Worker, request: Callable[..., T], *args: Any) -> None:
        self._thread, self._failed = worker.line.thread, worker.failed
        self._waiters: list[Callable[[], bool]] = []
        self._frames: TracebackType | None = None
        self._error: BaseException | None = None
        self.read = False
        self._future = worker.line.submit(self._run, request, *args)

    def _run(self, request: Callable[..., T], *args: Any) -> T:
        try:
            return request(*args)
        except BaseException as error:
            release(error)
            self._error, self._frames = error, error.__traceback__ and error.__traceback__.tb_next
            if not isinstance(error, NotRun):
                self._failed.append(self)
            raise

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result; raises the request's error, or TimeoutError."""
        self._refuse_to_wait_within()
        with self._waiting(lambda: True):
            self._future.exception(timeout)
            return self._value()

    async def result_async(self, timeout: float | None = None) -> T:
        """The same without blocking the event loop."""
        self._refuse_to_wait_within()
        with self._waiting(asyncio.get_running_loop().is_running):
            if not self._future.done():
                await self._done(timeout)
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
    def lost(self) -> bool:
        """Whether the request has failed, nobody has read why, and nobody waits to."""
        return not self.read and self._error is not None and not any(there() for there in self._waiters)

    def _value(self) -> T:
        self.read = True
        if self._error is not None:
            raise self._error.with_traceback(self._frames)
        return self._future.result()

    @contextmanager
    def _waiting(self, there: Callable[[], bool]) -> Iterator[None]:
        """Whoever waits, as long as it is ``there``, will read the error: the next call need not raise it."""
        self._waiters.append(there)
        try:
            yield
        finally:
            self._waiters.remove(there)

    async def _done(self, timeout: float | None) -> None:
        """Wait on a future of one's own: a waiter that is cancelled does not cancel the request."""
        finished: Future[None] = Future()

        def finish(_: Future[T]) -> None:
            if finished.set_running_or_notify_cancel():
                finished.set_result(None)

        self._future.add_done_callback(finish)
        waiter = asyncio.wrap_future(finished)
        try:
            if not (await asyncio.wait([waiter], timeout=timeout))[0]:
                raise TimeoutError
        finally:
            if not waiter.get_loop().is_closed():
                waiter.cancel()

    def _refuse_to_wait_within(self) -> None:
        """A loss function that waits for a request of its own client would wait for ever."""
        if get_ident() == self._thread and not self._future.done():
            self._future.cancel()
            fix = "A loss runs within a request of this client: it cannot wait for a later one, which is cancelled."
            raise LossInputError("result", "a wait outside of the client's own requests", "one inside", fix)


def release(error: BaseException) -> None:
    """Let go of what the frames of an error hold: the graph of a forward pass would live as long as the error."""
    chain: list[BaseException] = [error]
    for each in chain:
        traceback.clear_frames(each.__traceback__)
        chain += [e for e in (each.__cause__, each.__context__) if e is not None and e not in chain]


class NotRun(LossInputError):
    """A step that was not taken, since a gradient before it failed."""


class Failures:
    """How many gradients have failed or were cancelled, and the last one's error."""

    count = 0
    last: BaseException | None = None

    def add(self, future: Future[Any]) -> None:
        """Take note of a gradient that is done, if it is one that failed."""
        error = CancelledError() if future.cancelled() else future.exception()
        if error is not None:
            self.count, self.last = self.count + 1, error

    def step(self, known: int, request: Callable[..., T], *args: Any) -> T:
        """Run a step, unless a gradient has failed since the step was queued: it would step on a part."""
        if self.count > known:
            fix = "The gradient is that of the requests that succeeded: submit the failed one and the step again."
            got = f"one that failed ({type(self.last).__name__}: {self.last})"
            raise NotRun("optim_step", "requests before it that succeed", got, fix) from self.last
        return request(*args)


class Line(ThreadPoolExecutor):
    """One thread, which requests wait in line for."""

    def __init__(self, initializer: Callable[[], None] | None = None) -> None:
        super().__init__(max_workers=1, thread_name_prefix="lossfns", initializer=initializer)
        self.thread = self.submit(get_ident).result()


def direct(request: Callable[..., T], *args: Any) -> T:
    """Call it, and no more."""
    return request(*args)


class Worker:
    """Has requests executed in the order of their submission, from whatever thread that came, by ``call`` as a rule.

    An error that nobody has read is raised by the next ``submit``; one that is left when the worker goes,
    at the end of the program at the latest, is logged with its traceback.
    """

    def __init__(self, line: Line | None = None, call: Callable[..., Any] = direct) -> None:
        self.line, self.call = line or Line(), call
        self.failed: list[APIFuture[Any]] = []
        self._lock, self._process = Lock(), os.getpid()
        self._failures = Failures()
        WORKERS.add(self)

    def __del__(self) -> None:
        if self.failed:  # at the end of the program it is empty, and names such as log_errors are gone
            log_errors(self.failed)

    def submit(self, request: Callable[..., T], *args: Any) -> APIFuture[T]:
        """Queue a request. An error of an earlier one that nobody read is raised here rather than lost."""
        with self._lock:
            self._check()
            return APIFuture(self, self.call, request, *args)

    def submit_here(self, request: Callable[..., T], *args: Any) -> APIFuture[T]:
        """Queue a request that one process of many may make: of an unread error the next one of all tells."""
        if self.call is direct:
            return self.submit(request, *args)
        with self._lock:
            self._check_process()
            return APIFuture(self, direct, request, *args)

    def submit_gradient(self, request: Callable[..., T], *args: Any) -> APIFuture[T]:
        """Queue a request that adds to the gradient."""
        with self._lock:
            self._check()
            submitted = APIFuture(self, self.call, request, *args)
            submitted.future().add_done_callback(self._failures.add)
            return submitted

    def submit_step(self, request: Callable[..., T], *args: Any) -> APIFuture[T]:
        """Queue a request that takes the gradient; it is refused if a gradient before it still fails."""
        with self._lock:
            known = self._failures.count  # before the check, which raises what of it nobody has read
            self._check()
            return APIFuture(self, self.call, self._failures.step, known, request, *args)

    def _check(self) -> None:
        """Raise the first error that nobody has read."""
        self._check_process()
        for future in tuple(self.failed):  # which the thread may append to meanwhile
            if future.read or future.lost:
                self.failed.remove(future)
            if future.lost:
                future._value()

    def _check_process(self) -> None:
        """Refuse a process that has not got the thread."""
        if os.getpid() != self._process:
            fix = "Make a client in each process, after the fork."
            raise LossInputError("client", "the process that made it", "a fork of it", fix)


WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def log_all_errors() -> None:
    """At the end of the program. No finalizer: errors have frames that have the client, which would never go."""
    for worker in WORKERS:
        log_errors(worker.failed)


def log_errors(failed: list[APIFuture[Any]]) -> None:
    """Say what went wrong in requests whose outcome nobody has read."""
    for future in failed:
        if not future.read:
            log.error("A request failed and nobody read its error.", exc_info=future._error)
    failed.clear()


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
