"""Measurements on held-out examples, and samples to look at. They make only public calls of the client."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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


def likelihood(client: Client, renderer: Renderer, examples: Sequence[Demonstration]) -> Measured:
    """Return the held-out cross-entropy of the trained tokens: bits per byte of their text, and nats per token.

    For a model whose tokens are bytes, only bits per byte are returned. An end token adds bits and no byte.
    """
    data = [datum_of(example) for example in examples]
    total = -sum(completion_logprobs(client, data))
    bits = {"bits_per_byte": total / byte_count(renderer, examples) / math.log(2)}
    if isinstance(renderer.tokenizer, ByteTokenizer):
        return bits
    return {"nll": total / sum(float(weights_of(datum).sum()) for datum in data), **bits}


def byte_count(renderer: Renderer, examples: Sequence[Demonstration]) -> int:
    """Return the bytes of the text of the trained tokens, at least 1."""
    trained = [[t for t, w in zip(each.tokens[1:], each.weights[1:]) if w] for each in examples]
    return max(1, sum(len(renderer.decode(ids).encode()) for ids in trained))


def divergence(client: Client, teacher: Any, examples: Sequence[Demonstration], k: int) -> Measured:
    """Return the mean of Σ q·(log q − log p) by token, over the teacher's k most probable candidates, in nats."""
    data = [candidate_datum(example, teacher, k) for example in examples]
    total = tokens = 0.0
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


def pair_accuracy(client: Client, reference: Client | None, examples: Sequence[Preference]) -> Measured:
    """Return the share of pairs whose chosen side has the higher score; see ``scores``."""
    by_side = scores(client, reference, pair_datums(examples))
    return {"accuracy": share_positive([chosen - rejected for chosen, rejected in zip(by_side[0::2], by_side[1::2])])}


def ranking(client: Client, reference: Client | None, examples: Sequence[Labelled]) -> Measured:
    """Return how often a desirable answer has a higher score than an undesirable one, over all such pairs.

    Held-out answers of one kind alone cannot be compared: the result is then ½.
    """
    by_answer = scores(client, reference, [datum_of(each.example) for each in examples])
    good = [score for score, each in zip(by_answer, examples) if each.desirable]
    bad = [score for score, each in zip(by_answer, examples) if not each.desirable]
    return {"ranked": share_positive([a - b for a in good for b in bad] or [0.0])}


# Problems


def mean_reward(
    client: Client, renderer: Renderer, problems: Sequence[Problem], reward: Reward, max_tokens: int, samples: int = 4
) -> Measured:
    """Return the mean reward of samples of held-out problems, at temperature 1."""
    answers = sample_answers(client, renderer, problems, samples, max_tokens, seed=7)
    return {"reward": sum(reward(answer.problem, answer.text) for answer in answers) / len(answers)}


# Samples to look at

SAMPLES, SAMPLE_TOKENS, TEMPERATURE = 3, 64, 0.7
"""How many samples are shown, the most tokens of each, and the temperature at which they are drawn."""


def sample_texts(client: Client, renderer: Renderer, examples: Sequence[Example]) -> list[list[str]]:
    """Return pairs of a prompt and a sample for a few examples. The same weights give the same samples."""
    prompts = [shown_prompt(renderer, example) for example in examples[:SAMPLES]]
    sampler = client.save_weights_and_get_sampling_client()
    room = context_length(sampler) - max(map(len, prompts))
    most = int(min(SAMPLE_TOKENS, max(1, room)))
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
