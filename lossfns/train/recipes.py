"""A recipe for each method: its data, its loss, how long and how fast; what to measure before and after."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any, NamedTuple

from lossfns.backend import LocalTrainingClient
from lossfns.loss import Loss
from lossfns.losses.policy import dapo, grpo, gspo_token
from lossfns.losses.preference import dpo, orpo
from lossfns.losses.supervised import cross_entropy
from lossfns.train import methods, tasks
from lossfns.train.run import REFERENCES, Run
from lossfns.train.tasks import Demonstration, Preference, Problem, Task


class Outcome(NamedTuple):
    """What was measured on held-out examples: its name as in the metrics, its title, before and after."""

    name: str
    title: str
    before: float
    after: float


def frozen(run: Run, client: LocalTrainingClient) -> LocalTrainingClient:
    """A copy that stays as the client is when the run first gets here: the reference policy."""
    ranks, device = client.ranks, next(client.model.parameters()).device
    model = ranks.ask(ranks.copy)
    reference = LocalTrainingClient(model, tokenizer=client.get_tokenizer(), device=device, mesh=ranks.mesh)

    def kept() -> str:
        name = REFERENCES[ranks.size > 1]
        reference.save_state(run.folder / name, overwrite=True).result()
        return name

    reference.load_state(run.folder / run.once("reference", kept)).result()
    return reference


def sft(run: Run, client: LocalTrainingClient, task: Task[Demonstration], loss: Loss, args: Namespace) -> Outcome:
    measured = partial(methods.bits_per_byte, client, task.held_out)
    before = run.once("before", measured)
    methods.supervised(
        run,
        client,
        task.draw,
        phase="sft",
        steps=args.steps,
        batch=args.batch,
        learning_rate=methods.cosine(args.lr, args.steps),
        seed=args.seed,
    )
    return Outcome("bits_per_byte", "held-out bits per byte", before, measured())


def preference(run: Run, client: LocalTrainingClient, task: Task[Preference], loss: Loss, args: Namespace) -> Outcome:
    """DPO prefers relative to a supervised start; ORPO needs none: it learns the chosen texts as it goes."""

    def chosen(rng: Random, n: int) -> list[Demonstration]:
        return [Demonstration(e.prompt, e.chosen) for e in task.draw(rng, n)]

    draw = chosen if args.data else tasks.english().draw
    warm_up(run, client, draw, args, batch=16, learning_rate=methods.cosine(3e-3, args.warmup_steps))
    reference = frozen(run, client)
    measure = methods.margin_accuracy if "ref_logprobs" in loss.reads else methods.likelihood_accuracy
    measured = partial(measure, client, reference, task.held_out)
    before = run.once("before", measured)
    methods.preference(
        run,
        client,
        reference,
        loss,
        task,
        steps=args.steps,
        batch=args.batch,
        learning_rate=methods.cosine(args.lr, args.steps, rise=10),
        seed=args.seed,
    )
    return Outcome("accuracy", "held-out preference accuracy", before, measured())


def policy(run: Run, client: LocalTrainingClient, task: Task[Problem], loss: Loss, args: Namespace) -> Outcome:
    """Reinforcement learning from a warm start that is right only some of the time."""
    demonstrate = tasks.correct if args.data else tasks.careless

    def demonstrations(rng: Random, n: int) -> list[Demonstration]:
        return [demonstrate(problem, rng) for problem in task.draw(rng, n)]

    warm_up(run, client, demonstrations, args, batch=256, learning_rate=methods.constant(2e-3))
    longest = max(len(tasks.TOKENIZER.encode(p.answer)) for p in task.held_out + task.draw(Random(0), 200)) + 1
    max_tokens = args.max_tokens or longest
    measured = partial(methods.reward, client, task.held_out, max_tokens)
    before = run.once("before", measured)
    methods.policy(
        run,
        client,
        frozen(run, client),
        loss,
        task,
        steps=args.steps,
        batch=args.batch,
        group=args.group,
        updates=args.updates,
        learning_rate=methods.falling(args.lr, args.steps),
        max_tokens=max_tokens,
        seed=args.seed,
    )
    return Outcome("reward", "held-out reward", before, measured())


def warm_up(
    run: Run,
    client: LocalTrainingClient,
    draw: Callable[[Random, int], list[Demonstration]],
    args: Namespace,
    *,
    batch: int,
    learning_rate: methods.Schedule,
) -> None:
    """A short supervised start, so that there is something to prefer or to reward."""
    steps = args.warmup_steps
    methods.supervised(
        run, client, draw, phase="warm-up", steps=steps, batch=batch, learning_rate=learning_rate, seed=args.seed
    )


class Method(NamedTuple):
    """A loss, where its examples come from, how it is trained on, and the options it has with their defaults."""

    loss: Callable[[], Loss]
    task: Callable[[Namespace], Task[Any]]
    recipe: Callable[..., Outcome]
    options: dict[str, Any]


def demonstrations(args: Namespace) -> Task[Demonstration]:
    return tasks.own_demonstrations(args.data, args.seed) if args.data else tasks.english()


def pairs(args: Namespace) -> Task[Preference]:
    return tasks.own_preferences(args.data, args.seed) if args.data else tasks.continuations()


def whole_pairs(args: Namespace) -> Task[Preference]:
    return tasks.own_preferences(args.data, args.seed) if args.data else tasks.whole_texts(tasks.continuations())


def problems(args: Namespace) -> Task[Problem]:
    return tasks.own_problems(args.data, args.seed) if args.data else tasks.arithmetic()


POLICY = {
    "steps": 100,
    "batch": 32,
    "lr": 5e-4,
    "warmup_steps": 200,
    "group": 16,
    "updates": 2,
    "max_tokens": None,
}

METHODS = {
    "sft": Method(cross_entropy, demonstrations, sft, {"steps": 400, "batch": 16, "lr": 3e-3}),
    "grpo": Method(grpo, problems, policy, POLICY),
    "dapo": Method(dapo, problems, policy, POLICY),
    "gspo-token": Method(gspo_token, problems, policy, POLICY),
    "dpo": Method(dpo, pairs, preference, {"steps": 400, "batch": 32, "lr": 3e-4, "warmup_steps": 300}),
    "orpo": Method(orpo, whole_pairs, preference, {"steps": 500, "batch": 32, "lr": 3e-3, "warmup_steps": 0}),
}
