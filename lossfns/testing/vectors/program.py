"""A program that reads requests and writes replies, one on each line, run in a process group of its own."""

from __future__ import annotations

import os
import queue
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from lossfns.errors import LossInputError

MAX_LINE = 2**20
"""The longest line that is read, in bytes. The longest reply to a vector has some thousands."""

MAX_WAITING = 16
"""The number of lines that are read ahead."""

MAX_TAIL = 2**14
"""The number of bytes that are kept of what the program wrote last to standard error."""

PATIENCE = 5.0
"""The longest wait for a program that closed its output to end, in seconds."""


class Ended(Exception):
    """The program ended, or wrote a line that is too long. The text says which."""


class Silence(Exception):
    """No line came in time. The text says what is known of the reason."""


class Program:
    """A running program, and the threads that write to it and read from it. All memory is bounded.

    Leaving the context kills the program and the other processes of its group.

    Args:
        command: the program, split as a shell would.
        requests: the lines to write to its standard input, without newlines.

    Raises:
        LossInputError: if the command cannot be started.
    """

    def __init__(self, command: str, requests: Iterable[str]) -> None:
        pipe = subprocess.PIPE
        if not command.strip():
            raise LossInputError(
                "--cmd", "a command that starts", repr(command), "Name the program that answers the vectors."
            )
        try:
            self.process = subprocess.Popen(
                shlex.split(command), stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
            )
        except (OSError, ValueError) as error:
            fix = "Try it in a shell."
            raise LossInputError("--cmd", "a command that starts", f"{command!r}: {error}", fix) from None
        self.lines: queue.Queue[bytes | None] = queue.Queue(MAX_WAITING)
        self.partial = 0  # bytes of a line whose end has not come
        self.closed_input = False
        self.tail = b""
        works = (lambda: self.write_requests(requests), self.read_output, self.read_errors)
        self.threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in self.threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        self.process.wait()
        deadline = time.monotonic() + 1.0  # a process that left the group may hold the pipes open for longer
        while any(thread.is_alive() for thread in self.threads) and time.monotonic() < deadline:
            with suppress(queue.Empty):
                self.lines.get(timeout=0.01)  # the thread that reads may wait for room

    def kill(self) -> None:
        """Kill every process of the program's group."""
        if not hasattr(os, "killpg"):
            self.process.kill()
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    # The threads

    def write_requests(self, requests: Iterable[str]) -> None:
        """Write every request. A full pipe does not block the reading."""
        assert self.process.stdin is not None
        try:
            with self.process.stdin as stream:
                for line in requests:
                    stream.write(line.encode() + b"\n")
                    stream.flush()
        except OSError:  # the program may stop reading; requests without a reply count as failed
            self.closed_input = True

    def read_output(self) -> None:
        """Put every line of output into the queue, then None. A line that is too long is put there in part, as last."""
        assert self.process.stdout is not None
        buffer = bytearray()
        with suppress(OSError), self.process.stdout as stream:
            while chunk := os.read(stream.fileno(), 2**16):
                begun = len(buffer)
                buffer += chunk
                if b"\n" in chunk:
                    *complete, rest = bytes(buffer).split(b"\n")
                    buffer = bytearray(rest)
                    for line in complete:
                        self.lines.put(line)
                    begun = 0
                self.partial = len(buffer)
                if begun + len(chunk) > MAX_LINE and len(buffer) > MAX_LINE:
                    break
        if buffer:
            self.lines.put(bytes(buffer))
        self.lines.put(None)

    def read_errors(self) -> None:
        """Keep the end of what the program writes to standard error."""
        assert self.process.stderr is not None
        with suppress(OSError), self.process.stderr as stream:
            while chunk := os.read(stream.fileno(), 2**16):
                self.tail = (self.tail + chunk)[-MAX_TAIL:]

    # The other side of the queue

    def read_line(self, deadline: float) -> str:
        """Return the next line.

        Raises:
            Silence: if no line comes until the deadline, a time of ``time.monotonic``.
            Ended: if the program ended, or its line is too long.
        """
        try:
            line = self.lines.get(timeout=max(deadline - time.monotonic(), 0.001))
        except queue.Empty:
            if self.process.poll() is not None:  # another process holds its output open
                raise Ended(self.last_words()) from None
            reasons = [
                f"; it wrote {self.partial} bytes without a newline" if self.partial else "",
                "; it closed its input" if self.closed_input else "",
            ]
            raise Silence("".join(reasons)) from None
        if line is None:
            raise Ended(self.last_words())
        if len(line) > MAX_LINE:
            raise Ended(f"it wrote a line of more than {MAX_LINE} bytes")
        return line.decode("utf-8", "replace")

    def last_words(self) -> str:
        """Return how the program ended, and the last three lines that it wrote to standard error."""
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return "it closed its output and did not end"
        self.threads[-1].join(1.0)
        how = f"exit status {status}" if status >= 0 else f"signal {-status} ({signal.Signals(-status).name})"
        lines = self.tail.decode("utf-8", "replace").strip().splitlines()[-3:]
        return f"it ended with {how}" + "".join(f"\n  {one_line(line)}" for line in lines)


def one_line(text: str, longest: int = 200) -> str:
    """Return text for one line of a report: no control characters, no half of a surrogate pair, and not too long."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: longest + 1])
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise SystemExit on SIGTERM and SIGHUP, so that a program which runs is ended, too."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), end) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
