"""Measure the laws on known-wrong losses: which laws each one breaks, and which bug the first broken law names.

    python -m tools.laws write      # measure every mutant (tens of minutes) and write docs/laws.md
    python -m tools.laws render     # write docs/laws.md again from its own measurements, after a change of wording
    python -m tools.laws check      # measure every mutant; exit with 1 if docs/laws.md says something else

The page itself stores the measurements: ``read_page`` reads them from it, and ``render_page`` makes the page from them.
There are two populations. The page lists each exemplar. The held-out mutants are all other combinations of a loss and a
bug, with other settings. No law may be tuned on the held-out mutants.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from lossfns.testing.bugs import BUGS
from lossfns.testing.check import check, statement
from lossfns.testing.claims import CLAIMS
from lossfns.testing.explain import LAWS
from lossfns.testing.laws import ADVANTAGES, LAWS_BY_KIND
from lossfns.testing.mutants import CLOSED_FORMS, MUTANTS, exemplars, mutant, settings_showing

PAGE = Path("docs/laws.md")

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
    """Numbers of mutants of a loss or a kind: all, killed, killed without the claim, and named right."""

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
    """Yield each loss with each bug that it can have, except the exemplars.

    The settings are the last among the loss's golden vectors that show the bug.
    """
    listed = exemplars()
    for loss in CLOSED_FORMS:
        for bug in BUGS:
            for settings in settings_showing(bug, loss)[-1:]:
                if (bug, loss, settings) not in listed:
                    yield MutantSpec(bug, loss, settings)


def measure(spec: MutantSpec) -> Measurement:
    """Run every law on a mutant, on the small batches alone."""
    report = check(mutant(spec.bug, spec.loss, **spec.settings), examples=0)
    return Measurement(spec.loss, spec.bug, report.bug, tuple(verdict.law for verdict in report.broken))


def measure_all(population: Iterable[MutantSpec], label: str) -> list[Measurement]:
    """Measure a population with one process for each processor."""
    specs, measured = list(population), []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for measurement in pool.map(measure, specs, chunksize=4):
            measured.append(measurement)
            print(f"\r\x1b[K{label} {len(measured)}/{len(specs)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return measured


def measure_populations() -> Record:
    """Measure both populations."""
    measured = measure_all((MutantSpec(*spec) for spec in exemplars()), "exemplars")
    others = measure_all(held_out(), "held out")
    by_loss = {loss: [m for m in others if m.loss == loss] for loss in CLOSED_FORMS}
    counts = [count_outcomes(loss, part) for loss, part in by_loss.items()]
    return Record(measured, counts, [m for m in others if not m.named_right()])


def count_outcomes(title: str, measured: Sequence[Measurement]) -> Counts:
    """Count the outcomes of the mutants of a loss or a kind."""
    outcomes = (Measurement.killed, Measurement.without_claim, Measurement.named_right)
    return Counts(title, len(measured), *(sum(map(outcome, measured)) for outcome in outcomes))


# The page


def render_page(record: Record) -> str:
    """Return the text of ``docs/laws.md``."""
    # Sorted by kind, as read_page returns them, so that `write` and `render` write the same page.
    measured = sorted(record.exemplars, key=lambda m: MUTANT_KINDS.index(mutant_kind(m)))
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
(`lossfns.testing.mutants`). Each law runs on each mutant of its kind. A law that is broken kills the mutant and names a
bug. The laws run in the order of diagnosis, and `lossfns check` reports the bug that the first broken law names. Every
mutant also claims to be a certain loss, which your own loss need not do. The tables therefore also count the mutants
that are killed without the laws of the claim.

## The exemplars

For each bug and kind of loss there is one mutant with a reference and one without. The laws were developed on these
mutants, so these shares do not measure how well the laws name the bug of a new loss."""

HELD_OUT = """\
## Held out

These mutants were kept apart from the laws, so they measure how often `lossfns check` names the bug of a new loss.
They are the losses in this table, each with every bug of the catalogue that it can have, without the exemplars. The
settings of a mutant are the last ones among the golden vectors of its loss that show the bug. The laws were first
developed on bugs planted in torch code. Since then they were changed for the losses of [strangers.md](strangers.md) and
for more kinds of losses. If a law is changed because of one of these mutants, another held-out population must be
published.

`python -m tools.laws write` measures the population."""

LAWS_HEAD = """\
## The laws

Kills: the number of exemplars that break the law. First: the number of exemplars for which it is the first broken law.
Bugs: the bugs that it names for these exemplars."""

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
    parts = {kind: [m for m in measured if mutant_kind(m) == kind] for kind in MUTANT_KINDS} | {"all": measured}
    counts = [count_outcomes(kind, part) for kind, part in parts.items()]
    return table(("kind", "mutants", *SHARES), map(count_cells, counts))


