"""Data files: the rows of a JSONL file, a JSON array or a CSV table, each with its place in the file.

Everything that cannot be used is refused here, before a model is built. The error names the file, the line and the
field. For a file of another kind, the error names the kind and a command that converts it.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lossfns.errors import LossInputError
from lossfns.train import tables
from lossfns.train.values import Constant, Number, Row, quoted, shown

MAX_FILE, MAX_LINE = 2**30, 2**24
"""The largest file and the longest line, in bytes and in characters."""

MAX_DEPTH, MAX_DIGITS = 50, 400
"""The deepest nesting of a row, and the most characters of a number."""

FROM_TEXT = "import json; [print(json.dumps({'text': line.rstrip()})) for line in open('IN') if line.strip()]"
FROM_OBJECT = "import json; [print(json.dumps(row)) for row in json.load(open('IN'))['KEY']]"

OTHER_KINDS = {
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
    codecs.BOM_UTF16_LE: ("text in UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8 'IN' > rowsSUFFIX"),
    codecs.BOM_UTF16_BE: ("text in UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8 'IN' > rowsSUFFIX"),
}  # fmt: skip
"""Kinds of files that are not read, by their first bytes, with the way to convert them."""


class RepeatedKey(ValueError):
    """Raised for a key that a JSON object has twice."""


SPACE = re.compile(r"\s*")


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the dict of a JSON object, and refuse a key that comes twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedKey(next(name for name in names if names.count(name) > 1))
    return fields


DECODER = json.JSONDecoder(object_pairs_hook=object_of, parse_int=Number, parse_float=Number, parse_constant=Constant)


OnError = Callable[[LossInputError], None]
"""Called with the error of each line that cannot be used."""


def raise_at_once(error: LossInputError) -> None:
    """Raise the error of the first line that cannot be used."""
    raise error


def read_rows(source: str, on_error: OnError = raise_at_once) -> list[Row]:
    """Read rows of a file, of a folder that ``datasets`` has saved, or of a data set by its name.

    A file is Parquet or Arrow by its first bytes; CSV if its name ends in ``.csv`` or ``.tsv``; else a JSON array or
    JSONL.

    Args:
        source: a path; ``FOLDER`` or ``FOLDER:SPLIT``; ``OWNER/NAME``, ``OWNER/NAME:CONFIG`` or
            ``OWNER/NAME:CONFIG:SPLIT``.
        on_error: called with the error of each line that cannot be used. By default the first error is raised.

    Raises:
        LossInputError: if there is no file, or a file of another kind, which the error names.
    """
    rows = []
    for row in rows_of(source, on_error):
        try:
            check_row(row)
            rows.append(row)
        except LossInputError as error:
            on_error(error)
    return rows


def rows_of(source: str, on_error: OnError) -> Iterable[Row]:
    """Return the rows of a source, without a check of their values."""
    if tables.is_saved(source):
        return tables.saved_rows(source)
    if not os.path.exists(source) and tables.is_name(source) and not is_file_name(source):
        return tables.named_rows(source)
    content = read_bytes(source)
    if content.startswith((tables.PARQUET, tables.ARROW, tables.STREAM)):
        return tables.table_rows(source, content)
    text = decode_text(source, content)
    suffix = Path(source).suffix.lower()
    if suffix in (".csv", ".tsv"):
        return csv_rows(source, text, "\t" if suffix == ".tsv" else ",", on_error)
    return (array_rows if text.lstrip().startswith("[") else line_rows)(source, text, on_error)


def is_file_name(source: str) -> bool:
    """Whether a source that does not exist was meant as a file: it has the suffix of a file, or its folder exists."""
    suffixes = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".txt")
    return source.lower().endswith(suffixes) or os.path.isdir(os.path.dirname(source))


def located(source: str) -> str:
    """Return the absolute path of a source that is a file or a folder; the name of a data set stays as it is."""
    exists = os.path.exists(source) or tables.is_saved(source) or not tables.is_name(source) or is_file_name(source)
    return os.path.abspath(source) if exists else source


def digest(source: str) -> str:
    """Return the SHA-256 of a file, or of the rows of a folder or a data set; "" if they cannot be read."""
    try:
        if os.path.isfile(source):
            return hashlib.sha256(Path(source).read_bytes()).hexdigest()
        return hashlib.sha256(repr([row.fields for row in rows_of(source, raise_at_once)]).encode()).hexdigest()
    except (OSError, LossInputError):
        return ""


def read_bytes(path: str) -> bytes:
    """Return the content of a file."""
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
            fix = "Write a part of its rows to another file."
            raise LossInputError("--data", f"a file of at most {MAX_FILE} bytes", got, fix)
        return Path(path).read_bytes()
    except OSError as error:
        got, fix = f"{path} ({error.strerror})", "Name a file, or a data set as OWNER/NAME."
        raise LossInputError("--data", "a file of rows", got, fix) from None


def decode_text(path: str, content: bytes) -> str:
    """Return the text of a file; refuse a file of another kind by its name."""
    suffix = Path(path).suffix or ".jsonl"
    for start, (kind, fix) in OTHER_KINDS.items():
        if content.startswith(start):
            expected = "JSONL, a JSON array, CSV, Parquet or Arrow"
            raise LossInputError(
                "--data", expected, f"{path}, {kind}", fix.replace("IN", path).replace("SUFFIX", suffix)
            )
    at = content.find(b"\0")
    if at >= 0:
        fix = "It is damaged, or not UTF-8: iconv converts it."
        raise LossInputError(f"{path}:{line_of(content, at)}", "text in UTF-8", f"a NUL byte (byte {at})", fix)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place, got = f"{path}:{line_of(content, error.start)}", f"byte 0x{content[error.start]:02x} ({error.reason})"
        fix = f"Convert it, for example: iconv -f LATIN1 -t UTF-8 '{path}' > rows{suffix}"
        raise LossInputError(place, "text in UTF-8", got, fix) from None


def line_of(content: bytes, at: int) -> int:
    return content.count(b"\n", 0, at) + 1


def line_rows(path: str, text: str, on_error: OnError) -> Iterator[Row]:
    """Yield the rows of a JSONL file. Lines end only at a newline: a string may hold other line separators."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield line_row(path, number, text, line)
            except LossInputError as error:
                on_error(error)


