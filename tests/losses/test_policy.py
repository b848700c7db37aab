"""Policy losses by hand: two short sequences, numbers that can be redone on paper."""

import math
from typing import Any

import pytest
import torch
from batches import Batch, call

import lossfns
from lossfns import ON_POLICY

LN = math.log
# Ratios 1.5 and 0.5 with advantage 1 and −1 on a prompt token and three response tokens.
BATCH = Batch(
    logprobs=[[-9.0, -1.0, -1.0], [-2.0]],
    weights=[[0.0, 1.0, 1.0], [1.0]],
    columns={
        "advantages": [[9.0, 1.0, 1.0], [-1.0]],
        "old_logprobs": [[-9.0, -1.0 - LN(1.5), -1.0 - LN(0.5)], [-2.0 - LN(0.5)]],
        "ref_logprobs": [[-9.0, -1.0 - LN(2), -1.0], [-2.0]],
        "sampler_logprobs": [[-9.0, -1.0 - LN(1.5) - LN(3), -1.0 - LN(0.5)], [-2.0 - LN(0.5) + LN(2)]],
    },
)


def test_importance_sampling() -> None:
    """−(1.5 + 0.5 − 0.5) / 3 = −0.5; gradients −r·A/3."""
    value, gradients, metrics = call(lossfns.importance_sampling(), BATCH)
    assert value == pytest.approx(-0.5)
    assert gradients == [pytest.approx([0.0, -0.5, -0.5 / 3]), pytest.approx([0.5 / 3])]
    assert metrics["ratio"] == pytest.approx(2.5 / 3)


def test_ppo() -> None:
    """1.5 is cut to 1.2 and 0.5 with A < 0 to 0.8: −(1.2 + 0.5 − 0.8) / 3 = −0.3; both lose their gradient."""
    value, gradients, metrics = call(lossfns.ppo(), BATCH)
    assert value == pytest.approx(-0.3)
    assert gradients == [pytest.approx([0.0, 0.0, -0.5 / 3]), [0.0]]
    assert (metrics["clip_high"], metrics["clip_low"]) == pytest.approx((1 / 3, 1 / 3))


@pytest.mark.parametrize(
    ("clip", "low", "high"),
    [((1.0, 1.0), 1, 2), ((1.0, 1.75), 1, 1), ((0.25, 1.0), 0, 2), ((0.75, 1.75), 1, 1)],
    ids=str,
)
def test_a_ratio_is_counted_as_clipped_where_the_bound_takes_its_gradient(
    clip: tuple[float, float], low: int, high: int
) -> None:
    """Ratios ½, 1, 1½ and 2 with A = 1, 0 and −1: of twelve tokens, those on a bound are inside.

    ``low`` and ``high`` of four ratios lie beyond the bounds: with A < 0 and A > 0 they are clipped.
    """
    ratios = (0.5, 1.0, 1.5, 2.0)
    columns = {"advantages": [[1.0] * 4 + [0.0] * 4 + [-1.0] * 4], "old_logprobs": [[-3.0 - LN(r) for r in ratios] * 3]}
    batch = Batch([[-3.0] * 12], [[1.0] * 12], columns)
    _, gradients, metrics = call(lossfns.ppo(clip=clip), batch)
    assert (metrics["clip_low"], metrics["clip_high"]) == pytest.approx((low / 12, high / 12))
    up = [-r / 12 if r <= clip[1] else 0 for r in ratios]
    down = [r / 12 if r >= clip[0] else 0 for r in ratios]
    assert gradients[0] == pytest.approx([*up, 0, 0, 0, 0, *down])
    _, _, metrics = call(lossfns.cispo(clip=clip), batch)
    assert (metrics["bound_low"], metrics["bound_high"]) == pytest.approx((3 * low / 12, 3 * high / 12))


def test_dapo_raises_the_upper_bound_alone() -> None:
    """−(1.28 + 0.5 − 0.8) / 3."""
    assert call(lossfns.dapo(), BATCH)[0] == pytest.approx(-0.98 / 3)


def test_grpo_adds_the_kl() -> None:
    """Only one token is off the reference, by ln 2: k3 = ln 2 − ½, its gradient ½, over 3 tokens."""
    value, gradients, metrics = call(lossfns.grpo(kl_beta=0.6), BATCH)
    k3 = LN(2) - 0.5
    assert value == pytest.approx(-0.3 + 0.6 * k3 / 3)
    assert gradients[0] == pytest.approx([0.0, 0.6 * 0.5 / 3, -0.5 / 3])
    assert metrics["kl_ref"] == pytest.approx(k3 / 3)


