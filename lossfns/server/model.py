"""A model of a session: its requests run one at a time, in the order of their sequence ids."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from lossfns.backend.client.training import LocalTrainingClient
from lossfns.errors import LossInputError
from lossfns.server.futures import Future, Futures, Refused

log = logging.getLogger("lossfns.server")

Run = Callable[[], Awaitable[Any]]


class Call(NamedTuple):
    """An accepted request: its kind, the coroutine function that runs it, the bytes of its body, and its future."""

    kind: str
    run: Run
    nbytes: int
    future: Future


class ServedModel:
    """A training client and the queue of its requests.

    A request waits for all those with lower sequence ids, ``gap_seconds`` at most: a client leaves out the id of a call
    that failed before it was sent. The SDK sends the parts of a batch at once, the first one last, so an id that comes
    late is normal; one that comes after its place was given up is refused.

    A step is refused once after a gradient that has failed or was refused, since the gradient of its batch is not
    complete. It is not refused if another gradient is submitted after the client has read the failure.

    Args:
        model_id: ``{session}:train:{number}``.
        client: the model itself.
        base_model: the name of the model that it started from.
        futures: where outcomes are kept.
        queue_limit: the most requests that wait.
        gap_seconds: how long a request waits for the ones before it.
        user_metadata: strings by name, of the client.
    """

    def __init__(
        self,
        model_id: str,
        client: LocalTrainingClient,
        base_model: str,
        futures: Futures,
        *,
        queue_limit: int,
        gap_seconds: float,
        user_metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.model_id, self.client, self.base_model = model_id, client, base_model
        self.futures, self.queue_limit, self.gap_seconds = futures, queue_limit, gap_seconds
        self.user_metadata = dict(user_metadata or {})
        self.next_seq = 1
        self.waiting: dict[int, Call] = {}
        self.running: Call | None = None
        self.failed_gradient: Future | None = None
        self.metrics: dict[str, dict[str, float]] = {}  # the last of each kind of request
        self.last_request = time.time()
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._serve())

    def submit(self, seq_id: int, digest: int | None, kind: str, run: Run, nbytes: int = 0) -> Future:
        """Queue a request. A repeated one has the same future; a place that has passed is refused."""
        request_id = f"{self.model_id}:{seq_id}"
        if (repeated := self.futures.repeated(request_id, digest)) is not None:
            return repeated
        if seq_id < self.next_seq:
            reason = f"seq_id: expected {self.next_seq} or later, got {seq_id}, which has passed."
            if kind == "forward_backward":
                self.failed_gradient = Future(request_id, None)
                self.failed_gradient.set_error(reason)
                self.failed_gradient.retrieved = self.failed_gradient.finished
            raise Refused(400, reason)
        if len(self.waiting) >= self.queue_limit and seq_id != self.next_seq:
            raise Refused(429, f"{len(self.waiting)} requests of {self.model_id} wait.")
        if seq_id >= self.next_seq + self.futures.limit:  # a wrong id must not end the sequence
            raise Refused(429, f"seq_id: expected one below {self.next_seq + self.futures.limit} by now, got {seq_id}.")
        future = self.futures.begin(request_id, digest)
        if kind == "forward_backward" and self.failed_gradient is not None and self.failed_gradient.retrieved:
            self.failed_gradient = None
        self.last_request = time.time()
        self.waiting[seq_id] = Call(kind, run, nbytes, future)
        self._changed.set()
        return future

    async def _serve(self) -> None:
        while True:
            while self.next_seq not in self.waiting:
                await self._wait_for_next()
            self.running = self.waiting.pop(self.next_seq)
            self.next_seq += 1
            await self._run(self.running)
            self.running = None
            self._changed.set()

    async def _wait_for_next(self) -> None:
        self._changed.clear()
        if not self.waiting:
            await self._changed.wait()
            return
        try:
            async with asyncio.timeout(self.gap_seconds):
                while self.next_seq not in self.waiting:
                    await self._changed.wait()
                    self._changed.clear()
        except TimeoutError:
            log.warning("%s goes on without the request with seq_id %d.", self.model_id, self.next_seq)
            self.next_seq = min(self.waiting)

    def _fail_waiting(self, reason: str) -> None:
        """Fail all requests that wait."""
        for seq_id, call in sorted(self.waiting.items()):
            self._set_error(call, f"{call.kind} (seq_id {seq_id}): not run, it {reason}. Submit it again.", "user")
            self.next_seq = seq_id + 1
        self.waiting.clear()

    async def _run(self, call: Call) -> None:
        try:
            if call.kind == "optim_step":
                self._refuse_partial_gradient()
            result = await call.run()
        except LossInputError as error:
            self._set_error(call, str(error), "user")
        except Exception as error:  # the client gets the message alone; the traceback stays in the log
            log.exception("%s of %s failed.", call.kind, self.model_id)
            self._set_error(call, f"{type(error).__name__}: {error}", "server")
        else:
            metrics = result.get("metrics") if isinstance(result, dict) else result.metrics
            self.metrics |= {call.kind: metrics} if metrics else {}
            call.future.set_result(result)
            self.futures.finish(call.future)

    def _set_error(self, call: Call, reason: str, category: str) -> None:
        if call.kind == "forward_backward":
            self.failed_gradient = call.future
        call.future.set_error(reason, category)
        self.futures.finish(call.future)

    def _refuse_partial_gradient(self) -> None:
        failed, self.failed_gradient = self.failed_gradient, None
        if failed is not None:
            got = f"{failed.request_id}, which failed ({failed.error})"
            fix = "Submit the failed one again, then the step; or the step alone, to go on without it."
            raise LossInputError("optim_step", "requests before it that succeed", got, fix)

    async def stop(self, seconds: float, reason: str) -> None:
        """Run the waiting requests for ``seconds`` at most, then fail the rest. A running one is always finished."""
        try:
            async with asyncio.timeout(seconds):
                while self.running is not None or self.next_seq in self.waiting:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass
        self._fail_waiting(reason)
        while self.running is not None:
            self._changed.clear()
            await self._changed.wait()
        self._task.cancel()
