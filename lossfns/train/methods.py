"""The training loops and the held-out measurements. They make only public calls of the client."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any, NamedTuple

from lossfns.advantages import group_advantages, group_metrics
from lossfns.backend.types import AdamParams, SamplingParams
from lossfns.datum import Datum, ModelInput
from lossfns.frame import align_sampler_logprobs, datum_from_tokens
from lossfns.loss import Loss
from lossfns.losses.supervised import cross_entropy
from lossfns.metrics import merge_metrics
from lossfns.train.examples import Demonstration, Example, Preference, Problem, datum_of, prompt_of, sequences
from lossfns.train.remote import Client
from lossfns.train.render import Renderer
from lossfns.train.run import Run
from lossfns.train.tasks import Task

CHUNK = 256
"""Sequences in one evaluation request."""

# Learning rates


Schedule = Callable[[int], float]
"""The learning rate of a step, counted from 0."""


def constant(rate: float, warmup_steps: int = 20) -> Schedule:
    """Return a schedule that rises linearly over the first ``warmup_steps``, then stays at ``rate``."""
    return lambda step: rate * min(1, (step + 1) / warmup_steps)


def cosine(rate: float, steps: int, warmup_steps: int = 20) -> Schedule:
    """Return a schedule that rises linearly over ``warmup_steps``, then falls as a cosine to a tenth of ``rate``."""

    def at(step: int) -> float:
        done = max(0, step - warmup_steps) / max(1, steps - warmup_steps)
        return rate * min(1, (step + 1) / warmup_steps) * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    return at


def linear_decay(rate: float, steps: int, warmup_steps: int = 5) -> Schedule:
    """Return a schedule that falls linearly to a tenth of ``rate``, times a linear rise over ``warmup_steps``."""
    return lambda step: rate * min(1, (step + 1) / warmup_steps) * (1 - 0.9 * step / steps)


# Requests


def completion_datum(prompt: Sequence[int], completion: Sequence[int]) -> Datum:
    """Make a datum with weight 1 on the completion and 0 on the prompt."""
    return datum_from_tokens([*prompt, *completion], prompt_length=len(prompt))


def chunks(data: Sequence[Any], size: int = CHUNK) -> Iterable[list[Any]]:
    return (list(data[i : i + size]) for i in range(0, len(data), size))


def target_logprobs(client: Client, data: Sequence[Datum]) -> list[Any]:
    """Return the logprobs of each datum's targets under the current weights."""
    outputs = (client.forward(chunk, "cross_entropy").result().loss_fn_outputs for chunk in chunks(data))
    return [output["logprobs"] for part in outputs for output in part]


def completion_logprobs(client: Client, data: Sequence[Datum]) -> list[float]:
    """Return the logprob of each datum's completion: the sum over its tokens."""
    rows = zip(target_logprobs(client, data), data)
    return [float(lp.to_numpy() @ d.loss_fn_inputs["weights"].to_numpy()) for lp, d in rows]


def train_step(client: Client, data: list[Datum], loss: Any, learning_rate: float) -> dict[str, float]:
    """Take one optimizer step. Queue both requests before waiting for either."""
    adam = AdamParams(learning_rate=learning_rate, eps=1e-8, grad_clip_norm=1.0)
    pending, step = client.forward_backward_custom(data, loss), client.optim_step(adam)
    metrics = pending.result().metrics | step.result().metrics
    # A name with a colon is the service's: the loss once more, or its surrogate.
    return {name: value for name, value in metrics.items() if ":" not in name}


# Supervised


def train_supervised(
    run: Run,
    client: Client,
    draw: Callable[[Random, int], list[Demonstration]],
    *,
    phase: str,
    steps: int,
    batch: int,
    learning_rate: Schedule,
    seed: int,
) -> None:
    """Train with token-mean cross-entropy on demonstrations."""
    rng, loss = Random(seed), cross_entropy()
    for step in run.steps(phase, steps, rng):
        data = [datum_of(example) for example in draw(rng, batch)]
        run.log(step, train_step(client, data, loss, learning_rate(step)))


