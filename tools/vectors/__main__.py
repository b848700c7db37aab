"""Write the golden vectors, or check that the files are up to date.

python -m tools.vectors write [--out DIR]     # write the files whose contents changed
python -m tools.vectors check                 # exit with 1 if ``write`` would change a file
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lossfns.testing.vectors.vector import FOLDER
from tools.vectors.write import changed_files, schema_violations, write


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m tools.vectors``."""
    p = argparse.ArgumentParser(prog="python -m tools.vectors", description="Write the golden vectors, or check them.")
    p.add_argument("action", choices=("write", "check"))
    p.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="the folder of the files")
    args = p.parse_args(argv)
    if args.action == "write":
        args.out.mkdir(parents=True, exist_ok=True)
        changed = write(args.out)
        print("\n".join(f"wrote {path}" for path in changed) or "nothing to write: every file is up to date")
        return 0
    problems = [f"{path.name} is not what would be written" for path in changed_files(args.out)]
    problems += schema_violations(args.out)
    print("\n".join(problems) or "every file is as it should be")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
