"""Every estimator of samples: numbers worked on paper, the oracle, and what must not change an advantage."""

import math
import random
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

import lossfns
from lossfns import LossInputError, LossWarning
from lossfns.testing import oracle

near = pytest.approx


def call(name: str, **arguments: Any) -> list[float]:
    """The advantages as a list; always float64. A warning about groups of one is expected somewhere, not here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossWarning)
        result = getattr(lossfns, name)(**arguments)
    assert result.dtype == torch.float64
    values: list[float] = result.tolist()
    return values


SCALING = {"eps": (1e-6, 1e-4), "ddof": (1, 0)}
ALONE = {"group_of_one": ("zero", "reward")}
KNOBS: dict[str, dict[str, tuple[Any, ...]]] = {
    "group_advantages": {"scale": ("std", "none", "batch"), **SCALING, **ALONE},
    "leave_one_out_advantages": ALONE,
    "opo_advantages": ALONE,
    "pass_at_k_advantages": {"scale": ("none", "std"), **SCALING},
    "maxrl_advantages": {"eps": (0.0, 1e-6), **ALONE},
    "gpg_advantages": {"alpha": ("signal", "nonzero"), "scale": ("none", "std"), **SCALING, **ALONE},
    "asymre_advantages": {"shift": (-0.1, 0.25), **ALONE},
    "batch_advantages": SCALING,
    "reinforce_plus_plus_baseline_advantages": {**SCALING, **ALONE},
    "remax_advantages": {},
    "gdpo_advantages": SCALING,
}
"""The settings of each estimator of samples that takes ``missing``."""


def settings(name: str) -> Iterator[dict[str, Any]]:
    """Every combination of the settings of an estimator."""
    for values in product(*KNOBS[name].values()):
        yield dict(zip(KNOBS[name], values, strict=True))


def draw(name: str, seed: int, missing: bool = False) -> dict[str, Any]:
    """Rewards of interleaved groups: one of five samples, one of equal rewards, one of one, one of two."""
    rng = random.Random(seed)
    groups = list("aaaaabbbcdd")
    rng.shuffle(groups)

    def reward(group: str) -> float | None:
        if missing and rng.random() < 0.25:
            return None
        return {"b": 0.7, "c": 2.0}.get(group) or rng.choice([0.0, 1.0, rng.uniform(0, 5)])

    rewards: list[Any] = [reward(group) for group in groups]
    if name == "gdpo_advantages":
        rewards = [[r, reward(g), reward(g)] for r, g in zip(rewards, groups)]
    if missing and all(r is None for r in rewards):
        rewards[0] = 1.0
    lengths = [rng.choice([0, 1, 3, 7]) if g == "a" else rng.choice([2, 5]) for g in groups]
    if name == "opo_advantages" and not any(
        n and r is not None for n, r, g in zip(lengths, rewards, groups) if g == "a"
    ):
        lengths = [n + 1 for n in lengths]
    given: dict[str, Any] = {"rewards": rewards, "groups": groups}
    if name == "opo_advantages":
        given["lengths"] = lengths
    if name == "gdpo_advantages":
        given["reward_weights"] = [1.0, 0.5, -2.0]
    if name in ("batch_advantages", "reinforce_plus_plus_baseline_advantages", "gdpo_advantages") and seed % 2:
        given["lengths"] = [n + 1 for n in lengths]
    if name == "remax_advantages":
        given["greedy_rewards"] = [reward(group) for group in groups]
    if name in ("remax_advantages", "batch_advantages"):
        del given["groups"]
    return given


@pytest.mark.parametrize("missing", [False, True], ids=["all rewards", "some missing"])
def test_every_estimator_is_the_oracles_with_every_setting(missing: bool) -> None:
    for name, seed in product(KNOBS, range(4)):
        given = draw(name, seed, missing)
        for knobs in settings(name):
            expected = getattr(oracle, name)(**given, **knobs)
            found = call(name, **given, **knobs, **({"missing": "abstain"} if missing else {}))
            assert found == near(expected, rel=1e-11, abs=1e-12), (name, seed, knobs)


def test_every_setting_has_an_effect() -> None:
    for name, knobs in KNOBS.items():
        given = draw(name, 0)
        for knob, values in knobs.items():
            answers = [call(name, **given, **{knob: value}) for value in values]
            if knob == "eps":
                answers = [call(name, **given, **({"scale": "std"} if "scale" in knobs else {}), eps=e) for e in values]
            if knob == "ddof" and "scale" in knobs:
                answers = [call(name, **given, scale="std", ddof=d) for d in values]
            assert all(x != y for i, x in enumerate(answers) for y in answers[:i]), (name, knob)


# By hand


def test_batch_scale_by_hand() -> None:
    """Rewards 1, 3 | 2, 10: mean 4, squares 9 + 1 + 4 + 36 = 50, std √(50/3); deviations in the groups ∓1 and ∓4."""
    expected = [d / (math.sqrt(50 / 3) + 1e-6) for d in (-1, 1, -4, 4)]
    assert call("group_advantages", rewards=[1, 3, 2, 10], groups="aabb", scale="batch") == near(expected, rel=1e-14)


def test_leave_one_out_by_hand() -> None:
    """(1, 2, 6): others' means 4, 3.5, 1.5. It is 3/2 of the deviations from the mean 3: −2, −1, 3."""
    assert call("leave_one_out_advantages", rewards=[1, 2, 6], groups="aaa") == [-3.0, -1.5, 4.5]


