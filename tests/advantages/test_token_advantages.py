"""Advantages of tokens: numbers worked on paper, the oracle, and both forms of a batch."""

import math
import random
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

import lossfns
from lossfns import LossInputError
from lossfns.testing import oracle

near = pytest.approx
Rows = list[list[float]]


def rows_of(result: Any) -> Rows:
    """A result of rows as lists; always float64."""
    assert all(row.dtype == torch.float64 for row in result)
    return [row.tolist() for row in result]


def equal(left: Rows, right: Rows, tolerance: float = 1e-12) -> bool:
    """Whether two lists of rows agree."""
    flat = [[x for row in rows for x in row] for rows in (left, right)]
    return list(map(len, left)) == list(map(len, right)) and flat[0] == near(flat[1], rel=1e-11, abs=tolerance)


def draw(seed: int) -> dict[str, Any]:
    """Columns of rows of different lengths with gaps, one of them without an active token and one without a token."""
    rng = random.Random(seed)
    lengths = [5, 3, 0, 7, 1, 4, 6]

    def column(low: float, high: float) -> Rows:
        return [[rng.uniform(low, high) for _ in range(n)] for n in lengths]

    weights = [[float(rng.random() < 0.7) for _ in range(n)] for n in lengths]
    weights[1], weights[5] = [0.0] * 3, [1.0, 0.0, 0.0, 0.5]
    logprobs = column(-3, -0.1)
    return {
        "weights": weights,
        "rewards": column(-1, 2),
        "values": column(-1, 1),
        "logprobs": logprobs,
        "ref_logprobs": column(-3, -0.1),
        "sum_square_probs": [[math.exp(2 * x) + rng.uniform(0, 0.1) for x in row] for row in logprobs],
        "importance": column(0.5, 2),
        "scores": [rng.uniform(-1, 1) for _ in lengths],
        "groups": list("ababbab"),
    }


KNOBS: dict[str, tuple[tuple[str, ...], dict[str, tuple[Any, ...]]]] = {
    "returns_to_go": (("rewards",), {"gamma": (1.0, 0.9, 0.0), "steps": ("active", "slots")}),
    "gae": (("rewards", "values"), {"gamma": (1.0, 0.9), "lam": (0.95, 1.0, 0.0)}),
    "reinforce_plus_plus_advantages": (("rewards",), {"gamma": (1.0, 0.9), "ddof": (1, 0), "eps": (1e-8, 1e-2)}),
    "whiten": (("values",), {"shift_mean": (True, False), "ddof": (1, 0), "eps": (1e-8, 1e-2)}),
    "kl_penalties": (
        ("logprobs", "ref_logprobs"),
        {
            "kl_beta": (0.1, 0.0),
            "kl": ("k1", "k2", "k3"),
            "centred": (False, True),
            "discount": (0.0, 0.5, 1.0),
            "steps": ("active", "slots"),
        },
    ),
    "optimal_token_advantages": (
        ("rewards", "logprobs", "sum_square_probs", "groups"),
        {"group_of_one": ("zero", "reward")},
    ),
}
"""The columns of each estimator of tokens besides the weights, and its settings."""


def padded(rows: Rows, filler: float = math.nan) -> torch.Tensor:
    """Rows as a padded tensor, with a number behind their ends."""
    width = max(map(len, rows)) + 1
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows], dtype=torch.float64)


def test_every_estimator_is_the_oracles_in_both_forms_with_every_setting() -> None:
    """What stands at tokens that are not active, here nan, matters in no form."""
    for (name, (columns, knobs)), seed in product(KNOBS.items(), range(2)):
        drawn = draw(seed)
        weights = drawn["weights"]
        for values in product(*knobs.values()):
            setting = dict(zip(knobs, values, strict=True))
            given = {"weights": weights, **{column: drawn[column] for column in columns}}
            expected = getattr(oracle, name)(**given, **setting)
            holed = {
                k: [[x if w != 0 else math.nan for x, w in zip(*pair)] for pair in zip(x, weights)]
                if k not in ("weights", "groups")
                else x
                for k, x in given.items()
            }
            ragged = getattr(lossfns, name)(**holed, **setting)
            full = {k: x if k == "groups" else padded(x, 0.0 if k == "weights" else math.nan) for k, x in holed.items()}
            matrix = getattr(lossfns, name)(**full, **setting)
            for one, two, right in zip(
                *((ragged, matrix, expected) if name == "gae" else ([ragged], [matrix], [expected]))
            ):
                assert equal(rows_of(one), right), (name, setting)
                assert two.shape == full["weights"].shape
                assert equal([row[: len(w)] for row, w in zip(rows_of(two), weights)], right), (name, setting)
                assert two[full["weights"] == 0].count_nonzero() == 0


