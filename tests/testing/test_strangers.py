"""``lossfns check`` on losses that strangers wrote, as docs/strangers.md says."""

import json
from pathlib import Path

import pytest

from lossfns.cli import main
from tools.strangers import PAGE, SETS, Measurement, read_page, render_page, strangers, summary

ROOT = Path(__file__).parents[2]
OPEN = ROOT / SETS["open"]
CORRECT = [stranger for stranger in strangers(OPEN) if stranger.correct]
FEW = CORRECT[::6]


def test_the_page_is_what_its_own_measurements_make() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    record = read_page(text)
    assert render_page(record) == text, "docs/strangers.md was edited: python -m tools.strangers render"
    for name, measured in record.items():
        listed = [(s.path, s.correct) for s in strangers(ROOT / SETS[name])]
        assert [(m.path, m.is_correct) for m in measured] == listed, (
            "docs/strangers.md: python -m tools.strangers write"
        )


def test_a_page_keeps_every_measurement() -> None:
    record = {
        "open": [
            Measurement("a/x_01.py", "padded", "correct", "policy", "fragile", "mask-after-exp", ("poison",), ""),
            Measurement("a/y.py", "nn.Module", "wrong kl-sign ref-inert", "x?", "unsure", "kl-sign", ("kl",), "wrong"),
            Measurement("a/z.py", "numpy inside", "wrong", "–", "refused", "", (), ""),
        ],
        "held_out": [Measurement("b/x.py", "padded", "correct", "any?", "ok", "", (), "ok")],
    }
    assert read_page(render_page(record)) == record


def test_the_numbers_are_those_of_the_verdicts() -> None:
    def measured(correct: str, verdict: str, named: str = "", with_kind: str = "") -> Measurement:
        return Measurement("x.py", "padded", correct, "policy", verdict, named, ("kl",) if named else (), with_kind)

    right, named, misnamed, unnamed, passed, called = (
        measured("correct", "wrong", "kl-sign", with_kind="ok"),
        measured("wrong kl-sign", "fragile", "kl-sign"),
        measured("wrong kl-sign", "wrong", "ref-inert"),
        measured("wrong", "wrong", "ref-inert"),
        measured("wrong kl-sign", "unsure", "kl-sign"),
        measured("correct", "wrong", "kl-sign"),
    )
    assert [m.missed() for m in (right, named, misnamed, unnamed, passed, called)] == [0, 0, 1, 0, 1, 1]
    table = summary([right, named, misnamed, unnamed, passed, called])
    assert "| of these, called wrong | 1 (50.0%) |" in table
    assert "| of these, called wrong or fragile | 3 (75.0%) |" in table
    assert "| of these, that bug is named first | 1 (33.3%) |" in table


@pytest.mark.parametrize(
    "stranger",
    [s if s in FEW else pytest.param(s, marks=pytest.mark.exhaustive) for s in CORRECT],
    ids=lambda s: s.path,
)
def test_no_correct_loss_by_a_stranger_is_called_wrong(capfd: pytest.CaptureFixture[str], stranger: object) -> None:
    """As a user checks it, and where its kind is guessed, with its kind."""
    subject = f"{OPEN / stranger.path}:{stranger.object}"  # type: ignore[attr-defined]
    for options in ((), ("--kind", stranger.kind)):  # type: ignore[attr-defined]
        main(["check", subject, "--json", "-", "--examples", "4", *options])
        report = json.loads(capfd.readouterr().out)
        wrong = [(v["law"], v["seen"], v["example"]) for v in report["verdicts"] if v["verdict"] == "wrong"]
        assert wrong == [] and not report["stopped"]
        if not report["guessed"]:
            return