def test_grpo_without_kl_is_ppo_and_reads_no_reference() -> None:
    assert lossfns.grpo(kl_beta=0).reads == ("advantages", "old_logprobs")
    assert call(lossfns.grpo(kl_beta=0), BATCH)[:2] == call(lossfns.ppo(), BATCH)[:2]


def test_gspo_and_gspo_token_differ_in_the_gradient_alone() -> None:
    """s₁ = √(1.5·0.5) = 0.8660, s₂ = ½. Unclipped, mean over sequences: −(s₁ − s₂)/2.

    Token-wise each token of the first sequence gets −s₁·A/2/2; with equal advantages gspo's is the same. With
    advantages 1 and 3 the sequence ratio passes the mean advantage to both, gspo_token each its own.
    """
    s = math.sqrt(0.75)
    wide = (0.0, 10.0)
    for loss in (lossfns.gspo(clip=wide), lossfns.gspo_token(clip=wide)):
        value, gradients, metrics = call(loss, BATCH)
        assert value == pytest.approx(-(s - 0.5) / 2)
        assert gradients == [pytest.approx([0.0, -s / 4, -s / 4]), pytest.approx([0.25])]
        assert metrics["ratio"] == pytest.approx((2 * s + 0.5) / 3)
    uneven = Batch(BATCH.logprobs, BATCH.weights, {**BATCH.columns, "advantages": [[9.0, 1.0, 3.0], [-1.0]]})
    assert call(lossfns.gspo(clip=wide), uneven)[1][0] == pytest.approx([0.0, -s / 2, -s / 2])
    assert call(lossfns.gspo_token(clip=wide), uneven)[1][0] == pytest.approx([0.0, -s / 4, -3 * s / 4])


def test_a_clipped_sequence_has_no_gradient_at_all() -> None:
    _, gradients, metrics = call(lossfns.gspo_token(), BATCH)
    assert gradients[1] == [0.0] and metrics["clip_low"] == pytest.approx(1 / 3)


def test_cispo_bounds_the_weight_of_a_token_and_keeps_its_gradient() -> None:
    """Weights 1.5 → 1.2 and 0.5 → 0.8 twice: −(−1.2 − 0.8 + 0.8·2) / 3; gradients −w·A/3, none of them 0."""
    value, gradients, metrics = call(lossfns.cispo(clip=(0.8, 1.2)), BATCH)
    assert value == pytest.approx(0.4 / 3)
    assert gradients == [pytest.approx([0.0, -0.4, -0.8 / 3]), pytest.approx([0.8 / 3])]
    assert (metrics["bound_high"], metrics["bound_low"]) == pytest.approx((1 / 3, 2 / 3))
    assert not metrics.keys() & {"clip_low", "clip_high"}


def test_cispo_takes_the_bounds_of_the_services_by_default() -> None:
    """0 and 4: nothing is bound here, and the gradient is that of importance sampling."""
    value, gradients, metrics = call(lossfns.cispo(), BATCH)
    assert value == pytest.approx((1.5 + 0.5 - 0.5 * 2) / 3)
    assert gradients == call(lossfns.importance_sampling(), BATCH)[1]
    assert metrics["bound_high"] == metrics["bound_low"] == 0
    assert metrics["ratio"] == pytest.approx(2.5 / 3)


@pytest.mark.parametrize("cap", [20.0, None])
def test_a_far_ratio_weighs_a_token_of_cispo_by_the_bound(cap: float | None) -> None:
    """e⁸⁹⁹ is inf in floats: the weight is 4, with a gradient, and the cap is not needed."""
    batch = Batch([[-1.0, -900.0]], [[1.0, 1.0]], {"advantages": [[1.0, -1.0]], "old_logprobs": [[-900.0, -1.0]]})
    with pytest.warns(lossfns.LossWarning, match="log-ratio"):
        value, gradients, metrics = call(lossfns.cispo(clip=(0.5, 4.0), log_ratio_cap=cap), batch)
    assert (value, gradients) == ((4 - 450) / 2, [[-2.0, 0.25]])
    assert metrics["bound_low"] == metrics["bound_high"] == 0.5