def test_opo_by_hand() -> None:
    """Lengths 1, 2, 5 and rewards 8, 0, 0: baseline 8/8 = 1. With equal lengths it is the mean."""
    assert call("opo_advantages", rewards=[8, 0, 0], groups="aaa", lengths=[1, 2, 5]) == [7.0, -1.0, -1.0]
    given = {"rewards": [8, 1, 0], "groups": "aaa"}
    assert call("opo_advantages", **given, lengths=[4, 4, 4]) == call("group_advantages", **given, scale="none")


def test_opo_has_the_least_variance_of_all_constant_baselines() -> None:
    """Σ l·(r − b)² has the derivative −2·Σ l·(r − b), which is 0 at b = Σ l·r / Σ l."""
    rewards, lengths = [1.0, 0.25, -2.0], [1.0, 4.0, 2.0]
    advantages = call("opo_advantages", rewards=rewards, groups="aaa", lengths=lengths)
    assert math.fsum(n * a for n, a in zip(lengths, advantages)) == near(0, abs=1e-14)


def test_pass_at_k_by_hand() -> None:
    """The best of (0, 3, 1) is 3; without it 1 is the best. Where two share the best, neither is missed."""
    assert call("pass_at_k_advantages", rewards=[0, 3, 1], groups="aaa") == [0.0, 2.0, 0.0]
    assert call("pass_at_k_advantages", rewards=[3, 3, 1], groups="aaa") == [0.0, 0.0, 0.0]
    assert call("pass_at_k_advantages", rewards=[-2, -1, 5, 4], groups="abab") == [0.0, 0.0, 7.0, 5.0]


def test_pass_at_k_is_an_unbiased_gradient_of_the_expected_maximum() -> None:
    """Two actions, rewards 1 and 0, p = P(1), two samples: E max = 1 − (1 − p)², whose derivative is 2(1 − p).

    The estimate is Σᵢ Aᵢ·∂log p(aᵢ)/∂p, averaged over the four outcomes.
    """
    p, estimate = 0.3, 0.0
    for actions in product((1, 0), repeat=2):
        probability = math.prod(p if a else 1 - p for a in actions)
        scores = [1 / p if a else -1 / (1 - p) for a in actions]
        advantages = call("pass_at_k_advantages", rewards=actions, groups="qq")
        estimate += probability * math.fsum(a * s for a, s in zip(advantages, scores))
    assert estimate == near(2 * (1 - p), rel=1e-14)


