"""Measurements on held-out examples, and samples to look at. They make only public calls of the client."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from lossfns.backend.model.tokenizer import ByteTokenizer
from lossfns.backend.types import SamplingParams
from lossfns.datum import Datum, ModelInput
from lossfns.train.batches import candidate_datum, pair_datums, sample_answers
from lossfns.train.columns import target_logprobs, weights_of
from lossfns.train.examples import Demonstration, Example, Labelled, Preference, Problem, datum_of, prompt_of, sequences
from lossfns.train.remote import Client
from lossfns.train.render import Renderer
from lossfns.train.rewards import Reward

Measured = dict[str, float]
"""Measurements by name. The first one is that of the method."""

E = TypeVar("E")
Parts = Iterable[Sequence[E]]
"""The examples to measure on, in parts that are measured one after another."""

TITLES = {
    "bits_per_byte": "held-out bits per byte",
    "nll": "held-out nll per token",
    "accuracy": "held-out preference accuracy",
    "ranked": "held-out answers ranked right",
    "reward": "held-out reward",
    "kl_teacher": "held-out KL from the teacher",
}
"""The names of measurements in the printed report."""


def completion_logprobs(client: Client, data: Sequence[Datum]) -> list[float]:
    """Return the logprob of each datum's completion: Σ w·lp over its tokens."""
    return [float(lp.to_numpy() @ weights_of(d)) for lp, d in zip(target_logprobs(client, data), data)]


# Demonstrations


def likelihood(client: Client, renderer: Renderer, parts: Parts[Demonstration]) -> Measured:
    """Return the held-out cross-entropy of the trained tokens: bits per byte of their text, and nats per token.

    For a model whose tokens are bytes, only bits per byte are returned. An end token adds bits and no byte.
    """
    total = tokens = 0.0
    text_bytes = 0
    for examples in parts:
        data = [datum_of(example) for example in examples]
        total -= sum(completion_logprobs(client, data))
        tokens += sum(float(weights_of(datum).sum()) for datum in data)
        text_bytes += sum(len(renderer.decode(trained_tokens(example)).encode()) for example in examples)
    bits = {"bits_per_byte": total / max(1, text_bytes) / math.log(2)}
    return bits if isinstance(renderer.tokenizer, ByteTokenizer) else {"nll": total / tokens, **bits}


def trained_tokens(example: Demonstration) -> list[int]:
    """Return the tokens of a demonstration that are trained."""
    return [token for token, weight in zip(example.tokens[1:], example.weights[1:]) if weight]


def divergence(client: Client, teacher: Any, parts: Parts[Demonstration], k: int) -> Measured:
    """Return the mean of Σ q·(log q − log p) by token, over the teacher's k most probable candidates, in nats."""
    total = tokens = 0.0
    for examples in parts:
        data = [candidate_datum(example, teacher, k) for example in examples]
        for datum, row in zip(data, target_logprobs(client, data)):
            log_q = datum.loss_fn_inputs["teacher_logprobs"].to_torch()
            weights = datum.loss_fn_inputs["weights"].to_torch()
            total += float((weights * log_q.exp() * (log_q - row.to_torch())).sum())
            tokens += float(weights[:, 0].sum())
    return {"kl_teacher": total / tokens}


# Preferences


def share_positive(margins: Sequence[float]) -> float:
    """Return the share of margins above 0. A margin of 0 counts half."""
    return sum((margin > 0) + 0.5 * (margin == 0) for margin in margins) / len(margins)


def scores(client: Client, reference: Client | None, data: Sequence[Datum]) -> list[float]:
    """Return the log-ratio of each completion to the reference; without one, its mean logprob per token."""
    logprobs = completion_logprobs(client, data)
    if reference is None:
        return [total / float(weights_of(datum).sum()) for total, datum in zip(logprobs, data)]
    return [lp - ref for lp, ref in zip(logprobs, completion_logprobs(reference, data))]


def pair_accuracy(client: Client, reference: Client | None, parts: Parts[Preference]) -> Measured:
    """Return the share of pairs whose chosen side has the higher score; see ``scores``."""
    by_side = [score for examples in parts for score in scores(client, reference, pair_datums(examples))]
    return {"accuracy": share_positive([chosen - rejected for chosen, rejected in zip(by_side[0::2], by_side[1::2])])}


def ranking(client: Client, reference: Client | None, parts: Parts[Labelled]) -> Measured:
    """Return how often a desirable answer has a higher score than an undesirable one, over all such pairs.

    Held-out answers of one kind alone cannot be compared: the result is then ½.
    """
    good: list[float] = []
    bad: list[float] = []
    for examples in parts:
        by_answer = scores(client, reference, [datum_of(each.example) for each in examples])
        for score, each in zip(by_answer, examples):
            (good if each.desirable else bad).append(score)
    return {"ranked": share_positive([a - b for a in good for b in bad] or [0.0])}


# Problems


def mean_reward(
    client: Client, renderer: Renderer, parts: Parts[Problem], reward: Reward, max_tokens: int, samples: int = 4
) -> Measured:
    """Return the mean reward of samples of held-out problems, at temperature 1."""
    rewards: list[float] = []
    for number, problems in enumerate(parts):
        answers = sample_answers(client, renderer, problems, samples, max_tokens, seed=7 + number)
        rewards += [reward(answer.problem, answer.text) for answer in answers]
    return {"reward": sum(rewards) / len(rewards)}


# Samples to look at

SAMPLES, SAMPLE_TOKENS, TEMPERATURE = 3, 64, 0.7
"""How many samples are shown, the most tokens of each (of a policy ``--max-tokens``), and their temperature."""


def sample_texts(
    client: Client, renderer: Renderer, examples: Sequence[Example], max_tokens: int | None = None
) -> list[list[str]]:
    """Return pairs of a prompt and a sample for a few examples. The same weights give the same samples.

    ``max_tokens`` is that of the samples that are rewarded; None for a method that does not sample.
    """
    prompts = [shown_prompt(renderer, example) for example in examples[:SAMPLES]]
    sampler = client.save_weights_and_get_sampling_client()
    room = context_length(sampler) - max(map(len, prompts))
    most = int(min(max_tokens or SAMPLE_TOKENS, max(1, room)))
    params = SamplingParams(max_tokens=most, seed=11, temperature=TEMPERATURE, stop=renderer.end)
    responses = sampler.sample_batch([ModelInput.from_ints(prompt) for prompt in prompts], 1, params).result()
    tokens = [response.sequences[0].tokens for response in responses]
    return [[renderer.decode(prompt), renderer.decode(ids)] for prompt, ids in zip(prompts, tokens)]


def context_length(sampler: Any) -> float:
    """Return the most tokens of a prompt and its sample together: infinity for a model without a limit."""
    return float(getattr(getattr(sampler, "model", None), "context_length", math.inf))


def shown_prompt(renderer: Renderer, example: Example) -> list[int]:
    """Return the prompt of an example; for a text without one, its first tokens, at most 24 or half of the text."""
    prompt = prompt_of(example)
    if isinstance(example, Problem) or prompt != renderer.start:
        return prompt
    text = sequences(example)[0].tokens[len(prompt) :]
    return [*prompt, *text[: min(24, len(text) // 2)]]
