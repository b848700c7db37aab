"""``lossfns train LOSS``: every loss of the family by name, settings, and losses of one's own."""

import io
import math
from pathlib import Path
from typing import Any

from lossfns import LossInputError
from lossfns.backend import ByteTokenizer, Decoder, LocalTrainingClient
from lossfns.describe import makers, required
from lossfns.train.columns import check_columns
from lossfns.train.defaults import loss_of
from lossfns.train.examples import Demonstration, Labelled, Preference, Problem
from lossfns.train.losses import method_of
from lossfns.train.options import Options
from lossfns.train.recipes import Job, run_job
from lossfns.train.render import Renderer
from lossfns.train.run import Run
from lossfns.train.tasks import Task

RENDERER = Renderer(ByteTokenizer())
SHAPE: dict[str, Any] = {"vocab_size": 257, "dim": 16, "layers": 1, "heads": 1, "kv_heads": 1, "hidden": 16}
PARTS: dict[str, Any] = {"loss": "dapo", "policy": "dapo", "preference": "dpo", "quality": "kto", "delta": 0.1}
PARTS["weight"] = "rollout.truncated()"
"""What the combinators of the family combine."""

REFUSED = {
    "a2po": "which reads reference_point",
    "bradley_terry": "bradley_terry, of scores",
    "bradley_terry_margin": "of scores",
    "chord": "which reads sft_weights: it takes demonstrations of an expert",
    "echo": "which reads ce_weights: it takes the tokens that a tool returned",
    "info_nce": "a loss of embeddings",
    "odpo": "which reads target_margin: it takes scores of both sides",
    "oreal": "which reads positive_weights",
    "process_reward": "of scores",
    "sum_losses": "at least one loss",
    "value_loss": "of scores",
}
"""The losses that no run can train, and why."""


def demonstration(i: int) -> Demonstration:
    return RENDERER.completion(f"{i}+1=", str(i + 1))


def pair(i: int) -> Preference:
    return Preference(demonstration(i), RENDERER.completion(f"{i}+1=", "no"))


EXAMPLES: dict[str, list[Any]] = {
    "supervised": [demonstration(i) for i in range(4)],
    "distillation": [demonstration(i) for i in range(4)],
    "preference": [pair(i) for i in range(4)],
    "unpaired": [Labelled(demonstration(i), i % 2 == 0) for i in range(4)],
    "policy": [Problem(RENDERER.prompt(f"{i}+1="), "a", {}) for i in range(2)],
}


def tiny() -> LocalTrainingClient:
    return LocalTrainingClient(Decoder(**SHAPE), tokenizer=ByteTokenizer(), device="cpu")


def one_step(loss: Any, folder: Path, client: LocalTrainingClient, teacher: LocalTrainingClient, **more: Any) -> Any:
    """Run the recipe of a loss for one step and return its metrics."""
    examples = EXAMPLES[method_of(loss)]
    task: Task[Any] = Task("four examples", RENDERER, lambda rng, n: examples[:n], examples, examples)
    sizes: dict[str, Any] = {"steps": 1, "batch": 4, "lr": 1e-3, "group": 3, "updates": 1, "max_tokens": 3}
    options = Options(loss=loss.name, candidates=3, data="rows.jsonl", **sizes | more)
    mixed = lambda problem, text: sum(map(ord, text)) % 3 / 2  # noqa: E731
    folder.mkdir(exist_ok=True)
    job = Job(options=options, loss=loss, client=client, task=task, teacher=teacher, reward=mixed)
    with Run(folder, terminal=io.StringIO()) as run:
        outcome = run_job(run, job)
        assert all(math.isfinite(x) for x in [*outcome.before.values(), *outcome.after.values()])
        return run.history[-1]


def test_every_loss_of_the_family_trains_a_step_or_says_why_not(tmp_path: Path) -> None:
    """A combinator combines ``PARTS``. What is refused is refused before a model is built."""
    client, teacher = tiny(), tiny()
    refused = {}
    for name, make in makers().items():
        settings = {argument: PARTS[argument] for argument in required(make) if argument in PARTS}
        try:
            loss = loss_of(name, settings)
            check_columns(loss, teacher=True, outputs=True)
        except LossInputError as error:
            refused[name] = str(error)
            continue
        row = one_step(loss, tmp_path / name, client, teacher)
        assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]), (name, row)
        assert row["grad_norm"] > 0, (name, row)
    assert refused.keys() == REFUSED.keys()
    for name, reason in REFUSED.items():
        assert reason in refused[name], (name, refused[name])
