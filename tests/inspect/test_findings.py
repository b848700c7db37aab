"""docs/findings.md: each command finds exactly what its table says."""

import ast
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from lossfns.cli import parser
from lossfns.loading import load
from lossfns.testing.batch import Batch
from lossfns.testing.check import check

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")


def sections() -> Iterator[tuple[str, str, set[tuple[str, str, str]]]]:
    """Return, for each section, the package and version of its chapter, the command, and the broken laws.

    A broken law has its name, whether it makes the loss wrong or fragile, and the bug.
    """
    for chapter in re.split(r"^## ", PAGE, flags=re.M)[1:]:
        title, _, text = chapter.partition("\n")
        for section in re.split(r"^### ", text, flags=re.M)[1:]:
            (command,) = re.findall(r"^lossfns (check .+)$", section, re.M)
            yield title, command, set(re.findall(r"^\| `(\w+)` \| (\w+) \| `([\w-]+)` \|", section, re.M))


def installed(title: str) -> bool:
    """Whether a chapter is about no package, or about one that is installed in this version."""
    package, _, wanted = title.partition(" ")
    try:
        return not wanted or version(package) == wanted
    except PackageNotFoundError:
        return False


def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {f"{file}:{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef)}


HERE = [
    pytest.param(parser().parse_args(command.split()), broken, id=command.removeprefix("check examples/"))
    for title, command, broken in sections()
    if installed(title)
]


@pytest.mark.parametrize(("args", "broken"), HERE)
def test_the_kit_finds_what_the_page_says(args: Any, broken: set[tuple[str, str, str]]) -> None:
    report = check(load(f"{ROOT}/{args.subject}"), kind=args.kind, factory=args.factory)
    assert {(v.law, v.verdict, v.bug) for v in report.broken} == broken
    assert report.ok == all(verdict != "wrong" for _, verdict, _ in broken)


def test_the_page_names_every_loss_of_the_examples() -> None:
    """Except for the helpers that the adapters share."""
    named = {command.split()[1] for _, command, _ in sections()}
    files = [f"examples/{path.name}" for path in (ROOT / "examples").glob("*_losses.py")]
    there = {name for file in files for name in functions(file)}
    assert there - named == {
        "examples/cookbook_losses.py:inner",
        "examples/library_losses.py:hatchery",
        "examples/library_losses.py:verl",
    }
    assert named <= there


def test_the_focal_loss_is_that_of_the_document() -> None:
    """``docs/loop.md`` computes 0.593 on logprobs −1, −2 and −1, −0.5."""
    focal = load(f"{ROOT}/examples/reweighted_losses.py:focal")()
    batch = Batch([[-1.0, -2.0], [-1.0, -0.5]], [[1.0, 1.0], [1.0, 1.0]])
    value, _ = focal(batch.data(), batch.tensors())
    assert round(value.item(), 4) == 0.593
    assert "round(focal(data, logprobs)[0].item(), 4)\n0.593\n" in (ROOT / "docs/loop.md").read_text(encoding="utf-8")


def test_the_summary_of_the_page_follows_from_its_tables() -> None:
    """A loss has an entry under wrong, or under fragile, if and only if a law says so."""
    rows = re.findall(r"^\| ([^|`]+) \| ([^|]*)\| ([^|]*)\|$", PAGE.partition("\n## ")[0], re.M)[1:]
    said = [(bool(wrong.strip()), bool(fragile.strip())) for name, wrong, fragile in rows for _ in name.split(",")]
    found = [{verdict for _, verdict, _ in broken} for _, _, broken in sections()]
    assert said == [("wrong" in verdicts, "fragile" in verdicts) for verdicts in found]


def test_the_documented_losses_are_always_tried() -> None:
    assert functions("examples/documented_losses.py") <= {case.values[0].subject for case in HERE}
