"""The client and the published SDK: every difference has a reason, every reason a difference."""

from pathlib import Path
from typing import Any

import pytest
import signatures
from batches import sdks
from signatures import (
    OURS,
    differences,
    member_differences,
    published,
    read_record,
    reason,
    render,
    surface,
    unexplained,
    unused_reasons,
)

PAGE = Path(__file__).parents[3] / "docs" / "signatures.md"
TEXT = PAGE.read_text(encoding="utf-8")
STALE = "docs/signatures.md is out of date: python -m tools.signatures"


def found() -> dict[str, str]:
    return differences(read_record(TEXT)[0], {name: surface(of) for name, of in OURS.items()})


def test_every_difference_has_a_reason_and_every_reason_a_difference() -> None:
    """From the page's record of the SDK, which need not be installed."""
    print()
    for place, how in found().items():
        print(f"{place}: {how}. {reason(place)}")
    assert unexplained(found()) == []
    assert unused_reasons(found()) == []


def test_the_page_is_what_its_own_record_makes() -> None:
    assert render(*read_record(TEXT)) == TEXT, f"{STALE} render"


def test_the_record_is_of_the_published_sdk() -> None:
    """If ``tinker`` is not installed, the test checks only that the record is complete."""
    theirs, version = read_record(TEXT)
    assert version and all(theirs[name] for name in OURS)
    for sdk in sdks()[1:]:
        assert published() == theirs, f"{STALE} write"
        assert sdk.__version__ == version, f"{STALE} write"


def test_a_reason_that_is_taken_away_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(signatures.WHY, "TrainingClient.forward(output)")
    monkeypatch.setitem(signatures.WHY, "TrainingClient.forward(data)", "None at all.")
    missed = ["TrainingClient.forward(output): added", "TrainingClient.forward_async(output): added"]
    assert unexplained(found()) == missed
    assert unused_reasons(found()) == ["TrainingClient.forward(data)"]


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        ("(a, b=1)", "(a, b=1)", {}),
        ("(a)", "(a, b=1)", {"(b)": "added"}),
        ("(a)", "(a, b)", {"(b)": "added, and required"}),
        ("(a, b=1)", "(a)", {"(b)": "missing"}),
        ("(a, b=1)", "(a, b=2)", {"(b)": "`2` by default, `1` by default there"}),
        ("(a, b)", "(a, b=None)", {"(b)": "`None` by default, required there"}),
        ("(a, b)", "(a, *, b)", {"(b)": "keyword-only"}),
        ("(a, *, b)", "(a, b)", {}),
        ("(a, b)", "(b, a)", {"(a)": "at position 1 instead of 0", "(b)": "at position 0 instead of 1"}),
        ("(a, **rest)", "(a)", {"(**rest)": "missing"}),
        ("async (a)", "(a)", {"": "`async` there, `a method` here"}),
        ("= 1", "= 1.0", {}),
        ("= 1", "= 2", {"": "`= 1` there, `= 2` here"}),
        ("property", "= None", {}),
    ],
)
def test_what_differs_is_seen(theirs: str, ours: str, expected: dict[str, str]) -> None:
    assert dict(member_differences(theirs, ours)) == expected


def test_members_that_only_one_has_are_seen() -> None:
    surfaces: list[dict[str, Any]] = [{"APIFuture": {"x": "()", "y": "()"}}, {"APIFuture": {"y": "()", "z": "()"}}]
    assert differences(*surfaces) == {"APIFuture.x": "missing", "APIFuture.z": "added"}
