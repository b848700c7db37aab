"""Group advantages: numbers worked on paper, and the laws they obey."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from lossfns import LossInputError, LossWarning, group_advantages, group_metrics
from lossfns.testing import oracle

EPS = 1e-6


def advantages(rewards: Any, groups: Any, scale: str = "std") -> list[float]:
    """As a list; always float64."""
    result = group_advantages(rewards, groups, scale)
    assert result.dtype == torch.float64
    return result.tolist()


def draws(seed: int, count: int = 20) -> tuple[list[float], list[str]]:
    """Rewards of four interleaved groups with two samples at least."""
    rng = random.Random(seed)
    groups = [*"aabbccdd", *rng.choices("abcd", k=count - 8)]
    rng.shuffle(groups)
    return [rng.uniform(-5, 5) for _ in groups], groups


def test_one_group_by_hand() -> None:
    """(1, 2, 3, 6): mean 3, deviations (−2, −1, 0, 3), variance (4 + 1 + 0 + 9)/3 = 14/3 with ddof 1."""
    std = math.sqrt(14 / 3)
    expected = [d / (std + EPS) for d in (-2, -1, 0, 3)]
    assert advantages([1, 2, 3, 6], [0, 0, 0, 0]) == pytest.approx(expected, rel=1e-12)


def test_ddof_is_one() -> None:
    """Of (0, 1): deviations ±½, variance 2·¼/1 = ½, so ±½/√½ = ±1/√2; with ddof 0 it would be ±1."""
    assert advantages([0.0, 1.0], "aa") == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=2e-6)


def test_without_scale_only_the_mean_is_taken_off() -> None:
    """(1, 2, 3, 6) less 3, to the last bit."""
    assert advantages([1, 2, 3, 6], [0, 0, 0, 0], scale="none") == [-2.0, -1.0, 0.0, 3.0]


def test_interleaved_groups_do_not_mix() -> None:
    """a = (1, 3) has mean 2, b = (10, 20, 30) mean 20."""
    result = advantages([1, 10, 20, 3, 30], ["a", "b", "b", "a", "b"], scale="none")
    assert result == [-1.0, -10.0, 0.0, 1.0, 10.0]


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("reward", [0.7, 0.1, 1 / 3, -1e9, 1e-30, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_no_advantage(reward: float, dtype: torch.dtype, scale: str) -> None:
    """Exactly 0, although the mean of eight times 0.7 need not be 0.7 and the deviation is then no true 0."""
    assert advantages(torch.full((8,), reward, dtype=dtype), [0] * 8, scale) == [0.0] * 8


def test_a_constant_group_does_not_touch_the_others() -> None:
    result = advantages([0.7, 0.0, 0.7, 1.0, 0.7], ["a", "b", "a", "b", "a"])
    assert [result[i] for i in (0, 2, 4)] == [0.0] * 3
    assert [result[1], result[3]] == advantages([0.0, 1.0], [0, 0])


@pytest.mark.parametrize("scale", ["std", "none"])
def test_a_group_of_one_has_no_advantage_and_says_so(scale: str) -> None:
    with pytest.warns(LossWarning, match="a group of one has advantage 0") as caught:
        result = advantages([5.0, 1.0, 3.0], ["lone", "a", "a"], scale)
    assert len(caught) == 1
    assert result[0] == 0.0
    assert result[1] == -result[2] != 0


def test_a_group_of_one_divides_by_nothing() -> None:
    """Its deviation has no degree of freedom; no 0/0 is computed on the way, not even one that is masked after."""
    with np.errstate(all="raise"), pytest.warns(LossWarning):
        assert advantages([5.0, 1.0, 3.0], ["lone", "a", "a"])[0] == 0.0


def test_a_rare_success_keeps_its_scale() -> None:
    """One success in four: mean ¼, variance (9/16 + 3/16)/3 = ¼, so 3/4 and −1/4 over ½ are 1.5 and −0.5."""
    assert advantages([0, 0, 1, 0], "qqqq") == pytest.approx([-0.5, -0.5, 1.5, -0.5], rel=3e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", ["std", "none"])
def test_the_oracle_agrees(seed: int, scale: str) -> None:
    rewards, groups = draws(seed)
    if scale == "std":
        assert advantages(rewards, groups) == pytest.approx(
            oracle.group_advantages(rewards=rewards, groups=groups), rel=1e-9, abs=1e-12
        )
    for group in set(groups):
        own = [r for r, g in zip(rewards, groups) if g == group]
        mean = math.fsum(own) / len(own)
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in own) / (len(own) - 1)) + EPS if scale == "std" else 1.0
        found = [a for a, g in zip(advantages(rewards, groups, scale), groups) if g == group]
        assert found == pytest.approx([(r - mean) / std for r in own], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_laws(seed: int) -> None:
    """Mean 0 and deviation 1 in each group; a shift changes nothing, a scale nothing but ε's part."""
    rewards, groups = draws(seed)
    result = advantages(rewards, groups)
    for group in set(groups):
        own = torch.tensor([a for a, g in zip(result, groups) if g == group], dtype=torch.float64)
        assert own.mean().item() == pytest.approx(0, abs=1e-12)
        assert own.std().item() == pytest.approx(1, rel=1e-4)
    assert advantages([r + 100 for r in rewards], groups) == pytest.approx(result, rel=1e-9, abs=1e-12)
    assert advantages([r * 1000 for r in rewards], groups) == pytest.approx(result, rel=1e-3)
    assert advantages([-r for r in rewards], groups) == pytest.approx([-a for a in result])
    scaled = advantages([r * 8 for r in rewards], groups, "none")
    assert scaled == pytest.approx([8 * a for a in advantages(rewards, groups, "none")], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_order_and_labels_do_not_matter(seed: int) -> None:
    rewards, groups = draws(seed)
    order = random.Random(seed).sample(range(len(rewards)), len(rewards))
    result = advantages(rewards, groups)
    permuted = advantages([rewards[i] for i in order], [groups[i] for i in order])
    assert permuted == pytest.approx([result[i] for i in order], rel=1e-12, abs=1e-14)
    assert advantages(rewards, [{"a": "z", "b": "y", "c": "x", "d": "w"}[g] for g in groups]) == result


@pytest.mark.parametrize(
    "groups",
    [
        ["p", "q", "p", "q"],
        "pqpq",
        [7, 3, 7, 3],
        (0, 1, 0, 1),
        [("x", 1), ("x", 2), ("x", 1), ("x", 2)],
        [None, "q", None, "q"],
        torch.tensor([0, 1, 0, 1]),
        np.array([0, 1, 0, 1]),
        np.array(["p", "q", "p", "q"]),
    ],
    ids=lambda groups: f"{type(groups).__name__} of {type(groups[0]).__name__}",
)
def test_labels_may_be_anything_that_can_be_told_apart(groups: Any) -> None:
    assert advantages([1.0, 10.0, 3.0, 30.0], groups, "none") == [-1.0, -10.0, 1.0, 10.0]


def test_labels_may_come_one_by_one() -> None:
    assert advantages([1.0, 10.0, 3.0, 30.0], (label for label in "pqpq"), "none") == [-1.0, -10.0, 1.0, 10.0]


@pytest.mark.parametrize(
    "rewards",
    [
        [1, 3],
        (1.0, 3.0),
        [True, False],
        np.array([1.0, 3.0], np.float32),
        np.array([1, 3]),
        torch.tensor([1.0, 3.0]),
        torch.tensor([1, 3]),
        torch.tensor([True, False]),
        torch.tensor([1.0, 3.0], dtype=torch.float16),
        torch.tensor([1.0, 3.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 3.0], requires_grad=True),
    ],
    ids=lambda rewards: f"{type(rewards).__name__} of {getattr(rewards, 'dtype', type(rewards[0]).__name__)}",
)
def test_rewards_may_come_in_any_form(rewards: Any) -> None:
    """Deviations of (1, 3) are (−1, 1), of (True, False) (½, −½); no gradient is kept."""
    result = group_advantages(rewards, [0, 0], scale="none")
    assert not result.requires_grad
    assert result.tolist() == ([0.5, -0.5] if rewards[0] == 1 and rewards[1] == 0 else [-1.0, 1.0])


def test_rewards_are_not_written_to() -> None:
    rewards = np.array([1.0, 3.0])
    group_advantages(rewards, [0, 0])
    assert rewards.tolist() == [1.0, 3.0]


def test_metrics_count_groups_without_signal() -> None:
    """Groups a (1, 3), b (2, 2), c (7) and d (0, 0): three of four are constant, one of four has one sample."""
    metrics = group_metrics([1, 2, 7, 3, 2, 0, 0], ["a", "b", "c", "a", "b", "d", "d"])
    assert metrics == {"reward": 15 / 7, "groups": 4.0, "groups_constant": 0.75, "groups_of_one": 0.25}
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize(
    "rewards, groups, message",
    [
        ([1.0, 2.0], ["a"], "groups: expected 2 labels, one per reward, got 1"),
        ([1.0], ["a", "b"], "groups: expected 1 labels, one per reward, got 2"),
        ([1.0, 2.0], None, "groups: expected 2 labels, one per reward, got None"),
        ([1.0, 2.0], 2, "groups: expected 2 labels, one per reward, got 2"),
        ([1.0, 2.0], "", "groups: expected 2 labels, one per reward, got ''"),
        ([1.0, 2.0], ["a", ["b"]], "groups: expected 2 labels, one per reward"),
        ([1.0, 2.0], np.array(7), "groups: expected 2 labels, one per reward"),
        ([1.0, 2.0], torch.tensor([[0], [0]]), "groups: expected"),
        ([], [], "rewards: expected one number for each sample"),
        (1.0, ["a"], "rewards: expected one number for each sample"),
        ([[1.0, 2.0]], ["a"], "rewards: expected one number for each sample"),
        ([[1.0], [1.0, 2.0]], ["a", "a"], "rewards: expected one number for each sample"),
        (["1.0", "good"], ["a", "a"], "rewards: expected one number for each sample"),
        ([{"reward": 1.0}, 2.0], ["a", "a"], "rewards: expected one number for each sample"),
        ([0.0, None], ["a", "a"], r"rewards\[1\]: expected a finite number"),
        ([0.0, math.nan], ["a", "a"], r"rewards\[1\]: expected a finite number, got nan"),
        ([0.0, math.nan, 1.0, math.inf], "aaaa", r"rewards\[1\]: expected a finite number, got nan"),
        ([math.inf, 0.0], ["a", "a"], r"rewards\[0\]: expected a finite number, got inf"),
    ],
)
def test_what_is_no_reward_or_label_is_refused(rewards: Any, groups: Any, message: str) -> None:
    for function in (group_advantages, group_metrics):
        with pytest.raises(LossInputError, match=message):
            function(rewards, groups)
