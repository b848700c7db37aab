"""Worlds: every loss reaches the point that theory names, no loss with a wrong sign does, and the points are right."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from lossfns import (
    dft,
    dpo,
    group_advantages,
    grpo,
    importance_sampling,
    k2,
    kto,
    ppo,
    reinforce,
    sequence_mean,
    sequence_sum_mean,
    token_mean,
    with_kl,
)
from lossfns.cli import main
from lossfns.errors import LossInputError
from lossfns.loss import Loss
from lossfns.testing import field
from lossfns.testing.kinds import KINDS
from lossfns.testing.mutants import mutant, settings_showing
from lossfns.testing.public import presets
from lossfns.testing.vectors import METHODS
from lossfns.testing.vectors.vector import is_estimator
from lossfns.testing.worlds import advice, answers, bandit, corpus, distance, learn, lessons, tree, two_arms
from lossfns.testing.worlds.combined import COMBINED
from lossfns.testing.worlds.lesson import BETA, CLOSE, Lesson
from lossfns.testing.worlds.points import root, tilted, towards_reference, two_token_tree
from lossfns.testing.worlds.steps import Enumerated
from lossfns.testing.worlds.world import in_twos
from tools import worlds as worlds_tool

pytestmark = pytest.mark.filterwarnings("ignore::lossfns.LossWarning")


# Every loss


def assert_reached(name: str, lesson: Lesson) -> None:
    miss = lesson.miss()
    assert miss < CLOSE, f"{name} in the world {lesson.world.name} ({lesson.says}): {miss:.1e} from the point"
    assert distance(lesson.world.start, lesson.point) > 10 * CLOSE, f"{name}: nothing to learn"


@pytest.mark.repeated
def test_every_loss_reaches_a_point_in_each_of_its_worlds() -> None:
    """The first lesson of each world. A preset without a lesson raises, with its name."""
    for name in (*presets(), *COMBINED):
        for lesson in {lesson.world.name: lesson for lesson in reversed(lessons(name))}.values():
            assert_reached(name, lesson)


@pytest.mark.exhaustive
def test_every_loss_reaches_all_its_points() -> None:
    for name in (*presets(), *COMBINED):
        for lesson in lessons(name):
            assert_reached(name, lesson)


def test_a_loss_that_no_row_names_goes_as_far_as_its_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy loss, a loss of labels and a likelihood, under names that no row has."""
    losses = {"ppo": ppo, "kto": kto, "dft": dft}
    monkeypatch.setitem(lessons.__globals__, "presets", lambda: {f"new_{name}": x for name, x in losses.items()})
    for name in losses:
        found = lessons(f"new_{name}")
        assert found[-1].says == "as far as with the oracle's gradient"
        assert_reached(name, found[-1])
        assert fails(found[-1], mutant("sign-flipped", name))


def test_a_loss_without_a_lesson_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unheard_of() -> Loss:
        return replace(reinforce(), name="unheard_of", reads=("moonlight",))

    monkeypatch.setitem(lessons.__globals__, "presets", lambda: {"unheard_of": unheard_of})
    with pytest.raises(LossInputError, match=r"unheard_of: expected a world that says where it leads.*others\.py"):
        lessons("unheard_of")
    with pytest.raises(LossInputError, match=r"columns of the world bandit, got moonlight.*world\.py"):
        learn(unheard_of(), bandit, 1)


FATAL = (
    *("sign-flipped", "advantage-sign-lost", "penalty-sign", "kl-sign", "entropy-sign", "reference-misused"),
    *("no-gradient", "gradient-missing", "detached-term", "kl-detached", "side-detached"),
    *("sides-swapped", "pair-layout", "label-ignored", "class-weights-swapped"),
)
"""Bugs of a wrong sign, of a lost gradient, and of swapped sides."""


def fails(lesson: Lesson, loss_fn: Any) -> bool:
    """Whether a loss does not reach the point, or stops the steps by an error."""
    try:
        return not lesson.holds(loss_fn)
    except (LossInputError, ArithmeticError):
        return True