def test_importance_and_penalties_are_the_oracles() -> None:
    drawn = draw(0)
    columns = ("rewards", "logprobs", "sum_square_probs", "groups", "weights", "importance")
    given = {name: drawn[name] for name in columns}
    found = lossfns.optimal_token_advantages(**given)
    assert equal(rows_of(found), oracle.optimal_token_advantages(**given))
    assert not equal(rows_of(found), rows_of(lossfns.optimal_token_advantages(**{**given, "importance": None})), 1e-3)
    placed: dict[str, Any] = {"rewards": drawn["scores"], "weights": drawn["weights"], "penalties": drawn["values"]}
    assert equal(rows_of(lossfns.token_rewards(**placed)), oracle.token_rewards(**placed))
    placed["penalties"] = None
    assert equal(rows_of(lossfns.token_rewards(**placed)), oracle.token_rewards(**placed))


def test_every_setting_has_an_effect() -> None:
    drawn = draw(0)
    for name, (columns, knobs) in KNOBS.items():
        given = {"weights": drawn["weights"], **{column: drawn[column] for column in columns}}
        base = {"gamma": 0.9} if "gamma" in knobs else {"kl_beta": 0.1, "discount": 0.5} if "kl" in knobs else {}
        for knob, values in knobs.items():
            answers = [getattr(lossfns, name)(**given, **{**base, knob: value}) for value in values]
            flat = [rows_of(answer[0] if name == "gae" else answer) for answer in answers]
            assert not any(equal(x, y) for i, x in enumerate(flat) for y in flat[:i]), (name, knob)


# By hand


def test_gae_by_hand_skips_the_words_of_a_tool() -> None:
    """γ = ½, λ = ½; active tokens 0 and 2 of rewards 1, 4 and values 2, 3. What stands at 1 is never read.

    δ₂ = 4 − 3 = 1. δ₀ = 1 + ½·3 − 2 = ½, and A₀ = ½ + ¼·1 = ¾. Returns ¾ + 2 and 1 + 3.
    """
    advantages, returns = lossfns.gae([[1.0, 99.0, 4.0]], [[2.0, -7.0, 3.0]], [[1, 0, 1]], gamma=0.5, lam=0.5)
    assert rows_of(advantages) == [[0.75, 0.0, 1.0]]
    assert rows_of(returns) == [[2.75, 0.0, 4.0]]


def test_gae_at_the_ends_of_lambda() -> None:
    """λ = 1: A is the return to go − V, and returns do not depend on V. λ = 0: A is δ. V itself has no advantage."""
    drawn = draw(1)
    given = (drawn["rewards"], drawn["values"], drawn["weights"])
    _, returns = lossfns.gae(*given, gamma=0.9, lam=1.0)
    expected = rows_of(lossfns.returns_to_go(drawn["rewards"], drawn["weights"], gamma=0.9))
    assert equal(rows_of(returns), expected)
    exact, _ = lossfns.gae(drawn["rewards"], expected, drawn["weights"], gamma=0.9, lam=0.5)
    assert equal(rows_of(exact), [[0.0] * len(row) for row in expected])


def test_gae_of_right_padded_rows_does_not_depend_on_the_padding() -> None:
    row, more = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0, 5.0, 5.0]])
    short = lossfns.gae(row, row, torch.ones(1, 2), gamma=0.9)[0]
    long = lossfns.gae(more, more, torch.tensor([[1, 1, 0, 0]]), gamma=0.9)[0]
    assert torch.equal(short, long[:, :2])


