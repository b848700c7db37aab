"""Everything that a run needs before its first step: the model, the teacher, the examples and the reward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from typing import Any

import torch

from lossfns.backend.engine.differentiate import check_contract
from lossfns.errors import LossInputError
from lossfns.train import models, remote, tasks
from lossfns.train.columns import OUTPUTS, weights_of
from lossfns.train.examples import Demonstration, Example, Labelled, Preference, Problem, datum_of, sequences
from lossfns.train.losses import AnyLoss, OwnLoss, method_of, naming_own
from lossfns.train.methods import number
from lossfns.train.options import Options, naming
from lossfns.train.recipes import Job, answer_lengths, max_tokens_of, reward_name
from lossfns.train.remote import Client
from lossfns.train.render import Renderer
from lossfns.train.rewards import Reward, check_reward
from lossfns.train.tasks import Task


@contextmanager
def client_of(options: Options) -> Iterator[Client]:
    """Yield the client of a new model, in this process or on a server."""
    if options.base_url is None:
        local = models.load_client(options)
        models.check_trained(local)
        yield local
        return
    with remote.connected(options.base_url) as client:
        yield client


def job_of(options: Options, loss: AnyLoss, client: Client, task: Task[Any], reward: Reward | None) -> Job:
    """Load the teacher, and return the arguments of the recipe."""
    teacher = None if options.teacher is None else teacher_of(options, client)
    return Job(options=options, loss=loss, client=client, task=task, teacher=teacher, reward=reward)


def examples_of(options: Options, loss: AnyLoss) -> tuple[Task[Any], Reward | None]:
    """Load the examples, and the reward of a method that samples. This needs the model's tokenizer alone."""
    task = task_of(loss, options, models.renderer_of(options.model))
    if isinstance(loss, OwnLoss):
        try_loss(loss, task)
    if method_of(loss) != "policy":
        return task, None
    reward = check_reward(reward_name(task, options), task.held_out + task.train)
    check_room(task, options)
    return with_warning_of_long_answers(task, options), reward


def try_loss(loss: OwnLoss, task: Task[Any]) -> None:
    """Call a loss of the user on two held-out examples, with made-up logprobs and columns, before anything is trained.

    Raises:
        LossInputError: if it raises, or returns something else than a finite loss and metrics.
    """
    parts = [part for example in task.held_out[:2] for part in trained_sequences(example, task.renderer)]
    data = list(map(datum_of, parts))
    logprobs = [torch.full((datum.model_input.length,), -1.0 - i / 4) for i, datum in enumerate(data)]
    signs, shares, zeros = [1.0, -1.0] * len(data), [1.0, 0.0] * len(data), [0.0] * len(data)
    columns: dict[str, list[Any]] = {name: [row.numpy() for row in logprobs] for name in ROWS}
    columns |= {"advantages": signs, "rewards": shares, "labels": shares, "reference_point": zeros}
    columns |= {"groups": [0] * len(data), "nll_weights": [weights_of(datum) for datum in data]}
    read = {name: columns[name][: len(data)] for name in loss.reads if name in columns}
    with naming_own(loss):
        _, metrics = check_contract(loss.bind(**read)(data, [row.requires_grad_() for row in logprobs]))
        for name, value in metrics.items():
            number(name, value)


ROWS = ("old_logprobs", "sampler_logprobs", "ref_logprobs", "teacher_logprobs", *OUTPUTS)
"""The columns with a number for each token, which the trial of a loss fills with the logprobs."""


def trained_sequences(example: Example, renderer: Renderer) -> list[Demonstration]:
    """Return the sequences of an example; for a problem, its prompt with the answer."""
    if isinstance(example, Problem):
        return [renderer.answered(example.prompt, example.answer or "")]
    return sequences(example)


