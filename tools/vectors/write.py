"""Write the vector files from the cases, with the oracle's answers, computed flags, and ids that never change."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import lossfns
from lossfns.testing import oracle
from lossfns.testing.bugs import BUGS
from lossfns.testing.planted import divisor
from lossfns.testing.vectors.flags import arguments, flags, to_answer
from lossfns.testing.vectors.vector import ESTIMATORS, FOLDER, LEDGER, METHODS, SCHEMA, SUITE, Answer, encode, vectors
from tools.vectors.answers import correct_answer, count_tokens, round_significant, tolerance
from tools.vectors.cases import Case, cases
from tools.vectors.cases.family import family_losses

Test = dict[str, Any]
Ledger = dict[str, str]
"""id → fingerprint, for every id that was ever assigned."""


WITHDRAWN_NOTE = (
    "The withdrawn vectors have weights other than 0 and 1. They took the plain mean (gspo, gspo_token) or the plain "
    "sum (tis_level sequence) over a sequence. The rule is now the weighted one, and the same inputs have new ids."
)


class Group(NamedTuple):
    """Tests that share their settings."""

    config: Mapping[str, Any]
    tests: list[Test]


def answer_case(case: Case) -> Test:
    """Return a case with its answer in the form of the file, without its id and its flags."""
    test: Test = {"kind": case.kind, "comment": case.comment, "flags": [], "data": case.data}
    if case.denominator is not None:
        test["denominator"] = case.denominator
    if case.error is not None:
        code, name, datum = case.error
        return test | {"error": {"code": code, "field": name} | ({} if datum is None else {"datum": datum})}
    answer: Answer = round_significant(correct_answer(case.loss, case.config, case.data, case.denominator))
    if "advantages" in answer:
        return {**test, **answer, "tol": tolerance(answer, {})[0]}
    a = arguments(case.config, case.data, case.denominator)
    tol, reason = tolerance(answer, a)
    return test | {
        **answer,
        **({"grad_alternatives": [gradient_beyond_kink(case, a)]} if case.beyond_kink else {}),
        "metrics": {"tokens": count_tokens(a), "denominator": round_significant(float(divisor(a)))},
        "tol": tol,
        **({"tol_reason": reason} if reason else {}),
    }


def gradient_beyond_kink(case: Case, a: dict[str, Any]) -> Any:
    """Return the gradient just beyond a kink."""
    return round_significant(to_answer(getattr(oracle, case.loss)(**{**a, **case.beyond_kink}), case.data)["grad"], 9)


def fingerprint(loss: str, config: Mapping[str, Any], test: Test) -> str:
    """Return a hash of the inputs and of the answer to six digits. An id belongs to one fingerprint."""
    inputs = [test.get(name) for name in ("data", "denominator", "error")]
    answers = [test.get(name) for name in ("loss", "grad", "advantages")]
    text = json.dumps(encode([loss, config, inputs, round_significant(answers, 6)]), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def identify(loss: str, fingerprints: Iterable[str], ledger: Ledger) -> dict[str, str]:
    """Return fingerprint → id. Give a new fingerprint the next id of the loss, and add the id to the ledger."""
    id_of = {fingerprint_: name for name, fingerprint_ in ledger.items() if name.rpartition("-")[0] == loss}
    for fingerprint_ in fingerprints:
        if fingerprint_ not in id_of:
            id_of[fingerprint_] = f"{loss}-{len(id_of) + 1:04d}"
            ledger[id_of[fingerprint_]] = fingerprint_
    return id_of


def file_texts(ledger: Ledger) -> dict[str, str]:
    """Return file name → text for every method and for the ledger. Add new ids to the ledger."""
    groups_of: dict[str, dict[str, Group]] = {}
    for case in cases():
        groups = groups_of.setdefault(case.loss, {})
        groups.setdefault(json.dumps(case.config), Group(case.config, [])).tests.append(answer_case(case))
    texts = {f"{loss}.json": file_text(loss, list(groups.values()), ledger) for loss, groups in groups_of.items()}
    current = {name for text in texts.values() for name in ids(json.loads(text))}
    withdrawn = [name for name in ledger if name not in current]
    ledger_file = {"suite": SUITE, "note": WITHDRAWN_NOTE, "ids": ledger, "withdrawn": withdrawn}
    return texts | {LEDGER: json.dumps(ledger_file, indent=1) + "\n"}


def ids(parsed: Mapping[str, Any]) -> list[str]:
    """Return the ids of the tests in the contents of a file."""
    return [test["id"] for group in parsed["groups"] for test in group["tests"]]


def file_text(loss: str, groups: list[Group], ledger: Ledger) -> str:
    """Return the text of one method's file."""
    fingerprints = [fingerprint(loss, group.config, test) for group in groups for test in group.tests]
    id_of = identify(loss, fingerprints, ledger)
    test_ids = iter([id_of[x] for x in fingerprints])
    with_ids = [Group(group.config, [{"id": next(test_ids), **test} for test in group.tests]) for group in groups]
    loaded = vectors({"loss": loss, "groups": [encode(group._asdict()) for group in with_ids]})
    flagged = [
        Group(group.config, [test | {"flags": flags(next(loaded))} for test in group.tests]) for group in with_ids
    ]
    flagged_bugs = {flag for group in flagged for test in group.tests for flag in test["flags"]}
    head = {
        "schema": SCHEMA,
        "suite": SUITE,
        "loss": loss,
        "generator": "python -m tools.vectors write",
        "notes": {
            bug: {"words": BUGS[bug].description, "seen": list(BUGS[bug].sources)}
            for bug in BUGS
            if bug in flagged_bugs
        },
    }
    return format_file(head, flagged)