def test_rewards_stand_at_the_last_active_token() -> None:
    weights = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    found = lossfns.token_rewards([1.0, 2.0, 3.0], weights)
    assert found.tolist() == [[0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]


def test_returns_count_active_tokens_or_slots() -> None:
    """The reward 8 is one active token away, and three slots away."""
    given = ([[0.0, 5.0, 5.0, 8.0]], [[1, 0, 0, 1]])
    assert rows_of(lossfns.returns_to_go(*given, gamma=0.5)) == [[4.0, 0.0, 0.0, 8.0]]
    assert rows_of(lossfns.returns_to_go(*given, gamma=0.5, steps="slots")) == [[1.0, 0.0, 0.0, 8.0]]


def test_reinforce_plus_plus_by_hand() -> None:
    """Outcomes 3 and 1 of lengths 3 and 1: returns 3, 3, 3 | 1, mean 10/4, variance (3·¼ + 9/4)/3 = 1 with ddof 1."""
    rewards = lossfns.token_rewards([3.0, 1.0], [[1, 1, 1], [1]])
    found = rows_of(lossfns.reinforce_plus_plus_advantages(rewards, [[1, 1, 1], [1]]))
    assert equal(found, [[0.5, 0.5, 0.5], [-1.5]], 1e-7)


def test_whitening_by_hand() -> None:
    """(1, 3 | 8 masked): mean 2, variance 2 with ddof 1. Without the shift the mean 2 stays. Equal numbers give 0."""
    found = rows_of(lossfns.whiten([[1.0, 3.0], [8.0]], [[1, 1], [0]]))
    assert equal(found, [[-math.sqrt(0.5), math.sqrt(0.5)], [0.0]], 1e-8)
    kept = rows_of(lossfns.whiten([[1.0, 3.0], [8.0]], [[1, 1], [0]], shift_mean=False))
    assert equal(kept, [[2 - math.sqrt(0.5), 2 + math.sqrt(0.5)], [0.0]], 1e-8)
    assert rows_of(lossfns.whiten([[0.7] * 7], [[1] * 7])) == [[0.0] * 7]


def test_kl_penalties_by_hand() -> None:
    """KL 1 and 3 nats, β = ½: −½, −3/2; less their mean 2: ½, −½; discounted by ½: ½ − ¼, −½. With k2: −¼, −9/4."""
    given: tuple[Any, ...] = ([[-1.0, -9.0, -1.0]], [[-2.0, -1.0, -4.0]], [[1, 0, 1]], 0.5)
    assert rows_of(lossfns.kl_penalties(*given)) == [[-0.5, 0.0, -1.5]]
    assert rows_of(lossfns.kl_penalties(*given, kl=lossfns.k2)) == [[-0.25, 0.0, -2.25]]
    assert rows_of(lossfns.kl_penalties(*given, centred=True)) == [[0.5, 0.0, -0.5]]
    assert rows_of(lossfns.kl_penalties(*given, centred=True, discount=0.5)) == [[0.25, 0.0, -0.5]]
    slots = lossfns.kl_penalties(*given, centred=True, discount=0.5, steps="slots")
    assert rows_of(slots) == [[0.375, 0.0, -0.5]]


def test_the_optimal_token_baseline_by_hand() -> None:
    """Two rows of a group with returns 1 and 0. At p = ½ of two choices the energy is 1 − 1 + ½ = ½; at p = 1 it is 0.

    Row 1 is sure at its first token: W = 0, ½; row 2: W = ½, 1. Baselines (0·1 + ½·0)/½ = 0 and (½·1 + 1·0)/(3/2) = ⅓.
    """
    sure, half = 0.0, math.log(0.5)
    found = lossfns.optimal_token_advantages(
        [[0.0, 1.0], [0.0, 0.0]], [[sure, half], [half, half]], [[1.0, 0.5], [0.5, 0.5]], [[1, 1], [1, 1]], "qq"
    )
    assert equal(rows_of(found), [[1.0, 2 / 3], [0.0, -1 / 3]])


def test_the_optimal_token_baseline_has_the_least_variance() -> None:
    """The derivative of Σ W·(G − b)² in b is 0 at the baseline: Σ W·A = 0 over the t-th tokens of a group.

    The energy is the squared norm of the gradient of log p of the token in its logits, which autograd gives as well.
    """
    torch.manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    lp = logits.log_softmax(1)
    token = torch.tensor([0, 3, 2, 4, 1, 1])
    norms = [torch.autograd.grad(lp[i, k], logits, retain_graph=True)[0].square().sum() for i, k in enumerate(token)]
    logprobs = lp.gather(1, token[:, None]).flatten().reshape(2, 3)
    squares = lp.exp().square().sum(1).reshape(2, 3)
    rewards = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.0, -1.0]])
    advantages = lossfns.optimal_token_advantages(rewards, logprobs, squares, torch.ones(2, 3), "qq")
    w = torch.stack(norms).reshape(2, 3).cumsum(1)
    assert (w * advantages).sum(0).tolist() == near([0.0] * 3, abs=1e-12)
    assert not advantages.requires_grad


