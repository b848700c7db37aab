"""A recipe for each method: its loss, its data, its defaults, and the measurement before and after."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from random import Random
from typing import Any, NamedTuple, TypeVar

from lossfns.errors import LossInputError
from lossfns.loss import Loss
from lossfns.losses.policy import dapo, grpo
from lossfns.losses.preference import dpo
from lossfns.losses.reference_free import orpo
from lossfns.losses.sequence import gspo_token
from lossfns.losses.supervised import cross_entropy
from lossfns.train import methods, tasks
from lossfns.train.checkpoints import frozen_copy
from lossfns.train.examples import Demonstration, Preference, Problem
from lossfns.train.options import LARGEST, Options, check_option, flag
from lossfns.train.remote import Client
from lossfns.train.render import Renderer
from lossfns.train.run import Run
from lossfns.train.tasks import Task


class Outcome(NamedTuple):
    """A measurement on held-out examples, before and after training.

    Attributes:
        name: name in ``result.json``; a training metric of the same name shares its panel of the curves.
        title: name in the printed report.
        before, after: the values.
        samples: texts of the model by ``prompt``, ``before`` and ``after`` training.
    """

    name: str
    title: str
    before: float
    after: float
    samples: tuple[dict[str, str], ...] = ()


T = TypeVar("T", Demonstration, Preference, Problem)


def compared(
    run: Run,
    client: Client,
    task: Task[T],
    name: str,
    title: str,
    measure: Callable[[], float],
    train: Callable[[], None],
) -> Outcome:
    """Measure on held-out examples and draw samples, train, and do both again."""
    run.say(f"measuring on held-out examples: {len(task.held_out)}")
    draw = partial(methods.sample_texts, client, task.renderer, task.held_out)
    before, texts = run.once("before", measure), run.once("samples", draw)
    train()
    pairs = zip(texts, draw())
    samples = tuple({"prompt": p, "before": old, "after": new} for (p, old), (_, new) in pairs)
    return Outcome(name, title, before, measure(), samples)


# Recipes


def sft(run: Run, client: Client, task: Task[Demonstration], loss: Loss, options: Options) -> Outcome:
    """Fine-tune on demonstrations."""
    measure = partial(methods.bits_per_byte, client, task.held_out)
    train = partial(
        methods.train_supervised,
        run,
        client,
        task.draw,
        phase="sft",
        steps=options.steps,
        batch=options.batch,
        learning_rate=methods.cosine(options.lr, options.steps),
        seed=options.seed,
    )
    return compared(run, client, task, "bits_per_byte", "held-out bits per byte", measure, train)


def preference(run: Run, client: Client, task: Task[Preference], loss: Loss, options: Options) -> Outcome:
    """Learn preferences from pairs.

    DPO learns relative to a reference, so it needs a supervised start. ORPO needs none: it learns the chosen texts too.
    """

    def draw_chosen(rng: Random, n: int) -> list[Demonstration]:
        return [e.chosen for e in task.draw(rng, n)]

    draw = draw_chosen if options.data else tasks.documentation(task.renderer).draw
    warm_up(run, client, draw, options, batch=16, learning_rate=methods.cosine(3e-3, options.warmup_steps))
    reference = frozen_copy(run, client)
    accuracy = methods.margin_accuracy if "ref_logprobs" in loss.reads else methods.likelihood_accuracy
    measure = partial(accuracy, client, reference, task.held_out)
    train = partial(
        methods.train_preference,
        run,
        client,
        reference,
        loss,
        task,
        steps=options.steps,
        batch=options.batch,
        learning_rate=methods.cosine(options.lr, options.steps, warmup_steps=10),
        seed=options.seed,
    )
    return compared(run, client, task, "accuracy", "held-out preference accuracy", measure, train)


def policy(run: Run, client: Client, task: Task[Problem], loss: Loss, options: Options) -> Outcome:
    """Learn by reinforcement, from a supervised start that solves only some of the problems."""

    def draw_demonstrations(rng: Random, n: int) -> list[Demonstration]:
        drawn = [(e.prompt, str(e.answer) if options.data else tasks.noisy_answer(e, rng)) for e in task.draw(rng, n)]
        return [task.renderer.answered(*each) for each in drawn]

    warm_up(run, client, draw_demonstrations, options, batch=256, learning_rate=methods.constant(2e-3))
    longest = max(answer_lengths(task))
    max_tokens = options.max_tokens or longest
    measure = partial(methods.mean_reward, client, task.renderer, task.held_out, max_tokens)
    train = partial(
        methods.train_policy,
        run,
        client,
        frozen_copy(run, client),
        loss,
        task,
        steps=options.steps,
        batch=options.batch,
        group=options.group,
        updates=options.updates,
        learning_rate=methods.linear_decay(options.lr, options.steps),
        max_tokens=max_tokens,
        seed=options.seed,
    )
    return compared(run, client, task, "reward", "held-out reward", measure, train)


def answer_lengths(task: Task[Problem]) -> list[int]:
    """Return the tokens of each problem's answer, with the end of the sequence."""
    return [len(task.renderer.encode(problem.answer or "")) + 1 for problem in task.held_out + task.train]


def warm_up(
    run: Run,
    client: Client,
    draw: Callable[[Random, int], list[Demonstration]],
    options: Options,
    *,
    batch: int,
    learning_rate: methods.Schedule,
) -> None:
    """Train supervised for a few steps, so that the method starts from a model that produces plausible text."""
    methods.train_supervised(
        run,
        client,
        draw,
        phase="warm-up",
        steps=options.warmup_steps,
        batch=batch,
        learning_rate=learning_rate,
        seed=options.seed,
    )


