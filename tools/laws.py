"""Measure the laws on known-wrong losses: which laws each one breaks, and which bug the first broken law names.

    python -m tools.laws write      # measure every mutant (tens of minutes) and write docs/laws.md
    python -m tools.laws render     # write docs/laws.md again from its own measurements, after a change of wording
    python -m tools.laws check      # measure every mutant; exit with 1 if docs/laws.md says something else

The page is the record: ``read_page`` takes the measurements from it, and ``render_page`` makes the page from them. Two
populations are measured. The page lists each exemplar. The held-out mutants are the rest of the cross product of losses
and bugs, with other settings. No law may be tuned on them.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from lossfns.testing.bugs import BUGS
from lossfns.testing.check import check, statement
from lossfns.testing.laws import ADVANTAGES, LAWS_BY_KIND
from lossfns.testing.mutants import MUTANTS, exemplars, mutant, settings_showing
from lossfns.testing.vectors.vector import METHODS

PAGE = Path("docs/laws.md")

CLAIMS = {
    "vectors": "It gives the right answer to the golden vectors of the loss that it claims to be.",
    "agreement": "It has the value and the gradient of the loss that it claims to be.",
}
"""The laws of a claim by their names; ``lossfns.testing.claims`` makes them for each claim."""

LAWS: dict[str, Callable[..., None]] = {
    law.__name__: law for laws in (*LAWS_BY_KIND.values(), ADVANTAGES) for law in laws
}
"""Every other law by its name."""

KINDS = {kind: [law.__name__ for law in laws] for kind, laws in LAWS_BY_KIND.items()}
KINDS["advantages"] = [law.__name__ for law in ADVANTAGES]
"""The laws of each kind by name, in the order of diagnosis."""

MUTANT_KINDS = [kind for kind in KINDS if kind != "any"]
"""The kinds of the mutants."""


class MutantSpec(NamedTuple):
    """A mutant to measure: a bug, the loss that has it, and the settings of the loss."""

    bug: str
    loss: str
    settings: Mapping[str, Any]


class Measurement(NamedTuple):
    """A measured mutant: the laws that it breaks, in the order of diagnosis, and the bug that the first one names."""

    loss: str
    bug: str
    named: str
    laws: tuple[str, ...]

    def killed(self) -> bool:
        """Return whether any law is broken."""
        return bool(self.laws)

    def without_claim(self) -> bool:
        """Return whether any law other than those of the claim is broken."""
        return bool(set(self.laws) - set(CLAIMS))

    def named_right(self) -> bool:
        """Return whether the first broken law names the planted bug."""
        return self.named == self.bug

    @property
    def first(self) -> str:
        return self.laws[0] if self.laws else ""

    @property
    def mutant(self) -> str:
        return f"{self.loss}_{self.bug.replace('-', '_')}"


class Counts(NamedTuple):
    """The mutants of a loss or a kind: all, killed, killed without the claim, and named right."""

    title: str
    mutants: int
    killed: int
    without_claim: int
    named_right: int


class Record(NamedTuple):
    """All measurements: the exemplars, the counts of held-out mutants by loss, and the misnamed held-out mutants."""

    exemplars: list[Measurement]
    held_out: list[Counts]
    misnamed: list[Measurement]


def held_out() -> Iterator[MutantSpec]:
    """Yield every loss with every bug that it can have and the last settings that show it, except the exemplars."""
    shown = exemplars()
    for loss in METHODS:
        for bug in BUGS:
            for settings in settings_showing(bug, loss)[-1:]:
                if (bug, loss, settings) not in shown:
                    yield MutantSpec(bug, loss, settings)


def measure(spec: MutantSpec) -> Measurement:
    """Run every law on a mutant, on the small batches alone."""
    report = check(mutant(spec.bug, spec.loss, **spec.settings), examples=0)
    return Measurement(spec.loss, spec.bug, report.bug, tuple(verdict.law for verdict in report.failures))


def measure_all(population: Iterable[MutantSpec], label: str) -> list[Measurement]:
    """Measure a population with one process for each processor."""
    listed, found = list(population), []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for one in pool.map(measure, listed, chunksize=4):
            found.append(one)
            print(f"\r\x1b[K{label} {len(found)}/{len(listed)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def measure_populations() -> Record:
    """Measure both populations."""
    measured = measure_all((MutantSpec(*one) for one in exemplars()), "exemplars")
    others = measure_all(held_out(), "held out")
    by_loss = {loss: [k for k in others if k.loss == loss] for loss in METHODS}
    return Record(
        measured,
        [count_outcomes(loss, own) for loss, own in by_loss.items()],
        [k for k in others if not k.named_right()],
    )


def count_outcomes(title: str, own: Sequence[Measurement]) -> Counts:
    """Count the outcomes of the mutants of a loss or a kind."""
    return Counts(
        title,
        len(own),
        *(sum(map(test, own)) for test in (Measurement.killed, Measurement.without_claim, Measurement.named_right)),
    )


# The page


def render_page(record: Record) -> str:
    """Return the text of ``docs/laws.md``."""
    # In the order of the matrix, in which read_page finds them.
    measured = sorted(record.exemplars, key=lambda k: MUTANT_KINDS.index(mutant_kind(k)))
    parts = (
        INTRODUCTION,
        summary_table(measured),
        held_out_text(record),
        LAWS_HEAD,
        *law_tables(measured),
        diagnosis_orders(),
        BUGS_HEAD,
        bug_table(measured),
        MATRIX_HEAD,
        *(f"### {kind}\n\n{matrix_rows(measured, kind)}" for kind in MUTANT_KINDS),
    )
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """\
# Laws, bugs and mutants