def count_cells(counts: Counts) -> tuple[Any, ...]:
    """Return a row of the table of shares."""
    title, count, *parts = counts
    return title, count, *(f"{part} ({part / count:.1%})" if count else "–" for part in parts)


def totals(counts: Sequence[Counts]) -> Counts:
    """Add up counts."""
    return Counts("all", *(sum(column) for column in list(zip(*counts))[1:]))


def held_out_text(record: Record) -> str:
    """Return the section on the held-out mutants."""
    total = totals(record.held_out)
    share = f"**{total.named_right} of {total.mutants} are named right ({total.named_right / total.mutants:.1%})**"
    head = f"{share}; {total.killed} are killed."
    by_loss = table(("loss", "mutants", *SHARES), map(count_cells, (*record.held_out, total)))
    rows = ((f"`{m.mutant}`", m.bug, m.named or "–", m.first or "–") for m in record.misnamed)
    misnamed = table(("held-out mutant", "planted bug", "named", "by"), rows)
    return "\n\n".join([HELD_OUT, head, by_loss, "Not named right:", misnamed])


def mutant_kind(measurement: Measurement) -> str:
    """Return the kind of an exemplar."""
    return str(vars(MUTANTS[measurement.mutant])["kind"])


def law_tables(measured: Sequence[Measurement]) -> Iterable[str]:
    """Yield a table for each module of laws, then one for the claims."""
    broken = Counter(law for m in measured for law in m.laws)

    def row(name: str, words: str) -> tuple[Any, ...]:
        first = Counter(m.named for m in measured if m.first == name)
        named = ", ".join(f"{bug} ×{n}" if n > 1 else bug for bug, n in first.items())
        return f"`{name}`", words, kinds_with(name), broken[name], first.total(), named or "–"

    modules = dict.fromkeys(law.__module__.rpartition(".")[2] for law in LAWS.values())
    head = ("law", "what holds", "kinds", "kills", "first", "bugs")
    for module in modules:
        laws = {name: law for name, law in LAWS.items() if law.__module__.endswith(f".{module}")}
        yield f"### {module}\n\n" + table(head, (row(name, statement(law)) for name, law in laws.items()))
    yield "### claims\n\n" + table(head, (row(name, claim.says) for name, claim in CLAIMS.items()))


def kinds_with(law: str) -> str:
    """Return the kinds that have a law, as text."""
    if law in CLAIMS:
        return "with a claim"
    kinds = [kind for kind, laws in KINDS.items() if law in laws]
    return "every" if len(kinds) == len(LAWS_BY_KIND) else ", ".join(kinds)


def diagnosis_orders() -> str:
    """Return the order of diagnosis of each kind."""
    listed = [f"- {kind}: {', '.join(laws)}" for kind, laws in KINDS.items()]
    claims = ", ".join(f"`{name}`" for name in CLAIMS)
    return f"### The order of diagnosis\n\nThe laws of a claim come last: {claims}.\n\n" + "\n".join(listed)


def bug_table(measured: Sequence[Measurement]) -> str:
    """Return the table of bugs."""

    def row(bug: str) -> tuple[Any, ...]:
        with_bug = [m for m in measured if m.bug == bug]
        naming = dict.fromkeys(m.first for m in with_bug if m.named_right())
        sources, laws = (", ".join(names) or "–" for names in (BUGS[bug].sources, naming))
        return f"`{bug}`", BUGS[bug].description, sources, len(with_bug), laws

    return table(("bug", "in words", "seen in", "exemplars", "named by"), map(row, BUGS))


def matrix_rows(measured: Sequence[Measurement], kind: str) -> str:
    """Return the table of the exemplars of a kind, with the laws that kill each one."""
    rows = (
        (f"`{m.mutant}`", m.bug, "✓" if m.named_right() else m.named or "–", killers(m.laws))
        for m in measured
        if mutant_kind(m) == kind
    )
    return table(("mutant", "planted bug", "named", "killed by"), rows)


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
        "action",
        choices=("write", "render", "check"),
        help="write: measure every mutant and write the page; render: write the page from its own measurements; "
        "check: measure every mutant and compare with the page",
    )
    p.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    args = p.parse_args(argv)
    before = args.page.read_text(encoding="utf-8") if args.page.exists() else ""
    text = render_page(read_page(before) if args.action == "render" else measure_populations())
    if args.action == "check":
        for line in sorted(set(text.splitlines()) ^ set(before.splitlines())):
            print("+" if line in text else "-", line)
        return 0 if text == before else 1
    args.page.write_text(text, encoding="utf-8")
    print(f"wrote {args.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
