"""Requests that run one at a time, in the order of their submission, each with a future."""

from __future__ import annotations

import asyncio
import atexit
import functools
import logging
import os
import traceback
import weakref
from asyncio import AbstractEventLoop
from collections.abc import Callable, Coroutine, Generator, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, TimeoutError
from contextlib import contextmanager
from threading import TIMEOUT_MAX, Lock, Thread, get_ident
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar

from lossfns.backend.openmp import end_team
from lossfns.checks import is_real
from lossfns.errors import LossInputError

T = TypeVar("T")
P = ParamSpec("P")

log = logging.getLogger("lossfns")


class APIFuture(Generic[T]):
    """The result of a request.

    Any number of threads and coroutines may read it, with ``.result(timeout)``, ``await`` or
    ``.result_async(timeout)``, as often as they like. A reader that times out does not cancel the request.
    If the request fails, every reader gets the request's exception with the same traceback.

    Args:
        worker: the worker whose thread runs the request.
        request, args: what to call, and with which arguments.
        on_error: called with the request's error before any reader can see it.
    """

    def __init__(
        self,
        worker: Worker,
        request: Callable[..., T],
        *args: Any,
        on_error: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._thread, self._failed = worker.thread.ident, worker.failed
        self._readers: list[AbstractEventLoop | None] = []  # who waits: a coroutine's event loop, or None for a thread
        self._traceback: TracebackType | None = None
        self._error: BaseException | None = None
        self._was_read = self._is_running = False
        self._refused_wait: LossInputError | None = None  # of the request's thread, or of a thread that it has started
        self._on_error = on_error
        self._future = worker.thread.submit(self._run, request, *args)

    def _run(self, request: Callable[..., T], *args: Any) -> T:
        try:
            with self._running():
                return request(*args)
        except BaseException as error:
            clear_frames(error)
            self._error, self._traceback = error, error.__traceback__ and error.__traceback__.tb_next
            if not isinstance(error, NotRun):
                self._failed.append(self)
            self._on_error(error)
            raise

    @contextmanager
    def _running(self) -> Iterator[None]:
        before = RUNNING.get(get_ident())
        self._is_running, RUNNING[get_ident()] = True, weakref.ref(self)
        try:
            yield
        finally:
            self._is_running = False
            set_running(before)

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result and return it.

        Args:
            timeout: seconds to wait at most; None waits as long as the request takes.

        Raises the request's exception if the request fails, TimeoutError after ``timeout``, and CancelledError if the
        request was cancelled. Raises LossInputError if the caller is itself a request of the same client, or a thread
        that this request has started: the wait would never end.
        """
        check_timeout(timeout)
        self._refuse_deadlock()
        self._readers.append(None)
        try:
            self._future.exception(timeout)
            return self._value()
        finally:
            self._readers.remove(None)

    async def result_async(self, timeout: float | None = None) -> T:
        """Wait for the result without blocking the event loop; arguments and errors are those of ``result``."""
        check_timeout(timeout)
        self._refuse_deadlock()
        loop = asyncio.get_running_loop()
        self._readers.append(loop)
        try:
            if not self._future.done():
                await self._wait_until_done(timeout)
            return self._value()
        finally:
            self._readers.remove(loop)

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    async def coroutine(self) -> T:
        """Wait for the result, as a coroutine for ``asyncio.create_task``."""
        return await self

    def future(self) -> Future[T]:
        """Return the request as a ``concurrent.futures.Future``. Reading its error there does not mark it as read."""
        return self._future

    @property
    def unread_failure(self) -> bool:
        """Whether the request has failed, nobody has read its error, and nobody waits for it."""
        waited_for = any(loop is None or loop.is_running() for loop in self._readers)
        return self._error is not None and not self._was_read and not waited_for

    def _value(self) -> T:
        self._was_read = True
        if self._error is not None:
            raise self._error.with_traceback(self._traceback)
        return self._future.result()

    async def _wait_until_done(self, timeout: float | None) -> None:
        """Wait until the request is done.

        The reader waits on a future of its own, so that cancelling the reader does not cancel the request.
        """
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

    def _refuse_deadlock(self) -> None:
        """Refuse a wait that would never end, because the thread that must run the request waits. Cancel the request.

        The running request records the refusal, since it does not see an error in a thread that it has started.
        """
        running = running_request()
        inside = running is not None and running._thread == self._thread
        if (inside or get_ident() == self._thread) and not self._future.done():
            self._future.cancel()
            fix = "A loss runs within a request of this client, so it cannot wait for a later one, which is cancelled."
            error = LossInputError("result", "a wait outside of the client's own requests", "one inside", fix)
            if running is not None:
                running._refused_wait = error
            raise error


def check_timeout(timeout: Any) -> None:
    """Refuse anything but a number of seconds that a thread can wait, or None."""
    if timeout is not None and not (is_real(timeout) and timeout <= TIMEOUT_MAX):
        expected = f"seconds, a number up to {TIMEOUT_MAX:.0f}, or None"
        raise LossInputError("timeout", expected, repr(timeout), "None waits as long as the request takes.")


RUNNING: dict[int, weakref.ref[APIFuture[Any]]] = {}
"""Id of a thread → the request that the thread runs, or in which it was started."""


def set_running(request: weakref.ref[APIFuture[Any]] | None) -> None:
    """Set or clear the request of this thread in ``RUNNING``."""
    if request is None:
        RUNNING.pop(get_ident(), None)
    else:
        RUNNING[get_ident()] = request


def running_request() -> APIFuture[Any] | None:
    """Return the request that this thread runs, or in which it was started; None outside of requests and after them."""
    reference = RUNNING.get(get_ident())
    request = None if reference is None else reference()
    return request if request is not None and request._is_running else None


def raise_refused_wait() -> None:
    """Raise the refusal of a wait within the request that runs on this thread, if there was one."""
    request = running_request()
    if request is not None and request._refused_wait is not None:
        raise request._refused_wait


@functools.cache
def follow_threads() -> None:
    """Let threads that a request starts or gives work to be found in ``RUNNING``.

    Python does not tell which thread has started another, so ``Thread.start`` and ``ThreadPoolExecutor.submit`` are
    wrapped. What no request starts is left as it is.
    """
    start: Any = Thread.start
    submit: Any = ThreadPoolExecutor.submit

    @functools.wraps(start)
    def start_followed(thread: Thread) -> None:
        request = running_request()
        if request is not None:
            vars(thread)["run"] = functools.partial(run_within, weakref.ref(request), thread.run)
        start(thread)

    @functools.wraps(submit)
    def submit_followed(executor: ThreadPoolExecutor, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Any:
        request = running_request()
        if request is None:
            return submit(executor, function, *args, **kwargs)
        return submit(executor, run_within, weakref.ref(request), function, *args, **kwargs)

    Thread.start = start_followed  # type: ignore[method-assign, assignment]
    ThreadPoolExecutor.submit = submit_followed  # type: ignore[method-assign, assignment]


def run_within(request: weakref.ref[APIFuture[Any]], run: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run what a request has given to another thread."""
    before = RUNNING.get(get_ident())
    set_running(request)
    try:
        return run(*args, **kwargs)
    finally:
        set_running(before)


def clear_frames(error: BaseException) -> None:
    """Clear the local variables of an error's traceback, which would keep the graph of a forward pass alive."""
    chain: list[BaseException] = [error]
    for each in chain:
        traceback.clear_frames(each.__traceback__)
        chain += [e for e in (each.__cause__, each.__context__) if e is not None and e not in chain]


class NotRun(LossInputError):
    """A step that was refused because a gradient before it failed."""


class GradientFailures:
    """The number of gradient requests that have failed or were cancelled, and the error of the last one."""

    count = 0
    last: BaseException | None = None

    def record(self, error: BaseException) -> None:
        """Count one more failure."""
        self.count, self.last = self.count + 1, error

    def record_cancelled(self, future: Future[Any]) -> None:
        """Count a gradient request that was cancelled before it ran."""
        if future.cancelled():
            self.record(CancelledError())

    def run_step(self, count: int, request: Callable[..., T], *args: Any) -> T:
        """Run a step that was submitted after ``count`` failures.

        Refuse the step if there are more failures by now: part of its gradient would be missing.
        """
        if self.count > count:
            fix = "The gradient is that of the requests that succeeded: submit the failed one and the step again."
            got = f"one that failed ({type(self.last).__name__}: {self.last})"
            raise NotRun("optim_step", "requests before it that succeed", got, fix) from self.last
        return request(*args)


class RequestThread(ThreadPoolExecutor):
    """One thread and its queue of requests.

    Args:
        initializer: called once on the thread, before the first request.
    """

    def __init__(self, initializer: Callable[[], None] | None = None) -> None:
        super().__init__(max_workers=1, thread_name_prefix="lossfns", initializer=initializer)
        self.ident = self.submit(get_ident).result()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Queue a call. The OpenMP threads of the caller end, so that those of this thread have the cores alone."""
        end_team()
        return super().submit(fn, *args, **kwargs)


class Worker:
    """Runs requests on one thread, in the order in which any thread submits them.

    An error that nobody has read is raised by the next submission. Errors that are still unread when the worker
    is deleted, or at the end of the program, are logged with their tracebacks.

    Args:
        thread: the thread that runs the requests; None starts one.
        call: runs every request, as ``call(request, *args)``; None calls the request itself.
    """

    def __init__(self, thread: RequestThread | None = None, call: Callable[..., Any] | None = None) -> None:
        follow_threads()
        self.thread = thread or RequestThread()
        self.failed: list[APIFuture[Any]] = []
        self._caller = () if call is None else (call,)  # put before each request and its arguments
        self._lock, self._process = Lock(), os.getpid()
        self._failures = GradientFailures()
        WORKERS.add(self)

    def __del__(self) -> None:
        if self.failed:  # empty at the end of the program, when the module's names may be gone
            log_unread_failures(self.failed)

    def submit(self, request: Callable[..., T], *args: Any) -> APIFuture[T]:
        """Queue a request, or raise the error of an earlier one that nobody has read."""
        with self._lock:
            self._raise_unread_failure()
            return APIFuture(self, *self._caller, request, *args)

    def submit_local(self, request: Callable[..., T], *args: Any) -> APIFuture[T]:
        """Queue a request that only some ranks make. Unread errors are left for the next collective request."""
        if not self._caller:
            return self.submit(request, *args)
        with self._lock:
            self._refuse_fork()
            return APIFuture(self, request, *args)

    def submit_gradient(self, request: Callable[..., T], *args: Any) -> APIFuture[T]:
        """Queue a request that adds to the accumulated gradient."""
        with self._lock:
            self._raise_unread_failure()
            submitted: APIFuture[T] = APIFuture(self, *self._caller, request, *args, on_error=self._failures.record)
            submitted._future.add_done_callback(self._failures.record_cancelled)
            return submitted

    def submit_step(self, request: Callable[..., T], *args: Any) -> APIFuture[T]:
        """Queue a request that consumes the accumulated gradient. It is refused if a gradient before it fails."""
        with self._lock:
            count = self._failures.count  # read before the check: a failure after the check then refuses the step
            self._raise_unread_failure()
            return APIFuture(self, *self._caller, self._failures.run_step, count, request, *args)

    def _raise_unread_failure(self) -> None:
        """Raise the first error that nobody has read."""
        self._refuse_fork()
        for future in tuple(self.failed):  # a copy, since the thread may append to the list
            if future._was_read or future.unread_failure:
                self.failed.remove(future)
            if future.unread_failure:
                future._value()

    def _refuse_fork(self) -> None:
        """Refuse a forked process, which has no copy of the thread."""
        if os.getpid() != self._process:
            fix = "Make a client in each process, after the fork."
            raise LossInputError("client", "the process that made it", "a fork of it", fix)


WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def log_unread_failures_at_exit() -> None:
    """Log the unread errors of all workers at the end of the program.

    ``weakref.finalize`` is no alternative: it would hold the errors, whose frames refer to the client, which would then
    never be freed.
    """
    for worker in WORKERS:
        log_unread_failures(worker.failed)


def log_unread_failures(failed: list[APIFuture[Any]]) -> None:
    """Log the errors that nobody has read, and empty the list."""
    for future in failed:
        if not future._was_read:
            log.error("A request failed and nobody read its error.", exc_info=future._error)
    failed.clear()


class Resolved:
    """A client that needs no waiting, for code that expects a future of one: ``.result()`` and ``await`` return it."""

    def result(self, timeout: float | None = None) -> Self:
        """Return the client itself, at once; ``timeout`` is not needed."""
        return self

    async def result_async(self, timeout: float | None = None) -> Self:
        """Return the client itself, at once; ``timeout`` is not needed."""
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self.result_async().__await__()


def async_of(
    method: Callable[P, Any], doc: str | None = None
) -> Callable[[Callable[..., Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Decorate a coroutine function that passes its arguments on to ``method``.

    The decorated function is named ``<method>_async`` and has the signature of ``method``.

    Args:
        method: the method that takes the same arguments.
        doc: the docstring; None keeps that of the coroutine function.
    """

    def decorate(function: Callable[..., Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        docstring = doc or function.__doc__
        functools.update_wrapper(function, method)
        function.__name__, function.__qualname__ = f"{method.__name__}_async", f"{method.__qualname__}_async"
        function.__doc__ = docstring
        return function

    return decorate


def async_submit(method: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Make ``<method>_async``, a coroutine function that submits the request and returns what the method returns."""

    @async_of(method, f"``{method.__name__}`` for code that awaits the call as well as the future that it returns.")
    async def submit(*args: P.args, **kwargs: P.kwargs) -> T:
        return method(*args, **kwargs)

    return submit


def async_result(method: Callable[P, APIFuture[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Make ``<method>_async``, a coroutine function that awaits the method's future and returns its result."""

    @async_of(method, f"Await the result of ``{method.__name__}``.")
    async def result(*args: P.args, **kwargs: P.kwargs) -> T:
        return await method(*args, **kwargs)

    return result


def async_in_thread(method: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Make ``<method>_async``, a coroutine function that runs the blocking method in another thread."""

    @async_of(method, f"``{method.__name__}`` without blocking the event loop.")
    async def result(*args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(method, *args, **kwargs)

    return result