Written by `python -m tools.laws write`; do not edit. `docs/testing.md` explains how to use the laws, why each holds,
and what to do about a broken one.

A law is a property of every correct loss of its kind. A mutant is a loss that is correct except for one planted bug
(`lossfns.testing.mutants`). Each law runs on each mutant of its kind. A law that fails kills the mutant and names a
bug. The laws stand in the order of diagnosis, and `lossfns check` reports the bug that the first broken law names.
Every mutant also claims to be a certain loss, which your own loss need not do. The tables therefore also count the
mutants that are killed without the claim.

## The exemplars

There is one mutant for each bug and kind of loss, with a reference and without. The laws were developed on these
mutants, so these shares do not measure how well the laws name the bug of a new loss."""

HELD_OUT = """\
## Held out

These mutants were kept apart from the laws, so they measure how often `lossfns check` names the bug of a new loss.
They are every loss of this library with every bug of the catalogue that it can have, without the exemplars. The
settings are the last ones among the loss's golden vectors that show the bug. The laws were developed on bugs planted in
torch code. They have not changed since this population, whose bugs are planted in the oracle, was first measured. If a
law is changed because of one of these mutants, another held-out population must be published.

`python -m tools.laws write` measures the population."""

LAWS_HEAD = """\
## The laws

Kills: the number of exemplars that break the law. First: the number of exemplars for which it is the first broken law.
Bugs: those that it names then."""

BUGS_HEAD = """\
## The bugs

Exemplars: the number of exemplars with this bug. Named by: the laws that name the bug where they are the first broken
law."""

MATRIX_HEAD = """\
## Which law kills which exemplar

