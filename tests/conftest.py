"""Hypothesis: few examples, the same every time; with the exhaustive tests many, and new ones outside CI.

With ``-m exhaustive`` every property test is one of the exhaustive tests.
"""

import os

import pytest
from hypothesis import is_hypothesis_test, settings

settings.register_profile("default", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("exhaustive", derandomize=bool(os.environ.get("CI")), deadline=None, max_examples=200)


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("exhaustive" if config.getoption("markexpr") == "exhaustive" else "default")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("markexpr") == "exhaustive":
        for item in items:
            if isinstance(item, pytest.Function) and is_hypothesis_test(item.obj):
                item.add_marker("exhaustive")