def test_maxrl_by_hand_and_is_the_gradient_of_the_truncated_likelihood() -> None:
    """One success in four: (1 − ¼)/¼ = 3 and −1.

    For rewards 0 and 1, E of (1/n)·Σ A·∂log p(a)/∂p over n samples is the derivative of Σ_{k=1}^{n−1} −(1 − p)ᵏ/k, the
    expansion of log p up to the order n − 1: the sample itself is in the mean. It is Σ_{k<n−1} (1 − p)ᵏ.
    """
    assert call("maxrl_advantages", rewards=[0, 1, 0, 0], groups="aaaa") == [-1.0, 3.0, -1.0, -1.0]
    n, p, estimate = 4, 0.3, 0.0
    for actions in product((1, 0), repeat=n):
        probability = math.prod(p if a else 1 - p for a in actions)
        scores = [1 / p if a else -1 / (1 - p) for a in actions]
        advantages = call("maxrl_advantages", rewards=actions, groups="q" * n)
        estimate += probability * math.fsum(a * s for a, s in zip(advantages, scores)) / n
    assert estimate == near(math.fsum((1 - p) ** k for k in range(n - 1)), rel=1e-13)


def test_gpg_by_hand() -> None:
    """Two of six samples are in a constant group: α = 6/4. Three rewards are not 0: verl's α = 6/3."""
    given = {"rewards": [1, 0, 5, 5, 0, 0], "groups": "aabbaa"}
    assert call("gpg_advantages", **given) == near([1.125, -0.375, 0, 0, -0.375, -0.375])
    assert call("gpg_advantages", **given, alpha="nonzero") == near([1.5, -0.5, 0, 0, -0.5, -0.5])


def test_gpg_keeps_the_scale_of_the_mean() -> None:
    """The mean of |A| over a batch is that over its groups with a signal, however many constant groups are added."""
    plain = call("gpg_advantages", rewards=[1, 0], groups="aa")
    padded = call("gpg_advantages", rewards=[1, 0, *[3] * 6], groups="aabbbccc")
    assert sum(map(abs, padded)) / 8 == near(sum(map(abs, plain)) / 2)


def test_asymre_shifts_every_advantage_by_a_tenth() -> None:
    assert call("asymre_advantages", rewards=[1, 0], groups="aa") == near([0.6, -0.4])
    assert call("asymre_advantages", rewards=[0.7] * 3, groups="aaa") == near([0.1] * 3)


def test_remax_by_hand() -> None:
    assert call("remax_advantages", rewards=[1, 0, 2], greedy_rewards=[1, 1, 0.5]) == [0.0, -1.0, 1.5]


def test_batch_by_hand() -> None:
    """(1, 5) with lengths 3 and 1: mean 8/4 = 2, variance (3·1 + 9)/4 = 3. Without lengths: mean 3, std 2."""
    given: dict[str, Any] = {"rewards": [1, 5], "eps": 1e-12}
    assert call("batch_advantages", **given) == near([-1, 1])
    assert call("batch_advantages", **given, lengths=[3, 1]) == near([-1 / math.sqrt(3), 3 / math.sqrt(3)])


def test_reinforce_plus_plus_baseline_by_hand() -> None:
    """Deviations ∓1 and ∓2: variance (1 + 1 + 4 + 4)/3 = 10/3 over the batch."""
    found = call("reinforce_plus_plus_baseline_advantages", rewards=[1, 3, 2, 6], groups="aabb")
    assert found == near([x / math.sqrt(10 / 3) for x in (-1, 1, -2, 2)], rel=1e-8)


def test_gdpo_by_hand_tells_apart_what_the_sum_does_not() -> None:
    """Rewards (0, 1), (0, 2) and (1, 2) of two prompts have sums 1, 2 | 1, 3.

    GRPO gives both pairs ∓1/√2. GDPO: the first prompt differs in one reward, the second in two, z = ∓1/√2 of each.
    Sums ∓1/√2 and ∓√2 over their deviation √((1 + 4)/3) are ∓√0.3 and ∓√1.2.
    """
    rewards, groups = [[0, 1], [0, 2], [0, 1], [1, 2]], "aabb"
    summed = call("group_advantages", rewards=[1, 2, 1, 3], groups=groups)
    assert summed[1] == near(summed[3], rel=1e-5) == near(math.sqrt(0.5), rel=1e-5)
    expected = [-math.sqrt(0.3), math.sqrt(0.3), -math.sqrt(1.2), math.sqrt(1.2)]
    assert call("gdpo_advantages", rewards=rewards, groups=groups) == near(expected, rel=1e-5)


