"""The laws on the mutants: which law kills which, and which bug the first one names.

    python -m lossfns.testing.matrix write      # measures it all (a minute) and writes docs/laws.md
    python -m lossfns.testing.matrix render     # writes it anew from its own measurements, for words that changed
    python -m lossfns.testing.matrix check      # measures it all; exits 1 where the page says something else

The page is the record: ``read`` takes the measurements from it, ``page`` makes it of them again.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lossfns.terminal import status
from lossfns.testing.bugs import BUGS
from lossfns.testing.check import Report, check, says
from lossfns.testing.laws import ADVANTAGES, GROUPS
from lossfns.testing.mutants import MUTANTS

PAGE = Path("docs/laws.md")

CLAIMS = {
    "vectors": "It gives the right answer to the golden vectors of the loss that it claims to be.",
    "agreement": "It has the value and the gradient of the loss that it claims to be.",
}
"""The laws of what a loss claims to be; ``lossfns.testing.claims`` makes them for each claim."""

LAWS: dict[str, Callable[..., None]] = {law.__name__: law for laws in (*GROUPS.values(), ADVANTAGES) for law in laws}
"""Every law of every kind by its name."""

KINDS = {kind: [law.__name__ for law in laws] for kind, laws in GROUPS.items()}
KINDS["advantages"] = [law.__name__ for law in ADVANTAGES]
"""The laws of each kind by name, in the order of diagnosis."""

PLANTED = [kind for kind in KINDS if kind != "any"]
"""The kinds that mutants are of."""


class Kill(NamedTuple):
    """What became of a mutant: the laws that it breaks, in the order of diagnosis, and the bug that the first named."""

    mutant: str
    named: str
    laws: tuple[str, ...]

    def killed(self) -> bool:
        return bool(self.laws)

    def without_claim(self) -> bool:
        return bool(set(self.laws) - set(CLAIMS))

    def right(self) -> bool:
        return self.named == planted(self.mutant)

    def first(self) -> str:
        return self.laws[0] if self.laws else ""


def planted(mutant: str) -> str:
    """The bug that a mutant has."""
    return str(MUTANTS[mutant].bug)  # type: ignore[attr-defined]


def kind_of(mutant: str) -> str:
    return str(MUTANTS[mutant].kind)  # type: ignore[attr-defined]


def measured() -> list[Kill]:
    """Every law on every mutant, on the small batches that every law is tried on."""
    kills = []
    with status() as show:
        for i, (name, mutant) in enumerate(MUTANTS.items(), 1):
            show(f"{i}/{len(MUTANTS)} {name}")
            kills.append(kill(name, check(mutant, examples=0)))
    return kills


def kill(name: str, report: Report) -> Kill:
    return Kill(name, report.bug, tuple(verdict.law for verdict in report.failures))


# The page


def page(kills: Sequence[Kill]) -> str:
    """``docs/laws.md``."""
    parts = (
        INTRODUCTION,
        summary(kills),
        LAWS_HEAD,
        *laws_by_module(kills),
        orders(),
        BUGS_HEAD,
        bugs(kills),
        MATRIX_HEAD,
        *(f"### {kind}\n\n{rows(kills, kind)}" for kind in PLANTED),
    )
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """\
# Laws, bugs and mutants

Written by `python -m lossfns.testing.matrix write`; do not edit. `docs/testing.md` says how the laws are used, why each
holds, and what to do about one that is broken.

A law is a property of every correct loss of its kind. A mutant is a loss that is correct but for one planted bug. Each
law is tried on each mutant of its kind: a law that fails there kills the mutant, and names a bug. The laws stand in the
order of diagnosis; the bug that the first broken law names is the answer that `lossfns check` gives. Every mutant also
says which loss it claims to be, which a loss of yours may not: the table says how many are killed without that."""

LAWS_HEAD = """\
## The laws

Kills: how many mutants break the law. First: how many break it before any other, and which bugs it names for them."""

BUGS_HEAD = """\
## The bugs

Mutants: how many have this bug planted. Named by: the laws that name it where they are the first to break."""

MATRIX_HEAD = """\
## Which law kills which mutant

