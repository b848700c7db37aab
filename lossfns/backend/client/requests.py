"""What a call of a client takes: checked where the caller stands, and kept as it was at the call."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossfns.backend.engine.batch import missing
from lossfns.backend.engine.engine import POOLS
from lossfns.errors import LossInputError


def snapshot(data: Any) -> Any:
    """The datums as they are now: what the caller does to them afterwards is not part of the request."""
    return [datum_now(datum) for datum in data] if isinstance(data, (list, tuple)) else data


def datum_now(datum: Any) -> Any:
    """A datum with fields of its own; what is none is left to the checks."""
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
    """Refuse an output or a pooling that is not known, in the services' words."""
    if not isinstance(output, str) or output not in OUTPUTS:
        fix = (
            f"Unsupported output={output!r}; expected 'logprobs', 'embedding', 'projection', or "
            "'cos_similarity_matrix', of which the local client has the first two"
        )
        raise LossInputError("output", "'logprobs' or 'embedding'", repr(output), fix)
    if not isinstance(pooling, str) or pooling not in POOLS:
        fix = f"Unsupported pooling={pooling!r}; expected 'mean' or 'last'"
        raise LossInputError("pooling", "'mean' or 'last'", repr(pooling), fix)


def check_no_more(config: Mapping[str, Any]) -> None:
    """Refuse what an embedding does not read: a ``pooling`` misspelt would be another embedding."""
    if config:
        got = ", ".join(map(repr, config))
        raise LossInputError("loss_fn_config", "output and pooling for an embedding", got, "Drop the others.")


def check_path(field: str, path: Any) -> None:
    if not isinstance(path, (str, Path)) or not str(path) or "\0" in str(path):
        raise LossInputError(field, "the path of a file", repr(path), "Pass a string or a Path.")


def check_save(name: Any, ttl_seconds: Any, user_metadata: Any) -> None:
    """Refuse what a local file cannot keep."""
    check_path("name", name)
    if ttl_seconds is not None:
        raise LossInputError("ttl_seconds", "None", repr(ttl_seconds), "Nothing expires here: delete the file.")
    check_metadata(user_metadata)


def check_metadata(user_metadata: Any) -> None:
    strings = isinstance(user_metadata, Mapping) and all(
        isinstance(key, str) and isinstance(value, str) for key, value in user_metadata.items()
    )
    if user_metadata is not None and not strings:
        got, fix = f"{user_metadata!r}", "json.dumps makes a string of anything plain."
        raise LossInputError("user_metadata", "a dict of strings", got, fix)


def check_loss_type(loss_type_input: Any) -> None:
    if loss_type_input is not None and (not isinstance(loss_type_input, str) or loss_type_input != "logprobs"):
        fix = (
            f"Unsupported loss_type_input={loss_type_input!r}. Supported values are: logprobs. "
            "Set output='embedding' instead of loss_type_input for embedding/cos_similarity_matrix custom loss."
        )
        raise LossInputError("loss_type_input", "'logprobs'", repr(loss_type_input), fix)


def check_targets(data: Any) -> None:
    """Refuse a custom loss without targets at the call, as both SDKs do."""
    for i, datum in enumerate(data if isinstance(data, (list, tuple)) else ()):
        inputs = getattr(datum, "loss_fn_inputs", None)
        if isinstance(inputs, Mapping) and inputs.get("target_tokens") is None:
            fix = "target_tokens must be provided when using cross_entropy: build the datum with datum_from_tokens."
            raise missing("target_tokens", ["target_tokens"], fix, i)


def refuse_existing(path: str | Path) -> None:
    if os.path.exists(path):
        fix = "Choose another name; save_state(..., overwrite=True) replaces it."
        raise LossInputError("name", "a file that does not exist yet", f"{path}", fix)
