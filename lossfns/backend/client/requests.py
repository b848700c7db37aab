"""The arguments of a client's calls: checked at the call, and copied so that later changes do not matter."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossfns.backend.engine.batch import missing_field
from lossfns.backend.engine.pooling import POOLS
from lossfns.backend.storage.file import existing
from lossfns.errors import LossInputError


def copy_data(data: Any) -> Any:
    """Copy a list of datums, so that the caller may change the list and the datums' fields after the call."""
    return [copy_datum(datum) for datum in data] if isinstance(data, (list, tuple)) else data


def copy_datum(datum: Any) -> Any:
    """Return a shallow copy with its own fields; anything that is not a datum is returned as it is."""
    if not isinstance(getattr(datum, "loss_fn_inputs", None), Mapping):
        return datum
    try:
        copied = copy.copy(datum)
        object.__setattr__(copied, "loss_fn_inputs", dict(datum.loss_fn_inputs))
    except Exception:
        return datum
    return copied


OUTPUTS = ("logprobs", "embedding")


def check_output(output: Any, pooling: Any) -> None:
    """Refuse an unknown output or pooling, in the services' words."""
    if not isinstance(output, str) or output not in OUTPUTS:
        fix = (
            f"Unsupported output={output!r}; expected 'logprobs', 'embedding', 'projection', or "
            "'cos_similarity_matrix'. The local client has the first two."
        )
        raise LossInputError("output", "'logprobs' or 'embedding'", repr(output), fix)
    if not isinstance(pooling, str) or pooling not in POOLS:
        fix = f"Unsupported pooling={pooling!r}; expected 'mean' or 'last'"
        raise LossInputError("pooling", "'mean' or 'last'", repr(pooling), fix)


def check_embedding_config(config: Mapping[str, Any]) -> None:
    """Refuse settings that an embedding does not read: a misspelt ``pooling`` would give another embedding."""
    if config:
        got = ", ".join(map(repr, config))
        raise LossInputError("loss_fn_config", "output and pooling for an embedding", got, "Drop the others.")


def check_path(field: str, path: Any) -> None:
    """Refuse anything but a path that is not empty; ``field`` is the argument's name."""
    if not isinstance(path, (str, Path)) or not str(path) or "\0" in str(path):
        raise LossInputError(field, "the path of a file", repr(path), "Pass a string or a Path.")


def check_save(name: Any, ttl_seconds: Any, user_metadata: Any) -> None:
    """Refuse arguments of a save that a local file cannot honour."""
    check_path("name", name)
    if ttl_seconds is not None:
        raise LossInputError("ttl_seconds", "None", repr(ttl_seconds), "Nothing expires here: delete the file.")
    check_metadata(user_metadata)


def check_metadata(user_metadata: Any) -> None:
    """Refuse metadata that are neither None nor a dict of strings."""
    strings = isinstance(user_metadata, Mapping) and all(
        isinstance(key, str) and isinstance(value, str) for key, value in user_metadata.items()
    )
    if user_metadata is not None and not strings:
        got, fix = f"{user_metadata!r}", "Turn other values into a string with json.dumps."
        raise LossInputError("user_metadata", "a dict of strings", got, fix)


def check_loss_type(loss_type_input: Any) -> None:
    """Refuse an unknown ``loss_type_input``, in the services' words."""
    if loss_type_input is not None and (not isinstance(loss_type_input, str) or loss_type_input != "logprobs"):
        fix = (
            f"Unsupported loss_type_input={loss_type_input!r}. Supported values are: logprobs. "
            "Set output='embedding' instead of loss_type_input for embedding/cos_similarity_matrix custom loss."
        )
        raise LossInputError("loss_type_input", "'logprobs'", repr(loss_type_input), fix)


def check_custom_targets(data: Any) -> None:
    """Raise at the call, as both SDKs do, if a datum of a custom loss over logprobs has no targets."""
    for i, datum in enumerate(data if isinstance(data, (list, tuple)) else ()):
        inputs = getattr(datum, "loss_fn_inputs", None)
        if isinstance(inputs, Mapping) and inputs.get("target_tokens") is None:
            fix = "target_tokens must be provided when using cross_entropy: build the datum with datum_from_tokens."
            raise missing_field("target_tokens", ["target_tokens"], fix, i)


def refuse_existing(path: str | Path) -> None:
    """Refuse a name that exists before a save begins. The save itself refuses one that appears meanwhile."""
    if os.path.lexists(path):
        raise existing(path)


def check_flag(name: str, value: Any) -> None:
    """Refuse anything but True or False: a string is neither, and counts as True."""
    if not isinstance(value, bool):
        raise LossInputError(name, "True or False", repr(value), "Pass a bool, not a string or a number.")


def check_integer(name: str, value: Any, low: int, high: int, fix: str) -> None:
    """Refuse anything but an integer in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise LossInputError(name, f"a whole number from {low} to {high}", repr(value), fix)