def assert_fails(bug: str, name: str, lessons_of_name: list[Lesson]) -> None:
    """The mutant has the settings of each lesson in which the loss is the preset itself. It fails one of them."""
    own = [lesson for lesson in lessons_of_name if lesson.loss.name == name]
    for lesson in own:
        knobs = {k: getattr(x, "name", getattr(x, "__name__", x)) for k, x in lesson.loss.knobs.items()}
        if fails(lesson, mutant(bug, name, **{k: x for k, x in knobs.items() if x is not None})):
            return
    raise AssertionError(f"{name} with {bug} passes {len(own)} lessons")


@pytest.mark.repeated
def test_a_loss_with_a_wrong_sign_or_a_lost_gradient_or_a_swapped_side_fails() -> None:
    for bug, name in (
        ("sign-flipped", "ppo"),
        ("no-gradient", "cross_entropy"),
        ("kl-sign", "grpo"),
        ("penalty-sign", "dro"),
        ("sides-swapped", "dpo"),
        ("detached-term", "orpo"),
    ):
        assert_fails(bug, name, lessons(name))


@pytest.mark.exhaustive
def test_every_mutant_with_a_wrong_sign_or_a_lost_gradient_or_a_swapped_side_fails() -> None:
    tested = 0
    for name in METHODS:
        known = [] if is_estimator(name) else lessons(name)
        for bug in FATAL:
            if known and settings_showing(bug, name):
                assert_fails(bug, name, known)
                tested += 1
    assert tested >= 500


@pytest.mark.exhaustive
def test_wrong_losses_of_the_field_fail() -> None:
    """They are wrong copies of these presets, or of divergences from a teacher. Their metrics and batches differ."""
    for name, bug, like in (
        ("dft", "sign-flipped", "dft"),
        ("hard_tokens", "detached-term", "focal"),
        ("kto", "label-ignored", "kto"),
        ("kto", "sides-swapped", "kto"),
        ("reverse_kl", "kl-sign", "sampled_reverse_kl"),
        ("k2", "kl-sign", "sampled_reverse_kl"),
    ):
        assert fails(lessons(like)[0], field.WRONG[name, bug]), (name, bug)


# Steps


def test_a_natural_step_adds_the_reward_to_the_logits() -> None:
    """On-policy: g = π·(r − V), so θ + η·g/π = θ + η·r up to a constant. The loss divides by one token for each arm."""
    path = learn(reinforce(), bandit, 3, rate=0.25)
    assert distance(path[-1], (tilted(bandit.start[0], bandit.rewards, 1 / 0.75),)) < 1e-7


def test_a_loss_divides_by_its_expected_denominator() -> None:
    """In the tree a sequence has 0.6·1 + 0.4·2 = 1.4 tokens. The mean over tokens is 1 / 1.4 of the sum of a sequence,
    although the batch holds each sequence once."""
    by_token, by_sequence = (
        Enumerated.of(reinforce(weigh=weigh), tree).natural_gradient(tree.start)
        for weigh in (token_mean, sequence_sum_mean)
    )
    for one, other in zip(by_token[0] + by_token[1], by_sequence[0] + by_sequence[1]):
        assert 1.4 * one == pytest.approx(other, abs=1e-7)


def test_the_expected_gradient_is_that_of_the_expected_reward() -> None:
    """∂V/∂θ by differences of V, at both nodes, times −1 and over the probability to be there and that of the token."""
    direction = Enumerated.of(importance_sampling(weigh="sequence_sum_mean"), tree).natural_gradient(tree.start)
    for node, row in enumerate(tree.start):
        for token in range(2):
            values = []
            for h in (1e-5, -1e-5):
                logits = [math.log(p) + h * (t == token) for t, p in enumerate(row)]
                moved = list(tree.start)
                moved[node] = tilted([1, 1], logits, 1.0)
                values.append(tree.value(tuple(moved)))
            slope = (values[0] - values[1]) / 2e-5
            assert direction[node][token] * row[token] * (1.0, 0.4)[node] == pytest.approx(-slope, abs=1e-6)


