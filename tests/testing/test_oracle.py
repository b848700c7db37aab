"""The oracle compared with numbers computed by hand, and its gradients with central differences."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from lossfns.testing import oracle
from lossfns.testing.oracle import PAIR_WEIGHINGS, TOKEN_WEIGHINGS, Loss, Row, Rows

LN2, LN3 = math.log(2), math.log(3)
UNCLIPPED = (0.0, math.inf)

POLICY = ("logprobs", "advantages", "old_logprobs", "sampler_logprobs")
PAIRS = ("logprobs", "ref_logprobs")

# name, columns, knobs
TOKEN_CASES: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    ("cross_entropy", ("logprobs",), {}),
    ("multi_target_cross_entropy", ("logprobs",), {}),
    ("importance_sampling", POLICY, {}),
    ("importance_sampling", POLICY, {"log_ratio_cap": 0.3}),
    ("importance_sampling", POLICY, {"log_ratio_cap": None, "tis_cap": 1.1}),
    ("ppo", POLICY, {}),
    ("ppo", POLICY, {"clip": (0.9, 1.1)}),
    ("ppo", POLICY, {"dual_clip": 1.3}),
    ("ppo", POLICY, {"log_ratio_cap": 0.3}),
    ("ppo", POLICY, {"tis_cap": 1.1}),
    ("ppo", POLICY, {"tis_cap": 1.1, "tis_level": "sequence"}),
    ("dapo", POLICY, {}),
    ("dapo", POLICY, {"tis_cap": 1.1}),
    *(("grpo", (*POLICY, "ref_logprobs"), {"kl_beta": 0.3, "kl": kl}) for kl in ("k1", "k2", "k3")),
    ("grpo", (*POLICY, "ref_logprobs"), {"kl_beta": 0.3, "tis_cap": 1.1, "tis_level": "sequence"}),
    ("gspo", POLICY, {}),
    ("gspo", POLICY, {"clip": (0.9, 1.1)}),
    ("gspo", POLICY, {"clip": UNCLIPPED, "tis_cap": 1.1}),
    ("gspo", POLICY, {"clip": UNCLIPPED, "dual_clip": 1.1}),
    ("gspo", POLICY, {"clip": UNCLIPPED, "log_ratio_cap": 0.1}),
    ("dro", POLICY, {}),
    ("dro", POLICY, {"beta": 1.5}),
    ("dro", POLICY, {"beta": 1.5, "tis_cap": 1.1, "tis_level": "sequence"}),
]
PAIR_CASES: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    ("dpo", PAIRS, {}),
    ("dpo", PAIRS, {"beta": 1.5, "label_smoothing": 0.2}),
    ("orpo", ("logprobs",), {}),
    ("orpo", ("logprobs",), {"lam": 2.0}),
]
CASES = [
    (name, columns, {**knobs, "weigh": weigh})
    for cases, weighings in ((TOKEN_CASES, TOKEN_WEIGHINGS), (PAIR_CASES, PAIR_WEIGHINGS))
    for name, columns, knobs in cases
    for weigh in weighings
]


def method(name: str) -> Callable[..., Loss]:
    """Return the oracle's loss of this name."""
    loss: Callable[..., Loss] = getattr(oracle, name)
    return loss


def batch(seed: int, fractional: bool = True) -> dict[str, Rows]:
    """Six ragged sequences, the last without a token that counts."""
    rng = random.Random(seed)
    lengths = [3, 1, 4, 2, 5, 2]

    def rows(draw: Callable[[], float]) -> Rows:
        return [[draw() for _ in range(n)] for n in lengths]

    def around(center: Rows) -> Rows:
        return [[x + rng.gauss(0, 0.3) for x in row] for row in center]

    lp = rows(lambda: rng.uniform(-3, -0.1))
    weights = rows(lambda: rng.choice([0.0, 1.0, 1.0, 0.5, 0.3] if fractional else [0.0, 1.0, 1.0]))
    weights = [[*row[:-1], 1.0] for row in weights[:-1]] + [[0.0] * lengths[-1]]
    old = around(lp)
    return {
        "logprobs": lp,
        "weights": weights,
        "advantages": rows(lambda: rng.gauss(0, 1)),
        "old_logprobs": old,
        "ref_logprobs": around(lp),
        "sampler_logprobs": around(old),
    }


