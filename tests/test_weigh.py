"""Weighings: shares and counts by hand, and what they refuse."""

import dataclasses
import math

import pytest
import torch

import lossfns
from lossfns import LossInputError, Rows, Tokens, Weighing
from lossfns.preset import make_loss

# Sequences (0, 1, 2), (1, ½), (0): the last is empty.
WEIGHTS = torch.tensor([0.0, 1.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
T = Tokens(torch.zeros(6, dtype=torch.float64), WEIGHTS, torch.tensor([3, 2, 1]))
ITSELF = WEIGHTS.tolist()


@pytest.mark.parametrize(
    ("weigh", "share", "count"),
    [
        (lossfns.token_mean, ITSELF, 4.5),
        (lossfns.sequence_mean, [0, 1 / 3, 2 / 3, 2 / 3, 1 / 3, 0], 2),
        (lossfns.sequence_sum_mean, ITSELF, 2),
        (lossfns.fixed_length(10), ITSELF, 20),
        (lossfns.token_sum, ITSELF, None),
    ],
    ids=repr,
)
def test_token_weighings(weigh: Weighing, share: list[float], count: float | None) -> None:
    assert weigh.share(T).tolist() == pytest.approx(share)
    assert (weigh.count and weigh.count(T).item()) == (None if count is None else pytest.approx(count))


def test_pairs_count_where_both_sides_are_active() -> None:
    """Four sequences: a pair with active tokens, and a pair that is masked altogether."""
    t = Tokens(torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1, 1, 1, 1]))
    assert lossfns.pair_mean.share(t).tolist() == [1.0, 0.0]
    assert lossfns.pair_mean.count(t).item() == 1
    assert lossfns.pair_sum.count is None


@pytest.mark.parametrize("weights", [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]])
def test_a_pair_with_one_active_side_does_not_count(weights: list[float]) -> None:
    t = Tokens(torch.zeros(4), torch.tensor(weights, dtype=torch.float64), torch.tensor([1, 1, 1, 1]))
    for weigh in (lossfns.pair_mean, lossfns.pair_sum):
        share = weigh.share(t)
        assert share.tolist() == [0.0, 0.0] and share.dtype == torch.float64
    assert lossfns.pair_mean.count(t).item() == 0


def test_a_sequence_whose_signed_weights_have_no_positive_sum_has_no_mean() -> None:
    t = Tokens(torch.zeros(3), torch.tensor([1.0, 1.0, -2.0]), torch.tensor([1, 2]))
    assert math.isnan(lossfns.sequence_mean.count(t).item())
    data = [lossfns.datum_from_tokens([1, 2], [0, 1]), lossfns.datum_from_tokens([1, 2, 3], [0, 1, -2])]
    loss = lossfns.cross_entropy(weigh=lossfns.sequence_mean)
    logprobs = [torch.tensor([-1.0], requires_grad=True), torch.tensor([-1.0, -2.0], requires_grad=True)]
    with pytest.raises(LossInputError, match="a denominator above 0, got nan"):
        loss(data, logprobs)
    with pytest.raises(LossInputError, match="a denominator above 0"):
        loss.denominator(data)
    value, _ = lossfns.cross_entropy(weigh=lossfns.token_sum)(data, logprobs)
    assert value.item() == 1 + 1 - 4


def test_a_datum_counts_where_it_has_an_active_token() -> None:
    """Two of the three sequences, whatever their weights."""
    for weigh in (lossfns.datum_mean, lossfns.datum_sum):
        share = weigh.share(T)
        assert share.tolist() == [1.0, 1.0, 0.0] and share.dtype == torch.float64
    assert lossfns.datum_mean.count(T).item() == 2
    assert lossfns.datum_sum.count is None


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        *((name, "tokens") for name in ("token_mean", "sequence_mean", "sequence_sum_mean", "token_sum")),
        *((name, "pairs") for name in ("pair_mean", "pair_sum")),
        *((name, "sequences") for name in ("datum_mean", "datum_sum")),
    ],
)
def test_repr_is_the_name(name: str, rows: str) -> None:
    weigh = getattr(lossfns, name)
    assert repr(weigh) == name and weigh.rows == rows


def test_repr_of_a_fixed_length_has_the_length() -> None:
    assert repr(lossfns.fixed_length(256)) == "fixed_length(256)"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: lossfns.ppo(weigh="token-mean"), r"ppo: weigh: .* Did you mean 'token_mean'\?"),
        (lambda: lossfns.ppo(weigh="seq-mean-token-mean"), r"ppo: weigh: .* Did you mean 'sequence_mean'\?"),
        (lambda: lossfns.ppo(weigh=lossfns.pair_mean), "a weighing of tokens, got pair_mean"),
        (lambda: lossfns.dpo(weigh=lossfns.token_mean), "a weighing of pairs, got token_mean"),
        (lambda: lossfns.multi_target_cross_entropy(weigh=lossfns.pair_sum), "a weighing of tokens"),
        (lambda: lossfns.fixed_length(0), "length: expected a finite number above 0"),
        (lambda: lossfns.fixed_length("9"), "length"),
    ],
)
def test_what_does_not_fit_is_refused(build, message: str) -> None:
    with pytest.raises(LossInputError, match=message):
        build()


TOKEN_WEIGHINGS = ["token_mean", "sequence_mean", "sequence_sum_mean", "token_sum", "fixed_length"]
PAIR_WEIGHINGS = ["pair_mean", "pair_sum"]
DATUM_WEIGHINGS = ["datum_mean", "datum_sum"]


def of_sequences(weigh: Weighing) -> lossfns.Loss:
    return make_loss(lambda t: (t.logprobs, {}), (), weigh, rows=Rows.SEQUENCES)


@pytest.mark.parametrize(
    ("preset", "wrong", "rows", "fitting"),
    [
        (lossfns.ppo, lossfns.pair_mean, "tokens", TOKEN_WEIGHINGS),
        (lossfns.multi_target_cross_entropy, lossfns.pair_sum, "tokens", TOKEN_WEIGHINGS),
        (lossfns.dpo, lossfns.token_sum, "pairs", PAIR_WEIGHINGS),
        (of_sequences, lossfns.pair_sum, "sequences", DATUM_WEIGHINGS),
    ],
)
def test_the_refusal_names_every_weighing_that_fits_and_no_other(preset, wrong, rows: str, fitting: list[str]) -> None:
    with pytest.raises(LossInputError) as caught:
        preset(weigh=wrong)
    error = caught.value
    assert error.field == "weigh" and error.expected == f"a weighing of {rows}"
    assert error.fix == f"This loss has rows that are {rows}. Use one of: {', '.join(fitting)}."
    for name in fitting:
        with pytest.raises(LossInputError, match=f"Did you mean '{name}'"):
            preset(weigh=name.replace("_", "-"))
    with pytest.raises(LossInputError) as caught:
        preset(weigh="xyz")
    assert caught.value.fix == f"Known: {', '.join(sorted(fitting))}. Import it from lossfns."


def test_a_weighing_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        lossfns.token_mean.count = None