The bug named is that of the first broken law, which is bold; ✓ where it is the one planted. The others follow in the
order of diagnosis."""


def summary(kills: Sequence[Kill]) -> str:
    """How many mutants are killed, how many without a look at the claim, and how many named, by kind and in all."""
    parts = {kind: [k for k in kills if kind_of(k.mutant) == kind] for kind in PLANTED} | {"all": kills}
    return table(
        ("kind", "mutants", "killed", "killed without a claim", "named right by the first broken law"),
        (
            (kind, len(part), *(share(part, test) for test in (Kill.killed, Kill.without_claim, Kill.right)))
            for kind, part in parts.items()
        ),
    )


def share(kills: Sequence[Kill], test: Callable[[Kill], bool]) -> str:
    count = sum(map(test, kills))
    return f"{count} ({count / len(kills):.1%})"


def laws_by_module(kills: Sequence[Kill]) -> Iterable[str]:
    """A table for each module of laws, then one for the claims."""
    broken = Counter(law for k in kills for law in k.laws)

    def row(name: str, words: str) -> tuple[Any, ...]:
        first = Counter(k.named for k in kills if k.first() == name)
        named = ", ".join(f"{bug}{f' ×{n}' * (n > 1)}" for bug, n in first.items())
        return f"`{name}`", words, kinds_with(name), broken[name], first.total(), named or "–"

    modules = dict.fromkeys(law.__module__.rpartition(".")[2] for law in LAWS.values())
    head = ("law", "what holds", "kinds", "kills", "first", "bugs")
    for module in modules:
        own = {name: law for name, law in LAWS.items() if law.__module__.endswith(f".{module}")}
        yield f"### {module}\n\n" + table(head, (row(name, says(law)) for name, law in own.items()))
    yield "### claims\n\n" + table(head, (row(name, words) for name, words in CLAIMS.items()))


def kinds_with(law: str) -> str:
    if law in CLAIMS:
        return "with a claim"
    kinds = [kind for kind, laws in KINDS.items() if law in laws]
    return "every" if len(kinds) == len(GROUPS) else ", ".join(kinds)


def orders() -> str:
    """The order of diagnosis of each kind."""
    listed = [f"- {kind}: {', '.join(laws)}" for kind, laws in KINDS.items()]
    return "### The order of diagnosis\n\nThe claims come last, `vectors` before `agreement`.\n\n" + "\n".join(listed)


def bugs(kills: Sequence[Kill]) -> str:
    def row(bug: str) -> tuple[Any, ...]:
        naming = dict.fromkeys(k.first() for k in kills if k.right() and k.named == bug)
        mutants = [k for k in kills if planted(k.mutant) == bug]
        return f"`{bug}`", BUGS[bug].words, ", ".join(BUGS[bug].seen) or "–", len(mutants), ", ".join(naming) or "–"

    return table(("bug", "in words", "seen in", "mutants", "named by"), map(row, BUGS))


def rows(kills: Sequence[Kill], kind: str) -> str:
    """The mutants of a kind, with the laws that kill each."""
    return table(
        ("mutant", "planted bug", "named", "killed by"),
        (
            (f"`{k.mutant}`", planted(k.mutant), "✓" if k.right() else k.named or "–", killers(k.laws))
            for k in kills
            if kind_of(k.mutant) == kind
        ),
    )


def killers(laws: Sequence[str]) -> str:
    return ", ".join(f"**{law}**" if i == 0 else law for i, law in enumerate(laws)) or "–"


def table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    cells = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells)


ROW = re.compile(r"^\| `(\w+)` \| ([\w-]+) \| (✓|–|[\w-]+) \| ([*\w, –]+) \|$", re.MULTILINE)


def read(text: str) -> list[Kill]:
    """The measurements that a page was made of."""
    return [
        Kill(mutant, {"✓": bug, "–": ""}.get(named, named), tuple(re.findall(r"\w+", laws)))
        for mutant, bug, named, laws in ROW.findall(text.partition(MATRIX_HEAD)[2])
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m lossfns.testing.matrix``; 1 if a check finds the page untrue."""
    p = argparse.ArgumentParser(prog="python -m lossfns.testing.matrix", description="The laws on the mutants.")
    p.add_argument(
        "action", choices=("write", "render", "check"), help="measure and write; write anew; measure and see"
    )
    p.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    args = p.parse_args(argv)
    was = args.page.read_text(encoding="utf-8") if args.page.exists() else ""
    text = page(read(was) if args.action == "render" else measured())
    if args.action == "check":
        for line in sorted(set(text.splitlines()) ^ set(was.splitlines())):
            print("+" if line in text else "-", line)
        return 0 if text == was else 1
    args.page.write_text(text, encoding="utf-8")
    print(f"wrote {args.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