def test_groups_of_two_halve_the_gradient_of_centred_rewards() -> None:
    """The advantage r − (r + r') / 2 = (r − r') / 2 has the expectation (r − V) / 2."""
    groups = in_twos(bandit.units(bandit, bandit.start))
    assert sum(unit.probability for unit in groups) == pytest.approx(1) and len(groups) == 9
    mean = [0.0] * 3
    for unit in groups:
        for i, a in zip(unit.members, group_advantages([bandit.rewards[i] for i in unit.members], [0, 0], "none")):
            mean[i] += unit.probability * float(a) / 2
    for i, p in enumerate(bandit.start[0]):
        assert mean[i] == pytest.approx(p * (bandit.rewards[i] - bandit.value(bandit.start)) / 2)


# Points


def penalised_value(p: Any, beta: float, reverse: bool) -> float:
    """Σ p·r − β·KL(p‖ref), or with KL(ref‖p)."""
    pairs = list(zip(p, bandit.ref[0]))
    kl = sum(x * math.log(x / q) for x, q in pairs) if reverse else sum(q * math.log(q / x) for x, q in pairs)
    return sum(x * r for x, r in zip(p, bandit.rewards)) - beta * kl


@pytest.mark.parametrize("reverse", [True, False])
def test_the_optima_with_a_kl_are_better_than_all_around_them(reverse: bool) -> None:
    best = (tilted if reverse else towards_reference)(bandit.ref[0], bandit.rewards, BETA)
    assert sum(best) == pytest.approx(1)
    for i in range(3):
        for h in (1e-3, -1e-3):
            moved = [p + h * (j == i) - h * (j == (i + 1) % 3) for j, p in enumerate(best)]
            assert penalised_value(moved, BETA, reverse) < penalised_value(best, BETA, reverse)


def test_without_a_length_bias_the_tree_rests_at_the_exponential_of_the_value() -> None:
    """π(a) / π(b) = ref(a) / ref(b) · exp((r_a − Q) / β), Q the value of the second node."""
    first, second = two_token_tree((tree.ref[0], tree.ref[1]), tree.rewards, BETA, (1, 1), (1, 1))
    q = second[0] * tree.rewards[1] + second[1] * tree.rewards[2]
    odds = tree.ref[0][0] / tree.ref[0][1] * math.exp((tree.rewards[0] - q) / BETA)
    assert first[0] / first[1] == pytest.approx(odds)


def test_a_mean_over_sequences_of_means_over_tokens_leads_elsewhere() -> None:
    """The reference writes the short answer, the rewards ask for a long one, whose penalty is halved."""
    ends = [learn(with_kl(reinforce(weigh=weigh), BETA, k2), tree, 12)[-1] for weigh in (token_mean, sequence_mean)]
    assert ends[1][0][0] < ends[0][0][0] - 0.02
    assert distance(ends[0][1:], ends[1][1:]) < CLOSE


def test_a_root_is_found_whatever_its_direction() -> None:
    assert root(lambda x: x - 0.25, 0, 1) == pytest.approx(0.25) == root(lambda x: 0.25 - x, 0, 1)


def test_dpo_by_hand() -> None:
    """β·(log(p / 0.6) − log((1 − p) / 0.4)) = 0.8, so that log(p / (1 − p)) = 0.8 / 0.5 + log 1.5."""
    end = learn(dpo(beta=0.5), answers, 12)[-1]
    assert end[0][0] == pytest.approx(1 / (1 + math.exp(-1.6) / 1.5), abs=1e-6)


def test_ppo_stops_on_fixed_samples_and_continues_on_new_ones() -> None:
    fixed = learn(ppo(), two_arms, 20, rate=0.1)[-1]
    anew = learn(ppo(), replace(two_arms, old=None), 20, rate=0.1)[-1]
    assert 0.6 <= fixed[0][0] < 0.63 and anew[0][0] > 0.85


