"""lossfns/rosetta.json: the numbers of both sides of every row, and the texts that the rows rest on."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from lossfns.describe import ROSETTA
from tools.rosetta.compare import fault, ours, peers
from tools.rosetta.installed import Definition, Peer, installed_version
from tools.rosetta.row import Row

Record = dict[str, Any]
"""A row as it is stored: text, and the value and slope of both sides."""


def stored() -> Record:
    """Return the stored file; empty where there is none."""
    return json.loads(ROSETTA.read_text(encoding="utf-8")) if ROSETTA.exists() else {"rows": [], "definitions": {}}


def key(row: Row | Record) -> tuple[str, str]:
    """Return what names a row: framework and setting."""
    return (row.framework, row.setting) if isinstance(row, Row) else (row["framework"], row["setting"])


def runs_here(row: Row) -> bool:
    """Return whether the row's number can be computed: a formula, or a package in the version that the row names."""
    if not isinstance(row.peer, Peer):
        return True
    found = installed_version(row.peer.package)
    return found is not None and found in re.split(r"[ ,]+", row.framework)


def record(row: Row, recorded: Record | None) -> Record:
    """Evaluate a row. Where its package is absent, keep the recorded number.

    Raises:
        SystemExit: if the verdict does not hold, or if there is neither a package nor a recorded number.
    """
    mine = ours(row)
    numbers = {"ours": rounded(mine.value), "ours_slope": rounded(mine.slope)}
    if runs_here(row):
        theirs = peers(row)
        problem = fault(row, mine, theirs)
        if problem:
            raise SystemExit(f"{row.framework}, {row.setting}: {row.call} {problem}")
        numbers |= {"peer": rounded(theirs.value), "peer_slope": rounded(theirs.slope)}
    elif recorded is not None:
        numbers |= {name: recorded[name] for name in ("peer", "peer_slope")}
    else:
        raise SystemExit(f"{row.framework}, {row.setting}: its package is not installed, and no number is recorded")
    text = {
        "framework": row.framework,
        "setting": row.setting,
        "call": row.call,
        "verdict": row.verdict,
        "why": row.why,
        "source": row.source,
        "inputs": row.inputs,
    }
    return {**text, **numbers, "from": "formula" if not isinstance(row.peer, Peer) else row.peer.package}


def rounded(x: float) -> float:
    """Round to twelve significant digits."""
    return float(f"{x:.12g}")


def definitions(rows: Sequence[Row]) -> dict[Definition, list[Row]]:
    """Return the rows that rest on each definition of an installed package."""
    found: dict[Definition, list[Row]] = {}
    for row in rows:
        for definition in row.peer.rests_on() if isinstance(row.peer, Peer) else ():
            found.setdefault(definition, []).append(row)
    return found


def digests(rows: Sequence[Row], recorded: dict[str, str]) -> dict[str, str]:
    """Return the digest of each definition; where the package is absent or another version, the recorded one."""
    found = {}
    for definition, resting in definitions(rows).items():
        name = str(definition)
        if runs_here(resting[0]):
            found[name] = definition.digest()
        elif name in recorded:
            found[name] = recorded[name]
    return dict(sorted(found.items()))


def text_of(rows: Sequence[Record], digests: dict[str, str]) -> str:
    """Return the file: one row a line, so that a change shows as one line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return f'{{"rows": [\n{lines}\n],\n"definitions": {json.dumps(digests, indent=0)}}}\n'
