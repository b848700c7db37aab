"""The texts of ``lossfns explain``: in docs/testing.md, "What each law means" and the list of what no law sees.

python -m tools.explanations write    copy them to lossfns/testing/explanations.json
python -m tools.explanations check    say whether the copy is up to date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from lossfns.testing.explain import FILE

GUIDE = Path(__file__).parents[1] / "docs" / "testing.md"
SECTION = re.compile(r"^## What each law means\n(.*?)^## ", re.DOTALL | re.MULTILINE)
PARAGRAPH = re.compile(r"^- \*\*([\w, ]+)\.\*\*(.*?)(?=^- |^#|\n\n|\Z)", re.DOTALL | re.MULTILINE)
UNSEEN = re.compile(r"^No law sees:\n\n(.*?)\n\n", re.DOTALL | re.MULTILINE)
"""The list of what no law sees, in which each entry starts with a dash."""


def copied(guide: str) -> str:
    """Return the file for the text of the guide: the laws and the text of each paragraph."""
    found = SECTION.search(guide)
    assert found, "docs/testing.md has no section on what each law means"
    unseen = UNSEEN.search(guide)
    assert unseen, "docs/testing.md does not list what no law sees"
    entries = [
        {"laws": names.split(", "), "text": " ".join(text.split())} for names, text in PARAGRAPH.findall(found[1])
    ]
    entries += [
        {"laws": [], "text": " ".join(text.replace("**", "").split())} for text in f"\n{unseen[1]}".split("\n- ")[1:]
    ]
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m tools.explanations``. Return 1 if ``check`` finds that the copy is out of date."""
    p = argparse.ArgumentParser(prog="python -m tools.explanations", description="The texts of lossfns explain.")
    p.add_argument("action", choices=("write", "check"))
    args = p.parse_args(argv)
    text = copied(GUIDE.read_text(encoding="utf-8"))
    if args.action == "write":
        FILE.write_text(text, encoding="utf-8")
        print(f"wrote {FILE.name}")
        return 0
    return 0 if FILE.exists() and FILE.read_text(encoding="utf-8") == text else 1


if __name__ == "__main__":
    sys.exit(main())
