from collections.abc import Callable
from typing import Any

import pytest
import torch

from lossfns import LossInputError
from lossfns.backend.model.decoder import Decoder
from lossfns.backend.model.generate import draw_index, generate
from lossfns.logprobs.linear import linear_logprobs

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [4], [1, 2, 3]]
VOCAB = 13
Restrict = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture
def model() -> Decoder:
    model = Decoder(vocab_size=VOCAB, dim=32, layers=2, heads=4, kv_heads=2, hidden=48, seed=3)
    with torch.no_grad():  # a distribution that is neither flat nor nearly one token
        model.embed.weight.mul_(12)
    return model


def logits(model: Decoder, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        hidden: torch.Tensor = model(torch.tensor(tokens), [len(tokens)])
        return hidden @ model.head.T


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}])
def test_logprobs_are_the_untempered_ones_of_training(model: Decoder, options: dict[str, Any]) -> None:
    samples = generate(model, PROMPTS, max_tokens=8, seed=0, stop=[0], **options)
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        sequence = torch.tensor(prompt + sample.tokens)
        with torch.no_grad():
            expected = linear_logprobs(model(sequence[:-1], [len(sequence) - 1]), model.head, sequence[1:])
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected[len(prompt) - 1 :], atol=1e-4, rtol=0)


def test_temperature_zero_is_greedy(model: Decoder) -> None:
    for prompt, sample in zip(PROMPTS, generate(model, PROMPTS, max_tokens=8, temperature=0.0), strict=True):
        sequence = list(prompt)
        for token in sample.tokens:
            assert token == int(logits(model, sequence)[-1].argmax())
            sequence.append(token)
        assert len(sample.tokens) == 8 and sample.stop_reason == "length"


def test_the_seed_alone_decides_the_samples(model: Decoder) -> None:
    first = generate(model, PROMPTS, max_tokens=8, seed=1)
    torch.manual_seed(99)
    assert generate(model, PROMPTS, max_tokens=8, seed=1) == first
    assert generate(model, PROMPTS, max_tokens=8, seed=2) != first
    assert (
        first[1].tokens != first[3].tokens or first[0].tokens != first[4].tokens
    )  # repeated prompts have draws of their own


def test_without_a_seed_the_global_generator_draws(model: Decoder) -> None:
    torch.manual_seed(5)
    first, second = (generate(model, PROMPTS, max_tokens=8) for _ in range(2))
    torch.manual_seed(5)
    assert first != second and generate(model, PROMPTS, max_tokens=8) == first


def test_stops_at_and_with_the_stop_token(model: Decoder) -> None:
    samples = generate(model, PROMPTS * 10, max_tokens=6, seed=0, stop={0, 5})
    assert {s.stop_reason for s in samples} == {"stop", "length"}
    for sample in samples:
        assert len(sample.tokens) == len(sample.logprobs)
        assert not {0, 5} & set(sample.tokens[:-1])
        if sample.stop_reason == "stop":
            assert sample.tokens[-1] in {0, 5}
        else:
            assert len(sample.tokens) == 6 and sample.tokens[-1] not in {0, 5}


def test_the_other_rows_are_unchanged_when_one_stops(model: Decoder) -> None:
    free = generate(model, PROMPTS, max_tokens=8, temperature=0.0)
    stop = free[2].tokens[1]
    stopped = generate(model, PROMPTS, max_tokens=8, temperature=0.0, stop=[stop])
    for sample, unstopped in zip(stopped, free, strict=True):
        end = unstopped.tokens.index(stop) + 1 if stop in unstopped.tokens else 8
        assert sample.tokens == unstopped.tokens[:end]


@pytest.mark.parametrize(
    ("options", "restrict"),
    [
        ({}, lambda p: p),
        ({"temperature": 2.0}, lambda p: p.sqrt()),
        ({"top_k": 3}, lambda p: p * (p >= p.sort().values[-3])),
        ({"top_p": 0.5}, lambda p: p * (p >= p.sort().values[-3])),
    ],
)
def test_frequencies_match_the_softmax(model: Decoder, options: dict[str, Any], restrict: Restrict) -> None:
    n = 4000
    samples = generate(model, [[1, 2, 3]] * n, max_tokens=1, seed=0, **options)
    counts = torch.tensor([s.tokens[0] for s in samples]).bincount(minlength=VOCAB).double()
    weights = restrict(logits(model, [1, 2, 3])[-1].double().softmax(0))
    expected = n * weights / weights.sum()
    assert (counts[expected == 0] == 0).all()
    chi_square = ((counts - expected).square() / expected)[expected > 0].sum()
    assert chi_square < 32.9  # 12 degrees of freedom: exceeded once in a thousand


@pytest.mark.parametrize("total", [1.0, 0.37, 41.0])
def test_draws_have_the_frequencies_of_the_probabilities(total: float) -> None:
    """Also where most probabilities are 0, at both ends, and where they do not sum to 1."""
    probs, n = torch.zeros(6_000), 20_000
    support = torch.tensor([1, 2, 90, 3_000, 5_998])
    probs[support] = torch.tensor([0.5, 0.3, 0.1, 0.07, 0.03]) * total
    generator = torch.Generator().manual_seed(7)
    draws = torch.cat([draw_index(probs.expand(500, -1), generator) for _ in range(n // 500)])
    counts = (draws[:, None] == support).sum(0)
    assert counts.sum() == n  # nothing of probability 0
    expected = n * probs[support] / total
    assert ((counts - expected).square() / expected).sum() < 18.5  # 4 degrees of freedom: exceeded once in a thousand
    rare = draw_index(torch.tensor([[1e-30, 0.0, 1e-38]]), generator)
    assert rare.item() == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(model: Decoder, temperature: float, value: float) -> None:
    with torch.no_grad():
        model.embed.weight[5] = value
    with pytest.raises(LossInputError, match="model: expected finite logits, got a token with a logprob of nan"):
        generate(model, PROMPTS, max_tokens=3, temperature=temperature)


def test_nothing_to_do(model: Decoder) -> None:
    assert generate(model, [], max_tokens=3) == []
    assert [s.tokens for s in generate(model, PROMPTS, max_tokens=0)] == [[]] * 5


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_refuses_settings_that_describe_no_distribution(model: Decoder, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"temperature|top_p"):
        generate(model, PROMPTS, max_tokens=1, **options)


def test_refuses_an_empty_prompt(model: Decoder) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[1], []], max_tokens=1)


def test_leaves_the_training_mode_as_it_was(model: Decoder) -> None:
    for mode in (True, False):
        model.train(mode)
        generate(model, PROMPTS, max_tokens=1)
        assert model.training is mode
