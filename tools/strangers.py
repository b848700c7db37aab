"""``lossfns check`` on losses that strangers wrote: docs/strangers.md.

    python -m tools.strangers measure FOLDER    check the losses in FOLDER and its folders, and print the table
    python -m tools.strangers write             measure tests/strangers and write the page
    python -m tools.strangers render            write the page from its own measurements

A folder of losses has a ``manifest.json``, which says of each file: the object, the style, the kind, and whether the
loss is correct. ``FOLDER_bugs.json`` beside the folder lists, for a wrong one, the ids of the bugs that name what its
writer planted; without it the name is not judged. These lists were made from the writer's words and the catalogue of
bugs alone. Each loss is checked as a user would check it, without options. Where the report says that the kind was
guessed, it is checked once more with the kind of the manifest. The page stores the measurements.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tools.laws import table

PAGE = Path("docs/strangers.md")
SETS = {
    "held_out": Path("tests/strangers/held_out"),
    "again": Path("tests/strangers/held_out"),
    "open": Path("tests/strangers/open"),
}
PROCESSES = 2


class Stranger(NamedTuple):
    """A loss by a stranger.

    Attributes:
        path: the file, from the folder of its set.
        object: the name of the loss in the file.
        style, kind: the writer's words.
        correct: whether it is correct.
        bugs: the ids of the bugs that the report may name; none if that is not judged.
    """

    path: str
    object: str
    style: str
    kind: str
    correct: bool
    bugs: tuple[str, ...]


class Measurement(NamedTuple):
    """The verdict on a stranger.

    Attributes:
        path, style: as in ``Stranger``.
        correct: "correct", or "wrong" with the ids of its bugs after it.
        kind: the kind as which it was tested, with "?" if that was guessed.
        verdict: "ok", "unsure", "fragile", "wrong", or "refused".
        named: the bug that the report names first, or "".
        laws: the laws that it breaks, those that make it wrong first.
        with_kind: the verdict with the kind of the manifest, if the kind was guessed; else "".
    """

    path: str
    style: str
    correct: str
    kind: str
    verdict: str
    named: str
    laws: tuple[str, ...]
    with_kind: str

    @property
    def is_correct(self) -> bool:
        return self.correct == "correct"

    @property
    def bugs(self) -> set[str]:
        """The bugs that may be named."""
        return set(self.correct.split()[1:])

    @property
    def final(self) -> str:
        """The verdict with the kind of the manifest, if that was needed, else the verdict."""
        return self.with_kind or self.verdict

    def missed(self) -> bool:
        """Return whether a correct loss is called wrong, or a wrong one neither wrong nor fragile, or misnamed."""
        if self.is_correct:
            return self.final in ("wrong", "refused")
        return self.final not in ("wrong", "fragile") or not self.named_right()

    def named_right(self) -> bool:
        """Return whether the first bug is one of those of the manifest, or is not judged."""
        return not self.bugs or self.named in self.bugs


def strangers(folder: Path) -> Iterator[Stranger]:
    """Yield the losses of every manifest in a folder."""
    named = folder.with_name(f"{folder.name}_bugs.json")
    all_bugs = json.loads(named.read_text(encoding="utf-8")) if named.exists() else {}
    for manifest in sorted(folder.rglob("manifest.json")):
        for entry in json.loads(manifest.read_text(encoding="utf-8")):
            path = (manifest.parent / entry["file"]).relative_to(folder).as_posix()
            bugs = tuple(all_bugs.get(path, ()))
            yield Stranger(path, entry["object"], entry["style"], entry["kind"], entry["correct"], bugs)


def measure(folder: Path, stranger: Stranger) -> Measurement:
    """Check a loss as a user would, and once more with its kind if that was guessed."""
    report = check(folder, stranger)
    correct = "correct" if stranger.correct else " ".join(["wrong", *stranger.bugs])
    if report is None:
        return Measurement(stranger.path, stranger.style, correct, "–", "refused", "", (), "")
    again = check(folder, stranger, "--kind", stranger.kind) if report["guessed"] else None
    with_kind = ("refused" if again is None else verdict_of(again)) if report["guessed"] else ""
    last = again or report
    return Measurement(
        stranger.path,
        stranger.style,
        correct,
        report["kind"] + "?" * report["guessed"],
        verdict_of(report),
        last["bug"],
        broken_laws(last),
        with_kind,
    )


def check(folder: Path, stranger: Stranger, *options: str) -> dict[str, Any] | None:
    """Return the report of ``lossfns check``, or None if it refuses the loss."""
    subject = f"{(folder / stranger.path).resolve()}:{stranger.object}"
    command = [sys.executable, "-m", "lossfns", "check", subject, "--json", "-", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    return json.loads(done.stdout) if done.stdout else None


def verdict_of(report: dict[str, Any]) -> str:
    """Return the most severe verdict of a report."""
    counts = report["counts"]
    return next((verdict for verdict in ("wrong", "unsure", "fragile") if counts[verdict]), "ok")


def broken_laws(report: dict[str, Any]) -> tuple[str, ...]:
    """Return the broken laws, the most severe first."""
    by_verdict = {verdict: [] for verdict in ("wrong", "unsure", "fragile")}
    for v in report["verdicts"]:
        by_verdict.get(v["verdict"], []).append(v["law"])
    return tuple(law for laws in by_verdict.values() for law in laws)


def measure_all(folder: Path) -> list[Measurement]:
    """Measure every loss in a folder, two at a time."""
    listed, measured = list(strangers(folder)), []
    with ThreadPoolExecutor(PROCESSES) as pool:
        for measurement in pool.map(lambda stranger: measure(folder, stranger), listed):
            measured.append(measurement)
            print(f"\r\x1b[K{folder.name} {len(measured)}/{len(listed)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return measured


# The page

INTRODUCTION = """\
# Losses by strangers