def test_equal_returns_have_no_advantage() -> None:
    """Also where a group has one row left: the tail of the longest. With "reward" it keeps its return."""
    lp, squares = [[-0.3] * 3, [-1.7] * 2], [[0.6] * 3, [0.3] * 2]
    weights = [[1, 1, 1], [1, 1]]
    rewards = lossfns.token_rewards([0.7, 0.7], weights)
    assert rows_of(lossfns.optimal_token_advantages(rewards, lp, squares, weights, "qq")) == [[0.0] * 3, [0.0] * 2]
    kept = lossfns.optimal_token_advantages(rewards, lp, squares, weights, "qq", group_of_one="reward")
    assert rows_of(kept) == [[0.0, 0.0, 0.7], [0.0, 0.0]]


def test_ppo_for_rlhf_end_to_end() -> None:
    """KL in the reward, GAE and whitening compose, on rows and on a padded tensor alike."""
    drawn = draw(2)
    answers = []
    for form in (lambda x: x, lambda x: padded(x, 0.0)):
        w, lp, ref, v = (form(drawn[name]) for name in ("weights", "logprobs", "ref_logprobs", "values"))
        rewards = lossfns.token_rewards(drawn["scores"], w, lossfns.kl_penalties(lp, ref, w, 0.05))
        answers.append(rows_of(lossfns.whiten(lossfns.gae(rewards, v, w)[0], w)))
    lengths = [len(row) for row in drawn["weights"]]
    assert equal(answers[0], [row[:n] for row, n in zip(answers[1], lengths)])
    active = [x for row, w in zip(answers[0], drawn["weights"]) for x, a in zip(row, w) if a]
    assert math.fsum(active) == near(0, abs=1e-12)
    assert math.fsum(x * x for x in active) == near(len(active) - 1, rel=1e-6)


def test_a_loss_takes_the_advantages_of_either_form() -> None:
    """As rows of datums and as a padded tensor: the same loss, with the first token of each datum a prompt."""
    old, weights = [[-1.0, -2.0, -0.5], [-1.5, -0.25]], [[0.0, 1.0, 1.0], [0.0, 1.0]]
    current = [[x - 0.125 for x in row] for row in old]
    rows = lossfns.reinforce_plus_plus_advantages(lossfns.token_rewards([1.0, 0.0], weights), weights)
    data = [lossfns.datum_from_tokens([5, 6, 7, 8], weights=[0.0, 0.0, 1.0, 1.0])]
    data.append(lossfns.datum_from_tokens([5, 6, 7], weights=[0.0, 0.0, 1.0]))
    loss, _ = lossfns.ppo().bind(advantages=rows, old_logprobs=old)(data, [torch.tensor(row) for row in current])
    mask = padded(weights, 0.0)
    matrix = lossfns.reinforce_plus_plus_advantages(lossfns.token_rewards([1.0, 0.0], mask), mask)
    columns = {"advantages": matrix, "old_logprobs": padded(old, 0.0)}
    same, _ = lossfns.ppo().padded(padded(current, 0.0), mask, **columns)
    assert loss.item() == near(same.item(), rel=1e-6)
    expected = -sum(math.exp(-0.125) * a for row in rows_of(rows) for a in row) / 3
    assert loss.item() == near(expected, rel=1e-5)


