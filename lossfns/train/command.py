"""``lossfns train LOSS`` and ``train --resume DIR``."""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from lossfns.errors import LossInputError
from lossfns.terminal import OutputError, print_refusal, while_read
from lossfns.train import models
from lossfns.train.batch import write_look
from lossfns.train.checkpoints import checkpoints, load_newest, save_checkpoint
from lossfns.train.config import check_same, config_of, write_config_toml
from lossfns.train.defaults import complete_options, loss_of
from lossfns.train.losses import parse_setting
from lossfns.train.options import CHOICES, NAMES, Options, check_option, flag, naming, read_toml
from lossfns.train.outcome import report_outcome
from lossfns.train.paths import names_code
from lossfns.train.recipes import Job, run_job
from lossfns.train.remote import Client
from lossfns.train.rewards import SPECS
from lossfns.train.run import CHECKPOINT, CONFIG, Run, check_new, create_run, is_finished, load_config
from lossfns.train.setup import client_of, examples_of, job_of
from lossfns.train.trackers import TRACKERS, open_trackers


def add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``train`` command to a command line."""
    p = commands.add_parser(
        "train",
        help="train a local model with one of the losses",
        description="Train a local model with a loss, and measure it on held-out data before and after. How it is "
        "trained follows from what the loss reads. Everything about the run is kept in the folder --out.",
    )
    p.add_argument("loss", nargs="?", metavar="LOSS", help="a loss of the family, such as sft, dpo or grpo (lossfns "
        "list has them all), a call such as 'with_tis(dapo(), cap=2)', or one of your own: module:function or "
        "FILE.py:FUNCTION")  # fmt: skip
    of_loss = p.add_argument_group("loss")
    of_loss.add_argument("--loss", dest="named_loss", metavar="LOSS", help="the same as LOSS")
    of_loss.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the loss, such "
        "as clip=0.8,1.28, weigh=sequence_mean or kl_beta=0; lossfns describe LOSS has them all")  # fmt: skip
    of_loss.add_argument("--teacher", metavar="MODEL", help="the model that the loss learns from; without --model, a "
        "checkpoint of one")  # fmt: skip
    of_loss.add_argument("--candidates", type=int, metavar="N", help="candidate tokens of the teacher at each position "
        "(default: 16)")  # fmt: skip
    data = p.add_argument_group("data").add_argument
    data("--data", metavar="FILE", help="train on your own rows instead of built-in data: {prompt, completion} or a "
        "chat, {prompt, chosen, rejected}, {prompt, answer}, ...; docs/data.md lists all formats")  # fmt: skip
    data("--max-length", type=int, metavar="N", help="longest row of --data in tokens; longer ones are refused "
        "(default: 2048)")  # fmt: skip
    data("--drop-longer", action="store_true", default=None, help="leave out longer rows, and count them")
    model = p.add_argument_group("model").add_argument
    model("--model", metavar="MODEL", help="train this model instead of the embedded one: a folder or the name of a "
        "repository of Hugging Face, a GGUF file, or smollm2, the model of that extra")  # fmt: skip
    model("--lora", type=int, metavar="RANK", help="train low-rank adapters of this rank instead of all weights "
        "(default: 0, none)")  # fmt: skip
    model("--lora-parts", metavar="PARTS", help="which layers get adapters: some of attn, mlp and unembed, with commas "
        "between them (default: attn,mlp)")  # fmt: skip
    model("--dtype", choices=models.DTYPES, help="dtype of the weights (default: that of the model's file)")
    model("--gradient-checkpointing", action="store_true", default=None, help="save memory: run each layer again in "
        "the backward pass")  # fmt: skip
    model("--init", metavar="FILE", help="start from the weights of this checkpoint")
    model("--base-url", metavar="URL", help="train on a server of the Tinker API, such as lossfns serve, through the "
        "tinker SDK; TINKER_API_KEY is its key")  # fmt: skip
    model("--device", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    model("--threads", type=int, metavar="N", help="CPU threads; more hardly help a small model (default: 1)")
    steps = p.add_argument_group("steps").add_argument
    steps("--seed", type=int, metavar="N", help="seed of the model, the batches and the samples (default: 0)")
    steps("--steps", type=int, metavar="N", help="steps of the method (default: by method)")
    steps("--warmup-steps", type=int, metavar="N", help="supervised steps before the method (default: by method)")
    steps("--batch", type=int, metavar="N", help="examples, pairs or problems in a step (default: by method)")
    steps("--lr", type=float, metavar="X", help="largest learning rate (default: by method). It falls to a tenth by "
        "the end, after a rise over 5 steps of a policy method, 10 on pairs or labels, 20 of others")  # fmt: skip
    samples = p.add_argument_group("samples, for losses that need them").add_argument
    samples("--group", type=int, metavar="N", help="samples of each problem")
    samples("--updates", type=int, metavar="N", help="optimizer steps for each round of samples")
    samples(
        "--max-tokens", type=int, metavar="N", help="longest sample in tokens (default: that of the longest answer)"
    )
    samples("--reward", metavar="SPEC", help=f"{SPECS} (default: by the data)")
    samples("--advantage-scale", choices=CHOICES["advantage_scale"], help="divide advantages by the standard "
        "deviation of the group, or not, as in Dr. GRPO (default: std)")  # fmt: skip
    run = p.add_argument_group("run").add_argument
    run("--config", metavar="FILE", help="take options from a TOML file, such as the config.toml of a run; options of "
        "the command line come first")  # fmt: skip
    run("--out", metavar="DIR", help="the run folder (default: runs/LOSS-TIME)")
    run("--eval-every", type=int, metavar="N", help="steps from one held-out evaluation to the next (default: 0, only "
        "before and after)")  # fmt: skip
    run("--eval-examples", type=int, metavar="N", help="most held-out examples to measure on (default: 50 with "
        "--model, else all)")  # fmt: skip
    run("--track", action="append", metavar="NAMES", help=f"send the metrics to {', '.join(TRACKERS)}, or "
        "several with commas between them, too")  # fmt: skip
    run("--tensorboard", dest="track", action="append_const", const="tensorboard", help="the same as "
        "--track tensorboard: event files in the run folder")  # fmt: skip
    run("--save-every", type=int, metavar="N", help="steps from one checkpoint to the next (default: 20)")
    run("--resume", metavar="DIR", help="continue the run in this folder, which was killed or stopped; all other "
        "options come from the folder")  # fmt: skip
    p.set_defaults(run=train_command, parser=p)


def train_command(args: argparse.Namespace) -> int:
    """Run ``lossfns train``.

    Returns:
        0, also if the run was stopped early and saved, or 2 if the input was refused.
    """
    here = os.getcwd()
    try:
        given = given_options(args)
        if args.resume is not None:
            check_option("resume", args.resume)
            if given:
                names = ", ".join(map(flag, given))
                longer = f"; {TRAIN_LONGER.format(args.resume)}" if "steps" in given else ""
                args.parser.error(f"--resume takes all options from the run: leave out {names}{longer}")
        elif "loss" not in given:
            args.parser.error("name a loss, or --resume a run")
        options = None if args.resume is not None else complete_options(given)
    except LossInputError as error:
        args.parser.error(str(error))
    except KeyboardInterrupt:  # while a file of the user's is imported
        return 130
    try:
        with silence() if int(os.environ.get("RANK", 0)) else nullcontext():
            return resume_run(Path(args.resume)) if options is None else start_run(options, here, given.get("out"))
    except (LossInputError, ImportError, OSError) as error:
        return print_refusal(error)


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that the command line and its ``--config`` name. Those of the command line come first."""
    if args.named_loss is not None and args.loss is not None:
        raise LossInputError("--loss", "one loss", f"{args.loss} and {args.named_loss}", "Leave one of them out.")
    loss = args.named_loss if args.loss is None else args.loss
    track = None if args.track is None else ",".join(args.track)
    values = {**vars(args), "loss": loss, "track": track}
    file = {} if args.config is None else read_toml(args.config)
    named = {name: values[name] for name in NAMES if name != "set" and values[name] is not None}
    check_option("set", file.get("set", {}))
    given = list(map(parse_setting, args.set))
    names = [name for name, _ in given]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise LossInputError("--set", "each setting once", f"{twice} twice", "Leave one of them out.")
    settings = {**file.get("set", {}), **dict(given)}
    return {**file, **named, **({"set": settings} if settings else {})}