def teacher_of(options: Options, student: Client) -> Client:
    """Return the client of the teacher: a model as ``--model`` names it; without ``--model`` a checkpoint of one.

    Raises:
        LossInputError: if its tokens are not those of the student.
    """
    name = options.teacher if options.model is not None else None
    with naming({"--model": "--teacher", "path": "--teacher"}):
        teacher: Any = models.load_client(replace(options, model=name, lora=0, gradient_checkpointing=False))
        if name is None:
            teacher.load_state(str(options.teacher)).result()
    if vocabulary(teacher) != vocabulary(student):
        fix = "Logprobs of other tokens cannot be compared."
        raise LossInputError("--teacher", "a model with the tokens of the student", f"{options.teacher}", fix)
    return teacher  # type: ignore[no-any-return]


def vocabulary(client: Client) -> dict[str, int]:
    """Return the tokens of a client's tokenizer by name; none for bytes."""
    tokens: dict[str, int] = getattr(client.get_tokenizer(), "get_vocab", dict)()
    return tokens


EXAMPLES: dict[str, type[Any]] = {
    "supervised": Demonstration,
    "distillation": Demonstration,
    "preference": Preference,
    "unpaired": Labelled,
    "policy": Problem,
}
"""The kind of example of each method."""


def task_of(loss: AnyLoss, options: Options, renderer: Renderer) -> Task[Any]:
    """Load the examples of ``--data``, or make the built-in ones."""
    method = method_of(loss)
    if options.data is None:
        return built_in(loss, options, renderer)
    limit, kind = options.max_length or tasks.MAX_LENGTH, EXAMPLES[method]
    drop = options.drop_longer
    return tasks.load(options.data, renderer, kind, max_length=limit, drop_longer=drop, seed=options.seed)


def built_in(loss: AnyLoss, options: Options, renderer: Renderer) -> Task[Any]:
    """Make the built-in examples of a method."""
    method = method_of(loss)
    if method == "policy":
        return tasks.arithmetic(renderer)
    if method in ("supervised", "distillation"):
        return tasks.documentation(renderer)
    pairs = tasks.continuations(renderer)
    if method == "unpaired":
        return labelled(pairs)
    # A loss without a supervised start has to learn the texts too.
    starts_alone = not options.warmup_steps and "ref_logprobs" not in loss.reads
    return tasks.with_prompts_trained(pairs) if starts_alone else pairs


def labelled(pairs: Task[Preference]) -> Task[Labelled]:
    """Make a labelled answer of each side of the pairs."""

    def sides(examples: list[Preference]) -> list[Labelled]:
        return [Labelled(side, good) for pair in examples for side, good in zip(pair, (True, False))]

    def draw(rng: Random, n: int) -> list[Labelled]:
        return sides(pairs.draw(rng, (n + 1) // 2))[:n]

    held_out = sides(pairs.held_out[: len(pairs.held_out) // 2])
    return Task(pairs.name, pairs.renderer, draw, held_out, style=pairs.style)


def check_room(task: Task[Problem], options: Options) -> None:
    """Refuse samples that would not fit into the context of the model behind the longest prompt."""
    longest = max(len(problem.prompt) for problem in task.held_out + task.train)
    most, room = max_tokens_of(task, options), task.renderer.context - longest
    if most > room:
        expected = f"at most {max(room, 0):g}, what the longest prompt ({longest} tokens) leaves of the model's context"
        way = f"Pass --max-tokens {room:g}" if room >= 1 else "Take a model with a longer context"
        fix = f"{way}, or leave out long rows."
        raise LossInputError("--max-tokens", expected, f"{most}", fix)


def with_warning_of_long_answers(task: Task[Problem], options: Options) -> Task[Problem]:
    """Add a warning to the task's note if answers are longer than ``--max-tokens`` where a sample must be the answer.

    Raises:
        LossInputError: if no answer is short enough.
    """
    lengths, most = answer_lengths(task), max_tokens_of(task, options)
    longer = sum(length > most for length in lengths)
    if reward_name(task, options) != "exact" or not longer:
        return task
    if longer == len(lengths):
        expected = f"at least {min(lengths)}, the tokens of the shortest answer"
        fix = f"No sample could be right: the reward would always be 0. Pass {max(lengths)}, or leave it out."
        raise LossInputError("--max-tokens", expected, f"{most}", fix)
    warning = f"warning: {longer} of {len(lengths)} answers are longer than --max-tokens {most}: reward 0"
    return replace(task, note=f"{task.note}\n{warning}".lstrip())
