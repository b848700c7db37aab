"""A recipe for each method: its data, the batch of a step, and the measurement before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, NamedTuple

from lossfns.errors import LossInputError
from lossfns.losses.supervised import cross_entropy
from lossfns.terminal import one_line
from lossfns.tokens import TARGETS
from lossfns.train import batches, measures, methods, tasks, values
from lossfns.train.batch import write_look
from lossfns.train.checkpoints import reference_policy
from lossfns.train.columns import Batch
from lossfns.train.examples import Demonstration, Problem
from lossfns.train.losses import AnyLoss, OwnLoss, method_of
from lossfns.train.measures import Measured
from lossfns.train.methods import Schedule
from lossfns.train.options import Options
from lossfns.train.remote import Client
from lossfns.train.rewards import Reward, default_reward, last_number
from lossfns.train.run import Run
from lossfns.train.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a recipe works with.

    Attributes:
        options: those of the run.
        loss: the loss.
        client: the client to train.
        task: the examples.
        teacher: the client of the teacher; None without one.
        reward: rewards samples; None for a method that does not sample.
    """

    options: Options
    loss: AnyLoss
    client: Client
    task: Task[Any]
    teacher: Client | None = None
    reward: Reward | None = None

    @property
    def held_out(self) -> list[Any]:
        """The examples to measure on: the first ``--eval-examples`` of those that are held out."""
        return self.task.held_out[: self.options.eval_examples]

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of a sample that is rewarded; None for a method that does not sample."""
        if self.reward is None:
            return None
        return max_tokens_of(self.task, self.options)

    @property
    def phase(self) -> str:
        """The name of the phase: ``--loss`` if it is a plain name, or else the name of the loss."""
        text = self.options.loss
        return text if text.replace("-", "_").isidentifier() else self.loss.name


class Outcome(NamedTuple):
    """The measurements on held-out examples, before and after training, and samples.

    Attributes:
        before, after: measurements by name. A training metric of the same name shares its panel of the curves.
        samples: texts of the model by ``prompt``, ``before`` and ``after`` training.
    """

    before: Measured
    after: Measured
    samples: tuple[dict[str, str], ...] = ()


class Recipe(NamedTuple):
    """A method on a task.

    Attributes:
        make_batch: makes the batch of a step.
        measure: measures on held-out examples.
        learning_rate: the schedule.
    """

    make_batch: methods.MakeBatch
    measure: Callable[[], Measured]
    learning_rate: Schedule


def run_job(run: Run, job: Job) -> Outcome:
    """Warm up, measure on held-out examples, train, and measure again."""
    options, task = job.options, job.task
    run.plan({"warm-up": options.warmup_steps, job.phase: options.steps})
    warm_up(run, job)
    reads_reference = "ref_logprobs" in job.loss.reads
    reference = reference_policy(run, job.client, options) if reads_reference else None
    recipe = RECIPES[method_of(job.loss)](run, job, reference)
    some = f" of {len(task.held_out)}, as --eval-examples says" if len(job.held_out) < len(task.held_out) else ""
    run.say(f"measuring on held-out examples: {len(job.held_out)}{some}")
    draw = partial(measures.sample_texts, job.client, task.renderer, job.held_out, job.max_tokens)

    def measure() -> Measured:
        values = recipe.measure()
        run.log_evaluation(job.phase, run.done.get(job.phase, 0), values)
        return values

    before, texts = run.once("before", measure), run.once("samples", draw)
    if not run.done.get(job.phase):
        warn_if_zero(run, job, before, texts)
    methods.train(
        run,
        job.client,
        job.loss,
        recipe.make_batch,
        phase=job.phase,
        steps=options.steps,
        learning_rate=recipe.learning_rate,
        seed=options.seed,
        updates=max(1, options.updates),
        after=partial(watch, run, job, recipe),
    )
    if not run.done.get(job.phase):
        run.say(f"stopped before the first step of {job.phase}")
        return Outcome(before, before, tuple({"prompt": p, "before": old, "after": old} for p, old in texts))
    pairs = zip(texts, draw())
    samples = tuple({"prompt": p, "before": old, "after": new} for (p, old), (_, new) in pairs)
    return Outcome(before, measure(), samples)


def watch(run: Run, job: Job, recipe: Recipe, done: int, batch: Batch) -> None:
    """Look at the first batch, evaluate every ``--eval-every`` steps but the last, and warn of equal rewards."""
    if done == 1:
        write_look(run, job.client, job.task.renderer.shown)
    every, steps = job.options.eval_every, job.options.steps
    if every and done % every == 0 and done < steps:
        run.log_evaluation(job.phase, done, recipe.measure())
    if batch.rewards and done == min(FIRST_STEPS, steps):
        tokens = batch.data[0].loss_fn_inputs["target_tokens"].to_numpy()
        sampled = tokens[batch.data[0].loss_fn_inputs["weights"].to_numpy() > 0]
        warn_if_constant(run, done, job.task.renderer.decode(sampled.tolist()))


FIRST_STEPS = 5
"""The steps after which a run that is not shorter warns if the samples of each problem had equal rewards."""


def warn_if_constant(run: Run, steps: int, sample: str) -> None:
    """Warn if the samples of each problem had equal rewards in all steps of the phase: nothing is learned."""
    rows = [row for row in run.history if row["phase"] == run.phase]
    if any(row["groups_constant"] < 1 for row in rows):
        return
    rewards, first = {row["reward"] for row in rows}, "first step" if steps == 1 else f"first {steps} steps"
    if rewards == {0.0}:
        run.say(
            f"warning: all rewards of the {first} are 0, so nothing is learned. One of the samples was "
            f'"{one_line(sample, 30)}". Is --reward right? Or try more --warmup-steps, or easier problems.'
        )
    elif rewards == {1.0}:
        run.say(f"warning: all rewards of the {first} are 1: there is nothing left to learn.")
    else:
        run.say(
            f"warning: in the {first} all samples of a problem had the same reward, so nothing is learned. "
            "Try a larger --group, or another --reward."
        )


def warn_if_zero(run: Run, job: Job, before: Measured, texts: Sequence[Sequence[str]]) -> None:
    """Warn if no sample of held-out problems has a reward before training. ``texts`` are prompts with samples."""
    if before.get("reward") != 0:
        return
    exact = reward_name(job.task, job.options) == "exact"
    number = exact and all(last_number(each.answer or "") is not None for each in job.held_out)
    hints = [
        "With --reward exact a sample must be the bare answer." if exact else "",
        "--reward number reads the last number of a longer one." if number else "",
        "Or try more --warmup-steps, or easier problems.",
    ]
    hint = " ".join(filter(None, hints))
    run.say(
        f"warning: all samples of {values.counted(len(job.held_out), 'held-out problem')} have reward 0: nothing is "
        f'learned until one is right. A sample of the model is "{one_line(texts[0][1], 30)}". {hint}'
    )


def warm_up(run: Run, job: Job) -> None:
    """Train supervised for a few steps, so that the method starts from a model that produces plausible text."""
    options = job.options
    if not options.warmup_steps:
        return
    draw, batch, rate = WARM_UPS[method_of(job.loss)](job)
    if options.model is not None:
        batch, rate = options.batch, methods.constant(options.lr)

    def make_batch(rng: Random) -> Batch:
        return batches.demonstration_batch(job.client, draw(rng, batch))

    loss = cross_entropy()
    methods.train(
        run,
        job.client,
        loss,
        make_batch,
        phase="warm-up",
        steps=options.warmup_steps,
        learning_rate=rate,
        seed=options.seed,
    )


# Recipes


MEASURED_AT_ONCE = 10
"""The held-out examples that a pretrained model measures in one request, which takes seconds. Others measure all."""


def parts_of(run: Run, job: Job, most: int | None = None) -> Iterator[Sequence[Any]]:
    """Yield the examples to measure on, at most ``most``, in the parts of a request, and show the progress."""
    held_out = job.held_out[:most]
    return run.in_parts(held_out, MEASURED_AT_ONCE if job.options.model else len(held_out))


def supervised(run: Run, job: Job, reference: Client | None) -> Recipe:
    """Fine-tune on demonstrations."""
    client, task, options = job.client, job.task, job.options

    def make_batch(rng: Random) -> Batch:
        return batches.demonstration_batch(client, task.draw(rng, options.batch), reference=reference)

    def measure() -> Measured:
        return measures.likelihood(client, task.renderer, parts_of(run, job))

    return Recipe(make_batch, measure, methods.cosine(options.lr, options.steps))


def distillation(run: Run, job: Job, reference: Client | None) -> Recipe:
    """Learn from the teacher's most probable tokens, or its logprobs, at each position of demonstrations."""
    client, task, options, teacher = job.client, job.task, job.options, job.teacher
    assert teacher is not None  # check_columns refuses the loss otherwise
    sampler: Any = teacher.save_weights_and_get_sampling_client()
    k, soft = options.candidates, "teacher_logprobs" not in job.loss.reads

    def make_batch(rng: Random) -> Batch:
        examples = task.draw(rng, options.batch)
        if isinstance(job.loss, OwnLoss) or job.loss.rows != TARGETS:
            return batches.demonstration_batch(client, examples, reference=teacher, teacher=teacher)
        return batches.candidate_batch(client, examples, sampler, k, soft, reference=reference, teacher=teacher)

    def measure() -> Measured:
        return measures.divergence(client, sampler, parts_of(run, job, TEACHER_EXAMPLES), k)

    return Recipe(make_batch, measure, methods.cosine(options.lr, options.steps))


