"""Losses that compare the tokens or datums of a group, by hand."""

import math

import pytest
import torch
from batches import Batch, call

import lossfns
from lossfns import Tokens
from lossfns.losses.selection import largest_share, smallest_with_mean

LN = math.log


def batch_of(groups: tuple[float, float]) -> Batch:
    """Two datums of two tokens, on-policy. In one group the means are A = 0 and lp = −2.5.

    The covariances are then 2·1.5 = 3, 0, −1·0.5 = −0.5 and −1·−1.5 = 1.5.
    """
    logprobs = [[-1.0, -3.0], [-2.0, -4.0]]
    columns = {
        "advantages": [[2.0, 0.0], [-1.0, -1.0]],
        "old_logprobs": [list(row) for row in logprobs],
        "sampler_logprobs": [[-1.1, -3.2], [-2.3, -4.6]],
        "groups": [[label] * 2 for label in groups],
    }
    return Batch(logprobs, [[1.0] * 2] * 2, columns)


def test_clip_cov_drops_the_tokens_of_largest_covariance() -> None:
    """−A is −2, 0, 1, 1. One token of four: (0 + 1 + 1) / 4. Two: (0 + 1 + 0) / 4, or one if C must be above 2."""
    batch = batch_of((0.0, 0.0))
    value, gradients, metrics = call(lossfns.clip_cov(fraction=0.25), batch)
    assert value == 0.5 and gradients == [[0.0, 0.0], [0.25, 0.25]]
    assert metrics["cov_masked"] == 0.25
    assert call(lossfns.clip_cov(fraction=0.5), batch)[0] == 0.25
    assert call(lossfns.clip_cov(fraction=0.5, cov_bounds=(2.0, 5.0)), batch)[0] == 0.5
    assert call(lossfns.clip_cov(fraction=0.5, cov_bounds=(1.0, 2.0)), batch)[0] == -0.25


def test_clip_cov_drops_no_token_that_is_clipped() -> None:
    """The token of covariance 3 has the ratio 1.5 and A > 0: its loss is −1.2·2, and the next one is dropped."""
    batch = batch_of((0.0, 0.0))
    batch.columns["old_logprobs"][0][0] -= LN(1.5)
    assert call(lossfns.clip_cov(fraction=0.25), batch)[0] == pytest.approx((-2.4 + 0 + 1) / 4)


def test_groups_are_compared_within_themselves() -> None:
    """Apart, the covariances are ±1·1 in the first datum, twice 1 = a tie, and 0 in the second: nothing is dropped."""
    batch = batch_of((0.0, 1.0))
    assert call(lossfns.clip_cov(fraction=0.25, cov_bounds=(-9.0, 9.0)), batch)[2]["cov_masked"] == 0
    alone = [call(lossfns.m2po(threshold=0.05), batch.take([i]))[2]["m2_masked"] for i in (0, 1)]
    assert alone == [0, 1] and call(lossfns.m2po(threshold=0.05), batch)[2]["m2_masked"] == 0.5


def test_kl_cov_penalises_the_tokens_of_largest_covariance() -> None:
    """The first has r = 1.5: (−3 + ln 1.5 + 0 + 1 + 1) / 4, and its gradient is (−3 + 1) / 4."""
    batch = batch_of((0.0, 0.0))
    batch.columns["old_logprobs"][0][0] -= LN(1.5)
    value, gradients, metrics = call(lossfns.kl_cov(), batch)
    assert value == pytest.approx((-1 + LN(1.5)) / 4)
    assert gradients[0][0] == pytest.approx(-0.5) and metrics["cov_penalised"] == 0.25


def test_m2po_drops_tokens_until_the_second_moment_is_small() -> None:
    """m = 0.01, 0.04, 0.09, 0.36. Without the last the mean is 0.047, without the last two 0.025. −A is −2, 0, 1, 1."""
    batch = batch_of((0.0, 0.0))
    dropped = {0.2: 0, 0.05: 1, 0.04: 2, 0.02: 3, 0.005: 4}
    for threshold, count in dropped.items():
        value, _, metrics = call(lossfns.m2po(threshold=threshold), batch)
        assert metrics["m2_masked"] == count / 4, threshold
        assert value == sum([-2.0, 0.0, 1.0, 1.0][: 4 - count]) / 4, threshold


