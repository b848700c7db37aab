"""``lossfns train METHOD`` and ``lossfns train --resume DIR``."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.engine.ranks import start as start_ranks
from lossfns.backend.storage import checkpoint
from lossfns.errors import LossInputError
from lossfns.terminal import console_on
from lossfns.train import recipes
from lossfns.train.options import Options
from lossfns.train.run import (
    CHECKPOINTS,
    CURVES,
    METRICS,
    RESULT,
    Run,
    State,
    create_run,
    is_finished,
    load_config,
    write_json,
)
from lossfns.version import __version__


def add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``train`` command to a command line."""
    p = commands.add_parser(
        "train",
        help="train a local model with one of the losses",
        description="Train a local model and measure it on held-out data before and after. Everything about the run "
        "is kept in the folder --out.",
    )
    add = p.add_argument
    add("method", nargs="?", choices=recipes.METHODS, help="the training method")
    add("--data", metavar="FILE.jsonl", help="train on your own rows instead of built-in data: {prompt, completion} "
        "for sft, {prompt, chosen, rejected} for dpo and orpo, {prompt, answer} for the others")  # fmt: skip
    add("--out", metavar="DIR", help="the run folder (default: runs/METHOD-TIME)")
    add("--init", metavar="FILE", help="start from the weights of this checkpoint")
    add("--device", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--threads", type=int, metavar="N", help="CPU threads; more hardly help a model this small (default: 1)")
    add("--seed", type=int, metavar="N", help="seed of the model, the batches and the samples (default: 0)")
    add("--steps", type=int, metavar="N", help="steps of the method (default: by method)")
    add("--warmup-steps", type=int, metavar="N", help="supervised steps before the method (default: by method)")
    add("--batch", type=int, metavar="N", help="examples, pairs or problems in a step (default: by method)")
    add("--lr", type=float, metavar="X", help="learning rate (default: by method)")
    add("--group", type=int, metavar="N", help="samples of each problem, for grpo, dapo and gspo-token")
    add("--updates", type=int, metavar="N", help="optimizer steps for each round of samples")
    add("--max-tokens", type=int, metavar="N", help="longest sample in tokens (default: that of the longest answer)")
    add("--save-every", type=int, metavar="N", help="steps from one checkpoint to the next (default: 20)")
    add("--resume", metavar="DIR", help="continue the run in this folder, which was killed or stopped; all other "
        "options come from the folder")  # fmt: skip
    p.set_defaults(run=train_command, parser=p)


def train_command(args: argparse.Namespace) -> int:
    """Run ``lossfns train``.

    Returns:
        0, or 2 if the input was refused.
    """
    names = [field.name for field in fields(Options)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.resume is not None and given:
        args.parser.error(f"--resume takes all options from the run: leave out {', '.join(given)}")
    if args.resume is None and args.method is None:
        args.parser.error("name a method, or --resume a run")
    try:
        options = None if args.resume is not None else recipes.complete_options(given)
    except LossInputError as error:
        args.parser.error(str(error))
    try:
        with silence() if int(os.environ.get("RANK", 0)) else nullcontext():
            return resume_run(Path(args.resume)) if options is None else start_run(options)
    except LossInputError as error:
        print(f"lossfns: {error}", file=sys.stderr)
        return 2


@contextmanager
def silence() -> Iterator[None]:
    """Suppress all output but errors. Of several ranks only the first writes to the terminal."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def start_run(options: Options) -> int:
    """Start a new run."""
    folder = Path(options.out or f"runs/{options.method}-{time.strftime('%Y%m%d-%H%M%S')}")
    return train(options, folder, lambda config: create_run(folder, config))


def resume_run(folder: Path) -> int:
    """Continue a run from its newest checkpoint, or from the beginning if it was killed before there was one."""
    config = load_config(folder)
    if is_finished(folder):
        print(f"{folder} is finished: there is nothing to resume")
        return 0
    options = recipes.complete_options(config["options"])
    return train(options, folder, lambda now: check_same(config, now, folder))


def train(options: Options, folder: Path, check_config: Callable[[dict[str, Any]], None]) -> int:
    """Build the model, run the recipe, save and report.

    The first Ctrl-C ends the recipe early, but the run is saved, measured and reported all the same.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)  # for random numbers that a recipe does not draw from its own seeds
    method = recipes.METHODS[options.method]
    loss, task = method.loss(), method.task(options)
    client = LocalTrainingClient(device=options.device, seed=options.seed, mesh=start_ranks(options.device))
    ranks = client.ranks
    if options.init and not checkpoints(folder):
        client.load_state(options.init).result()
    ranks.when_idle(ranks.on_rank_zero, check_config, config_of(options, client))
    state, save = load_newest(client, folder), partial(save_checkpoint, client, folder)
    with Run(folder, save, state=state, every=options.save_every, ranks=ranks) as run:
        run.say(f"{options.method} on {task.name}: {loss!r}")
        if run.history:
            run.say(f"resumed after {run.steps_done} steps")
        outcome = method.recipe(run, client, task, loss, options)
    if ranks.rank == 0:
        report(run, outcome)
    return 0


# Checkpoints of a run


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first.

    There are two if a run was killed just after it was resumed with another number of processes.
    """
    paths = [folder / name for name in CHECKPOINTS if checkpoint.exists(folder / name)]
    return sorted(paths, key=lambda path: checkpoint.metadata(path).get("steps", 0), reverse=True)


def save_checkpoint(client: LocalTrainingClient, folder: Path, state: State) -> None:
    """Save the weights, the optimizer and the state of the run, and remove the checkpoint of the other form."""
    metadata = {"run": json.dumps(state._asdict())}
    name, other = CHECKPOINTS if client.ranks.size == 1 else CHECKPOINTS[::-1]
    client.save_state(folder / name, overwrite=True, user_metadata=metadata).result()
    client.ranks.when_idle(client.ranks.on_rank_zero, checkpoint.remove, folder / other)


def load_newest(client: LocalTrainingClient, folder: Path) -> State:
    """Load the newest checkpoint into the client and return the state of the run; an empty one if there is none."""
    if not checkpoints(folder):
        return State({}, [], {})
    path = checkpoints(folder)[0]
    client.load_state_with_optimizer(path).result()
    try:
        return State(**json.loads(checkpoint.metadata(path)["user_metadata"]["run"]))
    except (KeyError, TypeError, ValueError):
        got = f"{path}, which was saved by something else"
        raise LossInputError("--resume", "a checkpoint of the run", got, "Put the run's own back.") from None


# The configuration of a run


def config_of(options: Options, client: LocalTrainingClient) -> dict[str, Any]:
    """Return the content of ``config.json``: everything that is needed to repeat the run."""
    files = {name: os.path.abspath(path) for name, path in asdict(options).items() if name in ("data", "init") and path}
    return {
        "options": recipes.own_options(options) | files,
        "sha256": {name: sha256(path) for name, path in files.items()},
        "loss": repr(recipes.METHODS[options.method].loss()),
        "model": asdict(client.get_info()),
        "shape": client.model.shape,
        "versions": {"lossfns": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def sha256(path: str) -> str:
    """Return the SHA-256 of a file's content; an empty string if the file cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""


def check_same(then: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Compare the config of a run with the present one.

    Another version, device or loss is reported on standard error: the run may then not continue bit for bit.

    Raises:
        LossInputError: if a file that the run needs has changed.
    """
    needed = ["data"] if checkpoints(folder) else ["data", "init"]
    for name in needed:
        if then["sha256"].get(name) != now["sha256"].get(name):
            got, fix = f"{now['options'][name]}, which has changed since", "Put it back, or start a new run."
            raise LossInputError(f"--{name}", f"the file that {folder} began with", got, fix)
    old, new = ({"loss": c.get("loss"), "device": c["model"].get("device"), **c["versions"]} for c in (then, now))
    changed = [f"{name} {old.get(name)}, now {new[name]}" for name in new if old.get(name) != new[name]]
    if changed:
        print(f"lossfns: {folder} began with {'; '.join(changed)}: it may not continue bit for bit", file=sys.stderr)


# The report


def report(run: Run, outcome: recipes.Outcome) -> None:
    """Write ``result.json`` and the picture of the curves, and print the outcome."""
    result = {
        "stopped_early": run.stopped,
        "seconds": round(run.seconds, 1),
        outcome.name: {"before": outcome.before, "after": outcome.after},
    }
    write_json(run.folder / RESULT, result)
    print_outcome(outcome)
    print(f"{run.steps_done} steps in {result['seconds']} s{', stopped early' if run.stopped else ''}")
    print(f"checkpoint  {checkpoints(run.folder)[0]}")
    print(f"metrics     {run.folder / METRICS}")
    print(f"curves      {draw_curves(run, outcome, run.folder / CURVES)}")
    if run.stopped:
        print(f"continue    lossfns train --resume {run.folder}")


def print_outcome(outcome: recipes.Outcome) -> None:
    """Print the held-out measurement before and after between blank lines: a table on a terminal, else one line."""
    before, after, change = f"{outcome.before:.3f}", f"{outcome.after:.3f}", f"{outcome.after - outcome.before:+.3f}"
    console = console_on(sys.stdout)
    if console is None:
        print(f"\n{outcome.title}: {before} before, {after} after ({change})\n")
        return
    from rich import box
    from rich.table import Table

    table = Table("", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    table.add_row(outcome.title, before, after, change)
    console.print(table)


def draw_curves(run: Run, outcome: recipes.Outcome, path: Path) -> str:
    """Draw the curves of the run; return the path of the picture, or the reason why there is none."""
    try:
        from lossfns.train.plots import plot_metrics

        drawn = plot_metrics(run.history, {outcome.name: (outcome.before, outcome.after)}, path)
    except ImportError:
        return "not drawn: pip install 'lossfns[viz]'"
    return str(path) if drawn else "not drawn: no metric has changed yet"
