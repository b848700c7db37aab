"""Code of the documents that no doctest runs: commands have options that exist, and Python has names that exist."""

import ast
import contextlib
import importlib
import inspect
import math
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lossfns
from lossfns.cli import parser
from lossfns.spellings import SETTINGS, hint
from lossfns.testing import check

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PARSER = parser()


def blocks(page: Path, language: str) -> Iterator[str]:
    """Yield the blocks of a language in a page."""
    text = page.read_text(encoding="utf-8")
    yield from (body for _, body in re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL))


def commands(block: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell block: lines, and what `&&`, `|`, `;` and `&` separate."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;>")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;"):
                yield command
                command = []
            else:
                command.append(word)


def shell(page: Path) -> Iterator[list[str]]:
    """Yield the commands of a page: of its shell blocks, and of the steps of its workflows."""
    for block in blocks(page, "bash"):
        yield from commands(block)
    for block in blocks(page, "yaml"):
        steps = re.sub(r">-\n +(\S.*)\n +(?=--)", r"\1 ", block)
        yield from (each for step in re.findall(r"- run: (.*)", steps) for each in commands(step))


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return why the command line refuses the words; "" if it takes them."""
    with contextlib.suppress(SystemExit):
        PARSER.parse_args(words)
        return ""
    return capsys.readouterr().err


def test_the_commands_of_the_documents_are_taken_by_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    checked = 0
    for page in PAGES:
        for command in shell(page):
            if command[:1] == ["lossfns"]:
                words = command[1 : command.index(">")] if ">" in command else command[1:]
                assert not refusal(words, capsys), f"{page.name}: {' '.join(command)}"
                checked += 1
    assert checked > 50


def test_the_commands_that_sentences_quote_are_taken_by_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence may name a command without its arguments, and a printed session begins its commands with a $."""
    checked = 0
    for page in PAGES:
        if page.name == "errors.md":  # it quotes messages
            continue
        text = page.read_text(encoding="utf-8")
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        quoted = [*re.findall(r"`(lossfns [^`]+)`", prose), *re.findall(r"^\$ (lossfns .+)$", text, re.MULTILINE)]
        for command in (each for line in quoted for each in commands(line.replace("\n", " "))):
            said = refusal(command[1:], capsys) if command[:1] == ["lossfns"] else ""
            assert not said or re.search("arguments are required|expected one argument", said), f"{page.name}: {said}"
            checked += 1
    assert checked > 100


def test_the_extras_that_commands_install_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = ",".join(re.findall(r"(?:-e \.|-e \"\.|lossfns)\[([\w,]+)\]", text)).split(",")
    assert len(named) > 20 and set(named) <= set(extras), set(named) - set(extras)


def rows(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the code spans' texts of the first two cells of each row in the tables of a page."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for line in re.findall(r"^\| (.*) \|$", prose, re.MULTILINE):
        there, here = line.split(" | ")[:2]
        yield there, here


MOVING = sorted((ROOT / "docs" / "howto").glob("from_*.md"))


def test_the_calls_in_the_tables_of_moving_are_calls_of_this_library() -> None:
    """Calls, and settings such as ``clip=(0.8, 1.2)``, are evaluated; other code is a name of theirs or a column."""
    given = {"loss": lossfns.ppo(), "rewards": [1.0, 0.0], "groups": ["q", "q"], "max_completion_length": 16}
    names = {**vars(lossfns), **given, "math": math}
    checked = 0
    for page in MOVING:
        for code in (code for _, here in rows(page) for code in re.findall(r"`(\w+(?:=.+?|\(.*?\)))`", here)):
            setting = re.match(r"\w+=", code)
            assert eval(f"dict({code})" if setting else code, names) is not None, f"{page.name}: {code}"
            checked += 1
    assert checked > 80


def test_an_error_translates_a_setting_as_the_tables_of_moving_do() -> None:
    """``ppo(epsilon=0.2)`` says ``clip=(0.8, 1.2)``, which is what the table has beside ``epsilon=0.2``."""
    knobs = {name: setting.knob for setting in SETTINGS for name in setting.names if setting.knob}
    checked = 0
    for page in MOVING:
        for there, here in rows(page):
            single = re.match(r"`(?:--(?:\w+\.)*)?(\w+)[= ]([^`,]+)`(?: \(the default\))?$", there)
            if single and single[1] in knobs and here.startswith(f"`{knobs[single[1]]}="):
                words = single[2].split()
                values = [float(x) if re.fullmatch(r"[\d.]+", x) else x.strip('"') for x in words]
                said = hint(single[1], values[0] if len(values) == 1 else values, [knobs[single[1]]])
                whole = said.replace("(low,", "(0.8,").replace("high)", "1.2)")
                assert here.split("`")[1] in whole, f"{page.name}: {said}"
                checked += 1
    assert checked >= 8


def test_the_files_and_modules_that_commands_run_exist() -> None:
    checked = 0
    for page in PAGES:
        for command in shell(page):
            if command[:2] == ["python", "-m"] and command[2].startswith(("tools", "tests", "benchmarks")):
                path = ROOT / command[2].replace(".", "/")
                found = path.is_dir() or path.with_suffix(".py").exists()
            elif command[:1] == ["python"] and len(command) > 1 and "/" in command[1]:
                found = (ROOT / command[1]).exists()
            else:
                continue
            assert found, f"{page.name}: {' '.join(command)}"
            checked += 1
    assert checked > 5


def test_python_that_is_no_doctest_compiles_and_imports_names_that_exist() -> None:
    checked = 0
    for page in PAGES:
        for block in blocks(page, "python"):
            if ">>>" in block or page.parent.name == "losses" or page.name == "signatures.md":  # quotations
                continue
            for node in ast.walk(ast.parse(block)):
                module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
                # tests/integrations has the adapters, and tests/server the server, if their packages are installed.
                if re.match(r"lossfns(?!\.(integrations|server))\b", module):
                    found = importlib.import_module(module)
                    for name in node.names:
                        assert hasattr(found, name.name), f"{page.name}: {module}.{name.name}"
                        checked += 1
    assert checked > 10


def test_the_tests_of_a_loss_that_the_documents_show_run() -> None:
    """In place of the fixture ``check_loss``, which takes a second, its arguments are compared with those of check."""
    found = [block for page in PAGES for block in blocks(page, "python") if "def test_my_loss" in block]
    calls: list[inspect.BoundArguments] = []

    def check_loss(subject: Any, *, strict: bool = False, **options: Any) -> None:
        calls.append(inspect.signature(check).bind(subject, **options))

    for block in found:
        names: dict[str, Any] = {"fading": lossfns.ppo, "my_loss": lossfns.ppo()}
        exec(block, names)
        names["test_my_loss"](check_loss)
    assert len(calls) == 2 and all(call.arguments["kind"] == "policy" for call in calls)


def test_an_option_that_does_not_exist_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = commands("lossfns train grpo --stepz 3 # a comment")
    assert "--stepz" in refusal(command[1:], capsys)