def pick(columns: tuple[str, ...], data: dict[str, Rows]) -> dict[str, Rows]:
    """Return the columns of a method, and the weights."""
    return {name: data[name] for name in (*columns, "weights")}


def differences(loss: Callable[[Rows], float], logprobs: Rows, step: float = 1e-5) -> Rows:
    """(L(lp + h) − L(lp − h)) / 2h, one logprob at a time."""

    def moved(i: int, t: int, by: float) -> Rows:
        return [[x + by * (i == j and t == s) for s, x in enumerate(r)] for j, r in enumerate(logprobs)]

    return [
        [(loss(moved(i, t, step)) - loss(moved(i, t, -step))) / (2 * step) for t in range(len(row))]
        for i, row in enumerate(logprobs)
    ]


def near(value: object) -> Any:
    """Equal up to rounding."""
    return pytest.approx(value, rel=1e-12, abs=1e-14)


def flat(rows: Rows) -> Row:
    """All entries in one row."""
    return [x for row in rows for x in row]


# Numbers computed by hand


@pytest.mark.parametrize(
    ("weigh", "loss", "grads"),
    [
        ("token_mean", 2.0, [-0.4, -0.4, -0.2]),
        ("sequence_mean", 2.75, [-0.25, -0.25, -0.5]),
        ("sequence_sum_mean", 2.5, [-0.5, -0.5, -0.25]),
        ("fixed_length", 0.625, [-0.125, -0.125, -0.0625]),
        ("token_sum", 5.0, [-1, -1, -0.5]),
    ],
)
def test_cross_entropy_by_hand(weigh: str, loss: float, grads: Row) -> None:
    """Σ w(−lp) = 1 + 2 + 0.5·4 = 5 and Σw = 2.5 over two sequences; their means are 1.5 and 4.

    5/2.5 = 2, (1.5 + 4)/2 = 2.75, 5/2 = 2.5, 5/(4·2) = 0.625, 5. The third sequence is empty.
    """
    value, got = oracle.cross_entropy(
        logprobs=[[-1, -2], [-4], [-9]], weights=[[1, 1], [0.5], [0]], weigh=weigh, length=4
    )
    assert value == near(loss)
    assert flat(got) == near([*grads, 0])


def test_cross_entropy_negative_weight_by_hand() -> None:
    """Σ w(−lp) = 2·1 − 1·3 = −1, Σw = 1."""
    loss, grads = oracle.cross_entropy(logprobs=[[-1, -3]], weights=[[2, -1]])
    assert (loss, grads) == (-1, [[-2, 1]])


def test_multi_target_cross_entropy_by_hand() -> None:
    """Two positions of two targets: (0.5·1 + 0.5·2 + 1·3) / 2 = 2.25; each slope −w/2."""
    loss, grads = oracle.multi_target_cross_entropy(logprobs=[[-1, -2, -3, -math.inf]], weights=[[0.5, 0.5, 1, 0]])
    assert (loss, grads) == (2.25, [[-0.25, -0.25, -0.5, 0]])


def test_importance_sampling_by_hand() -> None:
    """r = 0.6/0.5 = 1.2 at A = 1 and 0.2/0.4 = 0.5 at A = −2: (−1.2 + 1)/2 = −0.1; slopes −rA/2."""
    loss, grads = oracle.importance_sampling(
        logprobs=[[math.log(0.6), math.log(0.2)]],
        old_logprobs=[[math.log(0.5), math.log(0.4)]],
        advantages=[[1, -2]],
        weights=[[1, 1]],
    )
    assert loss == near(-0.1)
    assert grads == [near([-0.6, 0.5])]