def test_dro() -> None:
    """d = ln 1.5, ln ½, ln ½ and β = 0.6: −(−1 − 1 + 2)/3 + 0.3·Σd²/3; gradients (−A + 0.6·d)/3."""
    value, gradients, metrics = call(lossfns.dro(beta=0.6), BATCH)
    near, far = LN(1.5), LN(0.5)
    assert value == pytest.approx(0.3 * (near**2 + 2 * far**2) / 3)
    assert gradients[0] == pytest.approx([0.0, (-1 + 0.6 * near) / 3, (-1 + 0.6 * far) / 3])
    assert gradients[1] == pytest.approx([(1 + 0.6 * far) / 3])
    assert metrics["log_ratio_abs"] == pytest.approx((near - 2 * far) / 3)
    assert metrics["ratio"] == pytest.approx(2.5 / 3) and metrics["ratio_capped"] == 0
    assert metrics["kl_old"] == pytest.approx((0.5 - near + 2 * (-0.5 - far)) / 3)


def test_dro_is_reinforce_with_k2_to_the_old_policy() -> None:
    held = lossfns.with_kl(lossfns.reinforce(), kl_beta=0.6, kl=lossfns.k2)
    batch = Batch(BATCH.logprobs, BATCH.weights, {**BATCH.columns, "ref_logprobs": BATCH.columns["old_logprobs"]})
    assert call(lossfns.dro(beta=0.6), batch)[:2] == call(held, batch)[:2]


def test_the_penalty_of_dro_has_no_cap() -> None:
    """900 nats away it pulls with 0.05·900, and the metrics are finite."""
    batch = Batch([[-1.0]], [[1.0]], {"advantages": [[1.0]], "old_logprobs": [[-901.0]]})
    with pytest.warns(lossfns.LossWarning, match="log-ratio"):
        value, gradients, metrics = call(lossfns.dro(), batch)
    assert value == pytest.approx(1 + 0.025 * 900**2) and gradients == [[pytest.approx(44.0)]]
    assert metrics["ratio_capped"] == 1 and all(map(math.isfinite, metrics.values()))


def test_the_samplers_weight_is_that_of_the_whole_term_of_dro() -> None:
    """Weights 2 (capped), 1 and ½ of reward and penalty alike."""
    rho, ds = (2.0, 1.0, 0.5), (LN(1.5), LN(0.5), LN(0.5))
    value, gradients, _ = call(lossfns.with_tis(lossfns.dro(beta=0.6), cap=2.0), BATCH)
    rewards = (-1.0, -1.0, 2.0)
    assert value == pytest.approx(sum(p * (0.3 * d**2 - r) for p, d, r in zip(rho, ds, rewards)) / 3)
    assert gradients[1] == pytest.approx([0.5 * (1 + 0.6 * LN(0.5)) / 3])


@pytest.mark.parametrize("loss", [lossfns.cispo(clip=(0.8, 1.2)), lossfns.dro(beta=0.6)], ids=repr)
def test_the_kl_joins_a_loss_without_a_clipped_ratio(loss: lossfns.Loss) -> None:
    """The reference is off by ln 2 at one token: k3 = ln 2 − ½ with the gradient ½, over 3 tokens."""
    value, gradients, metrics = call(lossfns.with_kl(loss, kl_beta=0.6), BATCH)
    alone, pulls, _ = call(loss, BATCH)
    assert value - alone == pytest.approx(0.6 * (LN(2) - 0.5) / 3)
    assert gradients[0][1] - pulls[0][1] == pytest.approx(0.6 * 0.5 / 3)
    assert metrics["kl_ref"] == pytest.approx((LN(2) - 0.5) / 3)


def test_on_policy_the_ratio_is_one_and_the_gradient_is_reinforce() -> None:
    for loss in (lossfns.importance_sampling(), lossfns.ppo(), lossfns.dapo(), lossfns.grpo(kl_beta=0)):
        logprobs = BATCH.tensors()
        bound = loss.bind(weights=BATCH.weights, advantages=BATCH.columns["advantages"], old_logprobs=ON_POLICY)
        value, metrics = bound(BATCH.data(), logprobs)
        value.backward()
        assert metrics["ratio"] == 1 and metrics["kl_old"] == 0
        assert value.item() == pytest.approx(-1 / 3)
        assert logprobs[0].grad.tolist() == pytest.approx([0.0, -1 / 3, -1 / 3])
        assert logprobs[1].grad.tolist() == pytest.approx([1 / 3])


