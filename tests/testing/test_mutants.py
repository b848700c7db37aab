"""Mutants: correct except for their bug, and equal to torch code with the same bug."""

import inspect
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from batches import apart, random_batch
from torch import Tensor

from lossfns.loss import Loss
from lossfns.testing import field
from lossfns.testing.batch import Batch
from lossfns.testing.bugs import BUGS
from lossfns.testing.check import check
from lossfns.testing.mutants import (
    CALL_BUGS,
    CLOSED_FORMS,
    MUTANTS,
    correct_loss,
    exemplars,
    mutant,
    oracle_loss,
    settings_showing,
)
from lossfns.testing.planted import ADVANTAGE_BUGS, GENERAL_BUGS, LIKELIHOOD_BUGS, MULTI_TARGET_BUGS, PAIR_BUGS
from lossfns.testing.subject import padded
from lossfns.testing.vectors import load

pytestmark = pytest.mark.filterwarnings("ignore::lossfns.LossWarning")
LOSSES = [loss for loss in CLOSED_FORMS if loss != "group_advantages"]


def batch_for(like: Loss, seed: int) -> Batch:
    """Return a random batch of the loss's kind with two fully masked sequences, which are a pair for pairs."""
    drawn = random_batch(Random(seed), pairs=like.rows == "pairs", targets=3 if like.rows == "targets" else 0)
    batch = Batch(drawn.logprobs, drawn.weights, drawn.columns, drawn.targets)
    both = batch.take([*range(len(batch.weights)), 0, 1])
    return both.having(weights=batch.weights + [[0.0] * len(row) for row in batch.weights[:2]])


def call(loss_fn: Any, batch: Batch, dtype: torch.dtype = torch.float64) -> tuple[float, list[list[float]]]:
    logprobs = batch.tensors(dtype)
    value, _ = loss_fn(batch.data(), logprobs)
    value.backward()
    return value.item(), [lp.grad.flatten().tolist() for lp in logprobs]


# The catalogue


def test_every_bug_has_one_implementation_and_an_exemplar() -> None:
    of_answers = {*GENERAL_BUGS, *LIKELIHOOD_BUGS, *MULTI_TARGET_BUGS, *PAIR_BUGS, *ADVANTAGE_BUGS}
    assert of_answers | CALL_BUGS.keys() | {bug for _, bug in field.WRONG} == BUGS.keys()
    assert not of_answers & CALL_BUGS.keys()
    assert {vars(made)["bug"] for made in MUTANTS.values()} == BUGS.keys()


def test_the_exemplars_are_no_fewer_than_the_bugs_of_every_kind() -> None:
    assert len(MUTANTS) == len(exemplars()) >= 200
    assert sum(bool(settings_showing(bug, loss)) for bug in BUGS for loss in CLOSED_FORMS) >= 600


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_says_what_it_is(name: str) -> None:
    made: Any = MUTANTS[name]
    assert made.__name__ == name and made.bug in BUGS and BUGS[made.bug].description in made.__doc__
    assert made.kind == check(made.like, examples=0).kind if made.kind == "advantages" else made.kind


def test_settings_are_keywords_and_those_left_out_are_of_the_first_vector() -> None:
    made: Any = mutant("sign-flipped", "ppo", clip=(0.9, 1.1))
    assert made.like.knobs["clip"] == (0.9, 1.1)
    assert inspect.signature(made).parameters["clip"].default == (0.9, 1.1)
    batch = batch_for(made.like, 0)
    assert call(lambda *given: made(*given, clip=(0.5, 3.0)), batch) != call(made, batch)
    assert correct_loss("ppo", load("ppo")[0].config).knobs["clip"] == (0.8, 1.2)


# Nothing else is wrong


@pytest.mark.parametrize("loss", LOSSES)
def test_without_a_bug_the_answer_is_that_of_the_library(loss: str) -> None:
    configs = {repr(v.config): v.config for v in load(loss) if v.error is None}
    for seed, config in enumerate(configs.values()):
        like = correct_loss(loss, config)
        batch = batch_for(like, seed)
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
            value, gradients = call(oracle_loss("", loss, config), batch, dtype)
            expected, slopes = call(like, batch, dtype)
            assert apart(value, expected) < tolerance and apart(gradients, slopes) < tolerance, config


