"""The folder of a server: where the checkpoints of its models are."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from lossfns.errors import LossInputError

if sys.platform != "win32":
    import fcntl

PATH = re.compile(
    r"tinker://(\w[\w-]{0,127}):train:(\d{1,18})/(weights|sampler_weights)/([A-Za-z0-9][\w.-]{0,127})", re.ASCII
)
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,127}", re.ASCII)


class StateFolder:
    """The folder of one server at a time. The lock ends with ``close``, and with the process.

    Args:
        path: the folder, which is created; None takes one that ``close`` deletes.

    Raises:
        LossInputError: for a folder that cannot be written to, or that another server has.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.temporary = tempfile.TemporaryDirectory(prefix="lossfns-") if path is None else None
        self.root = Path(self.temporary.name if self.temporary else str(path))
        self.root.mkdir(parents=True, exist_ok=True)
        if not os.access(self.root, os.W_OK):
            raise LossInputError("state", "a folder to write to", f"{self.root}", "Choose another.")
        self._lock = open(self.root / "lock", "ab")  # noqa: SIM115
        if sys.platform != "win32":
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                got, fix = f"{self.root}, which another server has", "Stop that one, or choose another folder."
                raise LossInputError("state", "a folder of one server", got, fix) from None

    def close(self) -> None:
        """Leave the folder to the next server, or delete it if it is temporary."""
        self._lock.close()
        if self.temporary is not None:
            self.temporary.cleanup()

    def checkpoint(self, path: str) -> Path:
        """Return the file of a checkpoint's path, ``tinker://SESSION:train:N/weights/NAME``."""
        match = PATH.fullmatch(path)
        if match is None:
            fix = "save_state and save_weights_for_sampler return such paths."
            raise LossInputError("path", "tinker://SESSION:train:N/weights/NAME", repr(path)[:200], fix)
        return self.root / match[1] / match[2] / match[3] / match[4]

    def saved_checkpoint(self, path: str) -> Path:
        """Return the file of a checkpoint that exists."""
        file = self.checkpoint(path)
        if not file.is_file():
            raise LossInputError("path", "a checkpoint of this server", repr(path), "list_checkpoints names them.")
        return file

    def new_checkpoint(self, model_id: str, kind: str, name: str) -> tuple[str, Path]:
        """Return the path that a model's checkpoint will have, and its file. ``kind`` is a part of the path."""
        if NAME.fullmatch(name) is None:
            fix = "Take letters, digits, '.', '_' and '-'; the first is a letter or a digit."
            raise LossInputError("path", "the name of a checkpoint", repr(name)[:200], fix)
        path = f"tinker://{model_id}/{kind}/{name}"
        return path, self.checkpoint(path)

    def of_model(self, model_id: str) -> Path:
        """Return the folder of a model's checkpoints."""
        return self.checkpoint(f"tinker://{model_id}/weights/any").parent.parent
