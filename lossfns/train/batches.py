"""The batch of a step: datums of the examples that were drawn, or of samples of the policy.

The clients are used through their public calls alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lossfns.advantages import group_metrics
from lossfns.backend.types import SamplingParams
from lossfns.datum import Datum, ModelInput, tensor_data
from lossfns.frame import align_sampler_logprobs, datum_from_candidates
from lossfns.train.columns import Batch
from lossfns.train.examples import Demonstration, Labelled, Preference, Problem, datum_of, demonstration
from lossfns.train.remote import Client
from lossfns.train.render import Renderer
from lossfns.train.rewards import Reward


def demonstration_batch(client: Client, examples: Sequence[Demonstration], **fields: Any) -> Batch:
    """Make a datum of each demonstration."""
    return Batch(data=list(map(datum_of, examples)), policy=client, **fields)


def pair_datums(examples: Sequence[Preference]) -> list[Datum]:
    """Make two datums of each example: datum 2i is chosen, datum 2i + 1 is rejected."""
    return [datum_of(side) for example in examples for side in example]


def pair_batch(client: Client, examples: Sequence[Preference], **fields: Any) -> Batch:
    """Make two datums of each pair. All pairs of the batch are one group."""
    data = pair_datums(examples)
    labels = [1.0, 0.0] * len(examples)
    return Batch(data=data, policy=client, groups=[0] * len(data), labels=labels, **fields)


def labelled_batch(client: Client, examples: Sequence[Labelled], **fields: Any) -> Batch:
    """Make a datum of each labelled answer."""
    data = [datum_of(each.example) for each in examples]
    labels = [float(each.desirable) for each in examples]
    return Batch(data=data, policy=client, groups=[0] * len(data), labels=labels, **fields)


def candidate_batch(
    client: Client, examples: Sequence[Demonstration], sampler: Any, k: int, soft: bool, **fields: Any
) -> Batch:
    """Make a datum of each demonstration whose targets are the k candidates that the teacher finds most probable.

    Args:
        client: the client to train.
        examples: the demonstrations.
        sampler: a sampling client of the teacher.
        k: candidates at each position.
        soft: whether the weight of a candidate is its renormalised probability, for a loss that does not read the
            teacher's logprobs.
        fields: other fields of the batch, such as the client of the reference.
    """
    make = soft_candidate_datum if soft else candidate_datum
    return Batch(data=[make(each, sampler, k) for each in examples], policy=client, **fields)


def candidate_datum(example: Demonstration, sampler: Any, k: int) -> Datum:
    """Make a datum of the teacher's k candidates for each target of a demonstration, with the teacher's logprobs."""
    ids, logprobs = candidates(example, sampler, k)
    return datum_from_candidates(example.tokens, ids, logprobs, example.weights)


def soft_candidate_datum(example: Demonstration, sampler: Any, k: int) -> Datum:
    """Make a datum of the teacher's k candidates, with their renormalised probabilities as weights."""
    ids, logprobs = candidates(example, sampler, k)
    datum = datum_from_candidates(example.tokens, ids, logprobs, example.weights)
    weights = (np.asarray(example.weights, np.float32)[1:, None] * logprobs.softmax(1).numpy()).astype(np.float32)
    fields = {"target_tokens": datum.loss_fn_inputs["target_tokens"], "weights": tensor_data("weights", weights)}
    return Datum(datum.model_input, fields)


def candidates(example: Demonstration, sampler: Any, k: int) -> tuple[np.ndarray, Tensor]:
    """Return the ids and the logprobs of the k tokens that the teacher finds most probable, for each target."""
    ids, logprobs = sampler.top_logprobs(ModelInput.from_ints(example.tokens), k).result()
    return ids.numpy(), logprobs


# Samples of the policy


class Answer(NamedTuple):
    """A sampled answer to a problem; ``logprobs`` are the sampler's, one for each of ``tokens``."""

    problem: Problem
    tokens: list[int]
    logprobs: list[float]
    text: str


def sample_answers(
    client: Client,
    renderer: Renderer,
    problems: Sequence[Problem],
    group: int,
    max_tokens: int,
    seed: int,
    temperature: float = 1.0,
) -> list[Answer]:
    """Sample ``group`` answers to each problem under the current weights."""
    sampler = client.save_weights_and_get_sampling_client()
    params = SamplingParams(max_tokens=max_tokens, seed=seed, temperature=temperature, stop=renderer.end)
    prompts = [ModelInput.from_ints(problem.prompt) for problem in problems]
    responses = sampler.sample_batch(prompts, group, params).result()
    return [
        Answer(problem, s.tokens, s.logprobs, renderer.decode(s.tokens))
        for problem, response in zip(problems, responses)
        for s in response.sequences
    ]


def sample_batch(
    client: Client, renderer: Renderer, problems: Sequence[Problem], reward: Reward, *,
    group: int, max_tokens: int, seed: int, scale: str, **fields: Any,
) -> Batch:  # fmt: skip
    """Sample a group of answers to each problem and reward them. The sampler's logprobs are the old logprobs."""
    samples = sample_answers(client, renderer, problems, group, max_tokens, seed)
    rewards = [reward(sample.problem, sample.text) for sample in samples]
    groups = [i for i in range(len(problems)) for _ in range(group)]
    data = [datum_of(demonstration(sample.problem.prompt, sample.tokens)) for sample in samples]
    sampled = [
        align_sampler_logprobs(sample.logprobs, datum.model_input.length, len(sample.problem.prompt))
        for sample, datum in zip(samples, data)
    ]
    return Batch(
        data=data,
        policy=client,
        groups=groups,
        sampled=sampled,
        rewards=rewards,
        scale=scale,
        metrics=group_metrics(rewards, groups),
        **fields,
    )
