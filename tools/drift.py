"""Compare the functions of installed frameworks that rows of the Rosetta table rest on with their recorded texts.

python -m tools.drift            # list the rows to look at again; exit with 1 if there are any
python -m tools.drift record     # store the digests of the texts that are installed now
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lossfns.describe import ROSETTA
from tools.rosetta.installed import Definition, folder
from tools.rosetta.record import definitions, stored, text_of
from tools.rosetta.row import Row
from tools.rosetta.table import all_rows


@dataclass(frozen=True)
class Drift:
    """A definition whose text is not the recorded one.

    Attributes:
        definition: where it is.
        what: what has happened to it.
        rows: the rows that rest on it.
    """

    definition: Definition
    what: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        settings = "\n".join(f"    {row.framework}: {row.setting}" for row in self.rows)
        return f"{self.definition} {self.what}. Look at these rows again:\n{settings}"


def drifted(rows: Sequence[Row], recorded: Mapping[str, str]) -> list[Drift]:
    """Return the definitions of installed packages whose text has changed, or which are gone or new."""
    found = []
    for definition, resting in definitions(rows).items():
        if folder(definition.package) is None:
            continue
        digest = digest_or_none(definition)
        if digest != recorded.get(str(definition)):
            what = "is gone" if digest is None else "has changed" if str(definition) in recorded else "is not recorded"
            found.append(Drift(definition, what, tuple(resting)))
    return found


def digest_or_none(definition: Definition) -> str | None:
    """Return the digest of an installed text; None where the file or the name is gone."""
    try:
        return definition.digest()
    except (FileNotFoundError, KeyError):
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m tools.drift``."""
    p = argparse.ArgumentParser(prog="python -m tools.drift", description="Find frameworks that have changed.")
    p.add_argument("action", nargs="?", choices=("list", "record"), default="list")
    action = p.parse_args(argv).action
    rows, before = all_rows(), stored()
    absent = sorted({d.package for d in definitions(rows) if folder(d.package) is None})
    if absent:
        print(f"not installed, not compared: {', '.join(absent)}")
    found = drifted(rows, before["definitions"])
    if action == "record":
        now = {str(d.definition): digest_or_none(d.definition) for d in found}
        kept = {**before["definitions"], **{name: digest for name, digest in now.items() if digest}}
        ROSETTA.write_text(text_of(before["rows"], dict(sorted(kept.items()))), encoding="utf-8")
        print(f"recorded {len(found)} texts")
        return 0
    print("\n".join(map(str, found)) or "no function that a row rests on has changed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
