"""The command line: ``lossfns train METHOD``, ``lossfns check SUBJECT`` and ``lossfns vectors``."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lossfns
from lossfns.backend import LocalTrainingClient
from lossfns.backend.engine import ranks as distributed
from lossfns.backend.storage import checkpoint
from lossfns.errors import LossInputError
from lossfns.testing.command import add_check
from lossfns.testing.vectors.command import add_vectors
from lossfns.train import recipes
from lossfns.train.run import CHECKPOINTS, CURVES, METRICS, RESULT, Run, State, begin, begun, table, write


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="lossfns", description="LLM post-training losses, and a local model to train.")
    p.add_argument("--version", action="version", version=f"lossfns {lossfns.__version__}")
    commands = p.add_subparsers(dest="command", required=True)
    add_check(commands)
    add_vectors(commands)
    add_train(commands)
    return p


def add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="train a local model with one of the losses",
        description="Train a local model, measure it on held-out data before and after, and keep all of it in --out.",
    )
    add = train.add_argument
    options = [
        add("method", nargs="?", choices=recipes.METHODS, help="what to train with"),
        add("--data", metavar="FILE.jsonl", help="your own rows: sft {prompt, completion}, dpo and orpo {prompt, "
            "chosen, rejected}, the others {prompt, answer}; without it, built-in data"),
        add("--out", metavar="DIR", help="run folder; default runs/METHOD-TIME"),
        add("--init", metavar="FILE", help="start from the weights of this checkpoint"),
        add("--device", help="auto, cpu, cuda, cuda:1, ...; default auto"),
        add("--threads", type=count, metavar="N", help="CPU threads, more help little on so small a model; default 1"),
        add("--seed", type=whole, metavar="N", help="of the model, the batches and the samples; default 0"),
        add("--steps", type=count, metavar="N", help="steps of the method; default by method"),
        add("--warmup-steps", type=whole, metavar="N", help="supervised steps before it; default by method"),
        add("--batch", type=count, metavar="N", help="examples, pairs or problems in a step; default by method"),
        add("--lr", type=rate, metavar="X", help="learning rate; default by method"),
        add("--group", type=count, metavar="N", help="samples of each problem (grpo, dapo, gspo-token)"),
        add("--updates", type=count, metavar="N", help="optimizer steps for each round of samples"),
        add("--max-tokens", type=count, metavar="N", help="longest sample; default: the longest answer"),
        add("--save-every", type=count, metavar="N", help="steps from one checkpoint to the next; default 20"),
    ]  # fmt: skip
    add("--resume", metavar="DIR", help="go on with the run in this folder, which was killed or stopped; takes all "
        "other options from there")  # fmt: skip
    train.set_defaults(run=train_command, parser=train, options=[option.dest for option in options])


def whole(text: str, least: int = 0) -> int:
    number = int(text)
    if not least <= number < 2**63:
        raise argparse.ArgumentTypeError(f"a whole number of at least {least}, got {number}")
    return number


def count(text: str) -> int:
    return whole(text, least=1)


def rate(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"a finite number above 0, got {number}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if it did what was asked, 1 if a check failed, 2 for input that it refuses."""
    args = parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    return run(args)


DEFAULTS = {"device": "auto", "threads": 1, "seed": 0, "save_every": 20}


def train_command(args: argparse.Namespace) -> int:
    """Run ``lossfns train``."""
    given = [name for name in args.options if getattr(args, name) is not None]
    if args.resume is not None and given:
        args.parser.error(f"--resume takes all options from the run: leave out {', '.join(given)}")
    try:
        with silent() if int(os.environ.get("RANK", 0)) else nullcontext():
            return start(completed(args)) if args.resume is None else resume(Path(args.resume))
    except LossInputError as error:
        print(f"lossfns: {error}", file=sys.stderr)
        return 2


@contextmanager
def silent() -> Iterator[None]:
    """Nothing on the terminal but errors: of many ranks, the first one writes."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def completed(args: argparse.Namespace) -> argparse.Namespace:
    """The method's defaults where nothing is given; an option that it does not have is refused."""
    if args.method is None:
        args.parser.error("name a method, or --resume a run")
    options = DEFAULTS | recipes.METHODS[args.method].options
    for name in {**DEFAULTS, **recipes.POLICY}:
        if getattr(args, name) is None:
            setattr(args, name, options.get(name))
        elif name not in options:
            args.parser.error(f"{args.method} has no --{name.replace('_', '-')}")
    return args


def start(args: argparse.Namespace) -> int:
    """A new run."""
    folder = Path(args.out or f"runs/{args.method}-{time.strftime('%Y%m%d-%H%M%S')}")
    return train(args, folder, lambda config: begin(folder, config))