def test_a_kl_of_weight_0_is_none() -> None:
    assert distance(learn(grpo(kl_beta=0), bandit, 3, rate=1.0)[-1], learn(ppo(), bandit, 3, rate=1.0)[-1]) < 1e-12


def test_sequences_are_drawn_with_the_probability_of_their_tokens() -> None:
    units = corpus.units(corpus, corpus.old or corpus.start)
    assert [round(unit.probability, 12) for unit in units] == [0.3, 0.56, 0.14]
    assert corpus.visits(corpus.start, 1) == pytest.approx(0.4) and corpus.visits(corpus.start, 0) == pytest.approx(1)


@pytest.mark.exhaustive
def test_the_picture_is_drawn(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds_tool, "PICTURE", tmp_path / "worlds.png")
    worlds_tool.picture()
    assert (tmp_path / "worlds.png").read_bytes().startswith(b"\x89PNG")
    assert next(worlds_tool.table()).split()[0] in presets()
    assert worlds_tool.spaced([0.5, 0.5, 1.0]) == pytest.approx([0.5, 0.585, 1.0])


# Advice


def test_advice_names_the_point() -> None:
    said = advice(ppo(clip=(0.7, 1.3)), "policy")
    assert said[0].endswith("to 0.00 1.00 0.00, the best arm") and "ratios are 1.3" in said[1]
    assert "gain alike" in said[2]
    assert "the shorter gains more" in advice(reinforce(weigh=sequence_mean), "policy")[2]
    assert "is a sign wrong?" in advice(mutant("sign-flipped", "ppo"), "policy")[0]
    assert all("is there a gradient?" in line for line in advice(mutant("no-gradient", "ppo"), "policy")[:2])
    assert "are the sides exchanged?" in advice(mutant("sides-swapped", "dpo"), "preference")[0]
    assert "DPO with beta = 0.3" in advice(dpo(beta=0.3), "preference")[0]
    assert "the mode of the data" in advice(field.CORRECT["reweighted"]["dft"], "reweighted")[0]
    assert "all to the desirable answer" in advice(field.CORRECT["unpaired"]["kto"], "unpaired")[0]
    assert "are the labels exchanged?" in advice(field.WRONG["kto", "sides-swapped"], "unpaired")[0]


@pytest.mark.exhaustive
def test_advice_is_given_for_every_correct_loss_of_the_field() -> None:
    for kind, losses in field.CORRECT.items():
        for name, loss_fn in losses.items():
            said = advice(loss_fn, kind)
            assert bool(said) == (kind != "advantages"), name
            assert not any("?" in line for line in said) or name == "samples of the teacher", (name, said)
    assert not any(advice(reinforce(), kind) for kind in KINDS if kind in ("any", "advantages"))


def test_the_command_says_what_a_loss_learns(capsys: pytest.CaptureFixture[str]) -> None:
    for subject, status, says in (
        ("lossfns.testing.mutants:cross_entropy_sign_flipped", 1, "which is none of the usual points"),
        ("lossfns:group_advantages", 0, "there is no world for advantages"),
    ):
        assert main(["check", subject, "--learns", "--examples", "0", "--json", "-"]) == status
        report = json.loads(capsys.readouterr().out)
        assert any(says in line for line in report["learns"]), report["learns"]


def test_advice_changes_no_verdict(tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """A likelihood that refuses the batch of a world is right, and its report says why there is no advice."""
    text = """
from lossfns import cross_entropy
def loss(data, logprobs_list):
    if any("teacher_logprobs" in datum.loss_fn_inputs for datum in data):
        raise ValueError("a column that I do not know")
    return cross_entropy()(data, logprobs_list)
loss.kind = "likelihood"
"""
    (tmp_path / "mine.py").write_text(text)
    assert main(["check", f"{tmp_path}/mine.py:loss", "--learns", "--examples", "0"]) == 0
    out = capsys.readouterr().out
    assert "learns: it does not run in the worlds: ValueError: a column that I do not know" in out
    assert main(["check", f"{tmp_path}/mine.py:loss", "--examples", "0"]) == 0
    assert "learns" not in capsys.readouterr().out