def test_rae_by_hand() -> None:
    """Decay ½ from 0. Role a: 1 → b ½, then 3 → b 1¾. Updated: A = ½ and 1¼; previous: A = 1 and 2½."""
    given: dict[str, Any] = {"rewards": [1.0, -1.0, 3.0], "roles": "aba", "baselines": {}, "decay": 0.5}
    advantages, baselines = lossfns.rae_advantages(**given)
    assert (advantages.tolist(), baselines) == ([0.5, -0.5, 1.25], {"a": 1.75, "b": -0.5})
    advantages, after = lossfns.rae_advantages(**given, baseline="previous")
    assert (advantages.tolist(), after) == ([1.0, -1.0, 2.5], baselines)


def test_rae_has_no_state_but_the_one_it_returns() -> None:
    """Two calls, with the baselines handed on, are one call. Neither changes its argument."""
    rewards, roles, start = [1.0, 0.5, -2.0, 3.0], "abab", {"a": 0.25}
    whole, end = lossfns.rae_advantages(rewards, roles, start)
    first, between = lossfns.rae_advantages(rewards[:2], roles[:2], start)
    second, after = lossfns.rae_advantages(rewards[2:], roles[2:], between)
    assert torch.equal(torch.cat([first, second]), whole) and after == end
    assert start == {"a": 0.25} and set(between) == {"a", "b"}
    skipped, same = lossfns.rae_advantages([None, 1.0], "ab", start, missing="abstain")
    assert skipped[0] == 0 and same == {"a": 0.25, "b": near(0.05)}


def test_hierarchical_by_hand() -> None:
    """Solvers of episode 1 have the mean ½, of episode 2 the mean 1; proposers of the group ¼."""
    roles = ["proposer", "solver", "solver", "proposer", "solver", "solver"]
    rewards, episodes = [0.5, 1, 0, 0, 1, 1], [1, 1, 1, 2, 2, 2]
    given: dict[str, Any] = {"rewards": rewards, "groups": "qqqqqq", "episodes": episodes, "roles": roles}
    assert call("hierarchical_advantages", **given) == [0.25, 0.5, -0.5, -0.25, 0.0, 0.0]
    everyone = call("hierarchical_advantages", **given, episode_roles=())
    assert everyone == [0.25, 0.25, -0.75, -0.25, 0.25, 0.25]


def test_gigpo_by_hand() -> None:
    """Episode 1 of rewards 0, 1 in the states s, t; episode 2 of reward 0 in s. γ = ½, no scale.

    Totals 1 and 0: A_E = ±½. Returns 0 + ½·1 = ½ and 1 | 0. In s: ½ and 0, so A_S = ±¼; t occurs once.
    """
    given: dict[str, Any] = {"rewards": [0, 1, 0], "groups": "qqq", "episodes": [1, 1, 2], "states": "sts"}
    assert call("gigpo_advantages", **given, gamma=0.5, scale="none") == [0.75, 0.5, -0.75]
    assert call("gigpo_advantages", **given, gamma=0.5, scale="none", omega=0.0) == [0.5, 0.5, -0.5]


def test_agents_are_the_oracles() -> None:
    rng = random.Random(0)
    n, warned = 24, {"gamma": (0.95, 1.0, 0.0), "scale": ("std", "none"), "omega": (1.0, 0.25), "ddof": (1, 0)}
    rewards = [rng.choice([0.0, 1.0, rng.uniform(-2, 2)]) for _ in range(n)]
    groups, episodes, states = (rng.choices(word, k=n) for word in ("ab", "xyz", "stuvw"))
    for values in product(*warned.values()):
        knobs = dict(zip(warned, values, strict=True))
        given: dict[str, Any] = {"rewards": rewards, "groups": groups, "episodes": episodes, "states": states, **knobs}
        assert call("gigpo_advantages", **given) == near(oracle.gigpo_advantages(**given), rel=1e-11, abs=1e-12), knobs
    some = [None if rng.random() < 0.2 else r for r in rewards]
    roles = rng.choices(("proposer", "solver", "judge"), k=n)
    for episode_roles in (("solver",), (), ("solver", "judge")):
        given = {"rewards": some, "groups": groups, "episodes": episodes, "roles": roles}
        given["episode_roles"] = episode_roles
        expected = oracle.hierarchical_advantages(**given)
        assert call("hierarchical_advantages", **given, missing="abstain") == near(expected, rel=1e-11, abs=1e-12)
    for baseline, decay in product(("updated", "previous"), (0.95, 0.0, 1.0)):
        given = {"rewards": some, "roles": roles, "baselines": {"judge": 0.5}, "baseline": baseline, "decay": decay}
        found, after = lossfns.rae_advantages(**given, missing="abstain")
        expected, state = oracle.rae_advantages(**given)
        assert found.tolist() == near(expected, rel=1e-12) and after == near(state, rel=1e-12)