# Forms and refusals


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: rows,
        lambda rows: tuple(tuple(row) for row in rows),
        lambda rows: [np.array(row, np.float32) for row in rows],
        lambda rows: [torch.tensor(row, dtype=torch.bfloat16) for row in rows],
        lambda rows: [torch.tensor(row).requires_grad_() for row in rows],
        lambda rows: np.array(rows),
        lambda rows: torch.tensor(rows, dtype=torch.float16),
        lambda rows: torch.tensor(rows, dtype=torch.float64).requires_grad_(),
    ],
)
def test_columns_may_come_in_any_form(make: Any) -> None:
    rewards, weights = make([[0.0, 1.0], [2.0, 4.0]]), make([[1.0, 1.0], [0.0, 0.5]])
    found = lossfns.returns_to_go(rewards, weights)
    assert isinstance(found, torch.Tensor) == isinstance(rewards, (torch.Tensor, np.ndarray))
    assert rows_of(found) == [[1.0, 1.0], [0.0, 4.0]]
    assert not any(row.requires_grad for row in found)


@pytest.mark.parametrize(
    ("rewards", "weights", "message"),
    [
        ([[1.0, 2.0]], [[1, 1], [1]], r"rewards: expected rows of lengths \[2, 1\], got rows of lengths \[2\]"),
        ([[1.0], [1.0]], [[1, 1], [1]], r"rewards: expected rows of lengths \[2, 1\], got rows of lengths \[1, 1\]"),
        (torch.ones(2, 3), torch.ones(2, 2), r"rewards: expected shape \[2, 2\], got shape \[2, 3\]"),
        ([[1.0, 2.0]], torch.ones(1, 2), r"rewards: expected shape \[1, 2\], got rows of lengths \[2\]"),
        ([1.0, 2.0], [[1], [1]], r"rewards: expected \[B, T\] numbers, or one row of numbers for each datum"),
        (torch.ones(2), torch.ones(2), r"weights: expected \[B, T\] numbers"),
        ([], [], r"weights: expected \[B, T\] numbers"),
        ([["a"]], [[1]], r"rewards: expected \[B, T\] numbers"),
        ([[1.0]], [[math.nan]], "weights: expected finite numbers, got nan or inf"),
        ([[0.0], [1.0, math.nan]], [[1], [0, 1]], r"datum\[1\].rewards\[1\]: expected a finite number at every active"),
        (None, [[1]], r"rewards: expected \[B, T\] numbers"),
    ],
)
def test_what_is_refused(rewards: Any, weights: Any, message: str) -> None:
    with pytest.raises(LossInputError, match=message):
        lossfns.returns_to_go(rewards, weights)


def test_values_out_of_range_are_refused() -> None:
    one: Any = [[1.0]]
    for call, message in [
        (
            lambda: lossfns.kl_penalties(one, [[-1.0]], one, 0.1),
            r"datum\[0\].logprobs\[0\]: expected a finite",
        ),
        (
            lambda: lossfns.kl_penalties([[-1.0]], [[-1.0]], one, -0.1),
            "kl_beta: expected a finite number of at",
        ),
        (lambda: lossfns.kl_penalties([[-1.0]], [[-1.0]], one, 0.1, kl="k4"), "kl: expected a function such as k1"),
        (lambda: lossfns.kl_penalties([[-1.0]], [[-1.0]], one, 0.1, discount=1.1), "discount: expected a number in"),
        (lambda: lossfns.returns_to_go(one, one, gamma=-0.1), "gamma: expected a number in"),
        (lambda: lossfns.returns_to_go(one, one, steps="tokens"), "steps: expected 'active' or 'slots'"),
        (lambda: lossfns.gae(one, one, one, lam=math.nan), "lam: expected a number in"),
        (lambda: lossfns.whiten(one, [[0.0]]), "weights: expected an active token, got none"),
        (lambda: lossfns.token_rewards([1.0], [[1], [1]]), "rewards: expected 2 numbers, one per row, got 1"),
        (
            lambda: lossfns.optimal_token_advantages(one, [[-1.0]], [[1.5]], one, "q"),
            r"sum_square_probs\[0\]: exp",
        ),
        (lambda: lossfns.optimal_token_advantages(one, [[-0.1]], [[0.5]], one, "q"), "at least the square of"),
        (lambda: lossfns.optimal_token_advantages(one, [[-1.0]], [[0.5]], one, "qq"), "groups: expected 1 labels"),
    ]:
        with pytest.raises(LossInputError, match=message):
            call()