@contextmanager
def one_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first Ctrl-C only: another one must not disturb the end of the process."""
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


def leave_at_once(folder: Path, shown: Path) -> NoReturn:
    """End the process after an interrupt, without waiting for the thread of the current request."""
    go_on = f"; continue with lossfns train --resume {shown}" if can_resume(folder) else ""
    with suppress(OutputError), while_read(sys.stderr):
        print(f"lossfns: interrupted{go_on}", file=sys.stderr)
    with suppress(OutputError), while_read(sys.stdout):
        pass
    os._exit(130)


def can_resume(folder: Path) -> bool:
    """Whether a folder holds a run that has begun and has not come to its end."""
    return (folder / CONFIG).exists() and not is_finished(folder)


@contextmanager
def silence() -> Iterator[None]:
    """Suppress all output in a ``with`` block: only rank 0 writes to the terminal. Errors are printed outside of it."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def start_run(options: Options, here: str, out: str | None) -> int:
    """Start a new run, in ``out`` if it is given.

    Paths are relative to ``here``: a function of the user may have changed the folder since. They are shown as given.
    """
    name = re.sub(r"[^\w.-]+", "-", Path(options.loss).name)[:40].strip("-.") or "run"
    start = here if names_code(vars(options)) else ""
    shown = Path(out or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder = Path(start, shown)
    check_new(folder)
    return train(options, folder, shown, lambda config: create_run(folder, config))


TRAIN_LONGER = f"to train longer, start a new run with --init {{}}/{CHECKPOINT}"
"""How to go on from the weights of a run at folder ``{}``."""


def resume_run(folder: Path) -> int:
    """Continue a run from its newest checkpoint, or from the beginning if it was killed before there was one."""
    config = load_config(folder)
    if is_finished(folder):
        with while_read(sys.stdout):
            print(f"{folder} is finished: there is nothing to resume; {TRAIN_LONGER.format(folder)}")
        return 0
    shown = folder
    if names_code(config["options"]):
        folder = folder.absolute()
    options = complete_options(config["options"])
    return train(options, folder, shown, lambda now: check_same(config, now, folder))


NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""The errors of a full disk, a full quota and a limit of a file's size."""


CheckConfig = Callable[[dict[str, Any]], None]
"""Takes the config of a run before its first step: it creates the folder, or compares the config with that there."""


def train(options: Options, folder: Path, shown: Path, check_config: CheckConfig) -> int:
    """Build the model, run the recipe, save and report.

    The first Ctrl-C ends the recipe early, but the run is saved, measured and reported all the same. The second one
    ends the process at once, with exit status 130. The terminal names the folder as ``shown``.

    Raises:
        LossInputError: also if a file of the run cannot be written: then it says how to go on.
    """
    with one_interrupt():
        try:
            return train_and_report(options, folder, shown, check_config)
        except KeyboardInterrupt:
            leave_at_once(folder, shown)
        except OSError as error:
            if not can_resume(folder):
                raise
            go_on = f"and continue with lossfns train --resume {shown}."
            if error.errno in NO_ROOM:
                fix = f"Make room for it, {go_on}"
                raise LossInputError("--out", "a folder to write in", f"{shown} ({error})", fix) from error
            got = f"{type(error).__name__}: {error}"
            raise LossInputError(f"run {shown}", "no error of the system", got, f"Mend its cause, {go_on}") from error


def train_and_report(options: Options, folder: Path, shown: Path, check_config: CheckConfig) -> int:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)  # for random numbers that a recipe does not draw from its own seeds
    loss = loss_of(options.loss, options.set)
    task, reward = examples_of(options, loss)
    with client_of(options) as client:
        train_with(client, job_of(options, loss, client, task, reward), folder, shown, check_config)
    return 0


def train_with(client: Client, job: Job, folder: Path, shown: Path, check_config: CheckConfig) -> None:
    """Run the recipe with a client, save and report."""
    ranks, options, task = client.ranks, job.options, job.task
    if options.init and not checkpoints(folder):
        with naming({"path": "--init"}):
            client.load_state(options.init).result()
    config = config_of(options, job.loss, client) | {"prompts": task.style}
    ranks.when_idle(ranks.on_rank_zero, check_config, config)
    ranks.when_idle(ranks.on_rank_zero, write_config_toml, folder, config["options"])
    state, save = load_newest(client, folder), partial(save_checkpoint, client, folder)
    names = options.track if ranks.rank == 0 else None
    trackers = open_trackers(names, folder, load_config(folder), sum(state.done.values())) if names else []
    with Run(folder, save, state=state, every=options.save_every, ranks=ranks, trackers=trackers) as run:
        run.say(f"{options.loss} on {task.name}: {job.loss!r}")
        if task.note:
            run.say(task.note)
        if run.history:
            run.say(f"resumed after {run.steps_done} steps")
        outcome = run_job(run, job)
        write_look(run, client, task.renderer.shown)
    if ranks.rank == 0:
        report_outcome(run, outcome, shown)
