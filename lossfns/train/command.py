"""``lossfns train METHOD`` and ``train --resume DIR``, ``lossfns plot DIR`` and ``lossfns sample DIR PROMPT``."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from uuid import uuid4

import torch

from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.engine.ranks import start as start_ranks
from lossfns.backend.storage import checkpoint
from lossfns.backend.types import SamplingParams
from lossfns.datum import ModelInput
from lossfns.errors import LossInputError
from lossfns.loss import Loss
from lossfns.terminal import console_on, say, while_read
from lossfns.train import formats, plots, recipes, remote, tasks
from lossfns.train.methods import TEMPERATURE, one_line
from lossfns.train.options import Options, check_option
from lossfns.train.remote import Client, RemoteTrainingClient
from lossfns.train.run import (
    CHECKPOINTS,
    CONFIG,
    CURVES,
    METRICS,
    OLD_CHECKPOINT,
    RESULT,
    Run,
    State,
    check_new,
    create_run,
    is_finished,
    load_config,
    replaced,
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
    add("--data", metavar="FILE", help="train on your own rows (JSONL, a JSON array or CSV) instead of built-in data: "
        "{prompt, completion} or a chat for sft, {prompt, chosen, rejected} for dpo and orpo, {prompt, answer} for the "
        "others; docs/train.md lists all formats")  # fmt: skip
    add("--max-length", type=int, metavar="N", help="longest row of --data in tokens (bytes); longer ones are refused "
        "(default: 2048)")  # fmt: skip
    add("--out", metavar="DIR", help="the run folder (default: runs/METHOD-TIME)")
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
    except (LossInputError, OSError) as error:
        return refused(error)


def refused(error: Exception) -> int:
    """Print an error in one line, and return the exit status for it."""
    with while_read(sys.stderr):
        print(f"lossfns: {error}", file=sys.stderr)
    return 2


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
    loss, task = method.loss(), method.task(options)
    with client_of(options) as client:
        train_with(client, method.recipe, task, loss, options, folder, check_config)
    return 0


@contextmanager
def client_of(options: Options) -> Iterator[Client]:
    """Yield the client of a new model, in this process or on a server."""
    if options.base_url is None:
        yield LocalTrainingClient(device=options.device, seed=options.seed, mesh=start_ranks(options.device))
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


# Checkpoints of a run


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first.

    There are two if a run was killed just after it was resumed with another number of processes. A run on a server has
    a file that names the checkpoint there.
    """
    if (folder / remote.CHECKPOINT).is_file():
        return [folder / remote.CHECKPOINT]
    paths = [folder / name for name in (*CHECKPOINTS, OLD_CHECKPOINT) if checkpoint.exists(folder / name)]
    return sorted(paths, key=lambda path: checkpoint.metadata(path).get("steps", 0), reverse=True)


def save_checkpoint(client: Client, folder: Path, state: State) -> None:
    """Save the weights, the optimizer and the state of the run, and remove the checkpoint of the other form."""
    metadata = {"run": json.dumps(state._asdict())}
    if isinstance(client, RemoteTrainingClient):
        return recipes.save_to(client, folder, remote.CHECKPOINT, metadata)
    name, other = CHECKPOINTS if client.ranks.size == 1 else CHECKPOINTS[::-1]
    recipes.save_to(client, folder, name, metadata)
    for old in (other, OLD_CHECKPOINT):
        client.ranks.when_idle(client.ranks.on_rank_zero, checkpoint.remove, folder / old)


def load_newest(client: Client, folder: Path) -> State:
    """Load the newest checkpoint into the client and return the state of the run; an empty one if there is none."""
    if not checkpoints(folder):
        return State({}, [], {})
    path = checkpoints(folder)[0]
    client.load_state_with_optimizer(path).result()
    try:
        data = checkpoint.metadata(path) if isinstance(client, LocalTrainingClient) else remote.read_pointer(path)
        return State(**json.loads(data["user_metadata"]["run"]))
    except (KeyError, TypeError, ValueError):
        got = f"{path}, which was saved by something else"
        raise LossInputError("--resume", "a checkpoint of the run", got, "Put the run's own back.") from None


# The configuration of a run


