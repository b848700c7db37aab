"""The training loops: supervised, preference and policy, each over the client's public calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

from lossfns.advantages import group_advantages, group_metrics
from lossfns.backend import AdamParams, LocalTrainingClient, SamplingParams
from lossfns.datum import Datum, ModelInput
from lossfns.frame import align_sampler_logprobs, datum_from_tokens
from lossfns.loss import Loss
from lossfns.losses.supervised import cross_entropy
from lossfns.metrics import merge_metrics
from lossfns.train.run import Run
from lossfns.train.tasks import END, TOKENIZER, Demonstration, Preference, Problem, Task

CHUNK = 256
"""Sequences in one evaluation request."""


def adam(learning_rate: float) -> AdamParams:
    return AdamParams(learning_rate=learning_rate, eps=1e-8, grad_clip_norm=1.0)


Schedule = Callable[[int], float]
"""The learning rate of a step."""


def constant(rate: float, rise: int = 20) -> Schedule:
    """Linear over the first steps, then constant."""
    return lambda step: rate * min(1, (step + 1) / rise)


def cosine(rate: float, steps: int, rise: int = 20) -> Schedule:
    """Linear over the first steps, then a half cosine down to a tenth."""

    def at(step: int) -> float:
        done = max(0, step - rise) / max(1, steps - rise)
        return rate * min(1, (step + 1) / rise) * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    return at


def falling(rate: float, steps: int, rise: int = 5) -> Schedule:
    """Linear over the first steps, on a line down to a tenth."""
    return lambda step: rate * min(1, (step + 1) / rise) * (1 - 0.9 * step / steps)


def datum(prompt: Sequence[int], completion: Sequence[int]) -> Datum:
    """Train on the completion, given the prompt."""
    return datum_from_tokens([*prompt, *completion], prompt_length=len(prompt))


def chunks(data: Sequence[Any], size: int = CHUNK) -> Iterable[list[Any]]:
    return (list(data[i : i + size]) for i in range(0, len(data), size))


def logprobs(client: LocalTrainingClient, data: Sequence[Datum]) -> list[Any]:
    """The targets' logprobs of each datum, under the current weights."""
    outputs = (client.forward(chunk, "cross_entropy").result().loss_fn_outputs for chunk in chunks(data))
    return [output["logprobs"] for part in outputs for output in part]


def completion_sums(client: LocalTrainingClient, data: Sequence[Datum]) -> list[float]:
    """Σ of the logprobs of each datum's completion."""
    rows = zip(logprobs(client, data), data)
    return [float(lp.to_numpy() @ d.loss_fn_inputs["weights"].to_numpy()) for lp, d in rows]


def step_on(client: LocalTrainingClient, data: list[Datum], loss: Any, learning_rate: float) -> dict[str, float]:
    """One optimizer step; both requests are queued before either is waited for."""
    pending, step = client.forward_backward_custom(data, loss), client.optim_step(adam(learning_rate))
    metrics = pending.result().metrics | step.result().metrics
    return {name: value for name, value in metrics.items() if ":" not in name}


# Supervised


def supervised(
    run: Run,
    client: LocalTrainingClient,
    draw: Callable[[Random, int], list[Demonstration]],
    *,
    phase: str,
    steps: int,
    batch: int,
    learning_rate: Schedule,
    seed: int,
) -> None:
    """Token-mean cross-entropy on demonstrations; ``learning_rate(step)``."""
    rng, loss = Random(seed), cross_entropy()
    for step in run.steps(phase, steps, rng):
        data = [datum(*example) for example in draw(rng, batch)]
        run.log(step, step_on(client, data, loss, learning_rate(step)))


def bits_per_byte(client: LocalTrainingClient, examples: Sequence[Demonstration]) -> float:
    """Held-out cross-entropy, in bits for each byte of the completions."""
    data = [datum(*example) for example in examples]
    return -sum(completion_sums(client, data)) / sum(len(e.completion) for e in examples) / math.log(2)


# Preference


def interleaved(examples: Sequence[Preference]) -> list[Datum]:
    """Datums 2i chosen, 2i + 1 rejected."""
    return [datum(e.prompt, completion) for e in examples for completion in (e.chosen, e.rejected)]


