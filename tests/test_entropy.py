"""Losses of the policy's entropy: exact values and gradients, in every form, from logits, and from samples alone."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch
from batches import Batch, apart, random_batch
from torch import Tensor

import lossfns
from lossfns import (
    Loss,
    LossInputError,
    adapt_entropy_coef,
    export,
    fixed_length,
    ppo,
    reinforce,
    sequence_mean,
    sum_losses,
    target_logprobs,
    testing,
    token_mean,
    with_clip_b,
    with_entropy,
    with_kl,
    with_sampled_entropy,
    with_top_entropy,
)
from lossfns.entropy import in_top_quantile
from lossfns.preset import make_loss
from lossfns.testing import oracle
from lossfns.testing.laws import policy
from lossfns.testing.laws.base import LawBroken

NAMES = ("entropy", "sum_square_probs")
WEIGHINGS = {"token_mean": token_mean, "sequence_mean": sequence_mean, "fixed_length": fixed_length(7)}


def call(loss: Loss, batch: Batch, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Return value, gradients in logprobs and entropies, and metrics, on datums."""
    columns, logprobs = batch.bound(loss.reads), batch.tensors(dtype)
    entropy = [torch.tensor(row, dtype=dtype, requires_grad=True) for row in batch.columns["entropy"]]
    columns |= {"entropy": entropy} if "entropy" in loss.reads else {}
    value, metrics = loss.bind(**columns, **options)(batch.data(), logprobs)
    value.backward()
    leaves = logprobs, entropy
    grads = [[(torch.zeros_like(x) if x.grad is None else x.grad).tolist() for x in row] for row in leaves]
    return value.item(), *grads, metrics


# Against plain floats


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_combinators_equal_the_oracle(dtype: torch.dtype) -> None:
    """Value and gradient in logprobs and entropies, under three weighings, with the own denominator and another."""
    bound = 1e-12 if dtype is torch.float64 else 1e-5
    for seed in range(5):
        batch = random_batch(Random(seed))
        as_is = lambda rows: [torch.tensor(row, dtype=dtype).tolist() for row in rows]  # noqa: E731
        batch = Batch(as_is(batch.logprobs), as_is(batch.weights), {n: as_is(x) for n, x in batch.columns.items()})
        for weigh, weighing in WEIGHINGS.items():
            for options in ({}, {"denominator": 17.0}):
                by = {"weights": batch.weights, "weigh": weigh, "length": 7, **options}
                base = reinforce(weigh=weighing)
                advantages, groups = ({n: batch.columns[n]} for n in ("advantages", "groups"))
                entropy, old = ({n: batch.columns[n]} for n in ("entropy", "old_logprobs"))
                plain = oracle.reinforce(logprobs=batch.logprobs, **advantages, **by)
                bonus = oracle.entropy_bonus(logprobs=batch.columns["entropy"], entropy_coef=0.3, **by)
                value, lp, h, _ = call(with_entropy(base, 0.3), batch, dtype, **options)
                assert apart((value, lp, h), (plain[0] + bonus[0], plain[1], bonus[1])) < bound
                sampled = oracle.sampled_entropy_bonus(logprobs=batch.logprobs, entropy_coef=0.3, **old, **by)
                value, lp, *_ = call(with_sampled_entropy(base, 0.3), batch, dtype, **options)
                both = [[a + b for a, b in zip(*rows)] for rows in zip(plain[1], sampled[1])]
                assert apart((value, lp), (plain[0] + sampled[0], both)) < bound
                columns = {"logprobs": batch.logprobs, **advantages, **groups, **entropy, **by}
                for loss, expected in (
                    (with_top_entropy(base, 0.2), oracle.with_top_entropy(top_quantile=0.2, **columns)),
                    (with_top_entropy(base, 0.55), oracle.with_top_entropy(top_quantile=0.55, **columns)),
                    (with_clip_b(base, 0.7), oracle.with_clip_b(mu=0.7, **columns)),
                ):
                    value, lp, h, _ = call(loss, batch, dtype, **options)
                    assert apart((value, lp), expected) < bound, loss
                    assert not any(map(any, h)), loss


