"""Print a cosmic-ray session as Markdown tables: mutants by module and by operator, and every survivor.

python -m lossfns_mutation.report session.sqlite
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome


def operator_family(operator: str) -> str:
    """``core/ReplaceBinaryOperator_Add_Sub`` -> ``ReplaceBinaryOperator``."""
    return operator.removeprefix("core/").partition("_")[0] if operator.startswith("core/") else operator


def change(diff: str) -> tuple[str, str]:
    """Return the lines that a diff removes and the lines that it adds."""
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    return tuple(" ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")


def table(title: str, outcomes: Counter[tuple[str, bool]]) -> Iterator[str]:
    yield f"\n| {title} | mutants | killed | survived | score |\n|---|---:|---:|---:|---:|"
    names = sorted({name for name, _ in outcomes})
    for name in [*names, "all"]:
        killed, survived = (
            sum(n for (other, is_killed), n in outcomes.items() if is_killed == wanted and name in ("all", other))
            for wanted in (True, False)
        )
        yield f"| {name} | {killed + survived} | {killed} | {survived} | {killed / (killed + survived):.1%} |"


def report(db: Any) -> Iterator[str]:
    results = [
        (item.mutations[0], result)
        for item, result in items_with_results(db)
        if result.worker_outcome == WorkerOutcome.NORMAL
    ]
    outcomes = [(mutation, result.test_outcome == TestOutcome.KILLED) for mutation, result in results]
    yield from table("module", Counter((str(m.module_path), is_killed) for m, is_killed in outcomes))
    yield from table("operator", Counter((operator_family(m.operator_name), is_killed) for m, is_killed in outcomes))
    yield "\n| place | operator | expression | survives as |\n|---|---|---|---|"
    survivors = [(m, r) for m, r in results if r.test_outcome == TestOutcome.SURVIVED]
    for m, result in sorted(survivors, key=lambda pair: (str(pair[0].module_path), pair[0].start_pos)):
        before, after = (text.replace("|", "\\|") for text in change(result.diff))
        yield f"| {m.module_path}:{m.start_pos[0]} | {operator_family(m.operator_name)} | `{before}` | `{after}` |"
    without_verdict = [
        m for m, r in items_with_results(db) if r.worker_outcome not in (WorkerOutcome.NORMAL, WorkerOutcome.SKIPPED)
    ]
    without_verdict += [m for m, r in results if r.test_outcome == TestOutcome.INCOMPETENT]
    if without_verdict:
        yield f"\n{len(without_verdict)} mutants without a verdict: {without_verdict}"


def items_with_results(db: Any) -> list[tuple[Any, Any]]:
    items = {item.job_id: item for item in db.work_items}
    return [(items[job], result) for job, result in db.results]


if __name__ == "__main__":
    with use_db(sys.argv[1], WorkDB.Mode.open) as session:
        print("\n".join(report(session)))