def format_file(head: Mapping[str, Any], groups: list[Group]) -> str:
    """Format a file as JSON. The settings of a group, the head of a test, each datum and each answer take one line."""
    top = "".join(f' "{name}": {to_json(value)},\n' for name, value in head.items() if name != "notes")
    notes = format_list("notes", "{}", [f'"{bug}": {to_json(note)}' for bug, note in head["notes"].items()], 2)
    body = format_list("groups", "[]", [group_text(group) for group in groups], 2)
    return f"{{\n{top} {notes},\n {body}\n}}\n"


def group_text(group: Group) -> str:
    tests = format_list("tests", "[]", [test_text(test) for test in group.tests], 4)
    return f'{{"config": {to_json(group.config)},\n   {tests}}}'


def test_text(test: Test) -> str:
    first = ", ".join(f'"{name}": {to_json(test[name])}' for name in ("id", "kind", "comment", "flags"))
    data = format_list("data", "[]", [to_json(row) for row in test["data"]], 6)
    others = [name for name in test if name not in ("id", "kind", "comment", "flags", "data")]
    return ",\n     ".join([f"{{{first}", data, *(f'"{name}": {to_json(test[name])}' for name in others)]) + "}"


def format_list(name: str, brackets: str, items: list[str], indent: int) -> str:
    """Format a named list or object with one item on each line."""
    margin = "\n" + " " * indent
    inside = margin + f",{margin}".join(items) if items else ""
    return f'"{name}": {brackets[0]}{inside}{brackets[1]}'


def to_json(x: Any) -> str:
    return json.dumps(encode(x), ensure_ascii=False, allow_nan=False)


def read_ledger(folder: Path) -> Ledger:
    """Read the ids and fingerprints in a folder. A folder without a ledger has none."""
    path = folder / LEDGER
    ledger: Ledger = json.loads(path.read_text(encoding="utf-8"))["ids"] if path.exists() else {}
    return ledger


DEFINITIONS = Path("docs/vectors.md")
BEGIN, END = "by `python -m tools.vectors write`. -->\n", "<!-- end -->"


def with_definitions(page: str) -> str:
    """Return the page on vectors with the equation of each loss of ``tools.vectors.cases.family`` and estimator."""
    before, _, rest = page.partition(BEGIN)
    losses = table_of("loss", "l of a row", family_losses())
    estimators = table_of("estimator", "advantage of a sample", ESTIMATORS)
    return f"{before}{BEGIN}\n{losses}\n\n{estimators}\n\n{END}{rest.partition(END)[2]}"


def table_of(kind: str, what: str, names: Iterable[str]) -> str:
    """Return a table in Markdown with the equation of each loss or estimator."""
    rows = [f"| `{name}` | {equation_of(name)} |" for name in names]
    return "\n".join([f"| {kind} | {what} |", "|---|---|", *rows])


def equation_of(name: str) -> str:
    """Return the first paragraph of the docstring of a preset or an estimator in one line."""
    paragraph = (inspect.getdoc(getattr(lossfns, name)) or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).replace("|", "\\|")


def write(folder: Path = FOLDER) -> list[Path]:
    """Write every file, and return the paths of those that changed. In the repository, write the definitions, too."""
    if folder == FOLDER and DEFINITIONS.exists():
        page = DEFINITIONS.read_text(encoding="utf-8")
        DEFINITIONS.write_text(with_definitions(page), encoding="utf-8")
    changed = changed_files(folder)
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    return list(changed)


def schema_violations(folder: Path = FOLDER) -> list[str]:
    """Return one line for each violation of the schema. A missing file violates it."""
    jsonschema = import_module("jsonschema")  # of the extra `testing`
    validator = jsonschema.Draft202012Validator(json.loads((folder / "schema.json").read_text(encoding="utf-8")))
    found = []
    for name in (f"{loss}.json" for loss in METHODS):
        parsed = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else None
        found += [f"{name}, {error.json_path}: {error.message[:200]}" for error in validator.iter_errors(parsed)]
    return found


def changed_files(folder: Path = FOLDER) -> dict[Path, str]:
    """Return path → new text for every file that ``write`` would change."""
    texts = {folder / name: text for name, text in file_texts(read_ledger(folder)).items()}
    return {p: text for p, text in texts.items() if not p.exists() or p.read_text(encoding="utf-8") != text}
