"""Malformed requests to a server of the SDK's protocol: requests of every endpoint, each spoiled in one way.

``malformed(rng, target)`` draws one. The same seed and target give the same requests.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple
from urllib.parse import quote

import zstandard
from tinker.proto import tinker_public_pb2 as pb

JSON, PROTOBUF = "application/json", "application/x-protobuf"
DEEP = "[" * 100_000 + "]" * 100_000
STRANGE = ["", " ", ".", "..", "../../etc/passwd", "..%2f..%2fx", "/etc/passwd", "a/../../b", "a\\..\\b", "a\0b", "a\nb",
           "\x1b[31mred", "\u202ename", "\ud800", "é" * 128, "ß", "x" * 10_000, "~root", "C:\\x", "|id", "$(id)", "a b",
           "tinker://", "tinker://../../x", "file:///etc/passwd", "-", ".hidden", "a" * 129, "名", "١٢٣"]  # fmt: skip


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
    target: Target, path: str, body: bytes, content_type: str = JSON, *lines: str, method: str = "POST", key: bool = True
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


# Good requests, by endpoint


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
UNREAD = {("create_session", "tags"), ("create_session", "sdk_version"), ("create_session", "user_metadata", "a")}


def endpoint(name: str) -> str:
    return name.partition(" ")[0]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the places of all values in a body, except itself."""
    if path:
        yield path
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaves(each, (*path, key))