@pytest.mark.parametrize("loss", [lossfns.cispo(), lossfns.dro()], ids=repr)
def test_on_policy_cispo_and_dro_are_reinforce(loss: lossfns.Loss) -> None:
    logprobs = BATCH.tensors()
    bound = loss.bind(weights=BATCH.weights, advantages=BATCH.columns["advantages"], old_logprobs=ON_POLICY)
    value, metrics = bound(BATCH.data(), logprobs)
    value.backward()
    expected, gradients, _ = call(lossfns.reinforce(), BATCH)
    assert value.item() == pytest.approx(expected)
    assert [lp.grad.tolist() for lp in logprobs] == [pytest.approx(row) for row in gradients]
    assert metrics["ratio"] == 1 and metrics["kl_old"] == metrics["log_ratio_abs"] == 0


def test_reinforce() -> None:
    """−(−1 − 1 + 2)/3 = 0; gradients −A/3."""
    value, gradients, metrics = call(lossfns.reinforce(), BATCH)
    assert value == pytest.approx(0) and metrics["nll"] == pytest.approx((1 + 1 + 2) / 3)
    assert gradients == [pytest.approx([0.0, -1 / 3, -1 / 3]), pytest.approx([1 / 3])]


def test_tis_scales_each_token_by_its_capped_weight() -> None:
    """old/sampler = 3 → 2 (capped), 1 and ½: −(2·1.5 + 1·0.5 − ½·0.5) / 3."""
    value, gradients, metrics = call(lossfns.with_tis(lossfns.importance_sampling(), cap=2.0), BATCH)
    assert value == pytest.approx(-3.25 / 3)
    assert gradients[0] == pytest.approx([0.0, -1.0, -0.5 / 3])
    assert metrics["tis_weight"] == pytest.approx(3.5 / 3) and metrics["tis_capped"] == pytest.approx(1 / 3)


def test_tis_by_sequence_is_the_product_and_geometric_its_root() -> None:
    """First sequence: product 3, root √3."""
    by_product = lossfns.with_tis(lossfns.importance_sampling(), cap=5.0, level=lossfns.sequence_level)
    assert call(by_product, BATCH)[0] == pytest.approx(-(3 * 2 - 0.25) / 3)
    by_root = lossfns.with_tis(lossfns.importance_sampling(), cap=5.0, level=lossfns.geometric_level)
    assert call(by_root, BATCH)[0] == pytest.approx(-(math.sqrt(3) * 2 - 0.25) / 3)


def test_the_kl_is_not_importance_weighted() -> None:
    tis = lossfns.with_tis(lossfns.importance_sampling(), cap=2.0)
    with_kl, without = call(lossfns.with_kl(tis, kl_beta=0.6), BATCH)[0], call(tis, BATCH)[0]
    assert with_kl - without == pytest.approx(0.6 * (LN(2) - 0.5) / 3)


def test_dual_clip_bounds_what_a_bad_token_can_cost() -> None:
    """r = e² = 7.39 with A = −1 costs 7.39, dual-clipped at 3 it costs 3 and has no gradient."""
    batch = Batch([[-1.0]], [[1.0]], {"advantages": [[-1.0]], "old_logprobs": [[-3.0]]})
    assert call(lossfns.ppo(), batch)[:2] == (pytest.approx(math.exp(2)), [pytest.approx([math.exp(2)])])
    value, gradients, metrics = call(lossfns.ppo(dual_clip=3.0), batch)
    assert (value, gradients, metrics["clip_dual"]) == (3.0, [[0.0]], 1.0)
    assert call(lossfns.with_dual_clip(lossfns.ppo(), c=3.0), batch)[:2] == (3.0, [[0.0]])


@pytest.mark.filterwarnings("ignore:the mean .log-ratio. is")
@pytest.mark.parametrize("preset", [lossfns.ppo, lossfns.dapo, lossfns.grpo, lossfns.gspo, lossfns.gspo_token])
def test_every_clipped_loss_has_a_cap_and_a_dual_clip(preset: Any) -> None:
    """A = −1 at ratio e²: e² without either, e where the log-ratio is capped at 1, 2 with a dual clip of 2."""
    columns = {"advantages": [[-1.0]], "old_logprobs": [[-3.0]], "ref_logprobs": [[-1.0]]}
    batch = Batch([[-1.0]], [[1.0]], columns)
    for knobs, value in (({}, math.exp(2)), ({"log_ratio_cap": 1.0}, math.e), ({"dual_clip": 2.0}, 2.0)):
        got, _, metrics = call(preset(**knobs), batch)
        assert got == pytest.approx(value)
        assert metrics["ratio_capped"] == ("log_ratio_cap" in knobs) and ("clip_dual" in metrics) == (value == 2)