# Data


def load(options: Options, renderer: Renderer, kind: type[T]) -> Task[T]:
    """Load the examples of ``--data``."""
    limit = options.max_length or tasks.MAX_LENGTH
    drop = options.drop_longer
    return tasks.load(str(options.data), renderer, kind, max_length=limit, drop_longer=drop, seed=options.seed)


def demonstrations(options: Options, renderer: Renderer) -> Task[Demonstration]:
    return load(options, renderer, Demonstration) if options.data else tasks.documentation(renderer)


def pairs(options: Options, renderer: Renderer) -> Task[Preference]:
    return load(options, renderer, Preference) if options.data else tasks.continuations(renderer)


def pairs_with_prompts(options: Options, renderer: Renderer) -> Task[Preference]:
    """Load the pairs for ORPO, which learns the chosen texts: the built-in prompts are part of them."""
    if options.data:
        return load(options, renderer, Preference)
    return tasks.with_prompts_trained(tasks.continuations(renderer))


def problems(options: Options, renderer: Renderer) -> Task[Problem]:
    """Load the problems, and note how many answers no sample can be: those longer than ``--max-tokens``.

    Raises:
        LossInputError: if no answer is short enough.
    """
    task = load(options, renderer, Problem) if options.data else tasks.arithmetic(renderer)
    lengths = answer_lengths(task)
    most = options.max_tokens or max(lengths)
    longer = sum(length > most for length in lengths)
    if longer == len(lengths):
        expected = f"at least {min(lengths)}, the tokens of the shortest answer"
        fix = f"No sample could be right: the reward would always be 0. Pass {max(lengths)}, or leave it out."
        raise LossInputError("--max-tokens", expected, f"{most}", fix)
    if longer:
        warning = f"warning: {longer} of {len(lengths)} answers are longer than --max-tokens {most}: reward 0"
        return replace(task, note=f"{task.note}\n{warning}".lstrip())
    return task


# Methods


Recipe = Callable[[Run, Client, Task[Any], Loss, Options], Outcome]


class Method(NamedTuple):
    """A training method.

    Attributes:
        loss: makes the loss.
        task: makes the examples to train on and to hold out.
        recipe: trains and measures.
        defaults: the defaults of its method-specific options. It does not have the others that ``POLICY`` names.
    """

    loss: Callable[[], Loss]
    task: Callable[[Options, Renderer], Task[Any]]
    recipe: Recipe
    defaults: dict[str, Any]


POLICY = {"steps": 100, "batch": 32, "lr": 5e-4, "warmup_steps": 200, "group": 16, "updates": 2, "max_tokens": None}
METHODS = {
    "sft": Method(cross_entropy, demonstrations, sft, {"steps": 400, "batch": 16, "lr": 3e-3}),
    "grpo": Method(grpo, problems, policy, POLICY),
    "dapo": Method(dapo, problems, policy, POLICY),
    "gspo-token": Method(gspo_token, problems, policy, POLICY),
    "dpo": Method(dpo, pairs, preference, {"steps": 400, "batch": 32, "lr": 3e-4, "warmup_steps": 300}),
    "orpo": Method(orpo, pairs_with_prompts, preference, {"steps": 500, "batch": 32, "lr": 3e-3, "warmup_steps": 0}),
}


def complete_options(given: Mapping[str, Any]) -> Options:
    """Check the options that are given, and fill in the defaults of the method. ``None`` counts as not given.

    Raises:
        LossInputError: for an option that does not exist, that the method does not have, or whose value is wrong.
    """
    given = {name: value for name, value in given.items() if value is not None}
    method = given.get("method")
    if method not in METHODS:
        raise LossInputError("method", f"one of {', '.join(METHODS)}", repr(method), "Name one of them.")
    known = {field.name for field in fields(Options)}
    for name, value in given.items():
        if name not in known:
            raise LossInputError("options", f"options among {', '.join(sorted(known))}", repr(name), "Leave it out.")
        check_option(name, value)
        if not has_option(method, name):
            others = ", ".join(other for other in METHODS if has_option(other, name))
            raise LossInputError(flag(name), f"a method that has it ({others})", method, "Leave it out.")
    options = Options(**METHODS[method].defaults | given)
    for name in ("device", "model", "lora", "lora_parts", "dtype", "gradient_checkpointing", "init"):
        default = next(field.default for field in fields(Options) if field.name == name)
        if options.base_url and (value := getattr(options, name)) != default:
            expected, fix = "no --base-url with it", "The server has the model: it starts from its own weights."
            raise LossInputError(flag(name), expected, reprlib.repr(value), fix)
    if options.max_length and not options.data:
        raise LossInputError("--max-length", "--data with it", "none", "The built-in data has its own length.")
    if options.drop_longer and not options.data:
        raise LossInputError("--drop-longer", "--data with it", "none", "The built-in data has its own length.")
    if options.batch * max(1, options.group) > LARGEST["batch"]:
        expected, got = f"--batch times --group of at most {LARGEST['batch']}", f"{options.batch * options.group}"
        raise LossInputError("--group", expected, got, "Take fewer samples in a step, and more steps.")
    return options


def has_option(method: str, name: str) -> bool:
    """Whether a method has an option. ``POLICY`` names all method-specific options."""
    return name not in POLICY or name in METHODS[method].defaults


def own_options(options: Options) -> dict[str, Any]:
    """Return the options as ``config.json`` holds them: ``None`` for those that the method does not have."""
    return {name: value if has_option(options.method, name) else None for name, value in asdict(options).items()}