def preference(
    run: Run,
    client: LocalTrainingClient,
    reference: LocalTrainingClient,
    loss: Loss,
    task: Task[Preference],
    *,
    steps: int,
    batch: int,
    learning_rate: Schedule,
    seed: int,
) -> None:
    """A preference loss on pairs, with the reference's logprobs where the loss reads them."""
    rng = Random(seed)
    for step in run.steps(loss.name, steps, rng):
        data = interleaved(task.draw(rng, batch))
        columns = {"ref_logprobs": logprobs(reference, data)} if "ref_logprobs" in loss.reads else {}
        run.log(step, step_on(client, data, loss.bind(**columns), learning_rate(step)))


def accuracy(leads: Sequence[float]) -> float:
    """The share of pairs whose chosen side leads; a tie counts half."""
    return sum((lead > 0) + 0.5 * (lead == 0) for lead in leads) / len(leads)


def margin_accuracy(
    client: LocalTrainingClient, reference: LocalTrainingClient, examples: Sequence[Preference]
) -> float:
    """Held-out: does the chosen side gain more over the reference than the rejected?"""
    data = interleaved(examples)
    gains = [a - b for a, b in zip(completion_sums(client, data), completion_sums(reference, data))]
    return accuracy([chosen - rejected for chosen, rejected in zip(gains[0::2], gains[1::2])])


def likelihood_accuracy(
    client: LocalTrainingClient, reference: LocalTrainingClient, examples: Sequence[Preference]
) -> float:
    """Held-out: is the chosen side likelier than the rejected, for each token?"""
    sums = completion_sums(client, interleaved(examples))
    lengths = [len(completion) for e in examples for completion in (e.chosen, e.rejected)]
    means = [total / length for total, length in zip(sums, lengths)]
    return accuracy([chosen - rejected for chosen, rejected in zip(means[0::2], means[1::2])])


# Policy


def policy(
    run: Run,
    client: LocalTrainingClient,
    reference: LocalTrainingClient,
    loss: Loss,
    task: Task[Problem],
    *,
    steps: int,
    batch: int,
    group: int,
    updates: int,
    learning_rate: Schedule,
    max_tokens: int,
    seed: int,
) -> None:
    """Sample groups, reward exact answers, and step on the loss with group-relative advantages.

    ``updates`` optimizer steps share one round of samples, each on its own part of the groups; the
    sampler's logprobs are the old policy's.
    """
    rng = Random(seed)
    for step in run.steps(loss.name, steps, rng):
        problems = task.draw(rng, batch)
        samples = attempts(client, problems, group, max_tokens, seed=rng.getrandbits(31))
        rewards = [float(correct) for *_, correct in samples]
        labels = [i for i in range(len(problems)) for _ in range(group)]
        advantages = group_advantages(rewards, labels)
        data = [datum(prompt, tokens) for prompt, tokens, *_ in samples]
        old = [align_sampler_logprobs(lps, d.model_input.length) for (_, _, lps, _), d in zip(samples, data)]
        ref = logprobs(reference, data) if "ref_logprobs" in loss.reads else old
        columns = {"advantages": advantages.tolist(), "old_logprobs": old, "ref_logprobs": ref}
        parts = []
        for part in range(min(updates, len(problems))):
            rows = [i for i, label in enumerate(labels) if label % updates == part]
            bound = loss.bind(**{name: [columns[name][i] for i in rows] for name in loss.reads})
            parts.append(step_on(client, [data[i] for i in rows], bound, learning_rate(step)))
        norm = sum(part["grad_norm"] for part in parts) / len(parts)
        run.log(step, {**merge_metrics(parts), **group_metrics(rewards, labels), "grad_norm": norm})


Attempt = tuple[list[int], list[int], list[float], bool]


def attempts(
    client: LocalTrainingClient,
    problems: Sequence[Problem],
    group: int,
    max_tokens: int,
    seed: int,
    temperature: float = 1.0,
) -> list[Attempt]:
    """``group`` samples for each problem: prompt, tokens, their logprobs, and whether the answer is right."""
    sampler = client.save_weights_and_get_sampling_client()
    params = SamplingParams(max_tokens=max_tokens, seed=seed, temperature=temperature)
    prompts = [ModelInput.from_ints(problem.prompt) for problem in problems]
    responses = sampler.sample_batch(prompts, group, params).result()
    return [
        (problem.prompt, s.tokens, s.logprobs, s.tokens == TOKENIZER.encode(problem.answer) + END)
        for problem, response in zip(problems, responses)
        for s in response.sequences
    ]


def reward(client: LocalTrainingClient, problems: Sequence[Problem], max_tokens: int, samples: int = 4) -> float:
    """Held-out share of right answers, sampled at temperature 1."""
    drawn = attempts(client, problems, samples, max_tokens, seed=7)
    return sum(correct for *_, correct in drawn) / len(drawn)