def resume(folder: Path) -> int:
    """A run from its newest checkpoint on, or from its beginning if it was killed before there was one."""
    config = begun(folder)
    if finished(folder):
        print(f"{folder} is finished: there is nothing to resume")
        return 0
    given = {name: value for name, value in config["options"].items() if value is not None}
    words = [value if name == "method" else f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    args = completed(parser().parse_args(["train", *words]))
    return train(args, folder, lambda now: check_same(config, now, folder))


def train(args: argparse.Namespace, folder: Path, check: Callable[[dict[str, Any]], None]) -> int:
    """Build the model, run the recipe, save and report; a first Ctrl-C ends the recipe early, with all of the rest."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)  # whatever a recipe draws elsewhere than from its own seeds
    method = recipes.METHODS[args.method]
    loss, task = method.loss(), method.task(args)
    client = LocalTrainingClient(device=args.device, seed=args.seed, mesh=distributed.start(args.device))
    ranks = client.ranks
    if args.init and not saved(folder):
        client.load_state(args.init).result()
    ranks.ask(ranks.first, check, config(args, client))
    state, save = newest(client, folder), partial(save_state, client, folder)
    with Run(folder, save, state=state, every=args.save_every, ranks=ranks) as run:
        run.say(f"{args.method} on {task.name}: {loss!r}")
        if run.history:
            run.say(f"resumed after {run.steps_done} steps")
        outcome = method.recipe(run, client, task, loss, args)
    if ranks.rank == 0:
        report(run, outcome)
    return 0


def save_state(client: LocalTrainingClient, folder: Path, state: State) -> None:
    metadata = {"run": json.dumps(state._asdict())}
    name, other = CHECKPOINTS if client.ranks.size == 1 else CHECKPOINTS[::-1]
    client.save_state(folder / name, overwrite=True, user_metadata=metadata).result()
    client.ranks.ask(client.ranks.first, checkpoint.remove, folder / other)


def saved(folder: Path) -> list[Path]:
    """The checkpoint of a run; also an older one, if it was killed as another number of processes went on with it."""
    paths = [folder / name for name in CHECKPOINTS if checkpoint.exists(folder / name)]
    return sorted(paths, key=lambda path: checkpoint.metadata(path).get("steps", 0), reverse=True)


def newest(client: LocalTrainingClient, folder: Path) -> State:
    """Load the newest checkpoint of the run and give its state, the first one where there is none."""
    if not saved(folder):
        return State({}, [], {})
    path = saved(folder)[0]
    client.load_state_with_optimizer(path).result()
    try:
        return State(**json.loads(checkpoint.metadata(path)["user_metadata"]["run"]))
    except (KeyError, TypeError, ValueError):
        got = f"{path}, which was saved by something else"
        raise LossInputError("--resume", "a checkpoint of the run", got, "Put the run's own back.") from None


def report(run: Run, outcome: recipes.Outcome) -> None:
    """``result.json``, the table and the picture."""
    result = {
        "stopped_early": run.stopped,
        "seconds": round(run.seconds, 1),
        outcome.name: {"before": outcome.before, "after": outcome.after},
    }
    write(run.folder / RESULT, result)
    change = f"{outcome.after - outcome.before:+.3f}"
    head = ("", "before", "after", "change")
    print("\n" + table([head, (outcome.title, f"{outcome.before:.3f}", f"{outcome.after:.3f}", change)]))
    print(f"\n{run.steps_done} steps in {result['seconds']} s{', stopped early' if run.stopped else ''}")
    print(f"checkpoint  {saved(run.folder)[0]}")
    print(f"metrics     {run.folder / METRICS}")
    print(f"curves      {draw(run, outcome, run.folder / CURVES)}")
    if run.stopped:
        print(f"go on with  lossfns train --resume {run.folder}")


def finished(folder: Path) -> bool:
    try:
        return json.loads((folder / RESULT).read_text())["stopped_early"] is False
    except (OSError, ValueError, KeyError, TypeError):
        return False


def config(args: argparse.Namespace, client: LocalTrainingClient) -> dict[str, Any]:
    """Everything that is needed to run it again."""
    files = {name: os.path.abspath(getattr(args, name)) for name in ("data", "init") if getattr(args, name)}
    return {
        "options": {name: getattr(args, name) for name in args.options} | files,
        "sha256": {name: sha256(path) for name, path in files.items()},
        "loss": repr(recipes.METHODS[args.method].loss()),
        "model": asdict(client.get_info()),
        "shape": client.model.shape,
        "versions": {"lossfns": lossfns.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def sha256(path: str) -> str:
    """Of the file's content; empty if there is no such file (any more)."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""


def check_same(then: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with another file than the run began with; say where the same bits cannot be promised."""
    needed = ["data"] if saved(folder) else ["data", "init"]
    for name in needed:
        if then["sha256"].get(name) != now["sha256"].get(name):
            got, fix = f"{now['options'][name]}, which has changed since", "Put it back, or start a new run."
            raise LossInputError(f"--{name}", f"the file that {folder} began with", got, fix)
    made, here = ({"loss": c.get("loss"), "device": c["model"].get("device"), **c["versions"]} for c in (then, now))
    other = [f"{name} {made.get(name)}, now {here[name]}" for name in here if made.get(name) != here[name]]
    if other:
        print(f"lossfns: {folder} began with {'; '.join(other)}: it may not go on bit for bit", file=sys.stderr)


def draw(run: Run, outcome: recipes.Outcome, path: Path) -> str:
    """The path of the picture, or what it takes to get one."""
    try:
        from lossfns.train.plots import curves

        drawn = curves(run.history, {outcome.name: (outcome.before, outcome.after)}, path)
    except ImportError:
        return "not drawn: pip install 'lossfns[viz]'"
    return str(path) if drawn else "not drawn: nothing has moved yet"
