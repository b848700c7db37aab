"""Malformed requests to a server of the SDK's protocol: requests of every endpoint, each spoiled in one way.

``malformed(rng, target)`` draws one. The same seed and target give the same requests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from random import Random
from typing import Any
from urllib.parse import quote

import zstandard
from malformed_messages import INFINITY, NAN, no_message, random_bytes, sparse, wrong_message
from requests_of_endpoints import JSON, OPEN, PROTOBUF, REQUIRED, UNREAD, Malformed, Target, bodies, http, text

DEEP = "[" * 100_000 + "]" * 100_000
STRANGE = [
    *[
        "",
        " ",
        ".",
        "..",
        "../../etc/passwd",
        "..%2f..%2fx",
        "/etc/passwd",
        "a/../../b",
        "a\\..\\b",
        "a\0b",
        "a\nb",
        "a b",
    ],
    *["\x1b[31mred", "\u202ename", "\ud800", "é" * 128, "ß", "名", "١٢٣", "x" * 10_000, "a" * 129, "-", ".hidden"],
    *["a b", "~root", "C:\\x", "|id", "$(id)", "tinker://", "tinker://../../x", "file:///etc/passwd"],
]


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


def exempt(name: str, path: tuple[Any, ...]) -> bool:
    """Whether any value is taken here: what is not read, and the constants of a graph, which fail when it runs."""
    return (name, path[0]) in UNREAD or "type" in path or path[-2:-1] == ("args",)


def wrong_type(rng: Random, target: Target) -> Malformed:
    places: list[tuple[Any, ...]] = []
    while not places:
        name, body = drawn(rng, target)
        places = [path for path in leaves(body) if not exempt(name, path)]
    path = rng.choice(places)
    value = body
    for key in path:
        value = value[key]
    spoiled = others(value, rng)
    while ("stop" in path and isinstance(spoiled, (str, bool))) or (
        path[-1] == "clip_high_threshold" and spoiled == INFINITY
    ):
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
        "deep object": b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "comment": b"/**/" + good,
        "quotes": good.replace(b'"', b"'"),
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
        body[key] = rng.choice(
            [-1, -(2**63), 2**62, 2**63, 10**30, 2**40 if key == "seq_id" and "model_id" in body else -2]
        )
    else:
        ids = [target.session_id, target.model_id, target.sampler_id, target.checkpoint]
        other = [*ids, *(f"{target.session_id}:{end}" for end in ("loss:1", "train:99", "train:0:0:0")), *STRANGE]
        body[key] = rng.choice([each for each in other if each != body[key]])
    return of_body(f"wrong {key} {body[key]!r:.40}", rng, target, name, text(body))


def strange_name(rng: Random, target: Target) -> Malformed:
    names = (
        "save_weights",
        "save_weights_for_sampler",
        "load_weights",
        "load_weights as model",
        "create_sampling_session",
    )
    name = rng.choice(names)
    body = bodies(rng, target)[name]
    strange = rng.choice(STRANGE)
    base = target.checkpoint.rpartition("/")[0]
    if name.startswith("save"):
        good = {"-": "-", "é" * 128: "é"}  # refused as well
        body["path"] = good.get(strange, strange)
    else:
        body["path" if "path" in body else "model_path"] = rng.choice(
            [strange, f"{base}/{strange}", f"{base}/../{strange}"]
        )
    return of_body(f"name {strange!r:.40}", rng, target, name, text(body))


PLACES = [
    *["", "..", "../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "%00", "%ff%fe", "%0d%0aSet-Cookie:x", "weights/../x"],
    *["optim_step/", "OPTIM_STEP", "optim_step%20", "healthz/x", "x" * 8000, "?a=b", "sessions/%F0%9F%92%A9"],
    *["sessions//finish", "sessions/../finish", "sessions/%00/finish", "samplers/%0a", "samplers/..%2f.."],
    *["sessions?limit=" + "9" * 5000, "checkpoints?offset=-1", "training_runs?limit=1e3", "training_runs?limit=%00"],
    *["training_runs/..%2f..", "training_runs/../../checkpoints"],
]


def wrong_place(rng: Random, target: Target) -> Malformed:
    name, body = drawn(rng, target)
    if rng.random() < 0.5:
        place, method = rng.choice(PLACES), rng.choice(["GET", "POST"])
    elif rng.random() < 0.3:
        method, strange = "DELETE", quote(rng.choice(STRANGE), "", "utf-8", "surrogatepass")
        place = (
            f"training_runs/{target.model_id}/checkpoints/{rng.choice(['weights', 'sampler_weights', '..'])}/{strange}"
        )
    else:
        place = endpoint(name)
        method = rng.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD", "get", "BREW", "CONNECT"])
    return Malformed(f"place {method} {place:.30}", http(target, place, text(body), method=method))


def wrong_form(rng: Random, target: Target) -> Malformed:
    """Bodies that are not what their headers say."""
    name, body = drawn(rng, target)
    passes = name.startswith("forward")
    types = [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        "\x80",
        "json",
        "x" * 5000,
    ]
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
        kind, encoding = (
            "encoding",
            rng.choice(["gzip", "br", "deflate", "zstd, zstd", "x" * 3000, "\x00\x01".strip("\x00")]),
        )
    raw = http(target, endpoint(name), spoiled.get(kind, good), JSON, f"Content-Encoding: {encoding}")
    return Malformed(f"compressed, {kind}", raw)


def bombs(rng: Random, target: Target) -> Malformed:
    kind = rng.choice(list(BOMBS))
    name = "forward_backward" if kind == "datums" else endpoint(drawn(rng, target)[0])
    content_type = PROTOBUF if kind == "datums" else JSON
    return Malformed(f"bomb of {kind}", http(target, name, BOMBS[kind], content_type, "Content-Encoding: zstd"))


def wrong_key(rng: Random, target: Target) -> Malformed:
    name, body = drawn(rng, target)
    key = rng.choice(
        ["", "x", target.key[:-1], target.key + "x", target.key.upper(), "\xff", "x" * 10_000, "tml-", None]
    )
    lines = (
        [] if key is None else [rng.choice(["X-API-Key: ", "Authorization: Basic ", "Authorization: Bearer "]) + key]
    )
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


KINDS: dict[Callable[[Random, Target], Malformed], float] = {
    wrong_type: 30, missing_field: 8, unknown_field: 4, duplicate_key: 6, no_object: 8, wrong_id: 12, strange_name: 8,
    wrong_place: 6, wrong_form: 5, compressed: 5, bombs: 0.3, wrong_key: 4, wrong_frame: 10, replay: 4, other_replay: 4,
    sparse: 8, wrong_message: 14, no_message: 4, random_bytes: 10,
}  # fmt: skip
"""How often each is drawn."""


def malformed(rng: Random, target: Target) -> Malformed:
    """Draw a malformed request."""
    return rng.choices(list(KINDS), list(KINDS.values()))[0](rng, target)
