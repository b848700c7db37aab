"""Passes in protobuf, each spoiled in one way."""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random
from typing import Any

from requests_of_endpoints import PROTOBUF, Malformed, Target, f32, http, i64, message, text
from tinker.proto import tinker_public_pb2 as pb

NAN, INFINITY = float("nan"), float("inf")


def csr(tensor: Any, shape: list[int], values: bytes, crow: bytes, col: bytes) -> None:
    tensor.sparse_csr.values, tensor.sparse_csr.crow_indices, tensor.sparse_csr.col_indices = values, crow, col
    del tensor.shape[:]
    tensor.shape.extend(shape)


CSR: dict[str, tuple[list[int], bytes, bytes, bytes]] = {
    "good rows of no tokens": ([4, 2], f32(1, 2), i64(0, 1, 2, 2, 2), i64(0, 1)),
    "column out of range": ([3, 2], f32(1, 2), i64(0, 1, 2, 2), i64(0, 2)),
    "negative column": ([3, 2], f32(1, 2), i64(0, 1, 2, 2), i64(-1, 1)),
    "column twice": ([3, 2], f32(1, 2), i64(0, 2, 2, 2), i64(1, 1)),
    "columns not sorted": ([3, 2], f32(1, 2), i64(0, 2, 2, 2), i64(1, 0)),
    "pointers descend": ([3, 2], f32(1, 2), i64(0, 2, 1, 2), i64(0, 1)),
    "pointers from 1": ([3, 2], f32(1, 2), i64(1, 1, 2, 2), i64(0, 1)),
    "negative pointer": ([3, 2], f32(1, 2), i64(0, -1, 2, 2), i64(0, 1)),
    "pointers past the end": ([3, 2], f32(1, 2), i64(0, 1, 2, 2**62), i64(0, 1)),
    "too few pointers": ([3, 2], f32(1, 2), i64(0, 2), i64(0, 1)),
    "no pointers": ([3, 2], f32(1, 2), b"", i64(0, 1)),
    "too few columns": ([3, 2], f32(1, 2), i64(0, 1, 2, 2), i64(0)),
    "cut values": ([3, 2], f32(1, 2)[:-1], i64(0, 1, 2, 2), i64(0, 1)),
    "cut pointers": ([3, 2], f32(1, 2), i64(0, 1, 2, 2)[:-3], i64(0, 1)),
    "one dimension": ([3], f32(1, 2), i64(0, 1, 2, 2), i64(0, 1)),
    "three dimensions": ([3, 2, 1], f32(1, 2), i64(0, 1, 2, 2), i64(0, 1)),
    "negative shape": ([-3, 2], f32(1, 2), i64(0, 1, 2, 2), i64(0, 1)),
    "shape of 2**80": ([2**40, 2**40], f32(1), i64(0, 1), i64(0)),
    "wide row": ([1, 2**27], f32(1), i64(0, 1), i64(2**26)),
    "no rows": ([0, 2**62], b"", i64(0), b""),
}


