"""Distillation on candidates and on sampled tokens, by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lossfns
from lossfns import LossInputError, datum_from_candidates, multi_target_cross_entropy

P, Q = [0.5, 0.25], [0.25, 0.5]
"""Student and teacher on two candidates; a quarter of either is elsewhere."""


def value_and_gradient(loss: Any, p: list[float] = P, q: list[float] = Q) -> tuple[float, list[float]]:
    logprobs = torch.tensor([[p]], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([[q]], dtype=torch.float64).log()
    value, _ = loss.padded(logprobs, torch.ones(1, 1, len(p), dtype=torch.float64), teacher_logprobs=teacher)
    value.backward()
    assert logprobs.grad is not None
    return value.item(), logprobs.grad.flatten().tolist()


def test_the_forward_kl_on_each_support() -> None:
    """Raw: ¼·log ½ + ½·log 2 = ¼·log 2, slopes −q. Renormalised: ⅓·log ½ + ⅔·log 2 = ⅓·log 2, slopes p/¾ − q/¾.

    With a tail of ¼ in both, the value is the raw one, and the slopes are −q + ¼·p/¼ = p − q.
    """
    value, slopes = value_and_gradient(lossfns.top_k_forward_kl(support=lossfns.raw_support))
    assert (value, slopes) == (pytest.approx(math.log(2) / 4), pytest.approx([-0.25, -0.5]))
    value, slopes = value_and_gradient(lossfns.top_k_forward_kl())
    assert (value, slopes) == (pytest.approx(math.log(2) / 3), pytest.approx([1 / 3, -1 / 3]))
    value, slopes = value_and_gradient(lossfns.top_k_forward_kl(support=lossfns.tail_support))
    assert (value, slopes) == (pytest.approx(math.log(2) / 4), pytest.approx([0.25, -0.25]))


def test_the_reverse_kl_is_the_forward_kl_with_the_sides_exchanged() -> None:
    """Value by symmetry. Raw slopes: p·(log p/q + 1) = ½·(log 2 + 1) and ¼·(1 − log 2)."""
    value, slopes = value_and_gradient(lossfns.top_k_reverse_kl(support=lossfns.raw_support))
    log2 = math.log(2)
    assert (value, slopes) == (pytest.approx(log2 / 4), pytest.approx([(log2 + 1) / 2, (1 - log2) / 4]))
    assert value_and_gradient(lossfns.top_k_reverse_kl())[0] == pytest.approx(
        value_and_gradient(lossfns.top_k_forward_kl(), Q, P)[0]
    )


def test_the_mixed_kl_and_its_ends() -> None:
    half = value_and_gradient(lossfns.top_k_mixed_kl())
    ends = [value_and_gradient(loss()) for loss in (lossfns.top_k_forward_kl, lossfns.top_k_reverse_kl)]
    assert half[0] == pytest.approx((ends[0][0] + ends[1][0]) / 2)
    assert value_and_gradient(lossfns.top_k_mixed_kl(forward_share=1.0)) == ends[0]
    assert value_and_gradient(lossfns.top_k_mixed_kl(forward_share=0.0)) == ends[1]


def test_the_jensen_shannon_divergence_of_two_points() -> None:
    """p = (⅔, ⅓), q = (⅓, ⅔), m = (½, ½): ½·KL(q‖m) + ½·KL(p‖m) = ⅓·log ⅔ + ⅔·log 4/3."""
    expected = math.log(2 / 3) / 3 + 2 * math.log(4 / 3) / 3
    assert value_and_gradient(lossfns.top_k_jsd())[0] == pytest.approx(expected)


@pytest.mark.parametrize("beta, name", [(1e-6, "top_k_forward_kl"), (1 - 1e-6, "top_k_reverse_kl")])
def test_the_gradient_of_the_jsd_near_its_ends(beta: float, name: str) -> None:
    """∇JSD/β → ∇ forward KL as β → 0, and ∇JSD/(1 − β) → ∇ reverse KL as β → 1."""
    _, slopes = value_and_gradient(lossfns.top_k_jsd(beta=beta))
    _, expected = value_and_gradient(getattr(lossfns, name)())
    assert [x / min(beta, 1 - beta) for x in slopes] == pytest.approx(expected, rel=1e-4)


def test_positions_count_alike_whatever_the_number_of_their_candidates() -> None:
    """Position 0 has two candidates, position 1 has one; the mean is over two positions, not over three entries."""
    logprobs = torch.tensor([[[0.5, 0.25], [0.5, 0.1]]], dtype=torch.float64).log()
    weights = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    teacher = torch.tensor([[[0.25, 0.5], [0.25, 0.9]]], dtype=torch.float64).log()
    loss = lossfns.top_k_forward_kl(support=lossfns.raw_support)
    value, metrics = loss.padded(logprobs, weights, teacher_logprobs=teacher)
    assert value.item() == pytest.approx((math.log(2) / 4 - 0.25 * math.log(2)) / 2, abs=1e-12)
    assert (metrics["denominator"], metrics["tokens"]) == (2, 3)
    assert loss.denominator(weights) == 2


def test_the_raw_forward_kl_has_the_gradient_of_a_cross_entropy_with_the_teachers_probabilities() -> None:
    logprobs = (-torch.rand(1, 4, 3, dtype=torch.float64) - 1).requires_grad_()
    teacher = (-torch.rand(1, 4, 3, dtype=torch.float64) - 1).exp()
    soft, _ = multi_target_cross_entropy(weigh=lossfns.sequence_sum_mean).padded(logprobs, teacher)
    hard, _ = lossfns.top_k_forward_kl(support="raw_support", weigh="sequence_sum_mean").padded(
        logprobs, torch.ones_like(teacher), teacher_logprobs=teacher.log()
    )
    torch.testing.assert_close(*(torch.autograd.grad(x, logprobs)[0] for x in (hard, soft)))


@pytest.mark.parametrize("name", ["top_k_forward_kl", "top_k_reverse_kl", "top_k_mixed_kl", "top_k_jsd"])
def test_an_unused_slot_beside_an_almost_impossible_candidate_has_no_gradient(name: str) -> None:
    """Renormalised, the one candidate in use has probability 1 in student and teacher: nothing is left to learn."""
    logprobs = torch.tensor([[[-1e4, 0.0]]], requires_grad=True)
    loss, _ = getattr(lossfns, name)().padded(
        logprobs, torch.tensor([[[1.0, 0.0]]]), teacher_logprobs=logprobs.detach()
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.item() == 0 and gradient.tolist() == [[[0.0, 0.0]]]


def test_datums_with_different_numbers_of_candidates_are_refused() -> None:
    def datum(k: int) -> Any:
        return datum_from_candidates([5, 6, 7], [[6] * k, [7] * k], [[-1.0] * k] * 2, prompt_length=1)

    logprobs = [torch.full((2, k), -1.0, requires_grad=True) for k in (1, 2)]
    with pytest.raises(LossInputError, match="the same K for all datums"):
        lossfns.top_k_forward_kl()([datum(1), datum(2)], logprobs)


def test_a_datum_of_candidates_leaves_out_the_prompt_and_unused_slots() -> None:
    datum = datum_from_candidates([5, 6, 7], [[6, 8], [7, 0]], [[-0.5, -1.0], [-0.25, -math.inf]], prompt_length=2)
    fields = {name: x.to_numpy().tolist() for name, x in datum.loss_fn_inputs.items()}
    assert fields["weights"] == [[0, 0], [1, 0]] and fields["target_tokens"] == [[6, 8], [7, 0]]
    assert fields["teacher_logprobs"] == [[-0.5, -1.0], [-0.25, 0.0]]
    with pytest.raises(LossInputError, match=r"\[2, K\]"):
        datum_from_candidates([5, 6, 7], [[6, 8]], [[-0.5, -1.0]], prompt_length=1)


def test_an_unused_slot_has_no_effect_however_small_the_mass_of_the_others_is() -> None:
    """exp of what is added to its 0 would overflow, and 0·inf is nan."""
    for name in ("top_k_forward_kl", "top_k_reverse_kl", "top_k_mixed_kl", "top_k_jsd"):
        for support in ("renormalised_support", "tail_support", "raw_support"):
            for small, other in ((-200.0, -1.0), (-1.0, -200.0), (-200.0, -200.0)):
                numbers = []
                for slots in (2, 3):
                    lp = torch.tensor([[[small, small - 1, 0.0][:slots]]], requires_grad=True)
                    teacher = torch.tensor([[[other, other - 2, 0.0][:slots]]])
                    weights = torch.tensor([[[1.0, 1.0, 0.0][:slots]]])
                    value, _ = getattr(lossfns, name)(support=support).padded(lp, weights, teacher_logprobs=teacher)
                    value.backward()
                    assert lp.grad is not None
                    numbers.append([value.item(), *lp.grad.flatten().tolist()])
                assert numbers[1] == pytest.approx([*numbers[0], 0.0], rel=1e-5), (name, support, small, other)


def test_on_policy_distillation_takes_the_teachers_log_ratio_as_the_advantage() -> None:
    """On-policy: −1·(teacher − old) at each token, slope the same; mean of (1 − 0.5)/2."""
    logprobs = torch.tensor([[-2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    teacher, old = torch.tensor([[-3.0, -0.5]], dtype=torch.float64), logprobs.detach()
    columns: dict[str, Tensor] = {"teacher_logprobs": teacher, "old_logprobs": old}
    value, metrics = lossfns.sampled_reverse_kl().padded(logprobs, torch.ones(1, 2, dtype=torch.float64), **columns)
    value.backward()
    assert value.item() == pytest.approx(0.25) and logprobs.grad is not None
    assert logprobs.grad.tolist() == [[0.5, -0.25]] and metrics["kl_teacher"] == 0.25


def test_one_step_towards_the_teacher_is_one_of_the_reverse_kl() -> None:
    """E_π ∇ of the sampled loss = ∇KL(π‖teacher), by enumeration of a softmax over four tokens."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    lp = logits.log_softmax(0)
    exact = torch.autograd.grad((lp.exp() * (lp - teacher)).sum(), logits, retain_graph=True)[0]
    columns = {"teacher_logprobs": teacher[:, None], "old_logprobs": lp.detach()[:, None]}
    loss, _ = lossfns.sampled_reverse_kl(weigh="token_sum").padded(lp[:, None], lp.detach().exp()[:, None], **columns)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], exact, rtol=1e-12, atol=1e-14)
