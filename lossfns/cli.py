"""The command line: ``lossfns train METHOD``, ``lossfns check SUBJECT`` and ``lossfns vectors``."""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import lossfns
from lossfns import LossInputError
from lossfns.backend import LocalTrainingClient
from lossfns.testing.command import add_check
from lossfns.testing.vectors.command import add_vectors
from lossfns.train import recipes
from lossfns.train.run import Run, table


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
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = train.add_argument
    add("method", choices=recipes.METHODS)
    add("--data", metavar="FILE.jsonl", help="your own rows: sft {prompt, completion}, dpo and orpo {prompt, chosen, "
        "rejected}, the others {prompt, answer}; without it, built-in data")  # fmt: skip
    add("--out", metavar="DIR", help="run folder; default runs/METHOD-TIME")
    add("--init", metavar="FILE", help="start from the weights of this checkpoint")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--threads", type=count, default=1, metavar="N", help="CPU threads; more help little on so small a model")
    add("--seed", type=whole, default=0, help="of the model, the batches and the samples")
    add("--steps", type=count, metavar="N", help="steps of the method; default by method")
    add("--warmup-steps", type=whole, metavar="N", help="supervised steps before it; default by method")
    add("--batch", type=count, metavar="N", help="examples, pairs or problems in a step; default by method")
    add("--lr", type=rate, metavar="X", help="learning rate; default by method")
    add("--group", type=count, metavar="N", help="samples of each problem (grpo, dapo, gspo-token)")
    add("--updates", type=count, metavar="N", help="optimizer steps for each round of samples")
    add("--max-tokens", type=count, metavar="N", help="longest sample; default: the longest answer")
    train.set_defaults(run=train_command, parser=train)


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


def train_command(args: argparse.Namespace) -> int:
    """Run ``lossfns train``."""
    options = recipes.METHODS[args.method].options
    for name in recipes.POLICY:
        if getattr(args, name) is None:
            setattr(args, name, options.get(name))
        elif name not in options:
            args.parser.error(f"{args.method} has no --{name.replace('_', '-')}")
    try:
        return train(args)
    except LossInputError as error:
        print(f"lossfns: {error}", file=sys.stderr)
        return 2


def train(args: argparse.Namespace) -> int:
    """Build the model, run the recipe, save and report; a first Ctrl-C ends the recipe early, with all of the rest."""
    torch.set_num_threads(args.threads)
    method = recipes.METHODS[args.method]
    loss, task = method.loss(), method.task(args)
    client = LocalTrainingClient(device=args.device, seed=args.seed)
    if args.init:
        client.load_state(args.init).result()
    folder = Path(args.out or f"runs/{args.method}-{time.strftime('%Y%m%d-%H%M%S')}")
    with Run(folder, config(args, client)) as run:
        run.say(f"{args.method} on {task.name}: {loss!r}")
        outcome = method.recipe(run, client, task, loss, args)
        saved = client.save_state(folder / "checkpoint.npz").result().path
    report = {
        "stopped_early": run.stopped,
        "seconds": round(time.monotonic() - run.start, 1),
        outcome.name: {"before": outcome.before, "after": outcome.after},
    }
    (folder / "result.json").write_text(json.dumps(report, indent=1) + "\n")
    change = f"{outcome.after - outcome.before:+.3f}"
    head = ("", "before", "after", "change")
    print("\n" + table([head, (outcome.title, f"{outcome.before:.3f}", f"{outcome.after:.3f}", change)]))
    print(f"\n{run.steps_done} steps in {report['seconds']} s{', stopped early' if run.stopped else ''}")
    print(f"checkpoint  {saved}")
    print(f"metrics     {folder / 'metrics.jsonl'}")
    print(f"curves      {draw(run, outcome, folder / 'curves.png')}")
    return 0


def config(args: argparse.Namespace, client: LocalTrainingClient) -> dict[str, Any]:
    """Everything that is needed to run it again."""
    versions = {"lossfns": lossfns.__version__, "torch": torch.__version__, "python": platform.python_version()}
    loss = repr(recipes.METHODS[args.method].loss())
    chosen = {name: value for name, value in vars(args).items() if name not in ("run", "parser")}
    return {"loss": loss, **chosen, "model": client.get_info(), "shape": client.model.shape, "versions": versions}


def draw(run: Run, outcome: recipes.Outcome, path: Path) -> str:
    """The path of the picture, or what it takes to get one."""
    try:
        from lossfns.plots import curves

        drawn = curves(run.history, {outcome.name: (outcome.before, outcome.after)}, path)
    except ImportError:
        return "not drawn: pip install 'lossfns[viz]'"
    return str(path) if drawn else "not drawn: nothing has moved yet"
