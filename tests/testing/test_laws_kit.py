"""The kit against itself: laws kill mutants and spare what is right, and docs/laws.md says so truly."""

import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import lossfns
from lossfns.testing.bugs import BUGS
from lossfns.testing.check import Verdict, quiet, trials
from lossfns.testing.laws import ADVANTAGES, GROUPS
from lossfns.testing.matrix import CLAIMS, KINDS, LAWS, page, planted, read
from lossfns.testing.mutants import BASELINES, MUTANTS
from lossfns.testing.vectors.vector import METHODS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "laws.md"
RECORD = {kill.mutant: kill for kill in read(PAGE.read_text(encoding="utf-8"))}
STALE = "docs/laws.md is out of date: python -m lossfns.testing.matrix write"


# What the page says


def test_the_page_is_what_its_own_measurements_make() -> None:
    """Laws, first lines, kinds, orders, bugs and where they were seen."""
    assert set(RECORD) == set(MUTANTS), STALE
    assert page(list(RECORD.values())) == PAGE.read_text(encoding="utf-8"), STALE


def test_every_mutant_is_killed_and_nearly_every_one_is_named() -> None:
    assert [name for name, kill in RECORD.items() if not kill.killed()] == []
    assert sum(kill.without_claim() for kill in RECORD.values()) >= 0.95 * len(MUTANTS)
    assert sum(kill.right() for kill in RECORD.values()) >= 0.95 * len(MUTANTS)


def test_every_law_kills_a_mutant() -> None:
    killers = {law for kill in RECORD.values() for law in kill.laws}
    assert {law.__name__ for laws in (*GROUPS.values(), ADVANTAGES) for law in laws} <= killers
    assert killers - set(CLAIMS) == set(LAWS)


def test_every_bug_is_named_by_a_first_broken_law() -> None:
    """But for the one that says no more than that the claim is wrong."""
    assert {kill.named for kill in RECORD.values() if kill.right()} >= set(BUGS) - {"another-loss"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_law_stands_once_in_the_order_of_a_kind(kind: str) -> None:
    assert len(set(KINDS[kind])) == len(KINDS[kind])


@pytest.mark.parametrize("law", LAWS)
def test_a_law_says_what_holds_in_its_first_line(law: str) -> None:
    first = (LAWS[law].__doc__ or "").partition("\n")[0]
    assert first.endswith(".") and len(first) < 120


def test_the_guide_explains_every_law_and_bug() -> None:
    """docs/testing.md: laws in bold, bugs by their ids, and how many mutants are named."""
    guide = (DOCS / "testing.md").read_text(encoding="utf-8")
    explained = {law for laws in re.findall(r"\*\*([\w, ]+)\.\*\*", guide) for law in laws.split(", ")}
    assert explained >= {*LAWS, *CLAIMS}
    assert [bug for bug in BUGS if f"`{bug}`" not in guide] == []
    right = sum(kill.right() for kill in RECORD.values())
    assert f"On {len(MUTANTS)} known-wrong losses the first broken law names the planted bug for {right}\n" in guide


# What the page says is true


def verdicts(subject: Any, examples: int = 0) -> Iterator[Verdict]:
    """What each law says, one by one."""
    for trial in trials(subject, examples=examples)[1]:
        with quiet():
            verdict = trial.run()
        yield verdict


ONE_OF_EACH_BUG = {mutant.bug: name for name, mutant in MUTANTS.items()}.values()
EVERY_MUTANT = [pytest.param(name, marks=[] if name in ONE_OF_EACH_BUG else pytest.mark.exhaustive) for name in MUTANTS]


@pytest.mark.parametrize("name", EVERY_MUTANT)
def test_the_law_that_breaks_first_is_the_one_on_the_page(name: str) -> None:
    recorded = RECORD[name]
    first = next((verdict for verdict in verdicts(MUTANTS[name]) if verdict.verdict == "fail"), None)
    assert first, f"it survives: {planted(name)}"
    assert (first.law, first.bug) == (recorded.first(), recorded.named), f"{first.seen} {STALE}"


# Correct code


PRESETS = {name: getattr(lossfns, name) for name in METHODS}
SETTINGS = (
    lossfns.grpo(weigh=lossfns.sequence_mean, kl_beta=0.04),
    lossfns.dapo(weigh=lossfns.fixed_length(8)),
    lossfns.ppo(clip=(0.0, 4.0)),
    lossfns.ppo(clip=(1.0, 1.0)),
    lossfns.reinforce(weigh=lossfns.sequence_sum_mean),
    lossfns.cross_entropy(weigh=lossfns.token_sum),
    lossfns.cross_entropy(weigh=lossfns.sequence_mean),
    lossfns.dpo(weigh=lossfns.pair_sum, label_smoothing=0.1),
    lossfns.orpo(weigh=lossfns.pair_sum, lam=1.0),
    lossfns.with_kl(lossfns.with_tis(lossfns.ppo(dual_clip=3.0, weigh=lossfns.sequence_mean)), 0.1, lossfns.k2),
    lossfns.with_tis(lossfns.gspo(), level=lossfns.sequence_level),
    lossfns.ppo(clip=(0.5, math.inf)),
    lossfns.cispo(clip=(0.8, 1.28), weigh=lossfns.sequence_mean),
    lossfns.cispo(clip=(0.0, math.inf)),
    lossfns.with_kl(lossfns.with_tis(lossfns.cispo(log_ratio_cap=None)), 0.1),
    lossfns.dro(beta=2.0, weigh=lossfns.token_sum),
    lossfns.with_kl(lossfns.with_tis(lossfns.dro()), 0.1),
)


@cache
def report(name: str, examples: int) -> list[Verdict]:
    return list(verdicts(PRESETS[name], examples))


@pytest.mark.parametrize("examples", [0, pytest.param(12, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", PRESETS)
def test_our_losses_obey_every_law(name: str, examples: int) -> None:
    assert [verdict for verdict in report(name, examples) if verdict.verdict == "fail"] == []


def test_every_law_has_something_to_say_of_our_losses() -> None:
    """A law that never holds of anything would pass unnoticed elsewhere."""
    held = {verdict.law for name in PRESETS for verdict in report(name, 0) if verdict.verdict == "pass"}
    assert held >= set(LAWS) - {"tis"}  # of a loss that has a correction


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_obey_every_law(name: str) -> None:
    assert [verdict for verdict in verdicts(BASELINES[name]) if verdict.verdict == "fail"] == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("subject", SETTINGS, ids=repr)
def test_our_losses_with_other_settings_obey_every_law(subject: Any) -> None:
    assert [verdict for verdict in verdicts(subject) if verdict.verdict == "fail"] == []
