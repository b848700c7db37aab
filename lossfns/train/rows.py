"""Files of a run with one JSON row on each line: metrics and evaluations."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from lossfns.errors import LossInputError

if sys.platform != "win32":
    import fcntl


class RowFile:
    """A file of rows that a run appends to, open and locked by this process.

    A killed run may have more rows than its checkpoint counts: the file is cut to that count. Rank 0 writes the file.
    Other ranks read its rows, and write their own rows to a temporary file.

    Args:
        path: the file; it is created if there is none.
        count: the number of rows by the checkpoint.
        rank: the rank of this process.

    Raises:
        LossInputError: if another process has the lock, or there are fewer rows.

    Attributes:
        rows: the rows, with those that are appended.
    """

    def __init__(self, path: Path, count: int, rank: int = 0) -> None:
        if rank:
            self.file: IO[bytes] = TemporaryFile()  # noqa: SIM115  # open until close()
            self.rows = [] if count == 0 else read_first(path, count)
            return
        self.file = path.open("ab+")
        try:
            lock(self.file, path.parent)
            self.file.seek(0)
            self.rows = read_rows(self.file, count)
            self.file.truncate(self.file.tell())
        except LossInputError:
            self.file.close()
            raise

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.file.write(json.dumps(row).encode() + b"\n")
        self.file.flush()

    def sync(self) -> None:
        """Wait until the rows are on the disk."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def lock(file: IO[bytes], folder: Path) -> None:
    """Keep other processes from writing to the run. The lock ends with the process, even if it is killed."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        got = f"{folder}, which is still running"
        raise LossInputError("--resume", "a run that has ended", got, "Wait for it, or stop it.") from None


def read_first(path: Path, count: int) -> list[dict[str, Any]]:
    """Read the first ``count`` rows of a file."""
    with path.open("rb") as file:
        return read_rows(file, count)


def read_rows(file: IO[bytes], count: int) -> list[dict[str, Any]]:
    """Read the next ``count`` rows of a file."""
    try:
        rows = [json.loads(file.readline()) for _ in range(count)]
        return [{**row, "seconds": float(row["seconds"])} for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError):
        got = f"{file.name}, which is damaged"
        raise LossInputError("--resume", f"{count} rows", got, "Start a new run.") from None