Written by `python -m tools.strangers write`; do not edit. The losses were written by readers of the contract alone, who
had seen neither the laws nor any other part of this project (`tests/strangers/README.md`).

Each loss is checked as a user would check it: `lossfns check FILE.py:NAME`. Where the report says that the kind was
guessed, the loss is checked once more with the kind that its writer named, and the second verdict counts. A correct
loss must not be called wrong. A wrong one must be called wrong or fragile, and the first broken law should name its
bug.

Only the first section measures how the laws judge losses that they have not seen. It was measured once, before anybody
looked at these losses, and `write` keeps it. The other two sections show the current laws on losses that were used to
develop them."""

TITLES = {
    "held_out": "The half that was set aside, measured once",
    "again": "The same half, after its misses were mended",
    "open": "The half on which the laws were developed",
}
HEAD = ("loss", "style", "written to be", "kind", "verdict", "with its kind", "named first", "broken laws")


def render_page(record: dict[str, list[Measurement]]) -> str:
    """Return the text of the page."""
    parts = [INTRODUCTION]
    for name, measured in record.items():
        parts += [f"## {TITLES.get(name, name)}", *section(measured)]
    return "\n\n".join(parts) + "\n"


def section(measured: Sequence[Measurement]) -> list[str]:
    """Return the numbers of a set, the losses that were judged otherwise than they are, and all losses."""
    missed = [m for m in measured if m.missed()]
    return [
        summary(measured),
        "Misses:\n\n" + table(HEAD, map(cells, missed)) if missed else "There are no misses.",
        "All losses:\n\n" + table(HEAD, map(cells, measured)),
    ]


def summary(measured: Sequence[Measurement]) -> str:
    """Return the numbers of a set."""
    correct, wrong = ([m for m in measured if m.is_correct == is_correct] for is_correct in (True, False))
    called = Counter(m.final for m in correct)
    fragile = Counter(m.laws[0] for m in correct if m.final == "fragile")
    of_laws = f" ({', '.join(f'`{law}` {n}' for law, n in fragile.most_common())})" if fragile else ""
    found = [m for m in wrong if m.final in ("wrong", "fragile")]
    judged = [m for m in wrong if m.bugs]
    named = [m for m in judged if m in found and m.named_right()]
    rows = [
        ("correct losses", len(correct)),
        ("of these, called wrong", share(called["wrong"], correct)),
        ("of these, called fragile", share(called["fragile"], correct) + of_laws),
        ("of these, refused", share(called["refused"], correct)),
        ("wrong losses", len(wrong)),
        ("of these, called wrong or fragile", share(len(found), wrong)),
        ("of these, called wrong", share(sum(m.final == "wrong" for m in wrong), wrong)),
        ("wrong losses whose bug has a name here", len(judged)),
        ("of these, that bug is named first", share(len(named), judged)),
    ]
    return table(("", "number"), rows)


def share(part: int, whole: Sequence[Any]) -> str:
    """Return a number with its share of a whole."""
    return f"{part} ({part / len(whole):.1%})" if whole else "0"


def cells(m: Measurement) -> tuple[str, ...]:
    """Return the cells of a loss in the table."""
    laws = ", ".join(m.laws) or "–"
    return f"`{m.path}`", m.style, m.correct, m.kind, m.verdict, m.with_kind or "–", m.named or "–", laws


ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \| (\w+) \| ([\w–]+) \| ([^|]+) \| ([^|]+) \|$")


def read_page(text: str) -> dict[str, list[Measurement]]:
    """Return the measurements in the text of a page."""
    record = {}
    for name, title in TITLES.items():
        _, found, rest = text.partition(f"## {title}\n")
        if found:
            _, _, rows = rest.partition("\n## ")[0].partition("All losses:\n")
            record[name] = [measurement(row) for row in map(ROW.match, rows.splitlines()) if row]
    return record


def measurement(row: re.Match[str]) -> Measurement:
    """Return the measurement in a row of the table."""
    path, style, correct, kind, verdict, with_kind, named, laws = ("" if x == "–" else x for x in row.groups())
    return Measurement(path, style, correct, kind or "–", verdict, named, tuple(re.findall(r"\w+", laws)), with_kind)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m tools.strangers``."""
    p = argparse.ArgumentParser(prog="python -m tools.strangers", description="lossfns check on losses by strangers.")
    actions = p.add_subparsers(dest="action", required=True)
    of_folder = actions.add_parser("measure", help="check the losses in a folder and print the table")
    of_folder.add_argument("folder", type=Path)
    of_folder.add_argument("--json", type=Path, metavar="FILE", help="write the measurements as JSON, too")
    for action in ("write", "render"):
        of_page = actions.add_parser(action, help=f"{action} the page")
        of_page.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    args = p.parse_args(argv)
    if args.action == "measure":
        measured = measure_all(args.folder)
        if args.json:
            args.json.write_text(json.dumps([m._asdict() for m in measured], indent=1), encoding="utf-8")
        print("\n\n".join(section(measured)))
        return 0
    if args.action == "write":
        once = read_page(args.page.read_text(encoding="utf-8")).get("held_out")
        sets = dict(existing(SETS.items()))
        record = {name: once if name == "held_out" and once else measure_all(folder) for name, folder in sets.items()}
    else:
        record = read_page(args.page.read_text(encoding="utf-8"))
    args.page.write_text(render_page(record), encoding="utf-8")
    print(f"wrote {args.page}")
    return 0


def existing(sets: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, Path]]:
    """Yield the sets whose folders exist."""
    return ((name, folder) for name, folder in sets if folder.is_dir())


if __name__ == "__main__":
    sys.exit(main())