def line_row(path: str, number: int, text: str, line: str) -> Row:
    """Return the row of one line."""
    if len(line) > MAX_LINE:
        got, fix = f"{len(line)}", "One object a line."
        raise LossInputError(f"{path}:{number}", f"a line of at most {MAX_LINE} characters", got, fix)
    fields, end = decode(path, number, text, line, skip_space(line, 0))
    if line[end:].strip():
        fix = "One object a line."
        raise LossInputError(f"{path}:{number}", "a JSON object", f"more after it: {shown(line[end:])}", fix)
    return as_row(f"{path}:{number}", fields)


def array_rows(path: str, text: str, on_error: OnError) -> Iterator[Row]:
    """Yield the elements of a JSON array, up to the first place that is not JSON."""
    try:
        yield from elements(path, text)
    except LossInputError as error:
        on_error(error)


def elements(path: str, text: str) -> Iterator[Row]:
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
        if not end and text.startswith("]", at):
            number += text.count("\n", counted, at)
            raise LossInputError(f"{path}:{number}", "a row after ','", "']'", "Delete the comma after the last row.")
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
    except RepeatedKey as error:
        fix = "Keep one of them."
        raise LossInputError(place, f"the key {shown(str(error))} once", "it twice", fix) from None
    except RecursionError:
        got = "deeper nesting"
        raise LossInputError(place, f"a row of at most {MAX_DEPTH} levels", got, "Flatten it.") from None
    except json.JSONDecodeError as error:
        got = f"{shown(line[max(0, error.pos - 10) : error.pos + 10])} at column {error.colno} ({reason_of(error)})"
        if ends_after_comma(line, error.pos):
            fix = "Delete the comma after the last entry."
        if line[start : start + 1] == "\ufeff":
            got = "a byte order mark: two files were joined"
        elif number == 1 and line[start : start + 1] not in ("{", "["):
            recipe = FROM_TEXT.replace("IN", path)
            fix = f'CSV is read if the name ends in .csv or .tsv. Convert plain text: python -c "{recipe}" > rows.jsonl'
        if number == 1 and (key := list_of_rows(text)):
            got, fix = "one object over many lines", write_list(path, key)
        raise LossInputError(place, "a JSON object", got, fix) from None


def ends_after_comma(line: str, at: int) -> bool:
    """Whether an object or a list ends right after the comma before, or at, a position.

    >>> ends_after_comma('{"a": 1, }', 9), ends_after_comma('{"a": 1, }', 7), ends_after_comma('{"a": 1, 2}', 9)
    (True, True, False)
    """
    at += line.startswith(",", at)
    return line[:at].rstrip().endswith(",") and line.startswith(("}", "]"), skip_space(line, at))


def reason_of(error: json.JSONDecodeError) -> str:
    """Return why a text is not JSON, as part of a sentence.

    >>> reason_of(json.JSONDecodeError("Unterminated string starting at", "", 0))
    'unterminated string'
    """
    reason = re.sub(r"( starting)? at$|: ?$", "", error.msg)
    return reason[:1].lower() + reason[1:]


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


SEPARATORS = (";", "\t", "|", ",")
"""The signs that stand between the columns of tables."""


def with_separator(path: str, separator: str, wanted: str) -> str:
    """Return the command that writes a table with another separator."""
    file, old, new = map(json.dumps, (path, separator, wanted))
    rows = f'csv.reader(open({file}, encoding="utf-8-sig", newline=""), delimiter={old})'
    code = f"import csv, sys; csv.writer(sys.stdout, delimiter={new}).writerows({rows})"
    return f"PYTHONIOENCODING=utf-8 python -c {shlex.quote(code)} > separated{Path(path).suffix}"


def csv_rows(path: str, text: str, delimiter: str, on_error: OnError) -> Iterator[Row]:
    """Yield the rows of a table whose first line names the columns."""
    csv.field_size_limit(MAX_LINE)
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
            on_error(LossInputError(place, "a row of CSV", f"a damaged one ({error})", fix))
            return
        if not cells:
            continue
        if not header:
            header = cells
            others = [sign for sign in SEPARATORS if sign != delimiter and sign in header[0]]
            if len(header) == 1 and others:
                fix = (
                    f"The separator is {others[0]!r}. Write another file: {with_separator(path, others[0], delimiter)}"
                )
                raise LossInputError(place, f"columns with {delimiter!r} between them", shown(header[0]), fix)
            if len(set(header)) < len(header) or "" in header:
                raise LossInputError(place, "a name for each column, once", shown(header), "Name the columns.")
        elif len(cells) != len(header):
            fix = f"The columns are {', '.join(map(shown, header))}; quote texts that hold a comma or a newline."
            on_error(LossInputError(place, f"{len(header)} columns", f"{len(cells)}", fix))
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