@pytest.mark.parametrize("loss", [lossfns.grpo(), lossfns.with_tis(lossfns.ppo())], ids=repr)
def test_combinators_go_on_from_inside_out(loss: lossfns.Loss) -> None:
    for combinator in (lossfns.with_dual_clip, lossfns.with_tis):
        with pytest.raises(lossfns.LossInputError, match="Apply with_kl last"):
            combinator(loss)


def test_capped_tokens_are_counted_and_have_no_gradient() -> None:
    batch = Batch([[-1.0, -1.0]], [[1.0, 1.0]], {"advantages": [[1.0, 1.0]], "old_logprobs": [[-1.0, -3.0]]})
    _, gradients, metrics = call(lossfns.importance_sampling(log_ratio_cap=1.0), batch)
    assert gradients == [pytest.approx([-0.5, 0.0])]
    assert metrics["ratio_capped"] == 0.5 and metrics["ratio"] == pytest.approx((1 + math.e) / 2)


def test_a_log_ratio_at_its_cap_is_not_counted_as_capped() -> None:
    """Log-ratios 1 and −1 with a cap of 1: they are what they would be without."""
    batch = Batch([[-1.0, -2.0]], [[1.0, 1.0]], {"advantages": [[1.0, 1.0]], "old_logprobs": [[-2.0, -1.0]]})
    value, _, metrics = call(lossfns.importance_sampling(log_ratio_cap=1.0), batch)
    assert metrics["ratio_capped"] == 0 and value == call(lossfns.importance_sampling(), batch)[0]


def test_without_a_cap_an_overflow_is_an_error_and_not_an_inf() -> None:
    batch = Batch([[-1.0]], [[1.0]], {"advantages": [[1.0]], "old_logprobs": [[-900.0]]})
    with pytest.raises(lossfns.LossInputError, match="log_ratio_cap"):
        call(lossfns.importance_sampling(log_ratio_cap=None), batch)
    with pytest.warns(lossfns.LossWarning, match="log-ratio"):
        value, _, _ = call(lossfns.importance_sampling(), batch)
    assert value == pytest.approx(-math.exp(20))
    assert torch.isfinite(torch.tensor(value))


@pytest.mark.parametrize(
    "build",
    [
        lambda: lossfns.with_kl(lossfns.grpo()),
        lambda: lossfns.with_kl(lossfns.dpo()),
        lambda: lossfns.with_kl(lossfns.orpo()),
        lambda: lossfns.with_tis(lossfns.multi_target_cross_entropy()),
        lambda: lossfns.with_dual_clip(lossfns.cross_entropy()),
    ],
)
def test_nothing_is_counted_twice_or_put_where_it_has_no_meaning(build: Any) -> None:
    with pytest.raises(lossfns.LossInputError, match=r"^(with_kl|with_tis|with_dual_clip): loss: expected a loss"):
        build()


# Weights that are fractions: Σ w·x / Σ w wherever a mean is taken over a sequence

UNEQUAL = Batch(
    logprobs=[[-1.0, -2.0]],
    weights=[[1.0, 0.25]],
    columns={
        "advantages": [[1.0, 1.0]],
        "old_logprobs": [[-1.5, -1.0]],
        "sampler_logprobs": [[-1.75, -2.0]],
    },
)
"""d = (0.5, −1), so Σ w·d / Σ w = (0.5 − 0.25) / 1.25 = 0.2. old − sampler = (0.25, 1)."""


def test_fractional_weights_enter_the_mean_of_gspos_ratio() -> None:
    """s = exp(0.2) = 1.221; ∂L/∂lp = −s·A·w/Σw, the whole sequence being one term of share 1."""
    value, gradients, metrics = call(lossfns.gspo(clip=(0.1, 9.0)), UNEQUAL)
    s = math.exp(0.2)
    assert metrics["ratio"] == pytest.approx(s) == pytest.approx(1.221, abs=5e-4)
    assert value == pytest.approx(-s)
    assert gradients == [pytest.approx([-0.8 * s, -0.2 * s])]


def test_fractional_weights_enter_gspo_token_alike() -> None:
    value, gradients, metrics = call(lossfns.gspo_token(clip=(0.1, 9.0)), UNEQUAL)
    assert metrics["ratio"] == pytest.approx(math.exp(0.2)) == pytest.approx(-value)
    assert gradients == [pytest.approx([-0.8 * math.exp(0.2), -0.2 * math.exp(0.2)])]