def put(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    body = copy.deepcopy(body)
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return body


NAN, INFINITY = float("nan"), float("inf")
HUGE = [10**30, -(10**30), 10**400, 2**63, NAN, INFINITY, -INFINITY]


def others(value: Any, rng: Random) -> Any:
    """Draw a value that cannot stand where ``value`` does: of another type, or no number that it could be."""
    kinds: list[Any] = [[[]], {"a": {}}]
    if not isinstance(value, bool):
        kinds += [True, False]
    if not isinstance(value, str):
        kinds += ["", "1", "x" * 300, "\0"]
    if isinstance(value, (bool, str, list, dict)):
        kinds += [1, 0, -1, 1.5]
    kinds += HUGE if not isinstance(value, float) else [10**400, NAN, INFINITY, -INFINITY]
    if isinstance(value, int) and not isinstance(value, bool):
        kinds += [1.5, -0.5]
    return rng.choice(kinds)


# Spoiled requests. Each function draws one.


def of_body(kind: str, rng: Random, target: Target, name: str, body: bytes, **more: Any) -> Malformed:
    return Malformed(f"{kind}: {name}", http(target, endpoint(name), body), **more)


def drawn(rng: Random, target: Target) -> tuple[str, dict[str, Any]]:
    return rng.choice(list(bodies(rng, target).items()))


def wrong_type(rng: Random, target: Target) -> Malformed:
    name, body = drawn(rng, target)
    places = [path for path in leaves(body) if (name, *path)[:3] not in UNREAD and (name, path[0]) not in UNREAD and "type" not in path]
    path = rng.choice(places)
    value = body
    for key in path:
        value = value[key]
    spoiled = others(value, rng)
    while path[-1] == "stop" and isinstance(spoiled, (str, bool)):
        spoiled = others(value, rng)
    where = ".".join(map(str, path))
    return of_body(f"wrong type at {where}: {spoiled!r:.40}", rng, target, name, text(put(body, path, spoiled)))


def missing_field(rng: Random, target: Target) -> Malformed:
    name, body = drawn(rng, target)
    while not REQUIRED[name]:
        name, body = drawn(rng, target)
    key = rng.choice(REQUIRED[name])
    if rng.random() < 0.5:
        body[key] = None
    else:
        del body[key]
    return of_body(f"without {key}", rng, target, name, text(body))


def unknown_field(rng: Random, target: Target) -> Malformed:
    name, body = drawn(rng, target)
    while name in OPEN:
        name, body = drawn(rng, target)
    body[rng.choice(["unknown", "__class__", "\0", "\n\x1b[2J", "x" * 100_000, "é", "\ud800"])] = rng.choice([1, None])
    return of_body("unknown field", rng, target, name, text(body))


def duplicate_key(rng: Random, target: Target) -> Malformed:
    name, body = drawn(rng, target)
    key = rng.choice(list(body))
    again = b"{%b: %b, %b" % (text(key), text(rng.choice([None, 1, "x", body[key]])), text(body)[1:])
    return of_body("duplicate key", rng, target, name, again)


def no_object(rng: Random, target: Target) -> Malformed:
    name, body = drawn(rng, target)
    good = text(body)
    spoiled = {
        "empty": b"", "null": b"null", "list": b"[" + good + b"]", "number": b"1", "string": text(good.decode()),
        "truncated": good[: rng.randrange(1, len(good) - 1)], "twice": good * 2, "not UTF-8": good[:-1] + b'\xff"}',
        "NUL": good + b"\0", "digits": b'{"a": ' + b"9" * 5000 + b"}", "deep": DEEP.encode(),
        "deep object": b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "comment": b"/**/" + good, "quotes": good.replace(b'"', b"'"),
        "garbage": rng.randbytes(rng.randrange(1, 2000)),
    }  # fmt: skip
    kind = rng.choice(list(spoiled))
    return of_body(f"no object, {kind}", rng, target, name, spoiled[kind])


def wrong_id(rng: Random, target: Target) -> Malformed:
    """Ids of nothing, of another kind, and places in the sequence that are none."""
    name, body = drawn(rng, target)
    ids = [key for key in body if key.endswith("_id")]
    while not ids:
        name, body = drawn(rng, target)
        ids = [key for key in body if key.endswith("_id")]
    key = rng.choice(ids)
    if isinstance(body[key], int):
        body[key] = rng.choice([-1, -(2**63), 2**62, 2**63, 10**30, 2**40 if key == "seq_id" and "model_id" in body else -2])
    else:
        other = [target.session_id, target.model_id, target.sampler_id, target.checkpoint, f"{target.session_id}:loss:1",
                 f"{target.model_id}:0:0", f"{target.session_id}:train:99", "0" * 36, *STRANGE]  # fmt: skip
        body[key] = rng.choice([each for each in other if each != body[key]])
    return of_body(f"wrong {key} {body[key]!r:.40}", rng, target, name, text(body))


def strange_name(rng: Random, target: Target) -> Malformed:
    names = ("save_weights", "save_weights_for_sampler", "load_weights", "load_weights as model", "create_sampling_session")
    name = rng.choice(names)
    body = bodies(rng, target)[name]
    strange = rng.choice(STRANGE)
    base = target.checkpoint.rpartition("/")[0]
    if name.startswith("save"):
        good = {"-": "-", "é" * 128: "é"}  # refused as well
        body["path"] = good.get(strange, strange)
    else:
        body["path" if "path" in body else "model_path"] = rng.choice([strange, f"{base}/{strange}", f"{base}/../{strange}"])
    return of_body(f"name {strange!r:.40}", rng, target, name, text(body))


PLACES = ["", "..", "../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "%00", "%ff%fe", "%0d%0aSet-Cookie:x", "optim_step/",
          "OPTIM_STEP", "optim_step%20", "sessions//finish", "sessions/../finish", "sessions/%00/finish", "samplers/%0a",
          "samplers/..%2f..", "healthz/x", "x" * 8000, "?a=b", "weights/../x", "sessions?limit=" + "9" * 5000,
          "checkpoints?offset=-1", "training_runs?limit=1e3", "training_runs?limit=%00", "training_runs/..%2f..",
          "training_runs/../../checkpoints", "sessions/%F0%9F%92%A9"]  # fmt: skip


def wrong_place(rng: Random, target: Target) -> Malformed:
    name, body = drawn(rng, target)
    if rng.random() < 0.5:
        place, method = rng.choice(PLACES), rng.choice(["GET", "POST"])
    elif rng.random() < 0.3:
        method, strange = "DELETE", quote(rng.choice(STRANGE), "", "utf-8", "surrogatepass")
        place = f"training_runs/{target.model_id}/checkpoints/{rng.choice(['weights', 'sampler_weights', '..'])}/{strange}"
    else:
        place = endpoint(name)
        method = rng.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD", "get", "BREW", "CONNECT"])
    return Malformed(f"place {method} {place:.30}", http(target, place, text(body), method=method))


def wrong_form(rng: Random, target: Target) -> Malformed:
    """Bodies that are not what their headers say."""
    name, body = drawn(rng, target)
    passes = name.startswith("forward")
    types = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "\x80", "json", "x" * 5000]
    types += [PROTOBUF] if passes or rng.random() < 0.5 else []
    content_type = rng.choice(types)
    return Malformed(f"content type {content_type:.30}: {name}", http(target, endpoint(name), text(body), content_type))


