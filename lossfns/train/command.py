"""``lossfns train LOSS`` and ``train --resume DIR``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from lossfns.errors import LossInputError
from lossfns.loss import Loss
from lossfns.terminal import while_read
from lossfns.train import models, recipes, remote, tasks
from lossfns.train.checkpoints import checkpoints, load_newest, save_checkpoint
from lossfns.train.config import check_same, config_of
from lossfns.train.options import Options, check_option
from lossfns.train.outcome import refused, report
from lossfns.train.remote import Client
from lossfns.train.render import Renderer
from lossfns.train.run import CONFIG, Run, check_new, create_run, is_finished, load_config


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
    add("--data", metavar="FILE", help="train on your own rows (JSONL, a JSON array or CSV) instead of built-in data: "
        "{prompt, completion} or a chat for sft, {prompt, chosen, rejected} for dpo and orpo, {prompt, answer} for the "
        "others; docs/train.md lists all formats")  # fmt: skip
    add("--max-length", type=int, metavar="N", help="longest row of --data in tokens (bytes); longer ones are refused "
        "(default: 2048)")  # fmt: skip
    add("--drop-longer", action="store_true", default=None, help="leave out longer rows, and count them")
    add("--out", metavar="DIR", help="the run folder (default: runs/METHOD-TIME)")
    add("--model", metavar="MODEL", help="train this model instead of the embedded one: a folder or the name of a "
        "repository of Hugging Face, a GGUF file, or smollm2, the model of that extra")  # fmt: skip
    add("--lora", type=int, metavar="RANK", help="train low-rank adapters of this rank instead of all weights")
    add("--lora-parts", metavar="PARTS", help="which layers get adapters: some of attn, mlp and unembed, with commas "
        "between them (default: attn,mlp)")  # fmt: skip
    add("--dtype", choices=models.DTYPES, help="dtype of the weights (default: that of the model's file)")
    add("--gradient-checkpointing", action="store_true", default=None, help="save memory: run each layer again in the "
        "backward pass")  # fmt: skip
    add("--init", metavar="FILE", help="start from the weights of this checkpoint")
    add("--base-url", metavar="URL", help="train on a server of the Tinker API, such as lossfns serve, through the "
        "tinker SDK; TINKER_API_KEY is its key")  # fmt: skip
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
        0, also if the run was stopped early and saved, or 2 if the input was refused.
    """
    names = [field.name for field in fields(Options)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.resume is not None and given:
        args.parser.error(f"--resume takes all options from the run: leave out {', '.join(given)}")
    if args.resume is None and args.method is None:
        args.parser.error("name a method, or --resume a run")
    try:
        if args.resume is not None:
            check_option("resume", args.resume)
        options = None if args.resume is not None else recipes.complete_options(given)
    except LossInputError as error:
        args.parser.error(str(error))
    try:
        with silence() if int(os.environ.get("RANK", 0)) else nullcontext():
            return resume_run(Path(args.resume)) if options is None else start_run(options)
    except (LossInputError, ImportError, OSError) as error:
        return refused(error)


@contextmanager
def one_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first Ctrl-C only: the next one must not disturb the end of the process."""
    raised = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if not raised:
            raised = True
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def leave_at_once(folder: Path) -> NoReturn:
    """End the process after an interrupt. The request in hand is left: its thread would keep the process alive."""
    begun = (folder / CONFIG).exists() and not is_finished(folder)
    with while_read(sys.stderr):
        print(
            f"lossfns: interrupted{f'; continue with lossfns train --resume {folder}' if begun else ''}",
            file=sys.stderr,
        )
    with while_read(sys.stdout):
        pass
    os._exit(130)


@contextmanager
def silence() -> Iterator[None]:
    """Suppress all output but errors. Of several ranks only the first writes to the terminal."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def start_run(options: Options) -> int:
    """Start a new run."""
    folder = Path(options.out or f"runs/{options.method}-{time.strftime('%Y%m%d-%H%M%S')}")
    check_new(folder)
    return train(options, folder, lambda config: create_run(folder, config))


def resume_run(folder: Path) -> int:
    """Continue a run from its newest checkpoint, or from the beginning if it was killed before there was one."""
    config = load_config(folder)
    if is_finished(folder):
        with while_read(sys.stdout):
            print(f"{folder} is finished: there is nothing to resume")
        return 0
    options = recipes.complete_options(config["options"])
    return train(options, folder, lambda now: check_same(config, now, folder))


def train(options: Options, folder: Path, check_config: Callable[[dict[str, Any]], None]) -> int:
    """Build the model, run the recipe, save and report.

    The first Ctrl-C ends the recipe early, but the run is saved, measured and reported all the same. The second one
    ends the process at once, with exit status 130.
    """
    with one_interrupt():
        try:
            return train_and_report(options, folder, check_config)
        except KeyboardInterrupt:
            leave_at_once(folder)


def train_and_report(options: Options, folder: Path, check_config: Callable[[dict[str, Any]], None]) -> int:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)  # for random numbers that a recipe does not draw from its own seeds
    method = recipes.METHODS[options.method]
    loss, task = method.loss(), method.task(options, Renderer(models.load_tokenizer(options)))
    with client_of(options) as client:
        train_with(client, method.recipe, task, loss, options, folder, check_config)
    return 0


@contextmanager
def client_of(options: Options) -> Iterator[Client]:
    """Yield the client of a new model, in this process or on a server."""
    if options.base_url is None:
        yield models.load_client(options)
        return
    with remote.connected(options.base_url) as client:
        yield client


def train_with(
    client: Client,
    recipe: recipes.Recipe,
    task: tasks.Task[Any],
    loss: Loss,
    options: Options,
    folder: Path,
    check_config: Callable[[dict[str, Any]], None],
) -> None:
    """Run the recipe with a client, save and report."""
    ranks = client.ranks
    if options.init and not checkpoints(folder):
        client.load_state(options.init).result()
    ranks.when_idle(ranks.on_rank_zero, check_config, config_of(options, client) | {"prompts": task.style})
    state, save = load_newest(client, folder), partial(save_checkpoint, client, folder)
    with Run(folder, save, state=state, every=options.save_every, ranks=ranks) as run:
        run.say(f"{options.method} on {task.name}: {loss!r}")
        if task.note:
            run.say(task.note)
        if run.history:
            run.say(f"resumed after {run.steps_done} steps")
        outcome = recipe(run, client, task, loss, options)
    if ranks.rank == 0:
        report(run, outcome)