def ratios(name: str, rs: Row, advantages: Row, **knobs: Any) -> tuple[float, Row]:
    """A loss on one sequence whose ratios are rs."""
    one, zero = [[1.0] * len(rs)], [[0.0] * len(rs)]
    loss, grads = method(name)(
        logprobs=[[math.log(r) for r in rs]],
        old_logprobs=zero,
        weights=one,
        advantages=[advantages],
        **knobs,
    )
    return loss, grads[0]


def test_ppo_by_hand() -> None:
    """−min: r = 1.5 gives −1.2 (clipped) at A = 1, 1.5 at A = −1; r = 0.5 gives 0.8 (clipped), −0.5.

    The sum is −1.2 + 0.8 + 1.5 − 0.5 = 0.6, over four tokens 0.15; slopes −rA/4 where unclipped.
    """
    loss, grads = ratios("ppo", [1.5, 0.5, 1.5, 0.5], [1, -1, -1, 1])
    assert loss == near(0.15)
    assert grads == near([0, 0, 0.375, -0.125])


def test_ppo_dual_clip_by_hand() -> None:
    """A = −1, c = 3: r = 5 costs 3 and is flat, r = 2 costs 2 with slope 2; A = 1 is as before, −1.2."""
    loss, grads = ratios("ppo", [5, 2, 5], [-1, -1, 1], dual_clip=3.0, weigh="token_sum")
    assert loss == near(3.8)
    assert grads == near([0, 2, 0])


@pytest.mark.parametrize("clip", [(0.5, 1.0), (1.0, 1.5)])
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_ppo_bounds_are_inside(clip: tuple[float, float], advantage: float) -> None:
    """At r = 1, a bound, the slope is −A."""
    assert ratios("ppo", [1], [advantage], clip=clip) == (-advantage, [-advantage])


def test_log_ratio_cap_by_hand() -> None:
    """With |d| ≤ log 2 the ratio 4 counts as 2 and is flat; the ratio 2 is on the bound and flows."""
    loss, grads = ratios("importance_sampling", [4, 2], [1, 1], log_ratio_cap=math.log(2), weigh="token_sum")
    assert loss == near(-4)
    assert grads == near([0, -2])


def test_dapo_by_hand() -> None:
    """r = 1.25, A = 1 is clipped to 1.2 by PPO and free under 1.28; r = 1.5 is clipped to 1.28."""
    assert ratios("ppo", [1.25], [1]) == (-1.2, [0])
    loss, grads = ratios("dapo", [1.25, 1.5], [1, 1], weigh="token_sum")
    assert loss == near(-2.53)
    assert grads == near([-1.25, 0])


@pytest.mark.parametrize(("kl", "value", "slope"), [("k1", -LN2, 1), ("k2", LN2**2 / 2, -LN2), ("k3", 1 - LN2, -1)])
def test_grpo_by_hand(kl: str, value: float, slope: float) -> None:
    """r = 1, A = 1: −1 + β·KL, slope −1 + β·KL′. x = ref − lp = log 2, so k3 = 2 − log 2 − 1, k3′ = 1 − 2."""
    loss, grads = ratios("grpo", [1], [1], ref_logprobs=[[LN2]], kl_beta=0.1, kl=kl)
    assert loss == near(-1 + 0.1 * value)
    assert grads == near([-1 + 0.1 * slope])


def test_grpo_k3_is_flat_past_20() -> None:
    """x = 25 counts as 20: e²⁰ − 21, slope 0; what remains is PPO's −1."""
    loss, grads = ratios("grpo", [1], [1], ref_logprobs=[[25.0]], kl_beta=1.0)
    assert loss == near(math.exp(20) - 22)
    assert grads == [-1]


@pytest.mark.parametrize("knobs", [{"weigh": "fixed_length", "length": 4}, {"denominator": 4.0}])
def test_grpo_divides_both_parts(knobs: dict[str, Any]) -> None:
    """(−1 + 0.1·k1)/4 with k1 = −log 2."""
    loss, grads = ratios("grpo", [1], [1], ref_logprobs=[[LN2]], kl_beta=0.1, kl="k1", **knobs)
    assert loss == near((-1 - 0.1 * LN2) / 4)
    assert grads == near([-0.9 / 4])


