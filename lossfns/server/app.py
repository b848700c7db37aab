"""The HTTP side: routes, the key, limits, and errors as statuses with a reason."""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from lossfns.errors import LossInputError
from lossfns.server import endpoints, rest, saved, status, wire
from lossfns.server.futures import Future, Refused, printable
from lossfns.server.results import encode, to_json
from lossfns.server.service import Service

log = logging.getLogger("lossfns.server.access")

INLINE_BYTES = {"body": 2**18, "result": 2**22}
"""The largest body that is read, and the largest result that is written, in the event loop: either takes less than a
millisecond. Larger ones take a thread."""

CALL_BYTES = 2**22
"""The largest body of a request that is no pass. It is parsed in the event loop, while nothing else runs."""

BODIES_AT_ONCE = 8
"""How many of the largest bodies may arrive at the same time."""

Handler = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")


class App:
    """The handlers of a service.

    Args:
        service: the sessions and models that requests are about.
        api_key: what clients must send as ``X-API-Key``; None lets everybody in.
        body_bytes, decompressed_bytes: the largest body, as it arrives and when decompressed.
        body_seconds: the longest time that a body may take to arrive.
        poll_seconds: how long ``retrieve_future`` waits for a result before it asks the client to try again.
    """

    def __init__(
        self,
        service: Service,
        *,
        api_key: str | None = None,
        body_bytes: int = 2**25,
        decompressed_bytes: int = 2**26,
        body_seconds: float = 60.0,
        poll_seconds: float = 20.0,
    ) -> None:
        self.service, self.api_key = service, api_key
        self.body_bytes, self.decompressed_bytes = body_bytes, decompressed_bytes
        self.body_seconds, self.poll_seconds = body_seconds, poll_seconds
        self.arriving_bytes = 0
        self.reading = asyncio.Lock()

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Restore what the last server has saved in the same folder, and save at the end."""
        await saved.restore(self.service)
        yield
        await self.service.close()
        if self.service.state.temporary is None:
            await saved.save(self.service)
        self.service.state.close()

    def starlette(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            *(self.route(f"/api/v1/{path}", self.post_handler(endpoint)) for path, endpoint in endpoints.POST.items()),
            self.route("/api/v1/forward_backward", self.passes),
            self.route("/api/v1/forward", self.passes),
            self.route("/api/v1/retrieve_future", self.retrieve_future),
            self.route("/api/v1/sessions/{session_id}/finish", self.finish_session),
            self.route("/api/v1/training_runs/{model_id}/checkpoints/{kind}/{name}", self.delete_checkpoint, "DELETE"),
            *(self.route(f"/api/v1/{path}", self.get_handler(answer), "GET") for path, answer in rest.GET.items()),
            self.route("/", self.status_page, "GET"),
            self.route("/status.json", self.status_json, "GET"),
            self.route("/{path:path}", self.unknown, "GET", "POST", "PUT", "DELETE", "PATCH"),
        ]
        app = Starlette(routes=routes, lifespan=self.lifespan, exception_handlers={HTTPException: self.no_route})
        app.state.service = self.service
        return app

    def route(self, path: str, handler: Handler, *methods: str) -> Route:
        return Route(path, self.guarded(handler), methods=list(methods or ("POST",)))

    def guarded(self, handler: Handler) -> Handler:
        """Check the key, turn errors into statuses, and log a line for each request."""

        async def handle(request: Request) -> Response:
            start = time.perf_counter()
            reason = ""
            try:
                self.check_access(request)
                response = await handler(request)
            except LossInputError as error:
                reason, code = str(error), 400
            except Refused as error:
                reason, code = error.reason, error.status
            except ClientDisconnect:
                reason, code = "The body is not complete.", 400
            except Exception as error:  # a defect of the server: the client gets its name, the log the traceback
                logging.getLogger("lossfns.server").exception("%s failed.", printable(request.url.path))
                reason, code = f"{type(error).__name__} in the server. Its log has more.", 400
            if reason:
                response = refusal(code, reason)
            milliseconds = 1e3 * (time.perf_counter() - start)
            path, reason = printable(request.url.path), printable(reason)
            reason = f" {reason}" if reason else ""
            log.info("%s %s %d %.1f ms%s", request.method, path, response.status_code, milliseconds, reason)
            return response

        return handle

    def check_access(self, request: Request) -> None:
        """Refuse clients without the key, and pages of other sites that a browser on this machine has open.

        A browser sends the key as the password of the status page.
        """
        if request.method != "GET" and "origin" in request.headers:
            raise Refused(403, "Origin: expected none. Web pages cannot call this server.")
        if self.api_key is None:
            return
        key = request.headers.get("x-api-key") or password(request.headers.get("authorization", ""))
        if not hmac.compare_digest(key.encode(), self.api_key.encode()):
            raise Refused(401, "X-API-Key: expected the key of this server. Pass api_key= or set TINKER_API_KEY.")

    async def body(self, request: Request, limit: int | None = None) -> bytes:
        """Return the body, decompressed; refuse one of more than ``limit`` bytes, or ``body_bytes``."""
        largest = self.body_bytes if limit is None else min(limit, self.body_bytes)
        declared = request.headers.get("content-length", "0")
        if len(declared) > 18 or not declared.isdecimal() or int(declared) > largest:
            raise Refused(413, f"A body of {declared} bytes: at most {largest} are read. Send less at a time.")
        parts, size = [], 0
        try:
            async with self.service.until_stop(asyncio.timeout(self.body_seconds)):
                async for part in request.stream():
                    size += len(part)
                    self.arriving_bytes += len(part)
                    if size > largest:
                        raise Refused(413, f"A body of more than {largest} bytes. Send less at a time.")
                    if self.arriving_bytes > BODIES_AT_ONCE * self.body_bytes:
                        reason = f"Bodies of {self.arriving_bytes} bytes arrive at the same time. Send it again."
                        raise Refused(429, reason)
                    parts.append(part)
        except TimeoutError:
            self.service.refuse_if_stopping()
            raise Refused(408, f"The body took more than {self.body_seconds:g} s to arrive.") from None
        finally:
            self.arriving_bytes -= size
        body = b"".join(parts)
        encoding = request.headers.get("content-encoding", "")
        if not encoding:
            return body
        return await self.in_thread(wire.decompress, body, encoding, limit or self.decompressed_bytes)

    async def in_thread(self, read: Callable[..., T], *args: Any) -> T:
        """Read a large body in a thread, one at a time: it may take many times its size in memory."""
        async with self.reading:
            return await asyncio.to_thread(read, *args)

    def post_handler(self, endpoint: endpoints.Endpoint) -> Handler:
        """Return the handler of an endpoint that takes and returns JSON."""

        async def handler(request: Request) -> Response:
            body = await self.body(request, CALL_BYTES)
            wire.check_json(request.headers.get("content-type", ""))
            answer = await endpoint(self.service, wire.json_object(body), hash(body))
            return Response(to_json(answer), media_type="application/json")

        return handler

    def get_handler(self, answer: Callable[..., dict[str, Any]]) -> Handler:
        """Return the handler of an endpoint without a body, which is answered in a thread."""

        async def handler(request: Request) -> Response:
            value = await asyncio.to_thread(answer, self.service, request.query_params, **request.path_params)
            return Response(to_json(value), media_type="application/json")

        return handler

    async def passes(self, request: Request) -> Response:
        """Accept a forward or a forward-backward request. Only these are large."""
        body = await self.body(request)
        content_type = request.headers.get("content-type", "")
        forward_only = request.url.path.endswith("/forward")

        def read() -> tuple[wire.Pass, int]:
            return wire.read_pass(body, content_type, forward_only=forward_only), hash(body)

        parsed, digest = await self.in_thread(read) if len(body) > INLINE_BYTES["body"] else read()
        answer = await endpoints.forward_backward(self.service, parsed, digest, len(body))
        return Response(to_json(answer), media_type="application/json")

    async def retrieve_future(self, request: Request) -> Response:
        """Wait for a result and return it; after ``poll_seconds`` ask the client to try again."""
        data = await self.body(request, CALL_BYTES)
        wire.check_json(request.headers.get("content-type", ""))
        body = wire.json_object(data)
        future = self.service.futures.find(wire.field(body, "request_id", str))
        try:
            async with asyncio.timeout(self.poll_seconds):
                await future.wait()
        except TimeoutError:
            pass
        if not future.finished:
            pending = {"type": "try_again", "request_id": future.request_id, "queue_state": "active"}
            return Response(to_json(pending), 408, media_type="application/json")
        response = await self.response_of(future, request.headers.get("accept", ""))
        self.service.futures.retrieve(future)
        return response

    async def response_of(self, future: Future, accept: str) -> Response:
        """Return the result or the error of a future that has finished."""
        if future.error is not None:
            failed = {"error": future.error, "category": future.category}
            return Response(to_json(failed), media_type="application/json")
        large = future.nbytes > INLINE_BYTES["result"]
        media_type, data = (
            await asyncio.to_thread(encode, future.result, accept) if large else encode(future.result, accept)
        )
        return Response(data, media_type=media_type)

    async def finish_session(self, request: Request) -> Response:
        await self.body(request, CALL_BYTES)
        await self.service.finish_session(request.path_params["session_id"])
        return Response(status_code=204)

    async def delete_checkpoint(self, request: Request) -> Response:
        await asyncio.to_thread(rest.delete_checkpoint, self.service, **request.path_params)
        return Response(status_code=204)

    async def status_page(self, request: Request) -> Response:
        return Response(status.page(self.service), media_type="text/html")

    async def status_json(self, request: Request) -> Response:
        return Response(to_json(status.status(self.service)), media_type="application/json")

    async def unknown(self, request: Request) -> Response:
        raise Refused(404, f"{request.method} {request.url.path}: this server has no such call.")

    async def no_route(self, request: Request, error: Exception) -> Response:
        """Answer a request that matches no route, such as one with an unknown method or a line break in its path."""
        code = error.status_code if isinstance(error, HTTPException) else 404
        return refusal(code, f"{request.method} {request.url.path}: this server has no such call.")


def password(authorization: str) -> str:
    """Return the password of an ``Authorization`` header of HTTP's basic form; "" if it has another."""
    kind, _, encoded = authorization.partition(" ")
    try:
        return base64.b64decode(encoded, validate=True).decode().partition(":")[2] if kind == "Basic" else ""
    except ValueError:
        return ""


def refusal(code: int, reason: str) -> Response:
    """Return the response to a request that is not accepted."""
    headers = {"www-authenticate": 'Basic realm="lossfns"'} if code == 401 else {}
    if code == 429:
        headers["x-should-retry"] = "false"  # the SDK would otherwise send new sessions again for minutes
    reason = printable(reason)
    body = to_json({"error": reason, "detail": reason})
    return Response(body, code, headers, media_type="application/json")


def create_app(service: Service | None = None, **options: Any) -> Starlette:
    """Return the ASGI application of a service; ``options`` are those of ``App``, such as ``api_key``.

    Its lifespan restores the service's state, and at the end saves it.
    """
    return App(service or Service(), **options).starlette()
