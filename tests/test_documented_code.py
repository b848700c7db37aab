"""Code of the documents that no doctest runs: commands have options that exist, and Python has names that exist."""

import ast
import contextlib
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from lossfns.cli import parser

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


def test_an_option_that_does_not_exist_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = commands("lossfns train grpo --stepz 3 # a comment")
    assert "--stepz" in refusal(command[1:], capsys)