# What must not change an advantage

GROUPED = [name for name in KNOBS if name not in ("batch_advantages", "remax_advantages")]
COUPLED = {"gpg_advantages", "reinforce_plus_plus_baseline_advantages", "gdpo_advantages"}
"""Their advantages depend on other groups by a factor alone, or by the statistics of the batch."""


def change(given: dict[str, Any], f: Callable[[float], float]) -> dict[str, Any]:
    rewards = [[f(x) for x in r] if isinstance(r, list) else f(r) for r in given["rewards"]]
    return {**given, "rewards": rewards}


def test_a_constant_that_all_rewards_share_changes_nothing_but_in_maxrl() -> None:
    for name in (name for name in KNOBS if name not in ("maxrl_advantages", "remax_advantages")):
        given, knobs = draw(name, 0), {"alpha": "signal"} if name == "gpg_advantages" else {}
        moved = call(name, **change(given, lambda r: r + 8.0), **knobs)
        assert moved == near(call(name, **given, **knobs), rel=1e-9, abs=1e-10), name
    given = draw("maxrl_advantages", 0)
    assert call("maxrl_advantages", **change(given, lambda r: 4 * r)) == near(call("maxrl_advantages", **given))


def test_order_and_names_of_groups_do_not_matter() -> None:
    for name, seed in product(KNOBS, (0, 1)):
        given = draw(name, seed)
        order = random.Random(seed).sample(range(11), 11)
        moved = {k: [x[i] for i in order] if isinstance(x, list) and len(x) == 11 else x for k, x in given.items()}
        expected = [call(name, **given)[i] for i in order]
        assert call(name, **moved) == near(expected, rel=1e-11, abs=1e-13), name
        if "groups" in given:
            renamed = {**given, "groups": [{"a": 9, "b": None, "c": ("x",), "d": "z"}[g] for g in given["groups"]]}
            assert call(name, **renamed) == call(name, **given), name


def test_a_batch_may_be_split_between_groups_where_no_statistic_couples_them() -> None:
    for name in GROUPED:
        given = draw(name, 0)
        whole = call(name, **given)
        for group in "abcd":
            own = [i for i, g in enumerate(given["groups"]) if g == group]
            part = {k: [x[i] for i in own] if isinstance(x, list) and len(x) == 11 else x for k, x in given.items()}
            alone = call(name, **part)
            factor = 1.0 if name not in COUPLED else sum(whole[i] * a for i, a in zip(own, alone)) / (
                sum(a * a for a in alone) or 1.0
            )  # fmt: skip
            assert [whole[i] for i in own] == near([factor * a for a in alone], rel=1e-5, abs=1e-7), (name, group)


def test_equal_rewards_have_no_advantage_whatever_they_are() -> None:
    """Exactly 0, also beside groups that differ. AsymRE has its shift there, by its definition."""
    for name, reward in product(GROUPED, (0.7, 1 / 3, 1e9, 0.0)):
        if name == "asymre_advantages":
            continue
        rewards: list[Any] = [reward] * 7 + [1.0, 0.0]
        given: dict[str, Any] = {"rewards": rewards, "groups": "aaaaaaabb"}
        if name == "gdpo_advantages":
            given["rewards"] = [[r, r] for r in rewards]
        if name == "opo_advantages":
            given["lengths"] = [3, 1, 4, 1, 5, 9, 2, 6, 5]
        for knobs in settings(name):
            found = call(name, **given, **knobs)
            assert found[:7] == [0.0] * 7 and found[7] > 0 >= found[8], (name, reward, knobs)


