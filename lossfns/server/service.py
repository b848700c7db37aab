"""Sessions, models, samplers and their requests, without HTTP: all that a server of the API keeps.

A ``Service`` belongs to one event loop. The models compute on threads of their own.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch

from lossfns.backend.client.sampling import LocalSamplingClient
from lossfns.backend.client.service import LocalServiceClient, ModelBuilder
from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.storage import checkpoint
from lossfns.errors import LossInputError
from lossfns.server.folder import StateFolder
from lossfns.server.futures import Future, Futures, Refused
from lossfns.server.model import ServedModel, log
from lossfns.server.samplers import Sampler
from lossfns.server.session import Session, session_of

REMEMBERED = 1000
"""The finished sessions that the server still knows: it answers that they have finished, not that they are unknown."""


class Service:
    """The models of a server, and the sessions of its clients.

    Models compute one at a time, unless there are more cores than torch takes threads: each plans with all free memory.

    Args:
        models: for each name a function that builds the model, as in ``LocalServiceClient``. None: ``"Decoder"``.
        device, memory_budget: as in ``LocalServiceClient``.
        state: the folder of checkpoints, and of what is saved at the end; one server has it at a time. None takes a
            folder that is deleted at the end.
        sessions, model_limit, samplers: the most sessions, models and loaded samplers at a time. A further sampler
            takes the place of the one that was not used for the longest time.
        memory: the most bytes of the process, on Linux: beyond it no model is created. ``memory_budget`` bounds the
            memory of a request.
        queue, queue_bytes: the most waiting requests of a model, and the most bytes of the waiting requests of all.
        results, result_bytes: the most futures, and the most bytes of results, that wait to be read.
        session_seconds: a session ends if its client gives no sign of life for this long.
        gap_seconds: how long a request waits for those with lower sequence ids.
        grace_seconds: how long ``close`` waits for accepted requests.
    """

    def __init__(
        self,
        models: Mapping[str, ModelBuilder] | None = None,
        *,
        device: str = "auto",
        memory_budget: float | None = None,
        state: str | Path | None = None,
        sessions: int = 256,
        model_limit: int = 64,
        memory: float | None = None,
        samplers: int = 16,
        queue: int = 1024,
        queue_bytes: int = 2**30,
        results: int = 20_000,
        result_bytes: int = 2**30,
        session_seconds: float = 1800.0,
        gap_seconds: float = 10.0,
        grace_seconds: float = 30.0,
    ) -> None:
        self.local = LocalServiceClient(models, device=device, memory_budget=memory_budget)
        self.state = StateFolder(state)
        self.session_limit, self.model_limit, self.sampler_limit = sessions, model_limit, samplers
        self.memory = memory
        self.queue, self.queue_bytes, self.session_seconds = queue, queue_bytes, session_seconds
        self.turns = asyncio.Semaphore(max(1, (os.cpu_count() or 1) // torch.get_num_threads()))
        self.gap_seconds, self.grace_seconds = gap_seconds, grace_seconds
        self.futures = Futures(results, result_bytes)
        self.sessions: dict[str, Session] = {}
        self.models: dict[str, ServedModel] = {}
        self.samplers: dict[str, Sampler] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.body_timeouts: set[asyncio.Timeout] = set()
        self.creating = 0
        self.started = time.monotonic()
        self.stopping = False

    # Sessions

    def create_session(self, user_metadata: Mapping[str, str] | None = None) -> str:
        self.refuse_if_stopping()
        self.finish_silent_sessions()
        for old in [name for name, s in self.sessions.items() if s.finished][:-REMEMBERED]:
            del self.sessions[old]
        if sum(not s.finished for s in self.sessions.values()) >= self.session_limit:
            raise Refused(429, f"{self.session_limit} sessions are open, which is the limit of this server.")
        session = Session(str(uuid.uuid4()), user_metadata)
        self.sessions[session.session_id] = session
        return session.session_id

    def session(self, session_id: str) -> Session:
        """Return a session that is open, and note that its client lives."""
        session = self.sessions.get(session_id)
        if session is None:
            raise Refused(404, f"The session {session_id!r} is unknown. create_session returns its id.")
        if session.finished:
            raise Refused(410, f"The session {session_id!r} has finished.")
        session.last_seen = time.monotonic()
        return session

    async def finish_session(self, session_id: str) -> None:
        """End a session, once its requests have run. Its models and samplers are freed; its checkpoints stay."""
        session = self.session(session_id)
        session.finished = True
        models = [model for model in self.models.values() if session_of(model.model_id) == session_id]
        await asyncio.gather(*(model.stop(60.0, "came after the end of its session") for model in models))
        for model in models:
            self.models.pop(model.model_id, None)
        for name in [name for name in self.samplers if session_of(name) == session_id]:
            del self.samplers[name]
        session.losses.clear()
        self.futures.release(session_id)

    def finish_silent_sessions(self) -> None:
        """End the sessions whose clients have given no sign of life for ``session_seconds``."""
        oldest = time.monotonic() - self.session_seconds
        for session in self.sessions.values():
            if not session.finished and session.last_seen < oldest:
                log.warning("Session %s ends: no heartbeat for %g s.", session.session_id, self.session_seconds)
                self.run_in_background(self.finish_session(session.session_id))

    def run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    # Models

    def model(self, model_id: str) -> ServedModel:
        model = self.models.get(model_id)
        if model is None:
            if session_of(model_id) in self.sessions:
                self.session(session_of(model_id))
            reason = f"The model {model_id!r} is unknown here. Create it, or create one from a saved state."
            raise Refused(404, reason)
        self.session(session_of(model_id))
        return model

    def create_model(
        self,
        session_id: str,
        number: int,
        digest: int | None,
        make: Callable[[], tuple[str, LocalTrainingClient]],
        user_metadata: Mapping[str, str] | None,
        path: str | None = None,
    ) -> Future:
        """Begin to create a model, by ``make`` in a thread, under the id ``{session}:train:{number}``.

        The result has the id, and the path that the model was loaded from, if any.
        """
        self.session(session_id)
        model_id = f"{session_id}:train:{number}"
        if (repeated := self.futures.repeated(f"{model_id}:0", digest)) is not None:
            return repeated
        self.refuse_if_stopping()
        if model_id in self.models:
            raise Refused(400, f"The model {model_id!r} exists. Take the next model_seq_id.")

        async def create() -> dict[str, Any]:
            if len(self.models) + self.creating >= self.model_limit:
                fix = "Close a ServiceClient, or start the server with a higher limit."
                raise LossInputError("models", f"at most {self.model_limit} models at a time", "one more", fix)
            if self.memory is not None and (resident_bytes() or 0) > self.memory:
                fix = "Close a ServiceClient, or start the server with a higher limit."
                raise LossInputError("memory", f"at most {self.memory:.0f} bytes", f"{resident_bytes()}", fix)
            self.creating += 1
            try:
                base_model, client = await asyncio.to_thread(make)
                self.session(session_id)  # it may have finished meanwhile
            finally:
                self.creating -= 1
            await self._record_run(model_id, client, base_model, user_metadata)
            self.add_model(model_id, client, base_model, user_metadata)
            kind = "create_model" if path is None else "load_weights"
            return {"model_id": model_id, "type": kind, **({} if path is None else {"path": path})}

        return self.start(self.futures.begin(f"{model_id}:0", digest), create)

    async def _record_run(
        self, model_id: str, client: LocalTrainingClient, base_model: str, user_metadata: Mapping[str, str] | None
    ) -> None:
        """Write the description of a model that ``RestClient`` lists, also after the model is freed."""
        info = await client.get_info_async()
        run = {
            "training_run_id": model_id,
            "base_model": base_model,
            "is_lora": info.is_lora,
            "lora_rank": info.lora_rank,
            "user_metadata": dict(user_metadata or {}),
        }
        folder = self.state.of_model(model_id)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "run.part").write_text(json.dumps(run))
            (folder / "run.part").replace(folder / "run.json")  # a reader finds all of it
        except OSError as error:
            raise LossInputError("state", "a folder to write to", f"{error}", "Free its disk.") from None

    def add_model(
        self, model_id: str, client: LocalTrainingClient, base_model: str, user_metadata: Mapping[str, str] | None
    ) -> ServedModel:
        model = self.models[model_id] = ServedModel(
            model_id,
            client,
            base_model,
            self.futures,
            queue_limit=self.queue,
            gap_seconds=self.gap_seconds,
            user_metadata=user_metadata,
        )
        return model

    def submit(
        self,
        model_id: str,
        seq_id: int,
        digest: int | None,
        kind: str,
        run: Callable[[ServedModel], Awaitable[Any]],
        nbytes: int = 0,
    ) -> Future:
        """Queue a request of a model, of ``nbytes``, which is run as ``run(model)`` in its turn."""
        self.refuse_if_stopping()
        model = self.model(model_id)

        async def in_turn() -> Any:
            async with self.turns:
                return await run(model)

        waiting = sum(call.nbytes for each in self.models.values() for call in each.waiting.values())
        if nbytes and waiting + nbytes > self.queue_bytes:
            raise Refused(429, f"Requests of {waiting} bytes wait; {self.queue_bytes} may.")
        return model.submit(seq_id, digest, kind, in_turn, nbytes)

    def start(self, future: Future, run: Callable[[], Awaitable[Any]]) -> Future:
        """Run a request that no other one has to wait for, and keep its outcome."""

        async def finish() -> None:
            try:
                future.set_result(await run())
            except LossInputError as error:
                future.set_error(str(error))
            except Refused as error:
                future.set_error(error.reason)
            except Exception as error:  # the client gets the message alone; the traceback stays in the log
                log.exception("%s failed.", future.request_id)
                future.set_error(f"{type(error).__name__}: {error}", "server")
            self.futures.finish(future)

        self.run_in_background(finish())
        return future

    def refuse_if_stopping(self) -> None:
        if self.stopping:
            raise Refused(503, "The server stops. Send the request again once it has restarted.")

    def begin_stop(self) -> None:
        """Refuse new requests, and end all waits for results and bodies: the clients ask the next server again."""
        self.stopping = True
        for future in self.futures.by_id.values():
            future.wake()
        for timeout in self.body_timeouts:
            timeout.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def until_stop(self, timeout: asyncio.Timeout) -> AsyncIterator[None]:
        """Enter a timeout that also ends when the server stops: a slow body must not keep the server from saving."""
        async with timeout:
            self.body_timeouts.add(timeout)
            try:
                yield
            finally:
                self.body_timeouts.discard(timeout)

    async def close(self) -> None:
        """Run the accepted requests for ``grace_seconds`` at most, and fail the rest."""
        self.begin_stop()
        stopped = "came when the server stopped"
        await asyncio.gather(*(model.stop(self.grace_seconds, stopped) for model in self.models.values()))
        if self.tasks:
            await asyncio.wait(self.tasks)

    # Samplers

    def add_sampler(self, session_id: str, number: int, sampler: Sampler) -> str:
        """Add a sampling session and return its id. The least recently used samplers are unloaded beyond the limit."""
        name = f"{session_id}:sample:{number}"
        existing = self.samplers.setdefault(name, sampler)
        same = (sampler.client, sampler.base_model, sampler.path) == (None, existing.base_model, existing.path)
        if existing is not sampler and not same:
            fix = "Take the next number."
            raise LossInputError("sampling_session_seq_id", "one that is not taken", str(number), fix)
        self._unload_samplers(name)
        return name

    def base_model_of(self, path: str | None, base_model: str | None) -> str:
        """Return the name of a sampler's base model, and refuse a path or a name without a model."""
        if path is not None:
            saved = (
                checkpoint.metadata(self.state.saved_checkpoint(path))["model"] if base_model is None else base_model
            )
            base_model = str(saved)
        names = [model.model_name for model in self.local.get_server_capabilities().supported_models]
        if base_model not in names:
            raise LossInputError("base_model", f"one of {', '.join(map(repr, names))}", repr(base_model), "Pass one.")
        return base_model

    def find_sampler(self, name: str) -> Sampler:
        if name not in self.samplers:
            reason = f"The sampling session {name!r} is unknown, or had to make room. Create a sampling client."
            raise Refused(404, reason)
        return self.samplers[name]

    async def sampler(self, name: str) -> tuple[Sampler, LocalSamplingClient]:
        """Return a sampling session and its client, which is loaded at its first use."""
        sampler = self.find_sampler(name)
        self.session(session_of(name))
        self.samplers[name] = self.samplers.pop(name)  # the last one is the last used
        async with sampler.lock:
            client = sampler.client
            if client is None:
                client = sampler.client = await asyncio.to_thread(self._load_sampler, sampler)
        self._unload_samplers(name)
        return sampler, client

    def _load_sampler(self, sampler: Sampler) -> LocalSamplingClient:
        file = None if sampler.path is None else self.state.saved_checkpoint(sampler.path)
        return self.local.create_sampling_client(file, sampler.base_model)

    def _unload_samplers(self, used: str) -> None:
        loaded = [name for name, sampler in self.samplers.items() if sampler.client is not None and name != used]
        for name in loaded[: max(0, len(loaded) + 1 - self.sampler_limit)]:
            if self.samplers[name].reloadable:
                self.samplers[name].client = None
            else:
                del self.samplers[name]


def resident_bytes() -> int | None:
    """Return the resident memory of the process in bytes; None on other systems than Linux."""
    if sys.platform != "linux":
        return None
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