@pytest.mark.parametrize("weigh", [token_mean, sequence_mean], ids=repr)
def test_any_split_that_keeps_groups_whole_is_exact(weigh: lossfns.Weighing) -> None:
    """The parts, with the denominator of the whole, sum to its value and have its gradients."""
    loss = with_clip_b(with_top_entropy(with_entropy(reinforce(weigh=weigh), 0.3), 0.6), 0.7)
    for seed in range(4):
        batch = random_batch(Random(seed))
        value, lp, h, _ = call(loss, batch)
        labels = [row[0] for row in batch.columns["groups"]]
        denominator = loss.bind(**batch.bound(("advantages",))).denominator(batch.data())
        total, parts = 0.0, {}
        for label in set(labels):
            members = [i for i, other in enumerate(labels) if other == label]
            part, *grads, _ = call(loss, batch.take(members), denominator=denominator)
            total, parts = total + part, parts | dict(zip(members, zip(*grads)))
        assert apart((total, [parts[i] for i in range(len(labels))]), (value, list(zip(lp, h)))) < 1e-12


# By hand


LN = math.log


def hand(**columns: Any) -> dict[str, Any]:
    """Two sequences of two tokens, the second with a masked token."""
    row = lambda x: torch.tensor(x, dtype=torch.float64, requires_grad=True)  # noqa: E731
    return {
        "logprobs": row([[LN(1 / 2), LN(1 / 4)], [LN(1 / 8), -9.0]]),
        "weights": torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
        "advantages": torch.tensor([1.0, -2.0]),
        "entropy": row([[0.5, 1.0], [2.0, 77.0]]),
        "groups": torch.tensor([0, 0]),
        **columns,
    }


def padded(loss: Loss, **columns: Any) -> Any:
    given = hand(**columns)
    named = {name: given[name] for name in ("logprobs", "weights", *loss.reads)}
    value, metrics = loss.padded(**named)
    value.backward()
    return value.item(), given["logprobs"].grad, given["entropy"].grad, metrics


