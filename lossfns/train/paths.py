"""Paths among the options of a run: absolute where they have to mean the same in another folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from lossfns.loading import file_of
from lossfns.train import files


def with_absolute_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with absolute paths, so that they mean the same in another folder."""
    resolve: dict[str, Callable[[str], str]] = {"data": files.located, "init": os.path.abspath}
    resolve |= dict.fromkeys(("model", "teacher"), absolute_if_there) | dict.fromkeys(("loss", "reward"), absolute_file)
    return {name: resolve[name](x) if name in resolve and x else x for name, x in options.items()}


def absolute_if_there(text: str) -> str:
    """Return the absolute path of a file or folder that exists, and the name of anything else."""
    return os.path.abspath(text) if os.path.exists(text) else text


def absolute_file(text: str) -> str:
    """Return ``FILE.py:FUNCTION`` and ``json-schema:FILE`` with an absolute path if the file exists.

    A name stays a name, also where a folder has it.
    """
    before, _, after = text.rpartition(":")
    if before.endswith(".py") and os.path.exists(before):
        return f"{os.path.abspath(before)}:{after}"
    return f"{before}:{os.path.abspath(after)}" if before == "json-schema" and os.path.exists(after) else text


def names_code(options: Mapping[str, Any]) -> bool:
    """Whether the loss or the reward is a function of the user. Its module may change the folder as it is imported."""
    loss, reward = (options.get(name) or "" for name in ("loss", "reward"))
    return ":" in loss.partition("(")[0] or (":" in reward and not reward.startswith(("regex:", "json-schema:")))


def code_files(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the files of the loss and the reward that are the user's: Python files, and a JSON schema."""
    loss, reward = (options.get(name) or "" for name in ("loss", "reward"))
    found = {"loss": file_of(loss) if ":" in loss.partition("(")[0] else None}
    kind, _, rest = reward.partition(":")
    found["reward"] = rest if kind == "json-schema" else file_of(reward) if rest and kind != "regex" else None
    return {name: file for name, file in found.items() if file}


def with_lasting_paths(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return options that mean the same after the import of the user's functions."""
    if not names_code(given):
        return given
    return with_absolute_paths(given) | ({"out": os.path.abspath(given["out"])} if "out" in given else {})