def sparse(rng: Random, target: Target) -> Malformed:
    kind = rng.choice(list(CSR))
    request = message(target)
    name = rng.choice(["target_tokens", "logprobs", "advantages"])
    shape, values, crow, col = CSR[kind]
    if name == "target_tokens" and not len(values) % 4:
        values = i64(*range(len(values) // 4))
    csr(request.data[1].loss_fn_inputs[name], shape, values, crow, col)
    return of_message(f"CSR, {kind}, {name}", target, request)


def of_message(kind: str, target: Target, request: Any, path: str = "forward_backward") -> Malformed:
    return Malformed(kind, http(target, path, request.SerializeToString(), PROTOBUF))


def tensor(request: Any, name: str = "logprobs") -> Any:
    return request.data[1].loss_fn_inputs[name]


def set_field(request: Any, place: Callable[[Any], Any], **fields: Any) -> None:
    for name, value in fields.items():
        setattr(place(request), name, value)


def set_shape(request: Any, *shape: int) -> None:
    del tensor(request).shape[:]
    tensor(request).shape.extend(shape)


def set_chunk(request: Any, data: bytes) -> None:
    request.data[1].model_input[0].encoded_text.tokens = data


def set_span(request: Any, length: int) -> None:
    request.data[1].model_input_spans.add().prompt_tokens.length = length


MESSAGES: dict[str, Callable[[Any], Any]] = {
    "dtype unspecified": lambda r: set_field(r, tensor, dtype=0),
    "dtype 99": lambda r: set_field(r, tensor, dtype=99),
    "int64 for float32": lambda r: set_field(r, tensor, dtype=pb.DTYPE_INT64),
    "float32 for tokens": lambda r: set_field(r, lambda r: tensor(r, "target_tokens"), dtype=pb.DTYPE_FLOAT32),
    "half the bytes": lambda r: set_field(r, lambda r: tensor(r, "target_tokens"), dense=f32(1, 2, 3)),
    "cut values": lambda r: set_field(r, tensor, dense=f32(1, 2, 3)[:-1]),
    "no values": lambda r: set_field(r, tensor, dense=b""),
    "too many values": lambda r: set_field(r, tensor, dense=f32(1, 2, 3, 4)),
    "nan": lambda r: set_field(r, tensor, dense=f32(1, NAN, 3)),
    "inf": lambda r: set_field(r, tensor, dense=f32(1, 2, INFINITY)),
    "logprob above 0": lambda r: set_field(r, lambda r: tensor(r, "advantages"), dense=f32(NAN, NAN, NAN)),
    "target out of range": lambda r: set_field(r, lambda r: tensor(r, "target_tokens"), dense=i64(1, 2, 2**40)),
    "negative target": lambda r: set_field(r, lambda r: tensor(r, "target_tokens"), dense=i64(1, 2, -1)),
    "shape [4]": lambda r: set_shape(r, 4),
    "shape [3, 2]": lambda r: set_shape(r, 3, 2),
    "shape [-3]": lambda r: set_shape(r, -3),
    "shape [-1, -3]": lambda r: set_shape(r, -1, -3),
    "shape [2**62]": lambda r: set_shape(r, 2**62),
    "shape of 10,000": lambda r: set_shape(r, *[2**40] * 10_000),
    "no token": lambda r: set_chunk(r, b""),
    "cut token": lambda r: set_chunk(r, b"\0" * 11),
    "token out of range": lambda r: set_chunk(r, struct.pack("<3i", 1, 2, 2**31 - 1)),
    "negative token": lambda r: set_chunk(r, struct.pack("<3i", 1, 2, -1)),
    "no chunk": lambda r: r.data[1].ClearField("model_input"),
    "empty chunk": lambda r: r.data[1].model_input.add(),
    "image": lambda r: set_field(r, lambda r: r.data[1].model_input.add().image, data=b"x", format="png"),
    "audio": lambda r: set_field(r, lambda r: r.data[1].model_input.add().dmel, dmel=b"x"),
    "no targets": lambda r: r.data[1].loss_fn_inputs.pop("target_tokens"),
    "no logprobs": lambda r: r.data[1].loss_fn_inputs.pop("logprobs"),
    "empty datum": lambda r: r.data.add(),
    "300,000 empty datums": lambda r: r.data.extend([pb.Datum()] * 300_000),
    "300,000 empty chunks": lambda r: r.data[1].model_input.extend([pb.Chunk(encoded_text={})] * 300_000),
    "no datum": lambda r: r.ClearField("data"),
    "unknown field": lambda r: r.data[1].loss_fn_inputs["unknown"].CopyFrom(tensor(r)),
    "field with control characters": lambda r: r.data[1].loss_fn_inputs["\x1b[2J\r\n\0"].CopyFrom(tensor(r)),
    "field of 1 MB": lambda r: r.data[1].loss_fn_inputs["x" * 2**20].CopyFrom(tensor(r)),
    "span too short": lambda r: set_span(r, 1),
    "negative span": lambda r: set_span(r, -3),
    "unknown loss": lambda r: set_field(r, lambda r: r, loss_fn="unknown"),
    "no loss": lambda r: set_field(r, lambda r: r, loss_fn=""),
    "loss of 1 MB": lambda r: set_field(r, lambda r: r, loss_fn="é" * 2**19),
    "stable_reinforce": lambda r: set_field(r, lambda r: r, loss_fn="stable_reinforce"),
    "custom without id": lambda r: set_field(r, lambda r: r, loss_fn="custom"),
    "unknown setting": lambda r: r.loss_fn_config.update({"unknown": 1.0}),
    "nan setting": lambda r: r.loss_fn_config.update({"clip_low_threshold": NAN}),
    "inf setting": lambda r: r.loss_fn_config.update({"clip_high_threshold": -INFINITY}),
    "text for a number": lambda r: set_field(r, lambda r: r.loss_fn_config_v2["clip_low_threshold"], text="0.8"),
    "unknown model": lambda r: set_field(r, lambda r: r, model_id="unknown"),
    "no model": lambda r: set_field(r, lambda r: r, model_id=""),
    "model of 1 MB": lambda r: set_field(r, lambda r: r, model_id="é\n" * 2**19),
    "seq_id 0": lambda r: set_field(r, lambda r: r, seq_id=0),
    "seq_id -1": lambda r: set_field(r, lambda r: r, seq_id=-1),
    "seq_id 2**31 - 1": lambda r: set_field(r, lambda r: r, seq_id=2**31 - 1),
}  # fmt: skip


def wrong_message(rng: Random, target: Target) -> Malformed:
    kind = rng.choice(list(MESSAGES))
    request = message(target)
    MESSAGES[kind](request)
    return of_message(f"protobuf, {kind}", target, request)


def no_message(rng: Random, target: Target) -> Malformed:
    good = message(target).SerializeToString()
    spoiled = {
        "huge field": b"\x1a\xff\xff\xff\xff\x0f" + good,
        "length of 2**63": b"\x1a" + b"\xff" * 9 + b"\x01" + good,
        "endless varint": b"\x10" + b"\xff" * 20,
        "group": b"\x0b" * 5000,
        "deep": b"\x1a\x02" * 5000,
        "wire type 7": b"\x0f" + good,
        "field 0": b"\x00" + good,
        "not UTF-8": b"\x0a\x02\xff\xfe" + good[38:],
        "JSON": text({"model_id": target.model_id}),
        "empty": b"",
    }
    kind = rng.choice(list(spoiled))
    return Malformed(f"no protobuf, {kind}", http(target, "forward_backward", spoiled[kind], PROTOBUF))


def random_bytes(rng: Random, target: Target) -> Malformed:
    """A request for the decoy with bytes changed, cut or added: it may still be a good one."""
    request = message(target)
    request.model_id, request.seq_id = target.decoy, rng.randrange(1, 5)
    data = bytearray(request.SerializeToString())
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case _:
                del data[at : at + rng.randrange(1, 200)]
                data = data or bytearray(b"\0")
    return Malformed("random bytes", http(target, "forward_backward", bytes(data), PROTOBUF), harmless=True)
