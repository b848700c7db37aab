"""Pages that are written from the code, and the pictures of losses."""

import functools
import itertools
import re
import unicodedata
from pathlib import Path

import pytest

from lossfns.cli import main
from lossfns.describe import families, makers, presets
from lossfns.errors import LossInputError
from lossfns.plot import curves
from lossfns.plot.command import TOPICS, figure_of
from lossfns.plot.family import parts_of
from tools import errors, pages

DOCS = Path(__file__).parents[1] / "docs"


def test_the_pages_are_those_of_the_code() -> None:
    assert pages.main(["check"]) == 0, "python -m tools.pages write"
    assert errors.main(["check"]) == 0, "python -m tools.errors write"


def test_links_and_pictures_of_the_documents_exist() -> None:
    files = [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]
    assert len(files) > 100
    for file in files:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", file.read_text(encoding="utf-8")):
            if not target.startswith(("http", "mailto")):
                assert (file.parent / target).exists(), f"{file.name}: {target}"


def test_no_sentence_is_cut_by_the_mark_of_a_list() -> None:
    """Markdown takes a line that starts with "0. " for an item of a list, also within the sentence of another item."""
    for file in [*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")]:
        text = re.sub(r"^ *```.*?^ *```", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for block in re.split(r"\n\s*\n", text):
            marks = [int(n) for n in re.findall(r"^ *(\d+)[.)] ", block, re.MULTILINE)]
            first = re.match(r"\s*(\d+)[.)] ", block)
            expected = range(int(first[1]), int(first[1]) + len(marks)) if first else ()
            assert marks == list(expected), f"{file.name}: {block}"


def slugs(file: Path) -> set[str]:
    """Return the anchors that the site gives to the headings of a page, as the Markdown package makes them."""
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        ascii_only = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        slug = base = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())
        repeats = itertools.count(1)
        while slug in found:
            slug = f"{base}_{next(repeats)}"
        found.add(slug)
    return found


def test_the_headings_that_links_name_exist() -> None:
    headings, checked = functools.cache(slugs), 0
    for file in [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]:
        text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#([^)\s]+)\)", text):
            page = (file.parent / target).resolve() if target else file
            if "reference" not in page.parts:  # the headings of those pages are written by mkdocstrings
                assert anchor in headings(page), f"{file.name}: {target}#{anchor}"
                checked += 1
    assert checked > 50


def test_each_of_the_ten_questions_has_an_answer_a_heading_and_a_public_source() -> None:
    questions = (DOCS / "questions.md").read_text(encoding="utf-8").split("\n## ")[1:]
    assert len(questions) == 10
    for question in questions:
        worked_out, asked = re.split(r"(?:Asked|Reported)\sin", question.partition("Worked out in")[2], maxsplit=1)
        assert re.search(r"\]\([\w/]+\.md#[\w-]+\)", worked_out), question
        assert re.search(r"\]\(https://github\.com/[\w-]+/[\w-]+/(issues|pull)/\d+\)", asked), question


def test_the_figures_of_the_readme_are_those_of_the_pages_that_it_links() -> None:
    """Each number of the first cell stands in the page: 659 and 708 of the laws, 0.78 and 0.13 of the speed."""
    readme, checked = (DOCS.parent / "README.md").read_text(encoding="utf-8"), 0
    for figures, page in re.findall(r"^\| ([\d., andof]+) \|.*?\]\(docs/([\w/-]+\.md)", readme, re.MULTILINE):
        text = (DOCS / page).read_text(encoding="utf-8").replace(",", "")
        for figure in re.findall(r"\d+(?:\.\d+)?", figures):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d])", text), f"{page} has no {figure}"
            checked += 1
    assert checked > 12


def test_the_readme_links_every_loss_once() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    linked = re.findall(r"\[`(\w+)`\]\(docs/losses/(\w+)\.md\)", readme)
    assert sorted(linked) == sorted((name, name) for name in makers())


def test_the_tests_that_show_the_claims_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (DOCS / "claims.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (DOCS.parent / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_a_ratio_curve_has_the_corners_and_slopes_of_its_equation() -> None:
    """PPO with bounds 0.8 and 1.2: for A = 1 the loss is −min(r, 1.2), for A = −1 it is max(r, 0.8).

    Its slope by the logprob is −r·A where no bound acts, and 0 where one does.
    """
    ppo = presets()["ppo"]()
    up, down = (curves.ratio_curve(ppo, a, [0.5, 1.0, 1.5]) for a in (1.0, -1.0))
    assert up.value == pytest.approx([-0.5, -1.0, -1.2]) and up.slope == pytest.approx([-0.5, -1.0, 0.0])
    assert down.value == pytest.approx([0.8, 1.0, 1.5]) and down.slope == pytest.approx([0.0, 1.0, 1.5])


def test_a_curve_is_of_one_row_whatever_divides_the_loss() -> None:
    """dr_grpo divides by a constant number of tokens; one token then still counts 1."""
    assert curves.ratio_curve(presets()["dr_grpo"](), 1.0, [1.0]).slope == pytest.approx([-1.0])


def test_slopes_are_the_derivatives_of_the_values() -> None:
    """Each loss with a picture, by central differences at points away from corners."""
    checked = 0
    for name, make in presets().items():
        loss = make()
        step = 1e-4
        if curves.is_preference(loss):
            found = curves.margin_curve(loss, [0.7 - step, 0.7, 0.7 + step])
            expected = (found.value[2] - found.value[0]) / (2 * step)
        elif curves.is_unpaired(loss):
            found = curves.log_ratio_curve(loss, 1.0, [0.7 - step, 0.7, 0.7 + step])
            expected = (found.value[2] - found.value[0]) / (2 * step)
        else:
            continue
        assert found.slope[1] == pytest.approx(expected, rel=1e-3, abs=1e-6), name
        checked += 1
    assert checked > 20


def test_every_loss_and_topic_is_drawn_or_refused_by_name() -> None:
    for name in TOPICS:
        assert figure_of([name]).axes, name
    for name in ("grpo", "dpo", "kto", "focal"):
        assert len(figure_of([name]).axes) >= 2, name
    assert len(figure_of(["ppo", "dapo"]).legends) == 1
    for names, words in ((["value_loss"], "value_loss, which reads"), (["ppo", "dpo"], "dpo"), (["gprpo"], "'grpo'")):
        with pytest.raises(LossInputError, match=words):
            figure_of(names)


def test_the_parts_of_a_loss_are_those_that_its_code_names() -> None:
    assert {"with_kl", "k3", "clipped_surrogate", "token_level"} <= set(parts_of(makers()["grpo"]))
    assert "geometric_level" in parts_of(makers()["gspo"]) and "geometric_level" not in parts_of(makers()["ppo"])
    assert "with_kl" not in parts_of(makers()["dapo"])
    assert sum(bool(parts_of(makers()[name])) for members in families().values() for name in members) > 90


def test_the_command_writes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trust.svg"
    assert main(["plot", "ppo", "dapo", "--out", str(file)]) == 0
    assert "<svg" in file.read_text() and str(file) in capsys.readouterr().out
    assert main(["plot", "kl", "--out", str(tmp_path / "kl.xyz")]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["plot", "kl", "--out", str(tmp_path / "kl")]) == 2 and not (tmp_path / "kl.png").exists()
    assert main(["plot", "x" * 5000]) == 2
    assert main(["plot", "gprpo"]) == 2
    assert "Did you mean 'grpo'?" in capsys.readouterr().err
