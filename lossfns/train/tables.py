"""Rows of Parquet and Arrow files, and of folders and names of ``datasets``. Needs the extra ``data``.

A null inside of a struct is read as a missing field: Arrow gives all structs of a column the same fields.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import date, time
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any

from lossfns.errors import LossInputError
from lossfns.train.values import Constant, Number, Row

PARQUET, ARROW, STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
"""First bytes of a Parquet file, an Arrow file and an Arrow stream."""

NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")
"""The name of a data set with its owner, and optionally a configuration and a split."""


def library(name: str) -> Any:
    """Import a library of the extra ``data``."""
    try:
        return import_module(name)
    except ImportError:
        fix = "pip install 'lossfns[data]'"
        raise LossInputError("--data", f"the library {name.split('.')[0]} for such data", "none", fix) from None


def table_rows(path: str, content: bytes) -> Iterator[Row]:
    """Yield the rows of a Parquet or Arrow file."""
    arrow, parquet, ipc = (library(name) for name in ("pyarrow", "pyarrow.parquet", "pyarrow.ipc"))
    source = arrow.BufferReader(content)
    try:
        if content.startswith(PARQUET):
            table = parquet.read_table(source)
        else:
            table = (ipc.open_file if content.startswith(ARROW) else ipc.open_stream)(source).read_all()
        names = table.column_names
        if len(set(names)) < len(names):
            raise ValueError("a column comes twice")
        rows = table.to_pylist()
    except (arrow.ArrowException, OSError, ValueError) as error:
        kind = "Parquet" if content.startswith(PARQUET) else "Arrow"
        raise LossInputError(
            "--data", f"a whole {kind} file", f"{path} ({first_line(error)})", "Write it anew."
        ) from None
    yield from numbered(path, rows)


def is_saved(path: str) -> bool:
    """Whether a path is a folder that ``save_to_disk`` wrote, with or without a split after a colon."""
    folder = Path(path if os.path.isdir(path) else path.rpartition(":")[0])
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def saved_rows(path: str) -> Iterator[Row]:
    """Yield the rows of a folder that ``save_to_disk`` wrote: ``FOLDER`` or ``FOLDER:SPLIT``."""
    folder, split = (path, "") if os.path.isdir(path) else path.rsplit(":", 1)
    try:
        data = library("datasets").load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        got = f"{folder} ({first_line(error)})"
        raise LossInputError("--data", "a whole folder of datasets", got, "Save it anew.") from None
    yield from split_rows(path, folder, data, split)


def is_name(source: str) -> bool:
    """Whether a source can be the name of a data set: ``OWNER/NAME``, ``OWNER/NAME:CONFIG`` or with ``:SPLIT``."""
    return NAME.fullmatch(source) is not None


def named_rows(source: str) -> Iterator[Row]:
    """Yield the rows of a data set of the hub, which is kept in the cache of ``datasets``."""
    name, config, split = [*source.split(":"), "", ""][:3]
    datasets, hub = library("datasets"), library("huggingface_hub")
    try:
        if not hub.constants.HF_HUB_OFFLINE:
            hub.HfApi().dataset_info(name, timeout=10)  # fails at once, where loading would try again and again
        data = datasets.load_dataset(name, config or None)
    except Exception as error:  # the classes of the library's HTTP errors depend on its version
        got = f"{source!r}: no such file, and no data set ({first_line(error)})"
        fix = "Check the path, the name or the connection; HF_HUB_OFFLINE=1 takes a data set from the cache."
        raise LossInputError("--data", "a file, a folder or the name of a data set", got, fix) from None
    yield from split_rows(source, f"{name}:{config}" if config else name, data, split)


def split_rows(source: str, name: str, data: Any, split: str) -> Iterator[Row]:
    """Yield the rows of one split: the one that is named, the only one, or ``train``."""
    if hasattr(data, "column_names") and not isinstance(data, dict):
        if split:
            raise LossInputError("--data", f"no split of {name}", repr(split), "It has none: leave it out.")
        yield from numbered(source, data.to_list())
        return
    names = list(data)
    if not split:
        split = names[0] if len(names) == 1 else "train"
    if split not in names:
        example = f"Name one: --data {name}:{names[0]}" if names else "It is empty."
        raise LossInputError("--data", f"a split of {name} ({', '.join(names)})", repr(split), example)
    yield from numbered(f"{name}:{split}", data[split].to_list())


def numbered(source: str, rows: list[dict[str, Any]]) -> Iterator[Row]:
    """Yield the rows of a table with their numbers, from 1."""
    for number, fields in enumerate(rows, 1):
        yield Row(f"{source}:{number}", {str(name): from_arrow(value) for name, value in fields.items()})


def from_arrow(value: Any) -> Any:
    """Return a value of a table as a row of JSON would have it; bytes stay bytes.

    >>> from_arrow({"role": "user", "name": None, "at": [1, 0.5, date(2026, 1, 2)]})
    {'role': 'user', 'at': [1, 0.5, '2026-01-02']}
    """
    if isinstance(value, dict):
        return {str(key): from_arrow(x) for key, x in value.items() if x is not None}
    if isinstance(value, (list, tuple)):
        return [from_arrow(x) for x in value]
    if isinstance(value, (bool, str, bytes)) or value is None:
        return value
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return Constant(value)
    if isinstance(value, (int, float, Decimal)):
        return Number(value)
    return value.isoformat() if isinstance(value, (date, time)) else str(value)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, at most 200 characters of it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