CHANGING = ("state-between-calls", "another-loss", "mask-by-token-id", "entropy-sign", "entropy-constant")
KEPT = [bug for bug in CALL_BUGS if bug not in CHANGING]
"""Bugs of the call that do not change value and gradient of an ordinary batch."""


@pytest.mark.parametrize("bug", KEPT)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_bug_of_the_call_leaves_value_and_gradient_alone(bug: str, loss: str) -> None:
    for config in settings_showing(bug, loss)[:1]:
        like = correct_loss(loss, config)
        batch = batch_for(like, 1)
        assert apart(list(call(mutant(bug, loss, **config), batch)), list(call(like, batch))) < 1e-12


def test_what_the_loss_refuses_a_mutant_refuses_too() -> None:
    batch = batch_for(correct_loss("dpo", load("dpo")[0].config), 0)
    for odd, logprobs in ((batch.take(range(3)), 3), (batch, len(batch.weights) - 1)):
        with pytest.raises(ValueError):
            mutant("sign-flipped", "dpo")(odd.data(), odd.tensors()[:logprobs])


# Wrong as torch code is


def mean(x: Tensor, mask: Tensor) -> Tensor:
    return (mask * x).sum() / mask.sum()


def blank(mask: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.where(mask != 0, x, 0) for x in columns)


def surrogate(r: Tensor, a: Tensor, low: float = 0.8, high: float = 1.2) -> Tensor:
    return -torch.min(r * a, r.clamp(low, high) * a)


def unmasked_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """exp of the log-ratio within ±20; unlike ``clamp`` it passes on the gradient of a nan."""
    d = logprobs - old_logprobs
    return torch.maximum(torch.minimum(d, d.new_tensor(20.0)), d.new_tensor(-20.0)).exp()


