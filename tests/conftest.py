"""Settings of a test run.

Property tests draw a few examples, the same in every run. With ``-m exhaustive`` they count as exhaustive tests and
draw many examples, outside CI new ones in every run. Processes that run tests side by side use one thread each.
"""

import os

import pytest
from hypothesis import is_hypothesis_test, settings

settings.register_profile("default", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("exhaustive", derandomize=bool(os.environ.get("CI")), deadline=None, max_examples=200)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the processes, which have not started yet
    settings.load_profile("exhaustive" if config.getoption("markexpr") == "exhaustive" else "default")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("markexpr") == "exhaustive":
        for item in items:
            if isinstance(item, pytest.Function) and is_hypothesis_test(item.obj):
                item.add_marker("exhaustive")