def test_a_bonus_by_hand() -> None:
    """−(1·ln ½ + 1·ln ¼ − 2·ln ⅛)/3 = −ln 8/3·... with c = 0.5: each H has gradient −0.5/3, the masked one 0."""
    value, lp, h, metrics = padded(with_entropy(reinforce(), 0.5))
    assert value == pytest.approx((LN(2) + LN(4) - 2 * LN(8)) / 3 - 0.5 * 3.5 / 3)
    torch.testing.assert_close(lp * 3, torch.tensor([[-1.0, -1.0], [2.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(h * 3, torch.tensor([[-0.5, -0.5], [-0.5, 0.0]], dtype=torch.float64))
    assert metrics["entropy"] == pytest.approx(3.5 / 3)
    _, _, h, _ = padded(with_entropy(reinforce(weigh=sequence_mean), 0.5))  # ½·(½·(0.5 + 1) + 2) of the entropies
    torch.testing.assert_close(h, torch.tensor([[-0.125, -0.125], [-0.25, 0.0]], dtype=torch.float64))


def test_a_coefficient_of_0_reports_the_entropy_and_has_no_gradient() -> None:
    loss = with_entropy(reinforce(), 0.0)
    value, _, h, metrics = padded(loss)
    assert (value, h) == (padded(reinforce())[0], None) and loss.gradient_columns == ()
    assert metrics["entropy"] == pytest.approx(3.5 / 3)


def test_the_tokens_of_highest_entropy_by_hand() -> None:
    """Of n = 3: 1 + ⌊ρ·2⌋ tokens. ρ = 0.4 keeps H = 2; ρ = 0.5 keeps 2 and 1, also as two groups of 2 and 1."""
    for rho, groups, kept in (
        (0.4, [0, 0], [[0, 0], [1, 0]]),
        (0.5, [0, 0], [[0, 1], [1, 0]]),
        (0.4, [7, -1], [[0, 1], [1, 0]]),
        (0.0, [0, 0], [[0, 0], [1, 0]]),
        (0.999, [0, 0], [[0, 1], [1, 0]]),
    ):
        value, lp, h, metrics = padded(with_top_entropy(reinforce(), rho), groups=torch.tensor(groups))
        terms = torch.tensor([[LN(2), LN(4)], [-2 * LN(8), 0.0]], dtype=torch.float64) * torch.tensor(kept)
        assert value == pytest.approx(float(terms.sum()) / 3) and h is None
        assert (lp != 0).int().tolist() == kept
        assert metrics["entropy_kept"] == pytest.approx(sum(map(sum, kept)) / 3)
    loss = reinforce()
    assert with_top_entropy(loss, 1.0) is not loss and with_top_entropy(loss, 1.0).reads == loss.reads


def test_ties_of_entropy_are_kept_together() -> None:
    tied = torch.tensor([[1.0, 1.0], [1.0, 77.0]], dtype=torch.float64, requires_grad=True)
    assert padded(with_top_entropy(reinforce(), 0.0), entropy=tied)[3]["entropy_kept"] == 1


def test_clip_b_by_hand() -> None:
    """S = p·(H + lp): ½(0.5 − 0.69), ¼(1 − 1.39), ⅛(2 − 2.08) = −0.097, −0.097, −0.010: the A < 0 is the highest."""
    kept = padded(with_clip_b(reinforce(), 0.1))
    assert kept[3]["clip_b"] == 0 and kept[0] == pytest.approx(padded(reinforce())[0])
    value, lp, h, metrics = padded(with_clip_b(reinforce(), 0.1), advantages=torch.tensor([-1.0, 2.0]))
    assert metrics["clip_b"] == pytest.approx(2 / 3) and h is None
    assert value == pytest.approx(2 * LN(8) / 3) and (lp != 0).int().tolist() == [[0, 0], [1, 0]]


def test_the_adaptive_coefficient_is_that_of_trl() -> None:
    """TRL 1.16, grpo_trainer.py: the coefficient applies if the last entropy is at most the target, and then moves."""
    coef, last, state = 0.0, math.inf, (0.0, 0.0)
    for entropy in (0.15, 0.2, 0.3, 0.1, 0.1, 0.5, 0.5, 0.5, 0.5):
        assert state == (coef, coef if last <= 0.2 else 0.0)
        coef = min(coef + 0.005, 0.012) if entropy <= 0.2 else max(coef - 0.005, 0.001)
        last, state = entropy, adapt_entropy_coef(state[0], entropy, target=0.2, low=0.001, high=0.012)
    for wrong in ({"coef": -1}, {"entropy": math.nan}, {"delta": 0}, {"high": -1}, {"target": "low"}):
        with pytest.raises(LossInputError, match=next(iter(wrong))):
            adapt_entropy_coef(**{"coef": 0.0, "entropy": 0.1, "target": 0.2} | wrong)


# The quantile


def test_the_mask_is_that_of_torch_quantile_for_each_group() -> None:
    g = torch.Generator().manual_seed(0)
    for seed in range(20):
        rng = Random(seed)
        lengths = torch.tensor([rng.randint(1, 30) for _ in range(6)])
        n, labels = int(lengths.sum()), torch.randint(-2, 2, (6,), generator=g).double()
        active = torch.rand(n, generator=g) < 0.7
        x = torch.rand(n, generator=g, dtype=torch.float64)
        groups = labels.repeat_interleave(lengths)
        t = lossfns.Tokens(x, active.double(), lengths, {"groups": torch.where(active, groups, 0)})
        for share in (0.0, 0.2, 0.37, 0.5, 0.9):
            expected = torch.zeros(n, dtype=torch.bool)
            for label in labels.unique():
                own = active & (groups == label)
                if own.any():  # the tolerance is for the interpolation of torch, where ρ·(n − 1) is a whole number
                    expected |= own & (x >= torch.quantile(x[own], 1 - share) - 1e-12)
            assert torch.equal(in_top_quantile(t, torch.where(active, x, 0), share), expected)


# Columns that carry a gradient


def tensors(seed: int = 0, vocabulary: int = 5) -> Any:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 4, vocabulary, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, vocabulary, (3, 4), generator=g)
    weights = torch.tensor([[1.0, 1, 1, 1], [0.5, 2, 0, 1], [0, 1, 1, 0]])
    return logits, targets, weights, torch.randn(3, generator=g)


def test_the_gradient_in_the_logits_is_that_of_the_definition_in_every_form() -> None:
    """Padded, packed, datums, deferred, vmap of each; bonus and a term of one's own in Σp²."""

    def terms(t: Any) -> Any:
        term, statistics = with_entropy(reinforce(), 0.3).terms(t)
        return term + 0.7 * t.sum_square_probs, statistics

    loss = make_loss(terms, ("advantages", *NAMES), sequence_mean)
    logits, targets, weights, advantages = tensors()
    lp = logits.log_softmax(-1)
    h, s = -(lp.exp() * lp).sum(-1), (2 * lp).exp().sum(-1)
    term = -advantages[:, None] * lp.gather(-1, targets[..., None]).squeeze(-1) - 0.3 * h + 0.7 * s
    expected = ((weights * term).sum(1) / weights.sum(1)).mean()
    (gradient,) = torch.autograd.grad(expected, logits)

    def outputs() -> Any:
        return target_logprobs(logits, targets, return_entropy=True, return_sum_square_probs=True)

    def of_padded() -> Tensor:
        logprobs, *columns = outputs()
        return loss.padded(logprobs, weights, advantages=advantages, **dict(zip(NAMES, columns)))[0]

    def of_packed() -> Tensor:
        logprobs, *columns = (x.flatten() for x in outputs())
        side = {"advantages": advantages, **dict(zip(NAMES, columns))}
        return loss.packed(logprobs, weights.flatten(), lengths=[4, 4, 4], **side)[0]

    def of_datums() -> Tensor:
        logprobs, *columns = (list(x) for x in outputs())
        data = Batch(weights.tolist(), weights.tolist()).data()
        bound = loss.bind(weights=weights.tolist(), advantages=advantages, **dict(zip(NAMES, columns)))
        return bound(data, logprobs)[0]

    def of_deferred() -> Tensor:
        logprobs, *columns = outputs()
        side = {"advantages": advantages, **dict(zip(NAMES, columns))}
        total, metrics = loss.deferred().padded(logprobs, weights, **side)
        assert metrics.finalise()["entropy"] == pytest.approx(h[weights != 0].mean().item())
        assert not any(x.requires_grad for x in metrics.tensors.values())
        return total

    for form in (of_padded, of_packed, of_datums, of_deferred):
        total = form()
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(torch.autograd.grad(total, logits)[0], gradient, atol=1e-14, rtol=1e-12)

    def of_each(*leaves: Tensor) -> Tensor:
        logprobs, *columns = (x[None] for x in leaves[:3])
        side = {"advantages": leaves[4][None], **dict(zip(NAMES, columns))}
        return loss.deferred().padded(logprobs, leaves[3][None], denominator=3.0, **side)[0]

    logprobs, *columns = (x.detach() for x in outputs())
    by_row = torch.func.vmap(torch.func.grad(of_each, argnums=(0, 1, 2)))(logprobs, *columns, weights, advantages)
    share = weights / weights.sum(1, keepdim=True) / 3
    torch.testing.assert_close(by_row[1], (-0.3 * share).double())
    torch.testing.assert_close(by_row[2], (0.7 * share).double())


def test_compiled_losses_are_the_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as one graph with its gradients in logprobs and columns, which a backend without a compiler runs."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))

    def terms(t: Any) -> Any:
        return -t.advantages * t.logprobs - 0.3 * t.entropy.square() + t.sum_square_probs, {}

    g = torch.Generator().manual_seed(0)
    for loss in (
        make_loss(terms, ("advantages", *NAMES), token_mean),
        with_clip_b(with_top_entropy(with_entropy(reinforce(), 0.3), 0.4), 0.5),
    ):
        for size in (4,):
            rows = {name: torch.rand(size, 5, generator=g) for name in ("logprobs", *NAMES)}
            rows["logprobs"] = -rows["logprobs"]
            weights, side = (torch.rand(size, 5, generator=g) < 0.8).float(), {"advantages": torch.randn(size)}
            side |= {"groups": torch.arange(size) % 2} if loss.couples_groups else {}
            found = []
            for form in (loss.padded, loss.compiled().padded):
                leaves = {n: x.clone().requires_grad_() for n, x in rows.items() if n in ("logprobs", *loss.reads)}
                total, metrics = form(weights=weights, **leaves, **side)
                total.backward()
                found.append((total.item(), [x.grad for x in leaves.values()], metrics))
            torch.testing.assert_close(found[0][:2], found[1][:2])
            assert found[0][2] == pytest.approx(found[1][2], rel=1e-5)


def test_what_stands_in_a_masked_slot_reaches_nothing() -> None:
    loss = with_clip_b(with_top_entropy(with_entropy(reinforce(), 0.3), 0.5), 0.5)
    results = []
    for poison in (77.0, math.nan, math.inf, -1e30):
        given = hand()
        with torch.no_grad():
            given["entropy"][1, 1] = poison
        value, lp, h, metrics = padded(loss, entropy=given["entropy"])
        results.append((value, lp.tolist(), h.tolist(), metrics))
    assert all(a == b for a, b in pairwise(results))


def refusal(function: Callable[[], Any]) -> str:
    with pytest.raises(LossInputError) as error:
        function()
    return str(error.value)


def test_a_constant_is_refused_where_the_gradient_goes_through_it_and_taken_where_it_does_not() -> None:
    constant = {"entropy": hand()["entropy"].detach()}
    bonus = with_entropy(reinforce(), 0.3)
    message = refusal(lambda: padded(bonus, **constant))
    assert "with_entropy: entropy: expected a tensor with its graph" in message and "got a constant" in message
    flat = {n: x.flatten() for n, x in hand(**constant).items() if n in ("logprobs", "weights", "entropy")}
    assert "got a constant" in refusal(lambda: bonus.packed(**flat, lengths=[2, 2], advantages=[1.0, 1.0]))
    batch = random_batch(Random(0))
    assert "got a constant" in refusal(lambda: bonus.bind(**batch.bound(bonus.reads))(batch.data(), batch.tensors()))
    with torch.no_grad():  # an evaluation
        named = {n: x for n, x in hand(**constant).items() if n != "groups"}
        assert bonus.padded(**named)[1]["entropy"] == pytest.approx(3.5 / 3)
    given = {n: x for n, x in hand(**constant).items() if n != "groups"} | {"logprobs": hand()["logprobs"].detach()}
    assert not bonus.padded(**given)[0].requires_grad
    for loss in (with_top_entropy(reinforce(), 0.5), with_clip_b(reinforce()), with_entropy(reinforce(), 0.0)):
        assert padded(loss, **constant)[0] == padded(loss)[0]
    assert padded(lossfns.eaft(), **constant)[0] == padded(lossfns.eaft())[0] and padded(lossfns.eaft())[2] is None


def test_a_loss_says_which_columns_carry_a_gradient() -> None:
    """The model's outputs, unless it says otherwise; combinators keep what the loss says."""

    def terms(t: Any) -> Any:
        return t.entropy * t.returns, {}

    constant = make_loss(lambda t: (t.entropy * t.logprobs, {}), ("entropy",), token_mean, differentiates=())
    assert make_loss(terms, ("entropy", "returns"), token_mean).gradient_columns == ("entropy",)
    mine = make_loss(terms, ("entropy", "returns"), token_mean, differentiates=("returns",))
    assert mine.gradient_columns == with_kl(mine).gradient_columns == ("returns",)
    assert with_entropy(mine).gradient_columns == ("returns", "entropy")
    assert with_top_entropy(with_entropy(ppo())).gradient_columns == ("entropy",)
    assert with_entropy(with_top_entropy(ppo())).gradient_columns == ("entropy",)
    assert with_clip_b(with_top_entropy(ppo())).gradient_columns == ()
    assert lossfns.wpo().gradient_columns == ()
    both = sum_losses(rl=with_entropy(reinforce(), 0.5), weighed=constant, weights={"weighed": "weights"})
    assert both.gradient_columns == ("entropy",)
    for loss in (both, with_entropy(constant, 0.5)):  # the other part's entropies are constants all the same
        assert torch.equal(padded(loss)[2] * 3, torch.tensor([[-0.5, -0.5], [-0.5, 0.0]], dtype=torch.float64))
    assert "differentiates: expected names among entropy, returns" in refusal(
        lambda: replace(mine, differentiates=("advantages",))
    )


# At the doors of services


def test_a_service_that_returns_logprobs_alone_gets_the_reason_and_what_to_take() -> None:
    batch = random_batch(Random(0))
    for loss, hint in (
        (with_entropy(reinforce()), "for a bonus take with_sampled_entropy"),
        (with_top_entropy(reinforce()), "A hosted service returns logprobs alone"),
    ):
        columns = {n: x for n, x in batch.bound(loss.reads).items() if n != "entropy"}
        message = refusal(lambda: loss.bind(**columns)(batch.data(), batch.tensors()))  # noqa: B023
        assert "datum[0].entropy: expected one row per datum, got nothing bound" in message and hint in message
    for exported in (
        lambda: export.as_datum_fn(with_entropy(reinforce())),
        lambda: export.with_denominators(with_entropy(reinforce()), batch.data()),
    ):
        assert "take with_sampled_entropy for an entropy bonus" in refusal(exported)
    assert "whose gradient goes through entropy" in refusal(
        lambda: lossfns.token_gradient(with_entropy(reinforce()), batch.data())
    )
    assert export.as_datum_fn(lossfns.eaft()).__code__.co_varnames == ("logprobs", "weights", "entropy")


def test_combinators_refuse_a_wrong_order() -> None:
    for combine in (with_top_entropy, with_clip_b):
        assert "Apply with_kl last" in refusal(lambda: combine(with_kl(ppo())))  # noqa: B023
    assert "There is nothing to clip by" in refusal(lambda: with_clip_b(lossfns.cross_entropy()))
    for combine in (lossfns.with_tis, lossfns.with_dual_clip):
        for bonus in (with_entropy, with_sampled_entropy):
            wrapped = with_top_entropy(bonus(ppo()))
            assert f"Apply {bonus.__name__} after" in refusal(lambda: combine(wrapped))  # noqa: B023
    assert with_kl(with_entropy(lossfns.with_tis(ppo()))).reads[-2:] == ("entropy", "ref_logprobs")


# The estimate from samples


def test_the_expected_gradient_of_the_estimate_is_that_of_the_entropy() -> None:
    """By enumeration over a vocabulary, on- and off-policy; −lp as it stands has expected gradient 0."""
    g = torch.Generator().manual_seed(1)
    for _ in range(5):
        logits, sampler = torch.randn(2, 6, generator=g, dtype=torch.float64)
        logits.requires_grad_()
        lp = logits.log_softmax(-1)
        (exact,) = torch.autograd.grad(-(lp.exp() * lp).sum(), logits, retain_graph=True)
        for old in (lp.detach(), sampler.log_softmax(-1)):
            mu = old.exp()  # one sequence for each token that may be sampled, weighed by its probability
            side = {"advantages": torch.zeros(6), "old_logprobs": old[:, None]}
            loss = with_sampled_entropy(reinforce(weigh=lossfns.token_sum), 0.7, None)
            total, metrics = loss.padded(lp[:, None], mu[:, None], **side)
            (found,) = torch.autograd.grad(total, logits, retain_graph=True)
            torch.testing.assert_close(found, -0.7 * exact, atol=1e-14, rtol=1e-12)
            torch.testing.assert_close(total, 0.7 * (lp.exp() * lp).sum(), atol=1e-14, rtol=1e-12)
            assert metrics["entropy_sampled"] > 0
        (naive,) = torch.autograd.grad((lp.detach().exp() * -lp).sum(), logits, retain_graph=True)
        torch.testing.assert_close(naive, torch.zeros_like(naive), atol=1e-15, rtol=0)


def test_the_law_of_the_entropy_accepts_the_estimate_and_no_other_form() -> None:
    batch = testing.Batch([[-1.0, -2.0]], [[1.0, 1.0]], {n: [[-1.0, -2.0]] for n in ("advantages", "old_logprobs")})

    def with_term(entropy_coef: float, of: Callable[[Tensor], Tensor]) -> Loss:
        def terms(t: Any) -> Any:
            return -t.advantages * t.logprobs + entropy_coef * of(t.logprobs), {"entropy": -t.logprobs.detach()}

        return make_loss(terms, ("advantages", "old_logprobs"), token_mean)

    policy.entropy(with_sampled_entropy(ppo(), 0.1), batch.data(), batch.tensors())
    for wrong, bug in ((lambda lp: lp, "entropy-constant"), (lambda lp: -lp.detach() * lp, "entropy-sign")):
        with pytest.raises(LawBroken) as broken:
            policy.entropy(with_term(0.1, wrong), batch.data(), batch.tensors())
        assert broken.value.bug == bug