TEACHER_EXAMPLES = 50
"""The most held-out examples that are compared with a teacher."""


def judged(make: Callable[..., Batch], measure: Callable[..., Any], run: Run, job: Job, ref: Client | None) -> Recipe:
    """Learn from judged answers: pairs of them, or answers with labels. ``make`` and ``measure`` are of their kind."""
    client, task, options = job.client, job.task, job.options

    def make_batch(rng: Random) -> Batch:
        return make(client, task.draw(rng, options.batch), reference=ref, history=history_of(run, job))

    schedule = methods.cosine(options.lr, options.steps, warmup_steps=10)
    return Recipe(make_batch, lambda: measure(client, ref, parts_of(run, job)), schedule)


def policy(run: Run, job: Job, reference: Client | None) -> Recipe:
    """Learn by reinforcement from samples."""
    client, task, options, reward = job.client, job.task, job.options, job.reward
    max_tokens = job.max_tokens
    assert reward is not None and max_tokens is not None

    def make_batch(rng: Random) -> Batch:
        problems = task.draw(rng, options.batch)
        return batches.sample_batch(
            client,
            task.renderer,
            problems,
            reward,
            group=options.group,
            max_tokens=max_tokens,
            seed=rng.getrandbits(31),
            scale=options.advantage_scale,
            reference=reference,
            teacher=job.teacher,
        )

    def measure() -> Measured:
        return measures.mean_reward(client, task.renderer, parts_of(run, job), reward, max_tokens)

    return Recipe(make_batch, measure, methods.linear_decay(options.lr, options.steps))