def bits_per_byte(client: Client, examples: Sequence[Demonstration]) -> float:
    """Return the held-out cross-entropy, in bits for each byte of the completions."""
    data = [datum_of(example) for example in examples]  # one token is one byte
    return -sum(completion_logprobs(client, data)) / sum(sum(e.weights[1:]) for e in examples) / math.log(2)


# Preference


def pair_datums(examples: Sequence[Preference]) -> list[Datum]:
    """Make two datums of each example: datum 2i is chosen, datum 2i + 1 is rejected."""
    return [datum_of(side) for e in examples for side in e]


def train_preference(
    run: Run,
    client: Client,
    reference: Client,
    loss: Loss,
    task: Task[Preference],
    *,
    steps: int,
    batch: int,
    learning_rate: Schedule,
    seed: int,
) -> None:
    """Train with a preference loss on pairs. The reference is evaluated only if the loss reads its logprobs."""
    rng = Random(seed)
    for step in run.steps(loss.name, steps, rng):
        data = pair_datums(task.draw(rng, batch))
        columns = {"ref_logprobs": target_logprobs(reference, data)} if "ref_logprobs" in loss.reads else {}
        run.log(step, train_step(client, data, loss.bind(**columns), learning_rate(step)))


def share_positive(margins: Sequence[float]) -> float:
    """Return the share of margins above 0. A margin of 0 counts half."""
    return sum((margin > 0) + 0.5 * (margin == 0) for margin in margins) / len(margins)


def margin_accuracy(client: Client, reference: Client, examples: Sequence[Preference]) -> float:
    """Return the share of pairs whose chosen side gains more over the reference than the rejected side."""
    data = pair_datums(examples)
    gains = [a - b for a, b in zip(completion_logprobs(client, data), completion_logprobs(reference, data))]
    return share_positive([chosen - rejected for chosen, rejected in zip(gains[0::2], gains[1::2])])


def likelihood_accuracy(client: Client, reference: Client, examples: Sequence[Preference]) -> float:
    """Return the share of pairs whose chosen side has the larger mean logprob per token.

    ``reference`` is not used: the arguments are those of ``margin_accuracy``.
    """
    sums = completion_logprobs(client, pair_datums(examples))
    lengths = [sum(side.weights[1:]) for e in examples for side in e]
    means = [total / length for total, length in zip(sums, lengths)]
    return share_positive([chosen - rejected for chosen, rejected in zip(means[0::2], means[1::2])])


# Policy