The first broken law is bold. "Named" is the bug that it names, ✓ if that is the planted bug. The other broken laws
follow in the order of diagnosis."""

SHARES = ("killed", "killed without a claim", "named right by the first broken law")


def summary_table(measured: Sequence[Measurement]) -> str:
    """Return the table of shares of the exemplars, by kind and in total."""
    parts = {kind: [k for k in measured if mutant_kind(k) == kind] for kind in MUTANT_KINDS} | {"all": measured}
    return table(
        ("kind", "mutants", *SHARES), (count_cells(count_outcomes(kind, part)) for kind, part in parts.items())
    )


def count_cells(counts: Counts) -> tuple[Any, ...]:
    """Return a row of the table of shares."""
    title, count, *parts = counts
    return title, count, *(f"{part} ({part / count:.1%})" if count else "–" for part in parts)


def totals(counts: Sequence[Counts]) -> Counts:
    """Add up counts."""
    return Counts("all", *(sum(column) for column in list(zip(*counts))[1:]))


def held_out_text(record: Record) -> str:
    """Return the section on the held-out mutants."""
    whole = totals(record.held_out)
    share = f"**{whole.named_right} of {whole.mutants} are named right ({whole.named_right / whole.mutants:.1%})**"
    head = f"{share}; {whole.killed} are killed."
    listed = table(("loss", *("mutants", *SHARES)), (count_cells(own) for own in (*record.held_out, whole)))
    others = ((f"`{k.mutant}`", k.bug, k.named or "–", k.first or "–") for k in record.misnamed)
    return "\n\n".join([HELD_OUT, head, listed, "Not named right:",
        table(("held-out mutant", "planted bug", "named", "by"), others)])  # fmt: skip


def mutant_kind(measurement: Measurement) -> str:
    """Return the kind of an exemplar."""
    return str(vars(MUTANTS[measurement.mutant])["kind"])


def law_tables(measured: Sequence[Measurement]) -> Iterable[str]:
    """Yield a table for each module of laws, then one for the claims."""
    broken = Counter(law for k in measured for law in k.laws)

    def row(name: str, words: str) -> tuple[Any, ...]:
        first = Counter(k.named for k in measured if k.first == name)
        named = ", ".join(f"{bug}{f' ×{n}' * (n > 1)}" for bug, n in first.items())
        return f"`{name}`", words, kinds_with(name), broken[name], first.total(), named or "–"

    modules = dict.fromkeys(law.__module__.rpartition(".")[2] for law in LAWS.values())
    head = ("law", "what holds", "kinds", "kills", "first", "bugs")
    for module in modules:
        own = {name: law for name, law in LAWS.items() if law.__module__.endswith(f".{module}")}
        yield f"### {module}\n\n" + table(head, (row(name, statement(law)) for name, law in own.items()))
    yield "### claims\n\n" + table(head, (row(name, words) for name, words in CLAIMS.items()))


def kinds_with(law: str) -> str:
    """Return the kinds that have a law, as text."""
    if law in CLAIMS:
        return "with a claim"
    kinds = [kind for kind, laws in KINDS.items() if law in laws]
    return "every" if len(kinds) == len(LAWS_BY_KIND) else ", ".join(kinds)


def diagnosis_orders() -> str:
    """Return the order of diagnosis of each kind."""
    listed = [f"- {kind}: {', '.join(laws)}" for kind, laws in KINDS.items()]
    return "### The order of diagnosis\n\nThe claims come last, `vectors` before `agreement`.\n\n" + "\n".join(listed)


def bug_table(measured: Sequence[Measurement]) -> str:
    """Return the table of bugs."""

    def row(bug: str) -> tuple[Any, ...]:
        own = [k for k in measured if k.bug == bug]
        naming = dict.fromkeys(k.first for k in own if k.named_right())
        return (
            f"`{bug}`",
            BUGS[bug].description,
            ", ".join(BUGS[bug].sources) or "–",
            len(own),
            ", ".join(naming) or "–",
        )

    return table(("bug", "in words", "seen in", "exemplars", "named by"), map(row, BUGS))


def matrix_rows(measured: Sequence[Measurement], kind: str) -> str:
    """Return the table of the exemplars of a kind, with the laws that kill each one."""
    return table(
        ("mutant", "planted bug", "named", "killed by"),
        (
            (f"`{k.mutant}`", k.bug, "✓" if k.named_right() else k.named or "–", killers(k.laws))
            for k in measured
            if mutant_kind(k) == kind
        ),
    )


def killers(laws: Sequence[str]) -> str:
    """Return the broken laws as text, the first one in bold."""
    return ", ".join(f"**{law}**" if i == 0 else law for i, law in enumerate(laws)) or "–"


def table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    cells = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells)


ROW = re.compile(r"^\| `(\w+)` \| ([\w-]+) \| (✓|–|[\w-]+) \| ([*\w, –]+) \|$", re.MULTILINE)
COUNTS = re.compile(r"^\| (\w+) \| (\d+)" + r" \| (\d+)(?: \([\d.]+%\))?" * 3 + r" \|$", re.MULTILINE)


def read_page(text: str) -> Record:
    """Return the measurements in the text of a page."""
    _, _, rest = text.partition(HELD_OUT.partition("\n")[0])
    held_text, _, rest = rest.partition(LAWS_HEAD.partition("\n")[0])
    _, _, matrix = rest.partition(MATRIX_HEAD.partition("\n")[0])
    by_loss = [Counts(loss, *map(int, numbers)) for loss, *numbers in COUNTS.findall(held_text) if loss != "all"]
    return Record(read_measurements(matrix), by_loss, read_measurements(held_text))


def read_measurements(text: str) -> list[Measurement]:
    """Return the measurements in tables of mutants."""
    return [
        Measurement(
            name.removesuffix("_" + bug.replace("-", "_")),
            bug,
            {"✓": bug, "–": ""}.get(named, named),
            tuple(re.findall(r"\w+", laws)),
        )
        for name, bug, named, laws in ROW.findall(text)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m tools.laws``. Return 1 if ``check`` finds that the page is out of date."""
    p = argparse.ArgumentParser(prog="python -m tools.laws", description="The laws on known-wrong losses.")
    p.add_argument(
        "action", choices=("write", "render", "check"), help="measure and write; write anew; measure and compare"
    )
    p.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    args = p.parse_args(argv)
    was = args.page.read_text(encoding="utf-8") if args.page.exists() else ""
    text = render_page(read_page(was) if args.action == "render" else measure_populations())
    if args.action == "check":
        for line in sorted(set(text.splitlines()) ^ set(was.splitlines())):
            print("+" if line in text else "-", line)
        return 0 if text == was else 1
    args.page.write_text(text, encoding="utf-8")
    print(f"wrote {args.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
