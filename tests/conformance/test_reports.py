"""The report of the suite in its forms, its formulas, and the page for implementers."""

import json
import math
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import servers as page_of_servers

from lossfns.cli import main
from lossfns.conformance.base import Check, Finding, Result, is_refusal, server_words, worst
from lossfns.conformance.bench import difference, how_different
from lossfns.conformance.bugs import ALL_BUGS, symptom
from lossfns.conformance.checks import CHECKS
from lossfns.conformance.checks.values import CASES
from lossfns.conformance.expected import expected
from lossfns.conformance.formulas import FORMULAS, as_data
from lossfns.conformance.page import page
from lossfns.conformance.report import MARKS, Report
from lossfns.conformance.rows import BATCH, policy_rows
from lossfns.conformance.wrong import variants

ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def report() -> Report:
    results = [
        Result("forward", "forward answers.", "pass", seconds=0.5),
        Result("order", "The order does not matter.", "pass", "core", 1e-6, 0.0, 3e-3, "reversed"),
        Result("clip-norm", "It clips.", "fail", "full", 0.5, 1e-4, 3e-3, "<b>½</b> & more \x1b[31m", "clip-ignored"),
        Result("sampling", "It samples.", "error", "full", seen="no answer within 15 s", bug="no-answer"),
        Result("several", "It takes [N, K].", "unsupported", seen="not here, it said"),
        Result("norm", "It falls.", "inconclusive", seen="no grad_norm"),
        Result("known", "Known.", "xfail", seen="as expected", bug="replayed"),
        Result("better", "Better.", "xpass"),
    ]
    return Report("http://127.0.0.1:8000", "0.38.0", "full", "Decoder", 0.0, 1e-6, results, "", 12.3, "2026-11-29")


def test_the_table_has_a_line_for_each_check_and_explains_what_does_not_hold() -> None:
    text = report().table()
    lines = text.splitlines()
    for r in report().results:
        assert any(line.startswith(MARKS[r.verdict]) and r.check in line for line in lines), r.check
    assert "5.0e-01 > 0.003, noise 1.0e-04" in text
    assert ALL_BUGS["clip-ignored"].description in text and "\x1b" not in report().summary
    assert lines[-1].startswith("2 of 8 checks hold, 1 fail, 1 error, 1 inconclusive, 1 unsupported, 1 xfail, 1 xpass")
    assert "most likely clip-ignored" in lines[-1]


def test_a_report_is_ok_without_failures_and_strict_counts_the_unclear_ones() -> None:
    good = [r for r in report().results if r.verdict not in ("fail", "error")]
    assert Report("u", "s", "full", results=good).ok
    assert not Report("u", "s", "full", results=good, strict=True).ok
    assert not Report("u", "s", "full", results=good, stopped="time was up").ok
    assert not report().ok


def test_only_a_run_of_all_checks_of_a_level_says_that_a_server_conforms() -> None:
    good = [r for r in report().results if r.verdict == "pass"]
    heads = [Report("u", "s", "core", results=good, partial=partial) for partial in (False, True)]
    assert "<h1>This training server conforms, level core</h1>" in page(heads[0])
    assert "<h1>The chosen checks hold</h1>" in page(heads[1])
    assert "does not conform, level full" in report().headline