def train_policy(
    run: Run,
    client: Client,
    reference: Client,
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
    """Train with a policy loss: sample groups, reward exact answers, and step with group-relative advantages.

    One round of samples serves ``updates`` optimizer steps; each takes a different part of the groups. The sampler's
    logprobs are the old logprobs.
    """
    rng = Random(seed)
    for step in run.steps(loss.name, steps, rng):
        problems = task.draw(rng, batch)
        samples = sample_answers(client, task.renderer, problems, group, max_tokens, seed=rng.getrandbits(31))
        rewards = [float(sample.correct) for sample in samples]
        groups = [i for i in range(len(problems)) for _ in range(group)]
        advantages = group_advantages(rewards, groups)
        data = [completion_datum(sample.prompt, sample.tokens) for sample in samples]
        old = [align_sampler_logprobs(s.logprobs, d.model_input.length, len(s.prompt)) for s, d in zip(samples, data)]
        columns = {"advantages": advantages.tolist(), "old_logprobs": old}
        if "ref_logprobs" in loss.reads:
            columns["ref_logprobs"] = target_logprobs(reference, data)
        metrics = []
        for update in range(min(updates, len(problems))):
            members = [i for i, label in enumerate(groups) if label % updates == update]
            bound = loss.bind(**{name: [columns[name][i] for i in members] for name in loss.reads})
            metrics.append(train_step(client, [data[i] for i in members], bound, learning_rate(step)))
        # A plain mean: merge_metrics would weight each norm by the number of tokens.
        norm = sum(m["grad_norm"] for m in metrics) / len(metrics)
        run.log(step, {**merge_metrics(metrics), **group_metrics(rewards, groups), "grad_norm": norm})
        if step + 1 == min(FIRST_STEPS, steps):
            warn_if_constant(run, step + 1, task.renderer.decode(samples[0].tokens))


FIRST_STEPS = 5
"""Steps after which rewards that have not changed are warned about."""


def warn_if_constant(run: Run, steps: int, sample: str) -> None:
    """Warn if all rewards of a phase's first steps were 0, or all were 1: there is nothing to learn from."""
    rewards = {row["reward"] for row in run.history if row["phase"] == run.phase}
    if rewards == {0.0}:
        run.say(
            f"warning: all rewards of the first {steps} steps are 0, so nothing is learned. A sample is right only if "
            f"it is exactly the answer; one of them was {one_line(sample, 30)!r}. Try more --warmup-steps, or shorter "
            f"answers."
        )
    elif rewards == {1.0}:
        run.say(f"warning: all rewards of the first {steps} steps are 1: there is nothing left to learn.")


class Answer(NamedTuple):
    """A sampled answer to a problem; ``logprobs`` are the sampler's, one for each of ``tokens``."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    correct: bool


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
    params = SamplingParams(max_tokens=max_tokens, seed=seed, temperature=temperature)
    prompts = [ModelInput.from_ints(problem.prompt) for problem in problems]
    responses = sampler.sample_batch(prompts, group, params).result()
    return [
        Answer(
            problem.prompt,
            s.tokens,
            s.logprobs,
            s.tokens[-1:] != [] and s.tokens[-1] in renderer.end and renderer.decode(s.tokens) == problem.answer,
        )
        for problem, response in zip(problems, responses)
        for s in response.sequences
    ]


def mean_reward(
    client: Client, renderer: Renderer, problems: Sequence[Problem], max_tokens: int, samples: int = 4
) -> float:
    """Return the share of correct answers to held-out problems, sampled at temperature 1."""
    answers = sample_answers(client, renderer, problems, samples, max_tokens, seed=7)
    return sum(answer.correct for answer in answers) / len(answers)


# Samples to look at

SAMPLES, SAMPLE_TOKENS, TEMPERATURE = 3, 64, 0.7
"""How many samples are shown, the most tokens of each, and the temperature at which they are drawn."""


def sample_texts(client: Client, renderer: Renderer, examples: Sequence[Example]) -> list[Any]:
    """Return pairs of a prompt and a sample for a few examples, the same draw for the same weights.

    An example without a prompt gives the first tokens of its text.
    """
    prompts = [prompt_to_sample(renderer, example) for example in examples[:SAMPLES]]
    sampler = client.save_weights_and_get_sampling_client()
    params = SamplingParams(max_tokens=SAMPLE_TOKENS, seed=11, temperature=TEMPERATURE)
    responses = sampler.sample_batch([ModelInput.from_ints(prompt) for prompt in prompts], 1, params).result()
    tokens = [response.sequences[0].tokens for response in responses]
    return [[renderer.decode(prompt), renderer.decode(ids)] for prompt, ids in zip(prompts, tokens)]


def prompt_to_sample(renderer: Renderer, example: Example) -> list[int]:
    """Return the prompt of an example, or the first tokens of its text if it has none."""
    prompt = prompt_of(example)
    if prompt != renderer.start or isinstance(example, Problem):
        return prompt
    tokens = sequences(example)[0].tokens
    return tokens[: len(prompt) + min(24, (len(tokens) - len(prompt)) // 2)]


def one_line(text: str, width: int) -> str:
    """Return text on one line of at most ``width`` characters: newlines and what cannot be printed are escaped.

    >>> print(one_line("a" + chr(10) + "b" + chr(27), 20), one_line("abcdef", 4))
    a\\nb\\x1b abc…
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= width else text[: width - 1] + "…"
