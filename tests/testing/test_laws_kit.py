"""The kit tested on itself: laws break on mutants and hold for correct losses, as docs/laws.md says."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lossfns
from lossfns.testing.batch import Batch
from lossfns.testing.bugs import BUGS
from lossfns.testing.check import prepare, without_side_effects
from lossfns.testing.laws import ADVANTAGES, LAWS_BY_KIND, SELF_CONTAINED
from lossfns.testing.mutants import CLOSED_FORMS, MUTANTS, correct_loss, oracle_loss
from lossfns.testing.report import BROKEN, Report, Verdict
from lossfns.testing.vectors import load
from tools.laws import CLAIMS, KINDS, LAWS, held_out, read_page, render_page, totals

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "laws.md"
RECORD = read_page(PAGE.read_text(encoding="utf-8"))
EXEMPLARS = {kill.mutant: kill for kill in RECORD.exemplars}
STALE = "docs/laws.md is out of date: python -m tools.laws write"


# What the page says


def test_the_page_is_what_its_own_measurements_make() -> None:
    """Laws, first lines, kinds, orders, bugs and where they were seen."""
    assert set(EXEMPLARS) == set(MUTANTS), STALE
    assert render_page(RECORD) == PAGE.read_text(encoding="utf-8"), STALE


def test_every_exemplar_is_killed_and_nearly_every_one_is_named() -> None:
    """The exception is a setting of group advantages, which none of their laws varies."""
    assert [name for name, kill in EXEMPLARS.items() if not kill.killed()] == ["group_advantages_inert_knob"]
    assert sum(kill.without_claim() for kill in RECORD.exemplars) >= 0.95 * len(MUTANTS)
    assert sum(kill.named_right() for kill in RECORD.exemplars) >= 0.95 * len(MUTANTS)


def test_every_law_kills_an_exemplar() -> None:
    killers = {law for kill in RECORD.exemplars for law in kill.laws}
    all_laws = {law.__name__ for laws in (*LAWS_BY_KIND.values(), ADVANTAGES) for law in laws}
    elsewhere = {"fresh_state", "ratio_metrics", "caps", "active_gradient", "ratio_symmetry"}  # test_policy_laws.py
    assert all_laws - elsewhere <= killers
    assert killers - set(CLAIMS) <= set(LAWS)


def test_every_bug_is_named_by_a_first_broken_law() -> None:
    """The exception is another-loss, which says no more than that the claim is wrong."""
    assert {kill.named for kill in RECORD.exemplars if kill.named_right()} >= set(BUGS) - {"another-loss"}


def test_the_held_out_losses_are_others_than_the_exemplars() -> None:
    population = list(held_out())
    counted = {loss: sum(spec.loss == loss for spec in population) for loss in CLOSED_FORMS}
    assert {entry.title: entry.mutants for entry in RECORD.held_out} == counted, STALE
    assert len(population) >= 400
    whole = totals(RECORD.held_out)
    assert len(RECORD.misnamed) == whole.mutants - whole.named_right


@pytest.mark.parametrize("kind", KINDS)
def test_a_law_stands_once_in_the_order_of_a_kind(kind: str) -> None:
    assert len(set(KINDS[kind])) == len(KINDS[kind])


@pytest.mark.parametrize("law", LAWS)
def test_a_law_says_what_holds_in_its_first_line(law: str) -> None:
    first = (LAWS[law].__doc__ or "").partition("\n")[0]
    assert first.endswith(".") and len(first) < 120


def test_the_guide_explains_every_law_and_bug() -> None:
    """docs/testing.md: laws in bold, bugs by their ids, and how many held-out losses are named right."""
    guide = (DOCS / "testing.md").read_text(encoding="utf-8")
    explained = {law for laws in re.findall(r"\*\*([\w, ]+)\.\*\*", guide) for law in laws.split(", ")}
    assert explained >= {*LAWS, *CLAIMS}
    assert [bug for bug in BUGS if f"`{bug}`" not in guide] == []
    whole = totals(RECORD.held_out)
    assert f"{whole.named_right} of {whole.mutants} losses that were kept apart from the laws" in " ".join(
        guide.split()
    )


# What the page says is true


def verdicts(subject: Any) -> Iterator[Verdict]:
    """Yield the verdict of each law on the small batches."""
    for trial in prepare(subject, examples=0).trials:
        with without_side_effects():
            verdict = trial.run()
        yield verdict


FIRST_OF_A_BUG: dict[str, str] = {vars(made)["bug"]: name for name, made in reversed(MUTANTS.items())}


def check_first_law(name: str, *, all_laws: bool = False) -> None:
    """Fail if the page names another first broken law of an exemplar. With ``all_laws``, check the other ones, too."""
    recorded = EXEMPLARS[name]
    made: list[Verdict] = []
    for verdict in verdicts(MUTANTS[name]):
        made.append(verdict)
        if verdict.verdict == "wrong" and not all_laws:
            break  # nothing is graver
    found_broken = Report(name, "", verdicts=made).broken
    check_honesty(MUTANTS[name], found_broken)
    first = found_broken[0] if found_broken else None
    found = (first.law, first.bug) if first else ("", "")
    assert found == (recorded.first, recorded.named), f"{first} {STALE}"


def check_honesty(mutant: Any, broken: list[Verdict]) -> None:
    """Fail if a report contradicts itself: "x, not x", "..", or a loss that the batch does not have."""
    for v in broken:
        assert v.seen.endswith(".") and ".." not in v.seen, v
        assert not re.search(r"(?<![-\w.])(-?[\w.]+), not \1(?![\w.])", v.seen), v
        found = re.search(r"the loss is (-?[\d.e-]+|nan|-?inf), not", v.seen)
        repeatable = mutant.bug != "state-between-calls"
        if found and repeatable and v.law in ("poison", "padding", "empty", "permutation", "agreement"):
            batch = eval(v.example, {"Batch": Batch, "nan": math.nan, "inf": math.inf})
            value = float(mutant(batch.data(), batch.tensors())[0].detach())
            assert value == pytest.approx(float(found[1]), rel=1e-5, nan_ok=True), v


@pytest.mark.parametrize(
    "bug", [pytest.param(bug, marks=pytest.mark.repeated) if i % 3 == 0 else bug for i, bug in enumerate(BUGS)]
)
def test_the_law_that_breaks_first_is_the_one_on_the_page(bug: str) -> None:
    check_first_law(FIRST_OF_A_BUG[bug])


@pytest.mark.exhaustive
@pytest.mark.parametrize("bug", [*BUGS][::3])
def test_so_is_the_first_of_all_laws_and_no_report_contradicts_itself(bug: str) -> None:
    check_first_law(FIRST_OF_A_BUG[bug], all_laws=True)


BROKEN_IN_MANY_WAYS = (
    "cross_entropy_padding_in_denominator",
    "cross_entropy_order_dependent",
    "dpo_empty_sequence_counted",
    "grpo_kl_unmasked",
)


@pytest.mark.parametrize("name", BROKEN_IN_MANY_WAYS)
def test_the_loss_in_a_report_is_that_of_the_batch_in_it(name: str) -> None:
    """The fault: numbers of one batch beside the picture of another."""
    check_honesty(MUTANTS[name], Report(name, "", verdicts=list(verdicts(MUTANTS[name]))).broken)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", sorted(MUTANTS.keys() - set(FIRST_OF_A_BUG.values()))[::4])
def test_the_law_that_breaks_first_is_the_one_on_the_page_for_every_exemplar(name: str) -> None:
    check_first_law(name)


# Correct code


PRESETS = {name: getattr(lossfns, name) for name in CLOSED_FORMS}
DEFAULTS = [preset() for name, preset in PRESETS.items() if name != "group_advantages"]
SETTINGS = (
    lossfns.grpo(weigh=lossfns.sequence_mean, kl_beta=0.04),
    lossfns.ppo(clip=(0.0, 4.0)),
    lossfns.ppo(clip=(1.0, 1.0)),
    lossfns.dpo(weigh=lossfns.pair_sum, label_smoothing=0.1),
    lossfns.orpo(weigh=lossfns.pair_sum, lam=1.0),
    lossfns.with_kl(lossfns.with_tis(lossfns.ppo(dual_clip=3.0, weigh=lossfns.sequence_mean)), 0.1, lossfns.k2),
    lossfns.with_tis(lossfns.gspo(), level=lossfns.sequence_level),
    lossfns.with_rollout_weight(
        lossfns.ppo(), lossfns.rollout.ratio() * lossfns.rollout.within(lossfns.k3, 0.5, lossfns.geometric_level)
    ),
    lossfns.with_kl(
        lossfns.ppo(), 0.1, kl_weight=lossfns.rollout.score_function, kl_cap=10.0, kl_to="sampler_logprobs"
    ),
    lossfns.ppo(clip=(0.5, math.inf)),
    *(
        PRESETS[loss.name](clip=(0.0, math.inf), weigh=lossfns.sequence_mean)
        for loss in DEFAULTS
        if "clip" in loss.knobs
    ),
    *(PRESETS[loss.name](log_ratio_cap=None) for loss in DEFAULTS if "log_ratio_cap" in loss.knobs),
    *(lossfns.with_kl(lossfns.with_tis(loss), 0.1) for loss in DEFAULTS if loss.reads[1:] == ("old_logprobs",)),
)


SWITCHED_OFF: dict[tuple[str, Any], set[str]] = {
    ("log_ratio_cap", None): {"finite"},  # exp overflows
    ("label_smoothing", 0.5): {"signal", "pair_canary"},  # both sides are pulled alike
    ("lam", 0.0): {"sides", "pair_canary"},  # the rejected side has no term
}
"""The laws that a correct loss may break with a setting, since the setting switches off what they are about."""


def broken(loss: lossfns.Loss) -> set[str]:
    """Return the laws that a correct loss breaks, but for those that its settings switch off."""
    knobs = {name: tuple(x) if isinstance(x, list) else getattr(x, "__name__", x) for name, x in loss.knobs.items()}
    off = set().union(*(laws for (name, value), laws in SWITCHED_OFF.items() if knobs.get(name, name) == value))
    return {verdict.law for verdict in verdicts(loss) if verdict.verdict in BROKEN} - off


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [loss.name for loss in DEFAULTS])
def test_our_losses_obey_every_law_on_random_batches(name: str) -> None:
    """Without the laws that make their own batches, which are the same in the default run."""
    own = {"vectors", *(law.__name__ for law in SELF_CONTAINED)}
    drawing = [trial for trial in prepare(PRESETS[name], examples=6).trials if trial.law not in own]
    assert len(drawing) > 10
    with without_side_effects():
        assert [verdict for trial in drawing if (verdict := trial.run()).verdict in BROKEN] == []


@pytest.mark.long
def test_our_losses_obey_every_law_and_every_law_has_something_to_say_of_them() -> None:
    """Every law of a kind with a preset applies to at least one preset, or to one with a correction.

    None of ours has an entropy bonus, keeps state or has the settings of the other exceptions: ``test_policy_laws.py``
    and ``test_field_laws.py`` have losses that do.
    """
    corrected = lossfns.with_tis(lossfns.ppo(dual_clip=3.0))
    found = {name: list(verdicts(subject)) for name, subject in {**PRESETS, "corrected": corrected}.items()}
    assert [(name, v) for name in PRESETS for v in found[name] if v.verdict in BROKEN] == []
    applicable = {verdict.law for made in found.values() for verdict in made if verdict.verdict == "pass"}
    kinds = ("policy", "likelihood", "preference", "advantages")
    expected = {law for kind in kinds for law in KINDS[kind]}
    assert applicable >= expected - {"entropy", "fresh_state", "target", "rejected_side", "smoothing"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("loss", SETTINGS, ids=repr)
def test_our_losses_obey_every_law_with_other_settings(loss: lossfns.Loss) -> None:
    assert broken(loss) == set()


ONE_OF_A_KIND = ("cross_entropy", "grpo", "dpo")


@pytest.mark.parametrize(
    "loss",
    [
        loss.name if loss.name in ONE_OF_A_KIND else pytest.param(loss.name, marks=pytest.mark.exhaustive)
        for loss in DEFAULTS
    ],
)
def test_the_oracle_obeys_every_law(loss: str) -> None:
    """The oracle is a second implementation of every loss."""
    correct: Any = oracle_loss("", loss, load(loss)[0].config)
    correct.like = correct_loss(loss, load(loss)[0].config)
    assert [verdict for verdict in verdicts(correct) if verdict.verdict in BROKEN] == []


@pytest.mark.filterwarnings("ignore:k1 in a loss:lossfns.LossWarning")
@pytest.mark.exhaustive
@pytest.mark.parametrize("loss", [loss.name for loss in DEFAULTS])
def test_our_losses_obey_every_law_with_all_settings_of_the_golden_vectors(loss: str) -> None:
    """Each value of each setting once, beside the others of some vector, in at most two combinations."""
    configs = [v.config for v in load(loss) if v.error is None and v.denominator is None]
    seen: set[str] = set()
    tried = 0
    for config in sorted(configs, key=lambda c: -len({*map(repr, c.items())} - {*map(repr, configs[0].items())})):
        values = {f"{name}={value!r}" for name, value in config.items()}
        if values <= seen or tried == 2:
            continue
        seen |= values
        tried += 1
        assert broken(correct_loss(loss, config)) == set(), config
