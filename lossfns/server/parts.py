"""The number of parts of a body, limited before it is parsed: an empty part of 2 bytes may take 100 in memory."""

from __future__ import annotations

from collections.abc import Iterator

from lossfns.errors import LossInputError

MOST_PARTS = 2**18
"""The most objects and lists of a JSON body, and the most fields of a protobuf message and its datums."""


def check_json_parts(body: bytes) -> None:
    """Refuse a JSON body of too many objects and lists."""
    check_count(body.count(b"{") + body.count(b"["))


def check_protobuf_parts(body: bytes, nested: int) -> None:
    """Refuse a protobuf message of too many fields, with those of the submessages of field number ``nested``."""
    count = 0
    for number, start, end in protobuf_fields(body, 0, len(body)):
        count += 1
        if number == nested:
            for _ in protobuf_fields(body, start, end):
                count += 1
                if count > MOST_PARTS:
                    break
        check_count(count)


def check_count(count: int) -> None:
    if count > MOST_PARTS:
        raise LossInputError("body", f"at most {MOST_PARTS} parts", "more", "Send several requests.")


def protobuf_fields(body: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the number, the start and the end of each field. Malformed bytes are left to the parser."""
    while start < end:
        tag, start = read_varint(body, start, end)
        size = {1: 8, 5: 4}.get(tag & 7, 0)
        if tag & 7 == 0:
            _, start = read_varint(body, start, end)
        elif tag & 7 == 2:
            size, start = read_varint(body, start, end)
        yield tag >> 3, start, min(start + size, end)
        start += size


def read_varint(body: bytes, start: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while start < end:
        byte = body[start]
        value, shift, start = value | (byte & 127) << shift, shift + 7, start + 1
        if byte < 128 or shift > 63:
            break
    return value, start