def test_a_group_of_one_warns_and_divides_by_nothing() -> None:
    for name in GROUPED:
        given = draw(name, 0)
        i = given["groups"].index("c")
        with np.errstate(all="raise"), pytest.warns(LossWarning, match=f"{name}: a group of one has advantage 0"):
            result = getattr(lossfns, name)(**given)
        assert (result[i] == 0) == (name != "reinforce_plus_plus_baseline_advantages" or "lengths" not in given), name
        if "group_of_one" in KNOBS[name]:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                getattr(lossfns, name)(**given, group_of_one="reward")


# Samples that abstain


def test_a_sample_that_abstains_is_in_no_statistic() -> None:
    """The advantages of the others are those that they have without it, and its own is 0."""
    for name, seed in product(KNOBS, (0, 1)):
        given = draw(name, seed)
        n = len(given["rewards"])
        gone = {1, 4}
        empty: Any = [None] * 3 if name == "gdpo_advantages" else math.nan
        holed = {**given, "rewards": [empty if i in gone else r for i, r in enumerate(given["rewards"])]}
        kept = [i for i in range(n) if i not in gone]
        rest = {k: [x[i] for i in kept] if isinstance(x, list) and len(x) == n else x for k, x in given.items()}
        found = call(name, **holed, missing="abstain")
        assert [found[i] for i in kept] == near(call(name, **rest), rel=1e-12, abs=1e-13), name
        assert [found[i] for i in gone] == [0.0, 0.0], name


def test_nobody_abstains_unasked() -> None:
    for name in KNOBS:
        given = draw(name, 0, missing=True)
        with pytest.raises(LossInputError, match=r'expected a finite number, got nan.*missing="abstain"'):
            getattr(lossfns, name)(**given)
        for bad in (math.inf, -math.inf):
            rewards = [[bad] * 3 if name == "gdpo_advantages" else bad, *given["rewards"][1:]]
            with pytest.raises(LossInputError, match=r"rewards\[0.*expected a finite number, got -?inf"):
                getattr(lossfns, name)(**{**given, "rewards": rewards}, missing="abstain")


def test_a_batch_of_abstentions_is_refused() -> None:
    with pytest.raises(LossInputError, match="a reward for at least one sample, got none"):
        lossfns.group_advantages([None, None], "aa", missing="abstain")


def test_gdpo_leaves_out_the_missing_reward_alone() -> None:
    """As TRL's nansum: sample 3 has no second reward, so its sum is its first z, and the second z is of the others."""
    rewards: list[Any] = [[1, 5], [0, 7], [2, None]]
    first = call("group_advantages", rewards=[1, 0, 2], groups="aaa")
    second = [*call("group_advantages", rewards=[5, 7], groups="aa"), 0.0]
    sums = [x + y for x, y in zip(first, second)]
    expected = call("batch_advantages", rewards=sums, ddof=1)
    assert call("gdpo_advantages", rewards=rewards, groups="aaa", missing="abstain") == near(expected, rel=1e-12)


def test_groups_with_signal_are_kept_or_removed_as_a_whole() -> None:
    """Of the groups a (1, 3), b (2, 2), c (7) and d (0, none, 1), a and d stay; in d one sample abstains."""
    rewards, groups = [1, 2, 7, 3, 2, 0, None, 1], list("abcabddd")
    kept = lossfns.groups_with_signal(rewards, groups, missing="abstain")
    assert kept.dtype == torch.bool
    assert kept.nonzero().flatten().tolist() == [0, 3, 5, 7]
    metrics = lossfns.group_metrics(rewards, groups, missing="abstain")
    assert metrics == {
        "reward": 16 / 7, "groups": 4.0, "groups_constant": 0.5, "groups_of_one": 0.25, "abstained": 1.0
    }  # fmt: skip
    with pytest.raises(LossInputError, match=r"rewards\[6\]"):
        lossfns.groups_with_signal(rewards, groups)


def test_advantages_of_the_kept_samples_are_unchanged() -> None:
    """Removing groups without signal changes no advantage of the others, so no gradient but its denominator."""
    given = draw("group_advantages", 3)
    kept = lossfns.groups_with_signal(**given).nonzero().flatten().tolist()
    part = {name: [values[i] for i in kept] for name, values in given.items()}
    whole = call("group_advantages", **given)
    assert call("group_advantages", **part) == near([whole[i] for i in kept], rel=1e-12)
    assert [a for i, a in enumerate(whole) if i not in kept] == [0.0] * (11 - len(kept))