def test_gspo_by_hand() -> None:
    """d = (log 4, 0), so s = 2. With A = (3, 1): −(6 + 2)/2 = −4, slopes (−3, −1), their mean −2 for both."""
    for name, slopes in (("gspo_token", [-3, -1]), ("gspo", [-2, -2])):
        loss, grads = ratios(name, [4, 1], [3, 1], clip=UNCLIPPED)
        assert loss == near(-4)
        assert grads == near(slopes)


def test_gspo_clips_the_sequence_by_hand() -> None:
    """s = 2 > 1.0004: −1.0004 at A = 1 and flat; 2 at A = −1 with slope 2, half to each token."""
    for name in ("gspo", "gspo_token"):
        loss, grads = ratios(name, [4, 1], [1, 1])
        assert loss == near(-1.0004)
        assert grads == [0, 0]
    assert ratios("gspo", [4, 1], [-1, -1])[1] == near([1, 1])


@pytest.mark.parametrize(
    ("level", "cap", "factors"),
    [
        ("token", 2.0, (2, 0.5)),
        ("token", 10.0, (4, 0.5)),
        ("sequence", 10.0, (2, 2)),
        ("sequence", 1.5, (1.5, 1.5)),
    ],
)
def test_truncated_importance_sampling_by_hand(level: str, cap: float, factors: tuple[float, float]) -> None:
    """old/sampler = 4 and 0.5, together 2: each ρ = min(·, cap) multiplies the term −A and the slope −A."""
    loss, grads = ratios(
        "ppo",
        [1, 1],
        [1, 1],
        sampler_logprobs=[[-math.log(4), math.log(2)]],
        tis_cap=cap,
        tis_level=level,
        weigh="token_sum",
    )
    assert loss == near(-sum(factors))
    assert grads == near([-rho for rho in factors])


def test_cispo_by_hand() -> None:
    """r = 2/3 and 6 at lp = log ½ and log ¼: weights 0.8 and 1.2 of −A·lp = log 2 and −2·log 4 = −4·log 2.

    0.8·log 2 − 4.8·log 2 = −4·log 2, over two tokens −2·log 2; slopes −wA/2, beyond the bounds as within.
    """
    loss, grads = oracle.cispo(
        logprobs=[[-LN2, -2 * LN2]],
        old_logprobs=[[-LN2 + math.log(1.5), -2 * LN2 - math.log(6)]],
        advantages=[[1, -2]],
        weights=[[1, 1]],
        clip=(0.8, 1.2),
    )
    assert loss == near(-2 * LN2)
    assert grads == [near([-0.4, 1.2])]


def test_cispo_has_the_slope_of_importance_sampling_within_its_bounds() -> None:
    """−sg(r)·A·∇lp = −∇(r·A)."""
    given = pick(POLICY, batch(4))
    _, grads = method("cispo")(**given, clip=UNCLIPPED, tis_cap=1.1)
    _, slopes = method("importance_sampling")(**given, tis_cap=1.1)
    assert any(flat(grads))
    assert flat(grads) == near(flat(slopes))


@pytest.mark.parametrize("cap", [20.0, None])
def test_cispo_weighs_a_far_token_by_the_bound(cap: float | None) -> None:
    """r = e¹⁰⁰⁰ counts as 4: −4·A·lp with lp = −1."""
    rows: dict[str, Any] = {"logprobs": [[-1]], "old_logprobs": [[-1001]], "weights": [[1]], "advantages": [[1]]}
    assert oracle.cispo(**rows, log_ratio_cap=cap) == (4, [[-4]])


def test_dro_by_hand() -> None:
    """d = 2 and −1 at lp = −1 and −3, A = 1 and −2, β = ½: 1 + ¼·4 = 2 and −6 + ¼ = −5.75, slopes −1 + 1, 2 − ½."""
    loss, grads = oracle.dro(
        logprobs=[[-1, -3]],
        old_logprobs=[[-3, -2]],
        advantages=[[1, -2]],
        weights=[[1, 1]],
        beta=0.5,
        weigh="token_sum",
    )
    assert loss == near(-3.75)
    assert grads == [near([0, 1.5])]