def max_tokens_of(task: Task[Problem], options: Options) -> int:
    """Return the most tokens of a sample: by default the longest answer if samples must be exact, or else 256."""
    return options.max_tokens or (max(answer_lengths(task)) if reward_name(task, options) == "exact" else 256)


def answer_lengths(task: Task[Problem]) -> list[int]:
    """Return the number of tokens of each answer, the end token included."""
    return [len(task.renderer.encode(each.answer or "")) + 1 for each in task.held_out + task.train]


def reward_name(task: Task[Problem], options: Options) -> str:
    """Return ``--reward``, or the default reward of the data."""
    return options.reward or default_reward(task.held_out + task.train)


RECIPES: dict[str, Callable[[Run, Job, Client | None], Recipe]] = {
    "supervised": supervised,
    "distillation": distillation,
    "preference": partial(judged, batches.pair_batch, measures.pair_accuracy),
    "unpaired": partial(judged, batches.labelled_batch, measures.ranking),
    "policy": policy,
}


def history_of(run: Run, job: Job) -> list[dict[str, Any]]:
    """Return the metrics of the steps of the method, without those of the warm-up."""
    return [row for row in run.history if row["phase"] == job.phase]


# Supervised starts


Start = tuple[Callable[[Random, int], list[Demonstration]], int, Schedule]
"""A function that draws examples, their number in a step, and the learning rate."""


def start_of_pairs(job: Job) -> Start:
    """Learn the chosen sides; with the built-in data, passages of the documentation."""
    return learn_texts(job, lambda rng, n: [pair.chosen for pair in job.task.draw(rng, n)])


def start_of_labels(job: Job) -> Start:
    """Learn the desirable answers; with the built-in data, passages of the documentation."""
    good = [each.example for each in job.task.train if each.desirable]
    if job.options.data and not good:
        raise LossInputError("--warmup-steps", "a desirable answer to start with", "none in the data", "Pass 0.")
    return learn_texts(job, lambda rng, n: rng.choices(good, k=n))


def learn_texts(job: Job, draw: Callable[[Random, int], list[Demonstration]]) -> Start:
    """Learn the examples of ``draw``; with the built-in data, passages of the documentation."""
    if not job.options.data:
        draw = tasks.documentation(job.task.renderer).draw
    return draw, 16, methods.cosine(3e-3, job.options.warmup_steps)


def start_of_problems(job: Job) -> Start:
    """Learn right answers; with the built-in data, answers that are mostly wrong, for the method to correct."""
    task = job.task
    answer = tasks.noisy_answer if job.options.data is None else lambda problem, rng: str(problem.answer)

    def draw(rng: Random, n: int) -> list[Demonstration]:
        return [task.renderer.answered(each.prompt, answer(each, rng)) for each in task.draw(rng, n)]

    return draw, 128, methods.constant(2e-3)


WARM_UPS: dict[str, Callable[[Job], Start]] = {
    "preference": start_of_pairs,
    "unpaired": start_of_labels,
    "policy": start_of_problems,
}