@pytest.mark.parametrize(
    ("level", "log_weight"),
    [("sequence_level", 0.25 + 0.25 * 1.0), ("geometric_level", (0.25 + 0.25 * 1.0) / 1.25)],
)
def test_fractional_weights_enter_tis_at_sequence_and_geometric_level(level: str, log_weight: float) -> None:
    """ρ = exp(Σ w·(old − sampler)), or of its quotient by Σ w; L = ρ·Σ w·(−r·A) / Σ w."""
    loss = lossfns.with_tis(lossfns.importance_sampling(), cap=9.0, level=level)  # type: ignore[arg-type]
    value, _, metrics = call(loss, UNEQUAL)
    assert metrics["tis_weight"] == pytest.approx(math.exp(log_weight))
    assert value == pytest.approx(-math.exp(log_weight) * (math.exp(0.5) + 0.25 * math.exp(-1)) / 1.25)


@pytest.mark.parametrize("level", ["sequence_level", "geometric_level"])
def test_a_weight_of_two_counts_a_token_twice(level: str) -> None:
    """In the ratio of the sequence as in the weighted mean of the terms."""
    loss = lossfns.with_tis(lossfns.ppo(), cap=9.0, level=level)  # type: ignore[arg-type]
    columns = {name: [[rows[0][0], rows[0][1]]] for name, rows in UNEQUAL.columns.items()}
    once = Batch([[-1.0, -2.0]], [[2.0, 1.0]], columns)
    columns = {name: [[rows[0][0], rows[0][0], rows[0][1]]] for name, rows in UNEQUAL.columns.items()}
    twice = Batch([[-1.0, -1.0, -2.0]], [[1.0, 1.0, 1.0]], columns)
    assert call(loss, once)[0] == pytest.approx(call(loss, twice)[0])
    for preset in (lossfns.gspo(clip=(0.1, 9.0)), lossfns.gspo_token(clip=(0.1, 9.0))):
        assert call(preset, once)[0] == pytest.approx(call(preset, twice)[0])


def test_the_samplers_weight_is_the_penaltys_too_in_dro() -> None:
    """ρ = exp(old − sampler) = e^0.25 and e; l = −(A·lp − ½β·d²) = 1 + ½·0.25 and 2 + ½."""
    value, _, _ = call(lossfns.with_tis(lossfns.dro(beta=1.0), cap=9.0), UNEQUAL)
    assert value == pytest.approx((math.exp(0.25) * 1.125 + 0.25 * math.e * 2.5) / 1.25)


@pytest.mark.filterwarnings("ignore:the mean .log-ratio. is")
@pytest.mark.parametrize("preset", [lossfns.ppo, lossfns.dapo, lossfns.gspo, lossfns.gspo_token])
def test_a_ratio_that_overflows_is_clipped_without_a_nan_in_the_gradient(preset: Any) -> None:
    """Where A > 0 the bound removes the gradient; 0 · inf is nan. A dual clip bounds the loss where A < 0."""
    far = {"advantages": [[1.0], [1.0]], "old_logprobs": [[-400.0], [-1.0]]}
    batch = Batch([[-1.0], [-1.0]], [[1.0], [1.0]], far)
    value, gradients, _ = call(preset(log_ratio_cap=None), batch, dtype=torch.float32)
    assert value == pytest.approx(-(preset().knobs["clip"][1] + 1) / 2) and gradients == [[0.0], [-0.5]]
    batch = Batch([[-1.0], [-1.0]], [[1.0], [1.0]], far | {"advantages": [[-1.0], [1.0]]})
    value, gradients, _ = call(preset(log_ratio_cap=None, dual_clip=3.0), batch, dtype=torch.float32)
    assert value == 1.0 and gradients == [[0.0], [-0.5]]
    with pytest.raises(lossfns.LossInputError, match="loss: expected a finite value, got inf"):
        call(preset(log_ratio_cap=None), batch, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:the mean .log-ratio. is")
def test_a_ratio_below_the_overflow_is_the_papers_uncapped_one() -> None:
    """e^80 is finite in float32; e^400 is finite in float64, and so is its gradient."""
    for log_ratio, dtype in ((80.0, torch.float32), (400.0, torch.float64)):
        batch = Batch([[-1.0]], [[1.0]], {"advantages": [[-1.0]], "old_logprobs": [[-1.0 - log_ratio]]})
        value, gradients, _ = call(lossfns.importance_sampling(log_ratio_cap=None), batch, dtype=dtype)
        assert value == gradients[0][0] == pytest.approx(math.exp(log_ratio), rel=1e-5)
