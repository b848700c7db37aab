"""Advice in errors: how to change the rows of a file, by a command that works on files of this kind."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from lossfns.train import tables
from lossfns.train.values import Row, quoted, shown

GOOD = '"true", "1", "1.0"'
"""The labels of good completions, in small letters."""


def renamed(row: Row, keys: Sequence[str]) -> str:
    """Say how to rename fields of the row's file, so that it has these fields."""
    path = path_of(row)
    missing = [key for key in keys if key not in row.fields]
    similar = {key: name for key in missing for name in misspelled(key, row, keys)}
    meant = "".join(f"Did you mean {key!r} by {shown(name)}? " for key, name in similar.items())
    if is_csv(path):
        return f"{meant}Rename the columns in the first line."
    names = {key: f"[{json.dumps(similar[key])}]" if key in similar else "FIELD" for key in missing}
    fields = ", ".join(f"{key}: .{names[key]}" if key in names else key for key in keys)
    columns = {similar.get(key, f"FIELD{i}"): key for i, key in enumerate(missing, 1)}
    how = ", with your own in place of FIELD" if len(similar) < len(missing) else ""
    return f"{meant}Rename the fields{how}: {command(path, f'{{{fields}}}', f'.rename_columns({json.dumps(columns)})')}"


def misspelled(key: str, row: Row, keys: Sequence[str]) -> list[str]:
    """Return the field of a row that is most similar to a missing one, if there is one."""
    return get_close_matches(key, [str(name) for name in row.fields if name not in keys], n=1, cutoff=0.75)


def without(row: Row, key: str) -> str:
    """Say how to leave a field out of the row's file."""
    path = path_of(row)
    if is_csv(path):
        return f"leave the column {quoted(key)} out."
    return command(path, f"del(.{key})", f".remove_columns({json.dumps(key)})")


def good_ones(row: Row) -> str:
    """Say how to write the rows with a good label to another file, without the label."""
    path = path_of(row)
    if is_csv(path):
        return "write them to another file, without the column 'label'."
    is_good = f"select(.label | tostring | ascii_downcase | IN({GOOD}))"
    kept = f'.filter(lambda row: str(row["label"]).lower() in ({GOOD})).remove_columns("label")'
    return command(path, f"{is_good} | {{prompt, completion}}", kept)


def different(row: Row) -> str:
    """Say how to write the rows whose chosen and rejected sides differ to another file."""
    path = path_of(row)
    if is_csv(path):
        return "write the others to another file."
    return command(path, "select(.chosen != .rejected)", '.filter(lambda row: row["chosen"] != row["rejected"])')


def command(path: str, program: str, methods: str) -> str:
    """Return a command that writes changed rows: a program of jq for JSON, methods of a ``Dataset`` for a table."""
    if (loading := loaded(path)) is None:
        program = f".[] | {program}" if is_array(path) else program
        return f"jq -c {shlex.quote(program)} {shlex.quote(path)} > rows.jsonl"
    code = f'from datasets import *; {loading}{methods}.to_json("rows.jsonl")'
    return f"python -c {shlex.quote(code)}"


def path_of(row: Row) -> str:
    """Return the file, the folder or the name of the row's source."""
    return row.place.rpartition(":")[0]


def is_csv(path: str) -> bool:
    return path.lower().endswith((".csv", ".tsv")) and loaded(path) is None


def is_json(path: str) -> bool:
    return not is_csv(path) and loaded(path) is None


def is_array(path: str) -> bool:
    """Whether a file of JSON is an array."""
    with open(path, encoding="utf-8-sig") as file:
        return next((line.lstrip()[0] for line in file if line.strip()), "") == "["


def loaded(path: str) -> str | None:
    """Return the Python expression that loads the rows of a table with ``datasets``; None for a file of text."""
    if tables.is_saved(path):
        folder, split = (path, "") if os.path.isdir(path) else path.rsplit(":", 1)
        return f"load_from_disk({json.dumps(folder)})" + (f"[{json.dumps(split)}]" if split else "")
    if not os.path.exists(path):
        name, *config, split = path.split(":")
        return f"load_dataset({', '.join(map(json.dumps, [name, *config]))}, split={json.dumps(split)})"
    with Path(path).open("rb") as file:
        start = file.read(6)
    if not start.startswith((tables.PARQUET, tables.ARROW, tables.STREAM)):
        return None
    kind = "parquet" if start.startswith(tables.PARQUET) else "arrow"
    return f'load_dataset("{kind}", data_files={json.dumps(path)}, split="train")'
