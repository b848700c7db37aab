"""Data files: the rows of a JSONL file, a JSON array or a CSV table, each with its place in the file.

Everything that cannot be used is refused here, before a model is built. The error names the file, the line and the
field. For a file of another kind, the error names the kind and a command that converts it.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import os
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lossfns.errors import LossInputError

MAX_FILE, MAX_LINE = 2**30, 2**24
"""The largest file and the longest line, in bytes and in characters."""

MAX_DEPTH, MAX_DIGITS = 50, 400
"""The deepest nesting of a row, and the most characters of a number."""

FROM_PARQUET = "import pandas; pandas.read_parquet('IN').to_json('rows.jsonl', orient='records', lines=True)"
FROM_ARROW = "import datasets; datasets.Dataset.from_file('IN').to_json('rows.jsonl')"
FROM_TEXT = "import json; [print(json.dumps({'text': line.rstrip()})) for line in open('IN') if line.strip()]"
FROM_OBJECT = "import json; [print(json.dumps(row)) for row in json.load(open('IN'))['KEY']]"

OTHER_KINDS = {
    b"PAR1": ("a Parquet file", f'Convert it: python -c "{FROM_PARQUET}"'),
    b"ARROW1": ("an Arrow file", f'Convert it: python -c "{FROM_ARROW}"'),
    b"\xff\xff\xff\xff": ("an Arrow stream", f'Convert it: python -c "{FROM_ARROW}"'),
    b"\x1f\x8b": ("a gzip file", "Unpack it: gunzip -k 'IN'"),
    b"BZh": ("a bzip2 file", "Unpack it: bunzip2 -k 'IN'"),
    b"\xfd7zXZ": ("an xz file", "Unpack it: unxz -k 'IN'"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "Unpack it: zstd -d 'IN'"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "Unpack it (unzip 'IN'), or export the sheet as CSV."),
    b"SQLite format 3": ("an SQLite database", "Export a table: sqlite3 -csv -header 'IN' 'select ...' > rows.csv"),
    b"\x89HDF": ("an HDF5 file", "Write its rows as JSONL."),
    b"%PDF": ("a PDF file", "Write its text as JSONL: one {\"text\": ...} a line."),
    b"\x89PNG": ("an image", "The model reads text only."),
    b"\xff\xd8\xff": ("an image", "The model reads text only."),
    b"\x80": ("a pickle", "Write its rows as JSONL; a pickle can run any program when it is read."),
    codecs.BOM_UTF16_LE: ("text in UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8 'IN' > rows.jsonl"),
    codecs.BOM_UTF16_BE: ("text in UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8 'IN' > rows.jsonl"),
}  # fmt: skip
"""Kinds of files that are not read, by their first bytes, with the way to convert them."""


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        place: the file and the line, such as ``rows.jsonl:3``.
        fields: the values by name. Numbers are ``Number``: text, as it stands in the file.
    """

    place: str
    fields: dict[str, Any]

    def refuse(self, expected: str, got: str, fix: str) -> NoReturn:
        """Refuse the row."""
        raise LossInputError(self.place, expected, got, fix)


class Number(str):
    """A number as it is written: ``0.50`` stays ``0.50``."""

    def __repr__(self) -> str:
        return str(self)


class Constant(str):
    """NaN, Infinity or -Infinity, which are not JSON."""

    def __repr__(self) -> str:
        return str(self)


class Repeated(ValueError):
    """A key that an object has twice."""


def plain(value: Any) -> Any:
    """Return a value with its numbers as numbers.

    >>> plain({"a": [Number("1"), Number("0.50"), "2"]})
    {'a': [1, 0.5, '2']}
    """
    if isinstance(value, Number):
        return int(value) if re.fullmatch(r"-?\d+", value) else float(value)
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    return [plain(x) for x in value] if isinstance(value, list) else value


SPACE = re.compile(r"\s*")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the dict of a JSON object, and refuse a key that comes twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise Repeated(next(name for name in names if names.count(name) > 1))
    return fields


DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_int=Number, parse_float=Number, parse_constant=Constant)


def shown(value: Any) -> str:
    """Show a value in a few printable characters."""
    text = reprlib.repr(value)
    return text if text.isprintable() else ascii(text)[1:-1]


def quoted(name: str) -> str:
    """Return the name of a field in quotes, at most 80 characters of it."""
    return ascii(name if len(name) <= 80 else f"{name[:40]}...{name[-37:]}")


