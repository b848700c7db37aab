"""Write the Rosetta table, or check it.

python -m tools.rosetta write     # docs/rosetta.md and lossfns/rosetta.json; absent packages keep recorded numbers
python -m tools.rosetta check     # exit with 1 if a verdict does not hold, or if ``write`` would change a file
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lossfns.describe import ROSETTA
from tools.rosetta.installed import Peer
from tools.rosetta.page import PAGE, render
from tools.rosetta.record import digests, key, record, runs_here, stored, text_of
from tools.rosetta.table import all_rows


def files() -> dict[Path, str]:
    """Evaluate all rows and return the files that they make."""
    before = stored()
    recorded = {key(row): row for row in before["rows"]}
    rows = all_rows()
    records = [record(row, recorded.get(key(row))) for row in rows]
    return {ROSETTA: text_of(records, digests(rows, before["definitions"])), PAGE: render(records)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m tools.rosetta``."""
    p = argparse.ArgumentParser(prog="python -m tools.rosetta", description="Write the Rosetta table, or check it.")
    p.add_argument("action", choices=("write", "check"))
    action = p.parse_args(argv).action
    absent = sorted({row.peer.package for row in all_rows() if isinstance(row.peer, Peer) and not runs_here(row)})
    if absent:
        print(f"not installed in the versions of the rows, recorded numbers are kept: {', '.join(absent)}")
    changed = [path for path, text in files().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if action == "check":
        print(
            "\n".join(f"{path.name} is not what would be written" for path in changed)
            or "every file is as it should be"
        )
        return 1 if changed else 0
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
    print("\n".join(f"wrote {path.name}" for path in changed) or "nothing to write: every file is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
