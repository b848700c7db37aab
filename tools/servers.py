"""Write the tables of docs/servers.md from the code: the built-in losses, and the checks of the conformance suite.

python -m tools.servers write
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from lossfns.conformance import formulas
from lossfns.conformance.bugs import ALL_BUGS
from lossfns.conformance.checks import CHECKS

PAGE = Path("docs/servers.md")


def checks() -> str:
    """Return the checks as a table in Markdown."""
    rows = ["| check | level | what it says | the bug that it usually means |", "| --- | --- | --- | --- |"]
    for check in CHECKS:
        says, bug = check.says.replace("|", "\\|"), ALL_BUGS[check.bug].description.replace("|", "\\|")
        rows.append(f"| `{check.name}` | {check.level} | {says} | `{check.bug}`: {bug} |")
    return "\n".join(rows)


TABLES = {"losses": formulas.table, "checks": checks}
"""Name of a place in the page → the table that stands there."""


def render(page: str) -> str:
    """Return the page with its tables written anew."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: written by `python -m tools.servers write` -->", f"<!-- end of {name} -->"
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{table()}\n{end}{rest.split(end)[1]}"
    return re.sub(r"\d+ checks", f"{len(CHECKS)} checks", page, count=1)


def main(arguments: list[str]) -> int:
    """Write the page."""
    if arguments != ["write"]:
        print(__doc__)
        return 2
    PAGE.write_text(render(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