def test_junit_counts_what_its_cases_say() -> None:
    suite = ElementTree.fromstring(report().junit())
    counts = {name: int(suite.get(name) or -1) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": 8, "failures": 1, "errors": 1, "skipped": 3}
    assert [len(suite.findall(f".//{tag}")) for tag in ("testcase", "failure", "error", "skipped")] == [8, 1, 1, 3]
    verdicts = [case.find(".//property[@name='verdict']") for case in suite.findall("testcase")]
    assert [v.get("value") for v in verdicts if v is not None] == [r.verdict for r in report().results]
    stopped = ElementTree.fromstring(Report("u", "s", "full", stopped="it died").junit())
    assert stopped.get("errors") == "1" and stopped.find("testcase/error") is not None


def test_json_has_null_for_what_was_not_measured() -> None:
    found = json.loads(json.dumps(report().as_dict(), allow_nan=False))
    assert found["results"][0]["error"] is None and found["results"][1]["error"] == 1e-6
    assert found["ok"] is False and found["bug"] == "clip-ignored" and found["counts"]["xpass"] == 1


def test_the_page_loads_nothing_and_shows_no_markup_of_the_server() -> None:
    text = page(report())
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attrs)))

    Parser().feed(text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags}
    assert not any({"src", "href", "onclick"} & set(attrs) for _, attrs in tags)
    assert "<b>½</b>" not in text and "&lt;b&gt;½&lt;/b&gt; &amp; more" in text
    assert all(f"<code>{r.check}</code>" in text for r in report().results)
    assert "<th>deviation</th>" in text  # "error" is a verdict


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium or google-chrome")
def test_the_page_is_no_wider_than_a_phone(tmp_path: Path) -> None:
    """A server may answer with a long word, such as a path."""
    long = [Result("path", "It saves.", "fail", seen="tinker://" + 90 * "x"), Result("y" * 90, 90 * "z", "unsupported")]
    text = page(Report("http://" + 90 * "s", "0", "full", results=long))
    frame = f'<iframe width="390" srcdoc="{escape(text)}"></iframe>'
    script = "const d = frames[0].document.documentElement; document.title = d.scrollWidth - d.clientWidth"
    (tmp_path / "phone.html").write_text(f'<body onload="{script}">{frame}</body>', encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"{tmp_path}/phone.html"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>0</title>" in shown


def test_names_of_checks_differ_and_each_names_a_bug_and_checks_that_come_before_it() -> None:
    seen: set[str] = set()
    for check in CHECKS:
        assert check.name not in seen, check.name
        assert check.bug in ALL_BUGS and check.level in ("core", "full"), check.name
        assert set(check.needs) <= seen, f"{check.name} needs {check.needs}, which come after it"
        assert check.says.endswith("."), f"{check.name}: {check.says}"
        seen.add(check.name)


def test_a_core_check_needs_no_check_of_the_full_level() -> None:
    levels = {check.name: check.level for check in CHECKS}
    for check in CHECKS:
        if check.level == "core":
            assert {levels[name] for name in check.needs} <= {"core"}, check.name


def test_the_formulas_are_those_of_the_losses() -> None:
    """Each expression is evaluated for each token, and summed."""
    logprobs = [-1.0 - np.arange(len(row.tokens)) % 5 / 2 for row in BATCH]
    for case in CASES:
        start = SimpleNamespace(start_logprobs=lambda rows: logprobs)
        rows = case.rows(start)  # type: ignore[arg-type]
        right = expected(case.loss, case.config, rows, logprobs)
        formula, total = FORMULAS[case.loss], 0.0
        defaults = as_data()["losses"][case.loss]["loss_fn_config"]
        config = defaults | (case.config or {})
        for row, lps, gradients in zip(rows, logprobs, right.gradients):
            fields = {name: x.tolist() for name, x in row.fields.items()}
            mask = fields.get("sequence_ratio_mask", [1.0] * len(lps))
            old = fields.get("logprobs", [0.0] * len(lps))
            s = math.exp(sum(m * (lp - q) for m, lp, q in zip(mask, lps, old)) / sum(mask))
            for i, lp in enumerate(lps):
                names = {
                    "lp": lp, "q": old[i], "w": fields.get("weights", [1.0] * len(lps))[i], "s": s,
                    "A": fields.get("advantages", [0.0] * len(lps))[i], "r": math.exp(lp - old[i]),
                    "low": config.get("clip_low_threshold"), "high": config.get("clip_high_threshold"),
                    "beta": config.get("beta"), "min": min, "clip": lambda x, low, high: min(max(x, low), high),
                }  # fmt: skip
                active = mask[i] != 0
                total += eval(formula.term, {"__builtins__": {}}, names) if active else 0.0
                gradient = eval(formula.gradient, {"__builtins__": {}}, names) if active else 0.0
                assert gradients[i] == pytest.approx(gradient, rel=1e-6, abs=1e-9), f"{case.name}: token {i}"
        assert right.value == pytest.approx(total, rel=1e-6), case.name


def test_every_known_bug_gives_another_value_or_gradient() -> None:
    logprobs = [-1.0 - np.arange(len(row.tokens)) % 5 / 2 for row in BATCH]
    for case in CASES:
        start = SimpleNamespace(start_logprobs=lambda rows: logprobs)
        rows = case.rows(start)  # type: ignore[arg-type]
        found = list(variants(case.loss, case.config, rows, logprobs))
        assert {"loss-not-summed", "sign-flipped"} <= {v.bug for v in found}, case.name
        assert all(v.bug in ALL_BUGS for v in found)
        if case.config:
            assert "config-ignored" in {v.bug for v in found} or case.loss == "gspo", case.name


def test_the_regimes_have_both_signs_on_both_sides_of_each_bound() -> None:
    rows = policy_rows([np.full(len(row.tokens), -1.0) for row in BATCH])
    ratios = np.exp(np.concatenate([-1.0 - row.fields["logprobs"] for row in rows]))
    advantages = np.concatenate([row.fields["advantages"] for row in rows])
    for sign in (1, -1):
        own = ratios[np.sign(advantages) == sign]
        assert (own > 1.2).any() and (own < 0.8).any() and ((own > 0.8) & (own < 1.2)).any(), sign


def test_effects_are_compared_relative_to_the_larger_one() -> None:
    """‖(3, 4) − (3, 0)‖ / ‖(3, 4)‖ = 4 / 5."""
    assert difference(np.array([3.0, 4.0]), np.array([3.0, 0.0])) == pytest.approx(0.8)
    assert difference(np.zeros(2), np.zeros(2)) == 0
    assert math.isnan(difference(np.array([np.nan]), np.array([1.0])))
    assert "0.5 times" in how_different(np.array([1.0, 2.0]), np.array([2.0, 4.0]))
    assert "cosine 0.00" in how_different(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    assert "no effect" in how_different(np.zeros(1), np.ones(1))


def test_nan_does_not_hold_and_the_first_broken_finding_counts() -> None:
    assert not Finding(math.nan, 1.0).holds
    broken = worst([Finding(0.1, 1.0, seen="a"), Finding(2.0, 1.0, seen="b"), Finding(9.0, 1.0, seen="c")])
    assert broken.seen == "b"
    assert worst([Finding(0.1, 1.0, seen="a"), Finding(0.5, 1.0, seen="b")]).seen == "b"


def test_refusals_are_the_senders_fault_and_final() -> None:
    def error(**fields: object) -> Exception:
        made = ValueError("no")
        vars(made).update(fields)
        return made

    assert is_refusal(error(category="user")) and is_refusal(error(category=SimpleNamespace(value="user")))
    assert not is_refusal(error(category="server")) and not is_refusal(error())
    assert [is_refusal(error(status_code=code)) for code in (400, 404, 422, 408, 429, 500, 501)] == [True] * 3 + [
        False
    ] * 4
    wrapped = ValueError("Error retrieving result")
    wrapped.__cause__ = error(status_code=404)
    assert is_refusal(wrapped)


def test_the_servers_words_lose_the_words_of_the_sdk() -> None:
    said = ValueError("Request failed: weights: too short for self.request_id='a:1' and expected type self.model_cls=X")
    assert server_words(said) == "ValueError: weights: too short"
    assert symptom("KeyError: 'loss:sum'", "refused") == "loss-sum-missing" and symptom("else", "refused") == "refused"


def test_a_check_is_named_after_its_function() -> None:
    def order_of_datums(bench: object) -> None:
        """The order of the datums
        does not matter.

        More.
        """

    check = Check.of(order_of_datums, "order-dependent")
    assert (check.name, check.says) == ("order-of-datums", "The order of the datums does not matter.")


def test_the_page_for_implementers_is_up_to_date() -> None:
    text = (ROOT / "docs/servers.md").read_text()
    assert page_of_servers.render(text) == text, "run: python -m tools.servers write"


def test_the_command_lists_checks_and_prints_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(CHECKS)
    assert main(["conformance", "--formulas"]) == 0
    assert json.loads(capsys.readouterr().out) == as_data()


def test_the_command_refuses_what_it_cannot_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["conformance"])
    assert "--base-url" in capsys.readouterr().err
    xfails = tmp_path / "xfails.txt"
    xfails.write_text("gradient-*\nnosuch-*\n")
    for option in (["--sdk-path", str(tmp_path)], ["--html", str(tmp_path / "no" / "x.html")],
                   ["--xfails", str(xfails)], ["--base-url", "127.0.0.1:9"]):  # fmt: skip
        assert main(["conformance", "--base-url", "http://127.0.0.1:9", *option]) == 2, option
        assert capsys.readouterr().err.startswith("lossfns: ")
