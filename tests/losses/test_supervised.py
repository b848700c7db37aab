"""Cross-entropy by hand, and against torch's own on logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from batches import Batch, call

import lossfns

BATCH = Batch([[-1.0, -2.0, -3.0], [-4.0]], [[0.0, 1.0, 1.0], [2.0]])


@pytest.mark.parametrize(
    ("weigh", "value", "gradients"),
    [
        (lossfns.token_mean, 13 / 4, [[0.0, -0.25, -0.25], [-0.5]]),
        (lossfns.sequence_mean, (2.5 + 4) / 2, [[0.0, -0.25, -0.25], [-0.5]]),
        (lossfns.sequence_sum_mean, 13 / 2, [[0.0, -0.5, -0.5], [-1.0]]),
        (lossfns.fixed_length(10), 13 / 20, [[0.0, -0.05, -0.05], [-0.1]]),
        (lossfns.token_sum, 13.0, [[0.0, -1.0, -1.0], [-2.0]]),
    ],
    ids=repr,
)
def test_by_hand(weigh: lossfns.Weighing, value: float, gradients: list[list[float]]) -> None:
    """Weights (0, 1, 1) and (2) on −lp (·, 2, 3) and (4): Σ w·(−lp) = 13, Σ w = 4."""
    got, got_gradients, metrics = call(lossfns.cross_entropy(weigh=weigh), BATCH)
    assert got == pytest.approx(value)
    assert got_gradients == [pytest.approx(row) for row in gradients]
    assert metrics["nll"] == pytest.approx(3.0) and metrics["tokens"] == 3


def test_weights_of_either_sign_are_coefficients() -> None:
    """CE with weights −g has the gradient g, bit for bit: the surrogate of the two-pass protocol."""
    g = [[0.3, -1.7, 0.0], [2.5]]
    batch = Batch(BATCH.logprobs, [[-x for x in row] for row in g])
    _, gradients, _ = call(lossfns.cross_entropy(weigh=lossfns.token_sum), batch)
    assert gradients == g


def logits_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 11, dtype=torch.float64, generator=generator), torch.arange(6)


def test_token_mean_is_torchs_cross_entropy_on_logits() -> None:
    logits, targets = logits_and_targets()
    logprobs = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    batch = Batch([logprobs[:4].tolist(), logprobs[4:].tolist()], [[1.0] * 4, [1.0] * 2])
    assert call(lossfns.cross_entropy(), batch)[0] == pytest.approx(F.cross_entropy(logits, targets).item())


def test_all_targets_weighted_by_a_distribution_are_soft_label_cross_entropy() -> None:
    """K = V: value that of torch's soft labels, and dL/dlogits = softmax·Σq − q."""
    logits, _ = logits_and_targets()
    q = torch.rand(6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(1)
    logits.requires_grad_()
    data = [lossfns.Datum(lossfns.ModelInput.from_ints([0] * 6))]
    loss = lossfns.multi_target_cross_entropy(weigh=lossfns.token_sum).bind(weights=[q])
    value, _ = loss(data, [logits.log_softmax(1)])
    value.backward()
    assert value.item() == pytest.approx(F.cross_entropy(logits, q, reduction="sum").item())
    torch.testing.assert_close(logits.grad, logits.softmax(1) - q)


def test_one_candidate_is_the_single_target() -> None:
    wide = Batch(BATCH.logprobs, BATCH.weights, targets=1)
    single, multi = call(lossfns.cross_entropy(), BATCH), call(lossfns.multi_target_cross_entropy(), wide)
    assert single[:2] == multi[:2]


def test_a_candidate_of_weight_zero_adds_nothing_even_at_minus_infinity() -> None:
    """Row-major [2, 2]: entries (−1, −∞), (−2, −3) with weights (1, 0), (½, ½)."""
    batch = Batch([[-1.0, -math.inf, -2.0, -3.0]], [[1.0, 0.0, 0.5, 0.5]], targets=2)
    value, gradients, _ = call(lossfns.multi_target_cross_entropy(), batch)
    assert value == pytest.approx((1 + 2.5) / 2)
    assert gradients == [pytest.approx([-0.5, 0.0, -0.25, -0.25])]


def test_ranks_are_not_mixed_up() -> None:
    flat, wide = Batch([[-1.0, -2.0]], [[1.0, 1.0]]), Batch([[-1.0, -2.0]], [[1.0, 1.0]], targets=2)
    with pytest.raises(lossfns.LossInputError, match="use multi_target_cross_entropy"):
        call(lossfns.cross_entropy(), wide)
    with pytest.raises(lossfns.LossInputError, match="use cross_entropy"):
        call(lossfns.multi_target_cross_entropy(), flat)


@pytest.mark.parametrize(
    ("loss", "value", "slope"),
    [
        (lossfns.dft(), 0.25 * math.log(4), -0.25),
        (lossfns.sft_phi(), 0.1875 * math.log(4), -0.1875),
        (lossfns.focal(), 0.5625 * math.log(4), -0.5625 + 2 * 0.75 * 0.25 * -math.log(4)),
        (lossfns.focal(gamma=0.0), math.log(4), -1.0),
        (lossfns.unlikelihood(), -math.log(0.75), 1 / 3),
    ],
    ids=repr,
)
def test_likelihoods_that_are_weighted_by_their_own_probability(loss: lossfns.Loss, value: float, slope: float) -> None:
    """At p = ¼: p = ¼, p(1 − p) = 3/16, (1 − p)² = 9/16 with d/dlp = −2(1 − p)p; −log(1 − p) has slope p/(1 − p)."""
    logprobs = torch.tensor([[0.25]], dtype=torch.float64).log().requires_grad_()
    total, _ = loss.padded(logprobs, torch.ones(1, 1, dtype=torch.float64))
    total.backward()
    assert logprobs.grad is not None
    assert (total.item(), logprobs.grad.item()) == (pytest.approx(value), pytest.approx(slope))


@pytest.mark.parametrize("loss", [lossfns.focal(), lossfns.focal(gamma=0.5), lossfns.unlikelihood()], ids=repr)
def test_they_are_finite_up_to_certainty(loss: lossfns.Loss) -> None:
    logprobs = torch.tensor([[0.0, -1e-12, -1e-7, -50.0, -1e4]], requires_grad=True)
    total, _ = loss.padded(logprobs, torch.ones(1, 5))
    total.backward()
    assert logprobs.grad is not None
    assert total.isfinite() and logprobs.grad.isfinite().all()