def test_truncation_spares_the_kl() -> None:
    """ρ = 2 doubles −1 but not β·k2 = 0.1·(log 2)²/2."""
    loss, grads = ratios(
        "grpo",
        [1],
        [1],
        ref_logprobs=[[LN2]],
        kl_beta=0.1,
        kl="k2",
        sampler_logprobs=[[-LN3]],
        tis_cap=2.0,
    )
    assert loss == near(-2 + 0.05 * LN2**2)
    assert grads == near([-2 - 0.1 * LN2])


def test_dpo_by_hand() -> None:
    """m = 2·(log 3)/2 − 0 = log 3, σ(m) = 3/4: log 4/3, slope −1/4 times w.

    With ε = 0.2: 0.8·log 4/3 + 0.2·log 4, slope −0.8/4 + 0.2·3/4 = −0.05.
    """
    rows: dict[str, Any] = {
        "logprobs": [[LN3 / 2, 7], [1]],
        "ref_logprobs": [[0, 0], [1]],
        "weights": [[2, 0], [1]],
    }
    loss, grads = oracle.dpo(**rows, beta=1.0)
    assert loss == near(math.log(4 / 3))
    assert flat(grads) == near([-0.5, 0, 0.25])
    loss, grads = oracle.dpo(**rows, beta=1.0, label_smoothing=0.2)
    assert loss == near(0.8 * math.log(4 / 3) + 0.2 * math.log(4))
    assert flat(grads) == near([-0.1, 0, 0.05])


def test_orpo_by_hand() -> None:
    """p = 3/4 and 1/2: odds 3 and 1, so the loss is −log 3/4 + λ·log 4/3 = (1 + λ)·log 4/3.

    The slope of log odds is 1/(1 − p) = 4 and 2, so −1 − λ·(1/4)·4 = −1 − λ and λ·(1/4)·2 = λ/2.
    """
    loss, grads = oracle.orpo(logprobs=[[math.log(0.75)] * 2, [math.log(0.5)]], weights=[[1, 3], [1]], lam=0.1)
    assert loss == near(1.1 * math.log(4 / 3))
    assert flat(grads) == near([-1.1 / 4, -1.1 * 3 / 4, 0.05])


def test_pairs_by_hand() -> None:
    """m = 0 costs log 2 with slopes ∓β/2; the second pair lacks a side, so one pair counts."""
    rows: dict[str, Rows] = {
        "logprobs": [[-1], [-2], [-3], [-4]],
        "ref_logprobs": [[-1], [-2], [-3], [-4]],
        "weights": [[1], [1], [1], [0]],
    }
    for knobs, scale in (
        ({}, 1),
        ({"denominator": 4.0}, 0.25),
        ({"weigh": "pair_sum", "denominator": 4.0}, 1),
    ):
        loss, grads = method("dpo")(**rows, beta=1.0, **knobs)
        assert loss == near(scale * LN2)
        assert flat(grads) == near([-0.5 * scale, 0.5 * scale, 0, 0])


def test_group_advantages_by_hand() -> None:
    """Rewards 1, 0: mean 1/2, std √(1/4 + 1/4) = √½; 3, 3 agree and 5 is alone."""
    rewards, groups = [1, 3, 0, 5, 3], ["a", "b", "a", "c", "b"]
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert oracle.group_advantages(rewards=rewards, groups=groups) == near([a, 0, -a, 0, 0])
    assert oracle.group_advantages(rewards=rewards, groups=groups, scale="none") == [0.5, 0, -0.5, 0, 0]
    assert oracle.group_advantages(rewards=[0.1] * 3, groups=[0] * 3) == [0, 0, 0]