def read_rows(path: str) -> list[Row]:
    """Read the rows of a data file: CSV if its name ends in ``.csv`` or ``.tsv``, else JSONL or a JSON array.

    Raises:
        LossInputError: if a line cannot be used, or the file is of another kind. The error names the line or the kind.
    """
    text = read_text(path)
    suffix = Path(path).suffix.lower()
    if suffix in (".csv", ".tsv"):
        rows = list(csv_rows(path, text, "\t" if suffix == ".tsv" else ","))
    elif text.lstrip().startswith("["):
        rows = list(array_rows(path, text))
    else:
        rows = list(line_rows(path, text))
    for row in rows:
        check_row(row)
    return rows


def read_text(path: str) -> str:
    """Return the text of a file; refuse a file of another kind by its name."""
    try:
        if os.path.isdir(path):
            names = sorted(name for name in os.listdir(path) if not name.startswith("."))[:3]
            fix = f"Name one of its files ({', '.join(map(ascii, names))}, ...)." if names else "It is empty."
            raise LossInputError("--data", "a file of rows", f"{path}, which is a folder", fix)
        if os.path.exists(path) and not os.path.isfile(path):
            fix = "A run reads its data again when it is resumed: write them to a file."
            raise LossInputError("--data", "a file of rows", f"{path}, which is a pipe or a device", fix)
        if os.path.exists(path) and os.path.getsize(path) > MAX_FILE:
            got = f"{path} with {os.path.getsize(path)}"
            fix = f"Take a part of it: head -n 100000 '{path}' > rows.jsonl"
            raise LossInputError("--data", f"a file of at most {MAX_FILE} bytes", got, fix)
        content = Path(path).read_bytes()
    except OSError as error:
        got, fix = f"{path} ({error.strerror})", "One JSON object a line."
        raise LossInputError("--data", "a JSONL file", got, fix) from None
    for start, (kind, fix) in OTHER_KINDS.items():
        if content.startswith(start):
            raise LossInputError("--data", "JSONL, a JSON array or CSV", f"{path}, {kind}", fix.replace("IN", path))
    at = content.find(b"\0")
    if at >= 0:
        fix = "It is damaged, or not UTF-8: iconv converts it."
        raise LossInputError(f"{path}:{line_of(content, at)}", "text in UTF-8", f"a NUL byte (byte {at})", fix)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place, got = f"{path}:{line_of(content, error.start)}", f"byte 0x{content[error.start]:02x} ({error.reason})"
        fix = f"Convert it, for example: iconv -f LATIN1 -t UTF-8 '{path}' > rows.jsonl"
        raise LossInputError(place, "text in UTF-8", got, fix) from None


def line_of(content: bytes, at: int) -> int:
    return content.count(b"\n", 0, at) + 1


def line_rows(path: str, text: str) -> Iterator[Row]:
    """Yield the rows of a JSONL file. Lines end only at a newline: a string may hold other line separators."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            if len(line) > MAX_LINE:
                got, fix = f"{len(line)}", "One object a line."
                raise LossInputError(f"{path}:{number}", f"a line of at most {MAX_LINE} characters", got, fix)
            fields, end = decode(path, number, text, line, skip_space(line, 0))
            if line[end:].strip():
                fix = "One object a line."
                raise LossInputError(f"{path}:{number}", "a JSON object", f"more after it: {shown(line[end:])}", fix)
            yield as_row(f"{path}:{number}", fields)


def array_rows(path: str, text: str) -> Iterator[Row]:
    """Yield the elements of a JSON array."""
    counted, number = 0, 1
    at = skip_space(text, text.index("[") + 1)
    end = text.startswith("]", at)
    while not end:
        number, counted = number + text.count("\n", counted, at), at
        fields, at = decode(path, number, text, text, at)
        yield as_row(f"{path}:{number}", fields)
        at = skip_space(text, at)
        end = text.startswith("]", at)
        if not end and not text.startswith(",", at):
            got = shown(text[at : at + 20]) if at < len(text) else "the end of the file"
            raise LossInputError(f"{path}:{number}", "',' or ']' after the row", got, "Is the array whole?")
        at = at if end else skip_space(text, at + 1)
    if skip_space(text, at + 1) < len(text):
        got, fix = shown(text[at + 1 : at + 40].strip()), "One array, or one object a line."
        raise LossInputError(f"{path}:{number}", "the end of the file after the array", got, fix)


def skip_space(text: str, at: int) -> int:
    """Return the position of the next character that is no white space."""
    return SPACE.match(text, at).end()  # type: ignore[union-attr]


def decode(path: str, number: int, text: str, line: str, start: int) -> tuple[Any, int]:
    """Decode one JSON value, and return it with the position after it."""
    place, fix = f"{path}:{number}", "One object a line."
    try:
        return DECODER.raw_decode(line, start)
    except Repeated as error:
        fix = "Keep one of them."
        raise LossInputError(place, f"the key {shown(str(error))} once", "it twice", fix) from None
    except RecursionError:
        got = "deeper nesting"
        raise LossInputError(place, f"a row of at most {MAX_DEPTH} levels", got, "Flatten it.") from None
    except json.JSONDecodeError as error:
        got = f"{error.msg} (column {error.colno}): {shown(line[max(0, error.pos - 10) : error.pos + 10])}"
        if line[start : start + 1] == "\ufeff":
            got = "a byte order mark: two files were joined"
        elif number == 1 and line[start : start + 1] not in ("{", "["):
            recipe = FROM_TEXT.replace("IN", path)
            fix = f'CSV is read if the name ends in .csv or .tsv. Convert plain text: python -c "{recipe}" > rows.jsonl'
        if number == 1 and (key := list_of_rows(text)):
            got, fix = "one object over many lines", write_list(path, key)
        raise LossInputError(place, "a JSON object", got, fix) from None


def list_of_rows(text: str) -> str | None:
    """Return the key of the rows, if a text is one JSON object that holds them; else None."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return key_of_rows(fields) or "KEY" if isinstance(fields, dict) else None


