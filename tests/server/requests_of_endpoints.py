"""A good request of every endpoint, as plain data, protobuf and bytes."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

from tinker.proto import tinker_public_pb2 as pb

JSON, PROTOBUF = "application/json", "application/x-protobuf"


@dataclass
class Target:
    """What the requests are about: a session with a model whose next request is ``seq_id``, and a decoy.

    ``decoy`` is a model of another session, to which bytes go that may by chance be a good request. ``sent`` are
    requests that were accepted before. A body of more than ``body_bytes`` is refused.
    """

    key: str
    session_id: str
    model_id: str
    sampler_id: str
    checkpoint: str
    decoy: str
    sent: list[bytes] = field(default_factory=list)
    seq_id: int = 1
    body_bytes: int = 2**26


class Malformed(NamedTuple):
    """A request in bytes.

    Attributes:
        kind: how it is spoiled, and what it was before.
        raw: its bytes.
        harmless: whether it may be accepted: it then changes nothing that a test looks at.
        half: whether the client sends nothing more and does not wait for an answer.
    """

    kind: str
    raw: bytes
    harmless: bool = False
    half: bool = False


def http(
    target: Target,
    path: str,
    body: bytes,
    content_type: str = JSON,
    *lines: str,
    method: str = "POST",
    key: bool = True,
) -> bytes:
    """Return a request in bytes; ``lines`` are further headers."""
    head = [f"{method} /api/v1/{path} HTTP/1.1", "Host: local", f"Content-Length: {len(body)}", *lines]
    if content_type:
        head.append(f"Content-Type: {content_type}")
    if key:
        head.append(f"X-API-Key: {target.key}")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


def datum() -> dict[str, Any]:
    def column(values: list[Any], dtype: str) -> dict[str, Any]:
        return {"data": values, "dtype": dtype, "shape": [3]}

    return {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": [72, 105, 33]}]},
        "loss_fn_inputs": {
            "target_tokens": column([105, 33, 10], "int64"),
            "logprobs": column([-5.0, -5.5, -6.0], "float32"),
            "advantages": column([1.0, -0.5, 0.5], "float32"),
        },
    }


def graph() -> dict[str, Any]:
    returned = {"tuple": [{"ref": "total"}, {"dict": {}}]}
    nodes = [
        {"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": [], "kwargs": {}},
        {"op": "call_method", "name": "total", "target": "sum", "args": [{"ref": "logprobs"}], "kwargs": {}},
        {"op": "output", "name": "output", "target": "output", "args": [returned], "kwargs": {}},
    ]
    return {"format": 1, "nodes": nodes}


ADAM = {"learning_rate": 0.5, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_clip_norm": 1.0}
CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


def bodies(rng: Random, target: Target) -> dict[str, dict[str, Any]]:
    """Return a good body of each JSON endpoint, with all fields that are read."""
    number = rng.randrange(10**6, 2**31)
    session, place = {"session_id": target.session_id}, {"model_id": target.model_id, "seq_id": target.seq_id}
    of_loss = {"data": [datum(), datum()], "loss_fn": "ppo", "loss_fn_config": dict(CLIP)}
    lora = {"rank": 4, "seed": 1, "train_mlp": True, "train_attn": True, "train_unembed": True}
    settings = {"max_tokens": 2, "seed": 1, "temperature": 0.5, "top_k": 5, "top_p": 0.5, "stop": [1]}
    sample = {"num_samples": 1, "sampling_session_id": target.sampler_id, "seq_id": number, "prompt_logprobs": True}
    metadata = {"user_metadata": {"a": "b"}}
    return {
        "create_session": {"tags": ["x"], "sdk_version": "0.38.0", **metadata},
        "session_heartbeat": dict(session),
        "create_model": session | metadata | {"model_seq_id": number, "base_model": "Decoder", "lora_config": lora},
        "load_weights": place | metadata | {"path": target.checkpoint, "optimizer": True},
        "load_weights as model": session | {"model_seq_id": number, "path": target.checkpoint, "optimizer": False},
        "get_info": {"model_id": target.model_id},
        "create_custom_loss": session
        | {"custom_loss_seq_id": number, "inputs": [{"name": "logprobs", "rank": 1}], "graph": graph()},
        "optim_step": place | {"adam_params": dict(ADAM)},
        "save_weights": place | metadata | {"path": f"new-{number}", "overwrite": False},
        "save_weights_for_sampler": place | {"path": f"new-{number}"},
        "save_weights_for_sampler in memory": place | {"sampling_session_seq_id": number, "kind": "snapshot"},
        "create_sampling_session": session | {"sampling_session_seq_id": number, "model_path": target.checkpoint},
        "asample": sample | {"prompt": datum()["model_input"], "sampling_params": settings},
        "forward": place | {"forward_input": of_loss},
        "forward_backward": place | {"forward_backward_input": of_loss},
        "retrieve_future": {"request_id": f"{target.model_id}:1"},
    }


REQUIRED = {
    "create_session": (),
    "session_heartbeat": ("session_id",),
    "create_model": ("session_id", "model_seq_id", "base_model"),
    "load_weights": ("seq_id", "path", "optimizer"),
    "load_weights as model": ("session_id", "model_seq_id", "path", "optimizer"),
    "get_info": ("model_id",),
    "create_custom_loss": ("session_id", "custom_loss_seq_id", "inputs", "graph"),
    "optim_step": ("model_id", "seq_id", "adam_params"),
    "save_weights": ("model_id", "seq_id", "path"),
    "save_weights_for_sampler": ("model_id", "seq_id", "path"),
    "save_weights_for_sampler in memory": ("model_id", "seq_id", "sampling_session_seq_id"),
    "create_sampling_session": ("session_id", "sampling_session_seq_id", "model_path"),
    "asample": ("sampling_session_id", "seq_id", "prompt", "sampling_params"),
    "forward": ("model_id", "seq_id", "forward_input"),
    "forward_backward": ("model_id", "seq_id", "forward_backward_input"),
    "retrieve_future": ("request_id",),
}
"""The fields without which a body is refused. Unknown ones are refused where all known ones are read."""
OPEN = ("create_session", "session_heartbeat", "get_info", "retrieve_future")
"""Endpoints that pass over fields that they do not know."""
UNREAD = {("create_session", name) for name in ("tags", "sdk_version", "user_metadata")}


def i64(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def f32(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def message(target: Target) -> Any:
    """Return a good request of two datums, which would change the gradient."""
    request = pb.ForwardBackwardRequest(
        model_id=target.model_id, seq_id=target.seq_id, loss_fn="ppo", loss_fn_config=CLIP
    )
    for _ in range(2):
        each = request.data.add()
        each.model_input.add().encoded_text.tokens = struct.pack("<3i", 72, 105, 33)
        for name, values, dtype in (("target_tokens", i64(105, 33, 10), pb.DTYPE_INT64),
                                    ("logprobs", f32(-5.0, -5.5, -6.0), pb.DTYPE_FLOAT32),
                                    ("advantages", f32(1.0, -0.5, 0.5), pb.DTYPE_FLOAT32)):  # fmt: skip
            tensor = each.loss_fn_inputs[name]
            tensor.dense, tensor.dtype = values, dtype
            tensor.shape.append(3)
    return request