# Gradients


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "columns", "knobs"), CASES)
def test_gradient_is_the_slope(name: str, columns: tuple[str, ...], knobs: dict[str, Any], seed: int) -> None:
    """∂L/∂lp in closed form is the central difference; no draw stands within a step of a kink."""
    given = pick(columns, batch(seed))
    loss = method(name)
    _, grads = loss(**given, **knobs, length=4)
    slopes = differences(lambda lp: loss(**{**given, "logprobs": lp}, **knobs, length=4)[0], given["logprobs"])
    assert flat(grads) == pytest.approx(flat(slopes), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("weigh", TOKEN_WEIGHINGS)
@pytest.mark.parametrize("clip", [(1 - 3e-4, 1 + 4e-4), (0.9, 1.1), UNCLIPPED])
def test_gspo_token_is_gspo(weigh: str, clip: tuple[float, float]) -> None:
    """One A in a sequence and weights 0 or 1 leave every counting token the same slope, its mean."""
    given = pick(POLICY, batch(5, fractional=False))
    given["advantages"] = [[row[0]] * len(row) for row in given["advantages"]]
    loss, grads = method("gspo")(**given, clip=clip, weigh=weigh, length=4)
    other, slopes = method("gspo_token")(**given, clip=clip, weigh=weigh, length=4)
    assert loss == other
    assert any(flat(grads))
    assert flat(grads) == near(flat(slopes))


@pytest.mark.parametrize("weigh", TOKEN_WEIGHINGS)
@pytest.mark.parametrize("clip", [(0.9, 1.1), UNCLIPPED])
def test_gspo_token_is_ppo_from_moved_logprobs(weigh: str, clip: tuple[float, float]) -> None:
    """log s = lp − sg(lp − mean d) is PPO's log ratio from old = lp − mean d."""
    given = pick(POLICY[:-1], batch(6))
    mean_d = oracle.averaged(
        given["weights"],
        oracle.difference(given["weights"], given["logprobs"], given["old_logprobs"]),
    )
    moved = [[x - m for x, m in zip(*rows, strict=True)] for rows in zip(given["logprobs"], mean_d, strict=True)]
    loss, grads = method("gspo_token")(**given, clip=clip, weigh=weigh, length=4)
    other, slopes = method("ppo")(**{**given, "old_logprobs": moved}, clip=clip, weigh=weigh, length=4)
    assert loss == pytest.approx(other, rel=1e-12)
    assert flat(grads) == pytest.approx(flat(slopes), rel=1e-12, abs=1e-15)


# What does not count


STOPPED = [
    ("gspo_token", POLICY, {"weigh": "sequence_mean", "tis_cap": 1.1}),
    ("cispo", POLICY, {"weigh": "sequence_mean", "tis_cap": 1.1, "clip": (0.9, 1.1)}),
]
"""Cases whose gradient is not the slope of their value, by design."""


@pytest.mark.parametrize(("name", "columns", "knobs"), [*CASES, *STOPPED])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_inactive_slots_are_never_read(name: str, columns: tuple[str, ...], knobs: dict[str, Any], junk: float) -> None:
    """Junk where w = 0 changes no bit, and the gradient there is 0."""
    given = pick(columns, batch(7))
    weights = given["weights"]
    spoiled = {
        column: [
            [x if w != 0 else junk for w, x in zip(*pair, strict=True)] for pair in zip(weights, rows, strict=True)
        ]
        for column, rows in given.items()
        if column != "weights"
    }
    clean = method(name)(**given, **knobs, length=4)
    assert method(name)(**spoiled, weights=weights, **knobs, length=4) == clean
    assert [g for g, w in zip(flat(clean[1]), flat(weights), strict=True) if w == 0 and g != 0] == []


@pytest.mark.parametrize(("name", "columns", "knobs"), [*CASES, *STOPPED])
def test_nothing_counts(name: str, columns: tuple[str, ...], knobs: dict[str, Any]) -> None:
    """No token that counts, or no sequence: the loss is 0."""
    given = {column: [[math.nan] * 2, []] for column in columns}
    assert method(name)(**given, weights=[[0, 0], []], **knobs, length=4) == (0, [[0, 0], []])
    assert method(name)(**{column: [] for column in columns}, weights=[], **knobs, length=4) == (0, [])


@pytest.mark.parametrize(("name", "columns", "knobs"), CASES)
def test_denominator_replaces_the_count(name: str, columns: tuple[str, ...], knobs: dict[str, Any]) -> None:
    """A given denominator divides the shares; a sum ignores it."""
    given = pick(columns, batch(8))
    halved = method(name)(**given, **knobs, denominator=2.0)[0]
    doubled = method(name)(**given, **knobs, denominator=0.5)[0]
    factor = 1 if knobs["weigh"] in ("token_sum", "pair_sum") else 4
    assert doubled == near(factor * halved)


# Extremes

EXTREMES = [0.0, -1e-10, -1e-6, -1.0, -50.0, -1e4]


@pytest.mark.parametrize("chosen", EXTREMES)
@pytest.mark.parametrize("rejected", EXTREMES)
def test_preferences_stay_finite(chosen: float, rejected: float) -> None:
    """Value and gradient are finite from certain to impossible sides."""
    rows: dict[str, Any] = {"logprobs": [[chosen], [rejected]], "weights": [[1], [1]]}
    for loss, grads in (oracle.orpo(**rows), oracle.dpo(**rows, ref_logprobs=[[-1], [-2]])):
        assert all(map(math.isfinite, [loss, *flat(grads)]))


def test_certain_orpo_by_hand() -> None:
    """At a_w = 0 the floor leaves log odds −log 1e-15, and a_l = −log 2 has 0: −log σ ≈ σ(−z) ≈ 1e-15.

    The loss is λ·1e-15 and the slope −1 − λ·1e-15·(1 + 1e15) ≈ −1 − λ.
    """
    loss, grads = oracle.orpo(logprobs=[[0], [-LN2]], weights=[[1], [1]], lam=0.5)
    assert loss == pytest.approx(0.5e-15, rel=1e-9)
    assert grads[0][0] == pytest.approx(-1.5, rel=1e-9)


def test_uncapped_ratio_overflows_to_infinity() -> None:
    """e¹⁰⁰⁰ is ∞: a gain without bound, unless clipped."""
    rows: dict[str, Any] = {
        "logprobs": [[1000]],
        "old_logprobs": [[0]],
        "weights": [[1]],
        "advantages": [[1]],
    }
    assert oracle.importance_sampling(**rows, log_ratio_cap=None) == (-math.inf, [[-math.inf]])
    assert oracle.ppo(**rows, log_ratio_cap=None) == (-1.2, [[0]])
    assert oracle.importance_sampling(**rows)[0] == -math.exp(20)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncation_clamps_at_20(level: str) -> None:
    """old − sampler = 30 counts as 20."""
    knobs: dict[str, Any] = {"sampler_logprobs": [[-30.0]], "tis_cap": math.inf, "tis_level": level}
    assert ratios("ppo", [1], [1], **knobs) == (-math.exp(20), [-math.exp(20)])


def test_sums_past_the_largest_float() -> None:
    """Two gains of 1e308 sum to ∞, and ∞ − ∞ is no number; neither raises."""
    assert oracle.total([1e308, 1e308]) == math.inf
    assert math.isnan(oracle.total([math.inf, -math.inf]))


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("ppo", {"weigh": "pair_mean"}),
        ("ppo", {"weigh": "fixed_length"}),
        ("ppo", {"tis_cap": 2.0}),
        ("ppo", {"tis_level": "batch"}),
        ("grpo", {"kl": "k4", "ref_logprobs": [[0.0]]}),
    ],
)
def test_unknown_options_raise(name: str, knobs: dict[str, Any]) -> None:
    """An unknown name and an option without its column are errors."""
    with pytest.raises(ValueError):
        ratios(name, [1], [1], **knobs)


def test_pairs_need_two() -> None:
    """An odd number of sequences and a weighing of tokens are errors."""
    with pytest.raises(ValueError, match="even"):
        oracle.orpo(logprobs=[[-1]] * 3, weights=[[1]] * 3)
    with pytest.raises(ValueError, match="pair_mean"):
        oracle.orpo(logprobs=[[-1]] * 2, weights=[[1]] * 2, weigh="token_mean")
    with pytest.raises(ValueError, match="scale"):
        oracle.group_advantages(rewards=[1], groups=[0], scale="mad")