def test_real_is_a_classification_within_the_group() -> None:
    """s = 0: log(1 + 1) + log(1 + 2) = ln 6 for a right and two wrong answers, 0 for a group of right ones: 3·ln 6 / 4.

    With τ = 1 the slopes are −½ in the right s and ⅓ in each wrong one, times ¾.
    """
    columns = {
        "old_logprobs": [[-1.0]] * 4,
        "labels": [[1.0], [0.0], [0.0], [1.0]],
        "groups": [[5.0], [5.0], [5.0], [2.0]],
    }
    value, gradients, metrics = call(lossfns.real(tau=1.0), Batch([[-1.0]] * 4, [[1.0]] * 4, columns))
    assert value == pytest.approx(0.75 * LN(6))
    assert [g for (g,) in gradients] == pytest.approx([-0.375, 0.25, 0.25, 0.0])
    assert metrics["mixed"] == 0.75


def test_real_does_not_overflow() -> None:
    """log(1 + e^(s/τ)) is s/τ for s = 10⁴ in float32, whatever the other groups are."""
    columns = {
        "old_logprobs": [[-1e4], [-1.0], [-1.0], [-1e4]],
        "labels": [[0.0], [1.0], [0.0], [1.0]],
        "groups": [[0.0], [0.0], [1.0], [1.0]],
    }
    batch = Batch([[-1e-3], [-1.0], [-1.0], [-1e-3]], [[1.0]] * 4, columns)
    value, gradients, _ = call(lossfns.real(tau=1.0), batch, torch.float32)
    assert value == pytest.approx((1e4 + LN(2) + LN(2) + 0) / 2, rel=1e-6)
    assert [g for (g,) in gradients] == pytest.approx([0.5, -0.25, 0.25, 0.0])


def one_group(x: list[float]) -> tuple[Tokens, torch.Tensor]:
    numbers = torch.tensor(x, dtype=torch.float64)
    groups = {"groups": torch.zeros_like(numbers)}
    return Tokens(numbers, torch.ones_like(numbers), torch.tensor([1, len(x) - 1]), groups), numbers


def test_of_equal_numbers_at_the_end_of_a_selection_none_is_taken() -> None:
    """Then the selection does not depend on the order of the tokens."""
    for x, share, expected in (
        ([3.0, 1.0, 2.0, 2.0], 0.25, [True, False, False, False]),
        ([3.0, 1.0, 2.0, 2.0], 0.5, [True, False, False, False]),
        ([3.0, 1.0, 2.0, 2.0], 0.75, [True, False, True, True]),
        ([0.0, -0.0, -1.0, -1.0], 0.25, [False] * 4),
        ([math.inf, 1.0, -5.0, -math.inf], 1.0, [True] * 4),
    ):
        t, numbers = one_group(x)
        assert largest_share(t, numbers, t.active, share).tolist() == expected, (x, share)
    t, numbers = one_group([0.5, 1.0, 1.0, 0.0])
    assert smallest_with_mean(t, numbers, 0.5).tolist() == [True, False, False, True]


@pytest.mark.parametrize("equal", [True, False])
def test_tokens_are_selected_as_after_a_sort(equal: bool) -> None:
    """Groups of several sequences, many equal numbers, both signs and 0; the answer of Python's own sort."""
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        lengths = torch.full((6,), 9) if equal else torch.tensor([9, 1, 14, 3, 20, 7])
        x = (torch.randn(54, generator=g, dtype=torch.float64) * 2 ** (seed % 5)).float().double()
        x[torch.rand(54, generator=g) < 0.4] = [0.5, -0.0, 1.5][seed % 3]
        of_sequence = torch.tensor([7, 2, 7, -3, 2, 7])
        groups = torch.repeat_interleave(of_sequence, lengths)
        weights = (torch.rand(54, generator=g) < 0.8).double()
        active, among = weights > 0, (weights > 0) & (torch.rand(54, generator=g) < 0.7)
        t = Tokens(x * weights, weights, lengths, {"groups": (groups * weights).double()}, equal)
        for share in (1e-4, 0.1, 0.5, 1.0):
            expected = torch.zeros(54, dtype=torch.bool)
            for label in (7, 2, -3):
                of_group = among & (groups == label)
                count = max(1, math.floor(share * int((active & (groups == label)).sum())))
                descending = sorted(x[of_group].tolist(), reverse=True)
                bar = descending[count] if count < len(descending) else -math.inf
                expected |= of_group & (x > bar)
            assert torch.equal(largest_share(t, x, among, share), expected), (seed, share)
        x = (x * weights).square()
        for bound in (1e-50, 1e-3, 0.25, 0.75, 3.0, 1e300):
            expected = torch.zeros(54, dtype=torch.bool)
            for label in (7, 2, -3):
                ascending = sorted(x[active & (groups == label)].float().tolist())
                paid = [n for n in range(len(ascending)) if math.fsum(y - bound for y in ascending[: n + 1]) > 0]
                bar = ascending[paid[0]] if paid else math.inf
                expected |= active & (groups == label) & (x.float() < bar)
            assert torch.equal(smallest_with_mean(t, x, bound), expected), (seed, bound)