def where_after_exp(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return mean(torch.where(mask != 0, surrogate(unmasked_ratio(logprobs, old_logprobs), advantages), 0), mask)


def mask_after_exp(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return mean(surrogate(unmasked_ratio(logprobs, old_logprobs), advantages), mask)


def max_for_min(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    lp, old, a = blank(mask, logprobs, old_logprobs, advantages)
    r = (lp - old).clamp(-20, 20).exp()
    return mean(-torch.max(r * a, r.clamp(0.8, 1.2) * a), mask)


def weight_carries_gradient(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    lp, old, a = blank(mask, logprobs, old_logprobs, advantages)
    return mean(-(lp - old).clamp(-20, 20).exp().clamp(0.8, 1.2) * a * lp, mask)


def product_of_ratios(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    lp, old, a = blank(mask, logprobs, old_logprobs, advantages)
    s = (mask * (lp - old)).sum(1, keepdim=True).clamp(-20, 20).exp()
    return by_sequence(surrogate(s, a, 0.8, 1.25), mask)


def sum_of_ratios(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    lp, old, a = blank(mask, logprobs, old_logprobs, advantages)
    s = (mask * (lp - old).exp()).sum(1, keepdim=True) / weight_or_one(mask)
    return by_sequence(surrogate(s, a, 0.8, 1.25), mask)


def by_sequence(x: Tensor, mask: Tensor) -> Tensor:
    masses = mask.sum(1)
    return ((mask * x).sum(1) / torch.where(masses != 0, masses, 1)).sum() / (masses != 0).sum()


def weight_or_one(mask: Tensor) -> Tensor:
    masses = mask.sum(1, keepdim=True)
    return torch.where(masses != 0, masses, 1)


def missing_stop_gradient(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    lp, old, a = blank(mask, logprobs, old_logprobs, advantages)
    mean_d = (mask * (lp - old)).sum(1, keepdim=True) / weight_or_one(mask)
    return by_sequence(surrogate((mean_d + lp - lp.detach()).clamp(-20, 20).exp(), a, 0.8, 1.25), mask)


def kl_detached(
    logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    lp, old, ref, a = blank(mask, logprobs, old_logprobs, ref_logprobs, advantages)
    x = (ref - lp.detach()).clamp(-20, 20)
    return mean(surrogate((lp - old).clamp(-20, 20).exp(), a) + 0.25 * (x.exp() - x - 1), mask)


def penalty_detached(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    lp, old, a = blank(mask, logprobs, old_logprobs, advantages)
    return mean(0.25 * (lp.detach() - old).square() - a * lp, mask)


def margins(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    lp, ref = blank(mask, logprobs, ref_logprobs)
    h = (mask * (lp - ref)).sum(1)
    return h[0::2], h[1::2]


def over_pairs(x: Tensor, mask: Tensor) -> Tensor:
    both = (mask != 0).any(1).reshape(-1, 2).all(1)
    return torch.where(both, x, 0).sum() / both.sum()


def every_chosen_against_every_rejected(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    chosen, rejected = margins(logprobs, ref_logprobs, mask)
    both = (mask != 0).any(1).reshape(-1, 2).all(1)
    every = -torch.nn.functional.logsigmoid(0.1 * (chosen[:, None] - rejected))
    return torch.where(both[:, None] & both, every, 0).sum() / both.sum() ** 2


def centred_margins(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    chosen, rejected = margins(logprobs, ref_logprobs, mask)
    m = chosen - rejected
    return over_pairs(-torch.nn.functional.logsigmoid(0.1 * (m - over_pairs(m, mask).detach())), mask)


def rejected_detached(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    chosen, rejected = margins(logprobs, ref_logprobs, mask)
    return over_pairs(-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected.detach())), mask)


IN_TORCH: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("where-after-exp", "ppo"): where_after_exp,
    ("mask-after-exp", "ppo"): mask_after_exp,
    ("clip-max-for-min", "ppo"): max_for_min,
    ("missing-stop-gradient", "cispo"): weight_carries_gradient,
    ("ratio-product", "gspo"): product_of_ratios,
    ("ratio-sum", "gspo"): sum_of_ratios,
    ("missing-stop-gradient", "gspo_token"): missing_stop_gradient,
    ("kl-detached", "grpo"): kl_detached,
    ("detached-term", "dro"): penalty_detached,
    ("broadcast", "dpo"): every_chosen_against_every_rejected,
    ("cross-talk", "dpo"): centred_margins,
    ("side-detached", "dpo"): rejected_detached,
}


@pytest.mark.parametrize(("bug", "loss"), IN_TORCH)
def test_a_planted_bug_answers_as_torch_code_with_it(bug: str, loss: str) -> None:
    made: Any = mutant(bug, loss)
    for seed in range(6):
        batch = batch_for(made.like, seed)
        batch = batch.take(range(len(batch.weights) - 2))
        rows = {name: calm(batch.logprobs, Random(seed + i)) for i, name in enumerate(batch.columns) if "log" in name}
        batch = batch.having(**rows)
        found, expected = call(made, batch), call(padded(IN_TORCH[bug, loss]), batch)
        assert apart(list(found), list(expected)) < 1e-6, seed


def calm(rows: list[list[float]], rng: Random) -> list[list[float]]:
    """Return logprobs of another policy within half a nat, so that no cap acts on a ratio or a sum of ratios."""
    return [[min(lp + rng.uniform(-0.5, 0.5), 0.0) for lp in row] for row in rows]


@pytest.mark.parametrize("bug", ["where-after-exp", "mask-after-exp"])
def test_a_masked_nan_comes_through_as_in_torch_code(bug: str) -> None:
    """nan shows in the value or in the gradient alone, at the same slots as in torch code."""
    made: Any = mutant(bug, "ppo")
    batch = Batch([[-1.0, -2.0], [-0.5]], [[0.0, 1.0], [1.0]],
        {"advantages": [[1.0, 1.0], [-1.0]], "old_logprobs": [[float("nan"), -2.5], [-0.5]]})  # fmt: skip
    (value, gradients), (expected, slopes) = call(made, batch), call(padded(IN_TORCH[bug, "ppo"]), batch)
    assert repr(value) == repr(expected)
    assert [[repr(g) for g in row] for row in gradients] == [[repr(g) for g in row] for row in slopes]
