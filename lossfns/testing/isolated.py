"""Run work in a child process, so that whatever the work does, its caller goes on and knows how it ended.

The work may end the process, crash it, block it, start threads and processes, close its streams and change the folder.
It sends messages, which are plain JSON values. Messages that were sent before the end arrive.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch

from lossfns.testing.vectors.program import ended_by_signals

Send = Callable[[Any], None]


class Ended(NamedTuple):
    """How the process of the work ended before the work was done: ``how`` in words, and whether time was up."""

    how: str
    timed_out: bool = False


def run_isolated(work: Callable[[Send], None], timeout: float, silence: float = math.inf) -> Iterator[Any]:
    """Run ``work(send)`` in a child process and yield what it sends. If it does not finish, the last item is ``Ended``.

    The child leads a process group, which is killed at the end, when time is up, and when the caller stops iterating.
    Standard output of the child goes to standard error. Its standard input is empty.

    Args:
        work: a function that is called with a function that sends a message.
        timeout: the seconds after which the child is killed.
        silence: the seconds without a message after which the child is killed.
    """
    deadline = time.monotonic() + timeout
    reader, writer = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    pid = os.fork()
    if pid == 0:
        run_child(work, writer, timeout)
    os.close(writer)
    with ended_by_signals():
        try:
            for message in messages(reader, pid, deadline, silence):
                if message == DONE:
                    return
                yield message
        finally:
            os.close(reader)
            end_group(pid)


DONE = ["done"]
FAILED = "failed"
"""The first item of the message that ``work`` itself has raised an error, not the code that it runs. The second item is
the error."""


def messages(reader: int, pid: int, deadline: float, silence: float) -> Iterator[Any]:
    """Yield the messages in a pipe, then an ``Ended``."""
    heard = time.monotonic()
    os.set_blocking(reader, False)
    poller = select.poll()
    poller.register(reader, select.POLLIN | select.POLLHUP)
    rest, is_open, status = b"", True, None
    while status is None or is_open:
        left = min(deadline, heard + silence) - time.monotonic()
        if left <= 0 and status is None:
            yield Ended("time was up", timed_out=True)
            return
        # A process that the child started may hold the pipe open, so the end of the child is looked for as well.
        if status is None and not is_open:
            time.sleep(0.005)
        elif status is None:
            poller.poll(min(left, 0.1) * 1000)
        part = read_available(reader) if is_open else None
        if part == b"":
            is_open = False
        elif part:
            *lines, rest = (rest + part).split(b"\n")
            heard = time.monotonic()
            for line in lines:
                with contextlib.suppress(ValueError):  # the work may have written to the pipe by itself
                    yield json.loads(line)
            continue
        if status is not None:
            break
        found, code = os.waitpid(pid, os.WNOHANG)
        status = code if found else None
    yield Ended(describe_status(status or 0))


def read_available(fd: int) -> bytes | None:
    """Return what can be read without waiting: None if nothing can, b"" at the end."""
    try:
        return os.read(fd, 1 << 16)
    except BlockingIOError:
        return None


def describe_status(status: int) -> str:
    """Return how a process ended, in words."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with contextlib.suppress(ValueError):
            return f"the process was ended by the signal {signal.Signals(number).name}"
        return f"the process was ended by the signal {number}"
    return f"the process ended with exit status {os.WEXITSTATUS(status)}"


def end_group(pid: int) -> None:
    """Kill the child and every process of its group, and wait for the child."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def run_child(work: Callable[[Send], None], writer: int, timeout: float) -> NoReturn:
    """Run the work in the child process, then end it without returning to the code of the parent."""
    status = 1
    try:
        os.setsid()
        torch.set_num_threads(1)  # the parent's other threads are not in this process, and would be waited for
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(int(min(timeout + 60, 2**31 - 1)))  # in case the parent is gone by then
        redirect_streams()
        owner = os.getpid()

        def send(message: Any) -> None:
            if os.getpid() != owner:
                os._exit(0)  # the work has forked: only the child itself sends
            line = json.dumps(message).encode() + b"\n"
            while line:
                line = line[os.write(writer, line) :]

        try:
            work(send)
            send(DONE)
        except Exception as error:
            traceback.print_exc()
            send([FAILED, f"{type(error).__name__}: {error}"])
        status = 0
    finally:
        os._exit(status)


def redirect_streams() -> None:
    """Empty standard input, and send standard output to standard error, for Python and for C."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    try:
        os.dup2(2, 1)
    except OSError:  # standard error is closed
        os.dup2(null, 1)
        os.dup2(null, 2)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
