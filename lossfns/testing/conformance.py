"""The laws as a pytest suite, one test for each law, on a loss that the environment names.

    LOSSFNS_SUBJECT=mypackage.losses:my_loss pytest --pyargs lossfns.testing.conformance

``LOSSFNS_KIND`` gives the kind of the loss where it cannot be detected. The attributes of the loss (``kind``, ``like``,
``skip``, ``couples``) count as for ``lossfns check``. A law that makes the loss fragile warns.
The options ``--lossfns-subject`` and ``--lossfns-kind`` of the plugin set the same variables.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest

from lossfns.loading import load
from lossfns.testing.check import Trial, prepare, without_side_effects


def pytest_generate_tests(metafunc: Any) -> None:
    """Make one test for each law of the subject's kind."""
    subject = os.environ.get("LOSSFNS_SUBJECT")
    if not subject:
        raise pytest.UsageError("set LOSSFNS_SUBJECT=module:loss_fn, or pass --lossfns-subject module:loss_fn")
    trials = prepare(load(subject), kind=os.environ.get("LOSSFNS_KIND")).trials
    metafunc.parametrize("trial", trials, ids=[trial.law for trial in trials])


def test_law(trial: Trial) -> None:
    """Fail where the subject breaks the law; skip where the law does not apply to it."""
    with without_side_effects():
        verdict = trial.run()
    if verdict.verdict in ("n/a", "skipped"):
        pytest.skip(verdict.seen)  # the reason why the law does not apply
    found = f"{verdict.says}\n{verdict.seen}\nLikely bug: {verdict.bug}\n{verdict.example}"
    if verdict.verdict == "wrong":
        pytest.fail(found, pytrace=False)
    if verdict.bug:
        warnings.warn(f"{verdict.verdict}: {found}", stacklevel=1)
