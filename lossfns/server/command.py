"""``lossfns serve``: the server from the command line."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import threading
import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from lossfns.errors import LossInputError
from lossfns.terminal import print_refusal, printable

if TYPE_CHECKING:
    from starlette.applications import Starlette

LOOPBACK = ("127.0.0.1", "::1", "localhost")
DECODER = "decoder"
"""The name of the embedded model on the command line. The SDK calls it ``Decoder``."""


def add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``serve`` command to a command line."""
    p = commands.add_parser(
        "serve",
        help="serve local models to the tinker SDK",
        description="Serve local models in the protocol of the tinker SDK: set TINKER_BASE_URL to the address that is "
        "printed, and TINKER_API_KEY to the key, or to tml-local if there is none. Needs the extra: server.",
    )
    add = p.add_argument
    add(
        "--model",
        action="append",
        metavar="[NAME=]MODEL",
        help="a base model: decoder, the embedded one, a folder "
        "or GGUF file, or the name of a repository; NAME is what clients call it. May be repeated (default: decoder)",
    )
    add("--host", default="127.0.0.1", help="the address to listen at (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="the port; 0 takes a free one (default: 8000)")
    add(
        "--api-key",
        metavar="KEY",
        help="what clients must send; the SDK wants it to start with tml-. Needed unless "
        "the host is loopback (default: LOSSFNS_API_KEY)",
    )
    add(
        "--state",
        metavar="DIR",
        help="keep checkpoints here, and at the end save all models; a server that is "
        "started with the same folder goes on with them (default: a temporary folder)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--models", type=int, default=64, metavar="N", help="the most models at a time (default: 64)")
    add("--memory", type=float, metavar="GIB", help="the most memory of the server; beyond it no model is created")
    add("--sessions", type=int, default=256, metavar="N", help="the most sessions at a time (default: 256)")
    add("--queue", type=int, default=1024, metavar="N", help="the most requests of a model that wait (default: 1024)")
    add("--grace", type=float, default=30.0, metavar="S", help="seconds for accepted requests at the end; those that "
        "have not run by then fail (default: 30)")  # fmt: skip
    add("--log", action="store_true", help="print a line for each request to standard error")
    p.set_defaults(run=serve_command)


def serve_command(args: argparse.Namespace) -> int:
    """Run ``lossfns serve``.

    Returns:
        0 after SIGTERM or SIGINT, 2 if the input was refused or the address is taken.
    """
    key = args.api_key or os.environ.get("LOSSFNS_API_KEY")
    try:
        if args.host not in LOOPBACK and not key:
            fix = "Pass --api-key, or serve on 127.0.0.1."
            raise LossInputError("--api-key", f"a key for {args.host}", "none", fix)
        from lossfns.server.app import create_app
        from lossfns.server.service import Service

        service = Service(
            named_models(args.model or [DECODER]),
            device=args.device,
            state=args.state,
            sessions=args.sessions,
            model_limit=args.models,
            memory=None if args.memory is None else args.memory * 2**30,
            queue=args.queue,
            grace_seconds=args.grace,
        )
        serve(create_app(service, api_key=key), host=args.host, port=args.port, log=args.log)
    except ModuleNotFoundError as error:
        return print_refusal(ImportError(f"the server needs {error.name}: pip install 'lossfns[server]'"))
    except (LossInputError, ImportError, OSError) as error:
        return print_refusal(error)
    return 0


def named_models(options: list[str]) -> dict[str, Any]:
    """Return the functions that build the models, by the names of the clients."""
    from lossfns.backend.client.reference import embedded_model
    from lossfns.backend.model import hf

    models: dict[str, Any] = {}
    for option in options:
        name, _, source = option.rpartition("=")
        name = name or ("Decoder" if source == DECODER else source)
        if name in models:
            raise LossInputError("--model", "each name once", repr(name), "Name one with NAME=MODEL.")
        models[name] = embedded_model if source == DECODER else lambda source=source: hf.load(source)
    return models


def serve(app: Starlette, *, host: str = "127.0.0.1", port: int = 8000, log: bool = False) -> None:
    """Serve an application until SIGTERM or SIGINT. Its service then finishes and saves.

    Args:
        app: from ``create_app``.
        host, port: where to listen. Port 0 takes a free one; the address is printed.
        log: whether to print a line for each request to standard error.

    Raises:
        OSError: if the address is taken, or is not one of this machine.
    """
    import uvicorn

    with listening_socket(host, port) as sock:
        name = f"[{host}]" if ":" in host else host
        print(f"lossfns serve: http://{name}:{sock.getsockname()[1]}", flush=True)
        loop_factory = uvicorn.Config(app).get_loop_factory()
        with warnings.catch_warnings(), asyncio.Runner(loop_factory=loop_factory) as runner:
            warnings.showwarning = log_warning
            runner.run(serve_socket(app, sock, log))


def log_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Log a warning as one line. Its place would be one of the server's own threads."""
    text = printable(" ".join(str(message).split()))
    logging.getLogger("lossfns.server").warning("%s: %s", category.__name__, text)


def listening_socket(host: str, port: int) -> socket.socket:
    """Listen at an address; raise OSError if it is taken."""
    kind = socket.SOCK_STREAM
    family, _, _, _, address = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_PASSIVE)[0]
    sock = socket.socket(family, kind, socket.IPPROTO_TCP)  # without the protocol, asyncio leaves Nagle's delays on
    try:
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"{error.strerror}: {host}, port {port}. --port takes another") from error
    except BaseException:
        sock.close()
        raise
    return sock


async def serve_socket(app: Starlette, sock: socket.socket, log: bool = False) -> None:
    """Serve an application at a socket that listens, until SIGTERM or SIGINT."""
    import uvicorn

    if log:
        logger = logging.getLogger("lossfns.server")
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.handlers[:], logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    # Without the last limit, a connection that comes while the server stops keeps it until the client closes it.
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_keep_alive=120, timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)

    def stop() -> None:
        app.state.service.begin_stop()
        server.force_exit = server.should_exit  # a second signal does not wait for the connections
        server.should_exit = True

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        # The server's own handlers would end the process by the signal.
        server.capture_signals = nullcontext  # type: ignore[assignment, method-assign, unused-ignore]
    await server.serve(sockets=[sock])