def key_of_rows(fields: dict[str, Any]) -> str | None:
    """Return the key of a list of objects, if there is one that is no chat."""
    lists = {key: x for key, x in fields.items() if isinstance(x, list) and x and isinstance(x[0], dict)}
    return next((key for key, x in lists.items() if not {"role", "from"} & x[0].keys()), None)


def write_list(path: str, key: str) -> str:
    """Return the command that writes the list under a key of a JSON file as JSONL."""
    recipe = FROM_OBJECT.replace("IN", path).replace("KEY", key)
    return f'Write its list as rows: python -c "{recipe}" > rows.jsonl'


def as_row(place: str, value: Any) -> Row:
    """Make a row. A value that is no object has no fields; the format that looks for them refuses it."""
    return Row(place, value if isinstance(value, dict) else {})


def csv_rows(path: str, text: str, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a table whose first line names the columns."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fix = "Quote texts that hold quotes or newlines."
            raise LossInputError(place, "a row of CSV", str(error), fix) from None
        if not cells:
            continue
        if not header:
            header = cells
            if len(set(header)) < len(header) or "" in header:
                raise LossInputError(place, "a name for each column, once", shown(header), "Name the columns.")
        elif len(cells) != len(header):
            fix = f"The columns are {', '.join(map(shown, header))}; quote texts that hold a comma or a newline."
            raise LossInputError(place, f"{len(header)} columns", f"{len(cells)}", fix)
        else:
            yield Row(place, dict(zip(header, cells)))


def check_row(row: Row) -> None:
    """Refuse a row with a value, anywhere in it, that no text in UTF-8 and no JSON can hold."""
    pending: list[tuple[str, Any, int]] = [("", row.fields, 0)]
    while pending:
        name, value, depth = pending.pop()
        if depth > MAX_DEPTH:
            row.refuse(f"at most {MAX_DEPTH} levels under {name.split('.')[0][:40]!r}", "more", "Flatten it.")
        if isinstance(value, dict):
            for key in value:
                check_text(row, f"a key under {quoted(name)}" if name else "a key", key)
            pending += [(f"{name}.{key}" if name else key, x, depth + 1) for key, x in value.items()]
        elif isinstance(value, list):
            pending += [(f"{name}[{i}]", x, depth + 1) for i, x in enumerate(value)]
        elif isinstance(value, Constant):
            row.refuse(f"JSON under {quoted(name)}", str(value), "JSON lacks it: write null, or leave the row out.")
        elif isinstance(value, Number):
            if len(value) > MAX_DIGITS:
                expected = f"a number of at most {MAX_DIGITS} digits under {quoted(name)}"
                row.refuse(expected, f"{len(value)}", "Write it as text.")
            if math.isinf(float(value)):
                row.refuse(f"a finite number under {quoted(name)}", shown(value), "Write it as text.")
        elif isinstance(value, str):
            check_text(row, f"under {quoted(name)}", value)


def check_text(row: Row, where: str, text: str) -> None:
    """Refuse text with half a surrogate pair or a NUL."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = f"half a surrogate pair (\\u{ord(text[error.start]):04x}) at character {error.start}"
        row.refuse(f"text in UTF-8, {where}", got, "Write the whole character, or leave it out.")
    if "\0" in text:
        got = f"a NUL at character {text.index(chr(0))}"
        row.refuse(f"text, {where}", got, "Leave it out: no text has one.")