# Refusals


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("group_advantages", {"scale": "grouped"}, "scale: expected 'std' or 'none' or 'batch'"),
        ("group_advantages", {"eps": 0.0}, "eps: expected a finite number above 0"),
        ("group_advantages", {"ddof": 2}, "ddof: expected 0 or 1, got 2"),
        ("group_advantages", {"ddof": True}, "ddof: expected 0 or 1, got True"),
        ("group_advantages", {"group_of_one": "keep"}, "group_of_one: expected 'zero' or 'reward'"),
        ("group_advantages", {"missing": "drop"}, "missing: expected 'refuse' or 'abstain'"),
        ("opo_advantages", {"lengths": [1, 2]}, "lengths: expected 3 numbers of at least 0, got 2 numbers"),
        ("opo_advantages", {"lengths": [1, -1, 1]}, "lengths: expected 3 numbers of at least 0, got -1"),
        ("opo_advantages", {"lengths": [0, 0, 1]}, "lengths: expected an active token in each group, got a group with"),
        ("opo_advantages", {"lengths": [1, None, 1]}, r"lengths\[1\]: expected a finite number, got nan"),
        ("maxrl_advantages", {"rewards": [1, -0.5, 0]}, r"rewards\[1\]: expected a number of at least 0, got -0.5"),
        ("maxrl_advantages", {"eps": -1e-6}, "eps: expected a finite number of at least 0"),
        ("pass_at_k_advantages", {"scale": "batch"}, "scale: expected 'none' or 'std'"),
        ("gpg_advantages", {"alpha": "all"}, "alpha: expected 'signal' or 'nonzero'"),
        ("asymre_advantages", {"shift": math.inf}, "shift: expected a finite number"),
        ("gdpo_advantages", {"rewards": [1.0, 2.0, 3.0]}, r"rewards: expected \[B, R\] numbers: one row of R rewards"),
        ("gdpo_advantages", {"rewards": [[1], [2], [3]], "reward_weights": [1, 2]}, "reward_weights: expected 1"),
        ("hierarchical_advantages", {"episodes": [1], "roles": "abc"}, "episodes: expected 3 labels, one per reward"),
        ("hierarchical_advantages", {"episodes": "aab", "roles": "abc", "episode_roles": "a"}, "a tuple of roles"),
        ("gigpo_advantages", {"episodes": "aab", "states": "ab"}, "states: expected 3 labels, one per reward"),
        ("gigpo_advantages", {"episodes": "aab", "states": "abc", "gamma": 1.5}, r"gamma: expected a number in"),
    ],
)  # fmt: skip
def test_what_is_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LossInputError, match=message):
        call(name, **{"rewards": [1.0, 0.0, 2.0], "groups": "aab", **arguments})


def test_rae_and_remax_and_batch_refuse() -> None:
    for arguments, message in [
        ({"rewards": [1.0], "roles": "a", "baselines": None}, "baselines: expected a mapping from role to number"),
        ({"rewards": [1.0], "roles": "a", "baselines": {"a": math.nan}}, r"baselines\['a'\]: expected a finite number"),
        ({"rewards": [1.0], "roles": "ab", "baselines": {}}, "roles: expected 1 labels, one per reward"),
        ({"rewards": [1.0], "roles": "a", "baselines": {}, "decay": 2}, r"decay: expected a number in \[0, 1\]"),
        ({"rewards": [1.0], "roles": "a", "baselines": {}, "baseline": "old"}, "baseline: expected 'updated' or"),
    ]:
        with pytest.raises(LossInputError, match=message):
            lossfns.rae_advantages(**arguments)  # type: ignore[arg-type]
    with pytest.raises(LossInputError, match="greedy_rewards: expected 2 numbers, one per reward, got 1 numbers"):
        lossfns.remax_advantages([1.0, 2.0], [1.0])
    with pytest.raises(LossInputError, match="lengths: expected a sample with an active token, got none"):
        lossfns.batch_advantages([1.0, 2.0], lengths=[0, 0])
