"""Reports on a terminal: the words of the plain text, coloured and wrapped to 80 columns."""

import io
import re
import sys
from collections.abc import Callable

import pytest

from lossfns.cli import main
from lossfns.terminal import console_on, print_wrapped, status, width_of, wrap
from lossfns.testing import command as check_command
from lossfns.testing.report import Report, Verdict
from lossfns.testing.vectors import command as vectors_command
from lossfns.testing.vectors.runner import Result, VectorReport
from lossfns.testing.vectors.vector import load

REPORT = Report(
    "mine[0]:my_loss",
    "policy",
    verdicts=[
        Verdict("contract", "A call returns a 0-d tensor that requires grad, and a dict of plain floats.", "pass", 0.1),
        Verdict(
            law="poison",
            says="nan, ±inf or 1e30 in a masked slot changes nothing, bit for bit.",
            verdict="wrong",
            seconds=0.2,
            bug="mask-after-exp",
            seen="nan in the masked slots of logprobs: the loss is nan, not -0.625.",
            example="Batch(\n    logprobs=[[-1.0], [-1.5]],\n    weights=[[1.0], [1.0]],\n)",
        ),
        Verdict("kl", "The KL term pulls to the reference.", "n/a", 0.1, seen="it reads no reference"),
    ],
    learns=["two arms: it ends at the better one", "a bandit: it ends at the mean of the rewards"],
)
RIGHT, WRONG = load("dpo")[:2]
RESULTS = [Result(RIGHT, "pass", ""), Result(WRONG, "fail", "loss is 1, not 2")]
VECTORS = VectorReport("./mine", "float64", RESULTS, "it wrote a line that is no reply to any open request: '[b]'")
PRINTED: list[tuple[Callable[..., None], Report | VectorReport]] = [
    (check_command.draw, REPORT),
    (check_command.draw, Report("mine", "any", verdicts=REPORT.verdicts[:1], stopped="time was up after 1 s")),
    (vectors_command.draw, VECTORS),
]
COLOUR = re.compile(r"\x1b\[(\d+;)*(3|4|9|10)\d[;m]")


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize(("draw", "report"), PRINTED, ids=["check", "check that was stopped", "vectors"])
def test_a_report_on_a_terminal_has_the_words_of_the_plain_one(
    draw: Callable[..., None], report: Report | VectorReport, terminal: io.StringIO
) -> None:
    draw(report, console_on(terminal))
    text = terminal.getvalue()
    shown = without_escapes(text)
    assert COLOUR.search(text) and not COLOUR.search(report.table())
    assert re.sub(r"[\s─]+", "", shown) == re.sub(r"\s+", "", report.table())
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_a_quiet_report_on_a_terminal_has_the_words_of_the_plain_one(terminal: io.StringIO) -> None:
    check_command.draw_quietly(REPORT, console_on(terminal))  # type: ignore[arg-type]
    shown = without_escapes(terminal.getvalue())
    assert re.sub(r"\s+", "", shown) == re.sub(r"\s+", "", REPORT.quiet()) and "contract" not in shown


def test_a_batch_is_shown_as_python_that_can_be_copied(terminal: io.StringIO) -> None:
    check_command.draw(REPORT, console_on(terminal))  # type: ignore[arg-type]
    lines = [line.strip() for line in without_escapes(terminal.getvalue()).splitlines()]
    first = lines.index("batch    Batch(")
    assert eval("\n".join(lines[first:][:4]).removeprefix("batch"), {"Batch": dict})


@pytest.mark.parametrize(("draw", "report"), PRINTED, ids=["check", "check that was stopped", "vectors"])
def test_no_color_is_respected(
    draw: Callable[..., None],
    report: Report | VectorReport,
    terminal: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    draw(report, console_on(terminal))
    assert terminal.getvalue() and not COLOUR.search(terminal.getvalue())


def test_pipes_dumb_terminals_and_installations_without_rich_get_no_console(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert console_on(terminal) is not None
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert console_on(io.StringIO()) is None
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert console_on(terminal) is None
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert console_on(terminal) is None


def test_a_status_line_goes_away(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    with status() as show:
        show("checking [poison]")
        print("a loss prints")
    text = terminal.getvalue()
    assert "checking [poison]" in text and "a loss prints" in text
    assert text.rstrip().endswith("\x1b[2K")  # the last line is erased
    monkeypatch.setattr(sys, "stderr", expected_warnings_ignored := io.StringIO())
    with status() as show:
        show("checking poison")
    assert expected_warnings_ignored.getvalue() == ""


def test_a_wrapped_line_continues_deeper(terminal: io.StringIO) -> None:
    console = console_on(terminal)
    assert console is not None
    print_wrapped(console, ["short", "", "    " + "word " * 20, "  [b] stays"])
    lines = [line.rstrip() for line in terminal.getvalue().splitlines()]
    assert [len(line) - len(line.lstrip()) for line in lines] == [0, 0, 4, 6, 2]
    assert lines[-1] == "  [b] stays"


def test_words_stay_whole_and_lines_of_other_streams_as_they_are(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path is longer than the line: what is copied from the terminal must be a path."""
    path = f"/{'long/' * 20}"
    assert wrap(f"report {path}", width_of(terminal)).splitlines() == ["report", f"  {path}"]
    assert width_of(terminal) == 80
    for stream in (None, io.StringIO()):
        assert wrap("word " * 40, width_of(stream)) == "word " * 40


def test_list_and_describe_fit_a_terminal_without_rich(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["list"]) == main(["describe", "with_kl"]) == main(["explain", "poison"]) == 0
    lines = terminal.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "  ``score_function`` of ``lossfns.rollout``. ``None``: 1." in "\n".join(lines)  # flows on, and breaks here
