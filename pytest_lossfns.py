"""The pytest plugin of lossfns: a fixture that tests a loss by its laws, and options that name the loss to test.

The plugin imports lossfns only when the fixture is called, so that it does not slow down other test runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lossfns")
    group.addoption("--lossfns-subject", metavar="MODULE:NAME", help="the loss that lossfns.testing.conformance tests")
    group.addoption("--lossfns-kind", metavar="KIND", help="the kind of the loss, as for lossfns check --kind")


def pytest_configure(config: pytest.Config) -> None:
    for option, variable in (("--lossfns-subject", "LOSSFNS_SUBJECT"), ("--lossfns-kind", "LOSSFNS_KIND")):
        if config.getoption(option):
            os.environ[variable] = config.getoption(option)


@pytest.fixture
def check_loss() -> Callable[..., Any]:
    """``check_loss(loss_fn, kind="policy")`` fails the test if the loss is wrong, and shows the report.

    With ``strict=True`` it fails a fragile loss, too. The other arguments are those of ``lossfns.testing.check``.
    """

    def check_loss(subject: Any, *, strict: bool = False, **options: Any) -> Any:
        from lossfns.testing.check import check

        report = check(subject, **options)
        if report.exit_status(strict):
            pytest.fail(report.table(), pytrace=False)
        return report

    return check_loss