def config_of(options: Options, client: Client) -> dict[str, Any]:
    """Return the content of ``config.json``: everything that is needed to repeat the run."""
    files = {name: os.path.abspath(path) for name, path in asdict(options).items() if name in ("data", "init") and path}
    return {
        "id": uuid4().hex,
        "options": recipes.own_options(options) | files,
        "sha256": {name: sha256(path) for name, path in files.items()},
        "loss": repr(recipes.METHODS[options.method].loss()),
        **description_of(client),
        "versions": {"lossfns": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def description_of(client: Client) -> dict[str, Any]:
    """Return the model and its shape, as far as they are known here."""
    if isinstance(client, RemoteTrainingClient):
        return {"model": client.describe(), "shape": None}
    return {"model": asdict(client.get_info()), "shape": client.model.shape}


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
        with while_read(sys.stderr):
            text = f"lossfns: {folder} began with {'; '.join(changed)}: it may not continue bit for bit"
            print(text, file=sys.stderr)


# The report


def report(run: Run, outcome: recipes.Outcome) -> None:
    """Write ``result.json`` and the picture of the curves, and print the outcome."""
    result = {
        "stopped_early": run.stopped,
        "seconds": round(run.seconds, 1),
        outcome.name: {"before": outcome.before, "after": outcome.after},
        "samples": outcome.samples,
    }
    write_json(run.folder, RESULT, result)
    curves = draw_curves(run.folder, run.history, {outcome.name: (outcome.before, outcome.after)})
    with while_read(sys.stdout):
        print_outcome(outcome)
        print_samples(outcome.samples)
        say(f"{run.steps_done} steps in {result['seconds']} s{', stopped early' if run.stopped else ''}")
        say(f"checkpoint  {checkpoints(run.folder)[0]}")
        say(f"metrics     {run.folder / METRICS}")
        say(f"curves      {curves}")
        say(f"try it      lossfns sample {run.folder} PROMPT")
        if run.stopped:
            say(f"continue    lossfns train --resume {run.folder}")


def print_outcome(outcome: recipes.Outcome) -> None:
    """Print the held-out measurement before and after between blank lines: a table on a terminal, else one line."""
    before, after, change = f"{outcome.before:.3f}", f"{outcome.after:.3f}", f"{outcome.after - outcome.before:+.3f}"
    console = console_on(sys.stdout)
    if console is None:
        say(f"\n{outcome.title}: {before} before, {after} after ({change})\n")
        return
    from rich import box
    from rich.table import Table

    table = Table("", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    table.add_row(outcome.title, before, after, change)
    console.print(table)


def print_samples(samples: Sequence[Mapping[str, str]]) -> None:
    """Print a few prompts with samples before and after training, each on a line of 80 columns."""
    if not samples:
        return
    say(f"samples at temperature {TEMPERATURE}, before and after training (whole in {RESULT})")
    for sample in samples:
        for name, text in sample.items():
            say(f"  {name:<8}{one_line(text, 68)}")
        say("")


def draw_curves(folder: Path, history: Sequence[Mapping[str, Any]], measured: Mapping[str, tuple[float, float]]) -> str:
    """Draw the curves of the run; return the path of the picture, or the reason why there is none."""
    picture = io.BytesIO()
    try:
        drawn = plots.plot_metrics(history, measured, picture)
    except ImportError:
        return f"not drawn: pip install 'lossfns[viz]', then lossfns plot {folder}"
    if not drawn:
        return "not drawn: no metric has changed yet"
    with replaced(folder, CURVES) as path:
        path.write_bytes(picture.getvalue())
    return str(folder / CURVES)


# lossfns plot


def add_plot(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``plot`` command to a command line."""
    p = commands.add_parser(
        "plot",
        help="draw the curves of a run of lossfns train",
        description="Show the curves of a run on the terminal, also while it is running, and draw them into its "
        "folder as curves.png, if matplotlib is installed (extra viz).",
    )
    p.add_argument("folder", metavar="RUN", help="the run folder")
    p.set_defaults(run=plot_command, parser=p)


def plot_command(args: argparse.Namespace) -> int:
    """Run ``lossfns plot``.

    Returns:
        0, or 2 if the folder holds no run or no metrics.
    """
    try:
        check_option("RUN", args.folder)
        folder = Path(args.folder)
        load_config(folder, "RUN")
        history = read_history(folder)
        curves = draw_curves(folder, history, read_measured(folder))
    except (LossInputError, OSError) as error:
        return refused(error)
    except KeyboardInterrupt:
        return 130
    with while_read(sys.stdout):
        print_curves(history)
        say(f"curves      {curves}")
    return 0


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics of a run that may still be running: a line that is not whole yet is left out.

    Raises:
        LossInputError: if there are none, or a row is damaged.
    """
    try:
        lines = (folder / METRICS).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        lines = []
    if not lines:
        got = f"none in {folder}"
        raise LossInputError("RUN", "a run with metrics", got, "It has not made a step yet.")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "phase": str(row["phase"]), "step": int(row["step"])})
            numbers = [row[name] for name in plots.PLOTTED if name in row]
        except (ValueError, KeyError, TypeError, RecursionError):
            numbers = [None]
        if not all(isinstance(x, (int, float)) for x in numbers):
            place = f"{folder / METRICS}:{number}"
            raise LossInputError(place, "a row of metrics", "a damaged one", "Was the file changed?")
    return rows


def read_measured(folder: Path) -> dict[str, tuple[float, float]]:
    """Return the held-out measurements of a finished or stopped run; none if it has not ended."""
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return {k: (float(v["before"]), float(v["after"])) for k, v in result.items() if isinstance(v, dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def print_curves(history: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each metric that has changed: its first value, its curve and its last value."""
    found = plots.changing_metrics(history)
    values = [plots.values_of(history, phase, name) for phase, name in found]
    console = console_on(sys.stdout)
    width = min(60, (console.width if console else 80) - 46)
    for (phase, name), x in zip(found, values):
        curve = plots.block_line(x, max(8, width))
        say(f"{phase:>10} {name:<10} {x[0]:>10.3f}  {curve}  {x[-1]:.3f}")


# lossfns sample


def add_sample(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``sample`` command to a command line."""
    p = commands.add_parser(
        "sample",
        help="generate text from a run of lossfns train",
        description="Generate from the newest checkpoint of a run. The prompt is written as the prompts of the run's "
        "data are: after a chat, as a message of the user.",
    )
    add = p.add_argument
    add("folder", metavar="RUN", help="the run folder")
    add("prompt", metavar="PROMPT", help="the text to continue or to answer; '' begins a text")
    add("--max-tokens", type=int, default=128, metavar="N", help="longest sample in tokens (default: 128)")
    add("--temperature", type=float, default=TEMPERATURE, metavar="X", help=f"0 is greedy (default: {TEMPERATURE})")
    add("--samples", type=int, default=1, metavar="N", help="how many samples (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the samples (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    p.set_defaults(run=sample_command, parser=p)


def sample_command(args: argparse.Namespace) -> int:
    """Run ``lossfns sample``.

    Returns:
        0, or 2 if the input was refused.
    """
    try:
        check_option("RUN", args.folder)
        texts = sample_run(Path(args.folder), args)
    except (LossInputError, OSError) as error:
        return refused(error)
    except KeyboardInterrupt:
        os._exit(130)
    with while_read(sys.stdout):
        for number, text in enumerate(texts, 1):
            if len(texts) > 1:
                say(f"sample {number}:")
            live = console_on(sys.stdout) is not None  # a terminal would obey the escape sequences of a sample
            say("\n".join(one_line(line, sys.maxsize) for line in text.split("\n")) if live else text)
    return 0


def sample_run(folder: Path, args: argparse.Namespace) -> list[str]:
    """Return samples from the newest checkpoint of a run."""
    config = load_config(folder, "RUN")
    if not checkpoints(folder):
        fix = "A run saves its first one after --save-every steps."
        raise LossInputError("RUN", "a run with a checkpoint", f"{folder}, which has none", fix)
    style = config.get("prompts", "text")
    try:
        ids = tasks.TOKENIZER.encode(formats.prompt_for(style, args.prompt))
    except UnicodeEncodeError:
        got = ascii(args.prompt[:40])
        raise LossInputError("PROMPT", "text in UTF-8", got, "Check the encoding of the terminal.") from None
    torch.set_num_threads(1)
    path, base_url = checkpoints(folder)[0], config["options"].get("base_url")
    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
    prompt = ModelInput.from_ints(tasks.END + ids if style == "passage" or not ids else ids)
    with sampler_of(path, base_url, args.device) as sampler:
        (response,) = sampler.sample_batch([prompt], args.samples, params).result()
    return [tasks.TOKENIZER.decode(sequence.tokens) for sequence in response.sequences]


@contextmanager
def sampler_of(path: Path, base_url: str | None, device: str) -> Iterator[Any]:
    """Yield a sampler of a run's checkpoint, in this process or on the server of the run."""
    if base_url is None:
        yield LocalTrainingClient(device=device).create_sampling_client(path)
        return
    with remote.connected(base_url) as client:
        client.load_state(path).result()
        yield client.save_weights_and_get_sampling_client()