def bomb(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(data)


BOMBS = {
    "zeros": bomb(bytes(2**29)), "zeros within the limit": bomb(bytes(2**27)),
    "objects": bomb(b'{"a":[' + b"{}," * 2**24 + b"{}]}"), "datums": bomb(b"\x1a\x00" * 2**24),
}  # fmt: skip


def compressed(rng: Random, target: Target) -> Malformed:
    name, body = drawn(rng, target)
    good = bomb(text(body))
    spoiled = {"truncated": good[:-3], "garbage": rng.randbytes(100), "empty": b"", "not compressed": text(body),
               "trailing": good + b"x"}  # fmt: skip
    kind = rng.choice(list(spoiled))
    encoding = "zstd"
    if rng.random() < 0.4:
        kind, encoding = "encoding", rng.choice(["gzip", "br", "deflate", "zstd, zstd", "x" * 3000, "\x00\x01".strip("\x00")])
    raw = http(target, endpoint(name), spoiled.get(kind, good), JSON, f"Content-Encoding: {encoding}")
    return Malformed(f"compressed, {kind}", raw)


def bombs(rng: Random, target: Target) -> Malformed:
    kind = rng.choice(list(BOMBS))
    name = "forward_backward" if kind == "datums" else endpoint(drawn(rng, target)[0])
    content_type = PROTOBUF if kind == "datums" else JSON
    return Malformed(f"bomb of {kind}", http(target, name, BOMBS[kind], content_type, "Content-Encoding: zstd"))


def wrong_key(rng: Random, target: Target) -> Malformed:
    name, body = drawn(rng, target)
    key = rng.choice(["", "x", target.key[:-1], target.key + "x", target.key.upper(), "\xff", "x" * 10_000, "tml-", None])
    lines = [] if key is None else [f"X-API-Key: {key}"]
    return Malformed(f"key {key!r:.20}", http(target, endpoint(name), text(body), JSON, *lines, key=False))


def wrong_frame(rng: Random, target: Target) -> Malformed:
    """Requests that are no HTTP, or whose length is not what it says."""
    name, body = drawn(rng, target)
    head, _, data = http(target, endpoint(name), text(body)).partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
    first = lines[0]

    def made(*more: bytes, body: bytes = data, first: bytes = first) -> bytes:
        return b"\r\n".join([first, *lines[1:], *more, b"", body])

    size, chunked = len(data), b"Transfer-Encoding: chunked"
    spoiled: dict[str, bytes | tuple[bytes]] = {
        "huge length": made(b"Content-Length: 99999999999"),
        "length beyond the limit": made(b"Content-Length: %d" % (target.body_bytes + 1)),
        "length of 5000 digits": made(b"Content-Length: " + b"9" * 5000),
        "negative length": made(b"Content-Length: -1"),
        "length with sign": made(b"Content-Length: +%d" % size),
        "length in hexadecimal": made(b"Content-Length: 0x10"),
        "two lengths": made(b"Content-Length: %d" % size, b"Content-Length: %d" % (size + 1)),
        "length in words": made(b"Content-Length: many"),
        "chunk of no size": made(chunked, body=b"zz\r\n" + data + b"\r\n0\r\n\r\n"),
        "huge chunk": made(chunked, body=b"f" * 40 + b"\r\n" + data),
        "unknown transfer": made(b"Transfer-Encoding: gzip"),
        "version in letters": made(b"Content-Length: %d" % size, first=first.replace(b"1.1", b"x.y")),
        "no version": made(b"Content-Length: %d" % size, first=first.replace(b" HTTP/1.1", b"")),
        "no colon": made(b"Content-Length: %d" % size, b"no colon"),
        "NUL in a header": made(b"Content-Length: %d" % size, b"X: a\0b"),
        "header of 1 MB": made(b"Content-Length: %d" % size, b"X: " + b"a" * 2**20),
        "no headers": first + b"\r\n\r\n",
        "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),),
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "garbage": rng.randbytes(300) + b"\r\n\r\n",
        "space in the path": made(b"Content-Length: %d" % size, first=b"POST /a b HTTP/1.1"),
        "both lengths": (made(b"Content-Length: 3", chunked, body=b"0\r\n\r\n"),),
        "truncated body": (made(b"Content-Length: %d" % (size + 50)),),
        "truncated head": (head[: rng.randrange(5, len(head))],),
        "truncated chunk": (made(chunked, body=b"ffff\r\n" + data),),
    }  # fmt: skip
    kind = rng.choice(list(spoiled))
    raw = spoiled[kind]
    if isinstance(raw, tuple):
        return Malformed(f"frame, {kind}", raw[0], half=True)
    return Malformed(f"frame, {kind}", raw)


def replay(rng: Random, target: Target) -> Malformed:
    """A request that was accepted, once more: it has the same outcome, and is not run again."""
    return Malformed("replay", rng.choice(target.sent), harmless=True)


def other_replay(rng: Random, target: Target) -> Malformed:
    """Another request in a place that has passed."""
    name = rng.choice(["optim_step", "save_weights", "load_weights", "forward_backward", "save_weights_for_sampler"])
    body = bodies(rng, target)[name]
    body["seq_id"] = rng.randrange(1, target.seq_id)
    return of_body("place that has passed", rng, target, name, text(body))


# Protobuf


def i64(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def f32(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def message(target: Target) -> Any:
    """Return a good request of two datums, which would change the gradient."""
    request = pb.ForwardBackwardRequest(model_id=target.model_id, seq_id=target.seq_id, loss_fn="ppo", loss_fn_config=CLIP)
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
    "float32 tokens of half the length": lambda r: set_field(r, lambda r: tensor(r, "target_tokens"), dense=f32(1, 2, 3)),
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
    "100,000 empty datums": lambda r: r.data.extend([pb.Datum()] * 100_000),
    "150,000 empty chunks": lambda r: r.data[1].model_input.extend([pb.Chunk(encoded_text={})] * 150_000),
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


KINDS: dict[Callable[[Random, Target], Malformed], float] = {
    wrong_type: 30, missing_field: 8, unknown_field: 4, duplicate_key: 6, no_object: 8, wrong_id: 12, strange_name: 8,
    wrong_place: 6, wrong_form: 5, compressed: 5, bombs: 0.3, wrong_key: 4, wrong_frame: 10, replay: 4, other_replay: 4,
    sparse: 8, wrong_message: 14, no_message: 4, random_bytes: 10,
}  # fmt: skip
"""How often each is drawn."""


def malformed(rng: Random, target: Target) -> Malformed:
    """Draw a malformed request."""
    return rng.choices(list(KINDS), list(KINDS.values()))[0](rng, target)
