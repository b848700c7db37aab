"""The command line: ``lossfns list``, ``describe``, ``check``, ``vectors``, ``data``, ``train``, ``plot``, ``sample``,
``export``, ``serve``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from lossfns.catalogue import add_describe, add_list
from lossfns.conformance.command import add_conformance
from lossfns.server.command import add_serve
from lossfns.testing.command import add_check
from lossfns.testing.vectors.command import add_vectors
from lossfns.train.command import add_train
from lossfns.train.compare_command import add_compare
from lossfns.train.data_command import add_data
from lossfns.train.export_command import add_export
from lossfns.train.plot_command import add_plot
from lossfns.train.sample_command import add_sample
from lossfns.version import __version__


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. Each command is defined beside its code."""
    p = argparse.ArgumentParser(prog="lossfns", description="LLM post-training losses: train with them, test your own.")
    p.add_argument("--version", action="version", version=f"lossfns {__version__}")
    commands = p.add_subparsers(dest="command", required=True)
    add_list(commands)
    add_describe(commands)
    add_check(commands)
    add_vectors(commands)
    add_conformance(commands)
    add_data(commands)
    add_train(commands)
    add_plot(commands)
    add_compare(commands)
    add_sample(commands)
    add_export(commands)
    add_serve(commands)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 if the command succeeded, 1 if a check failed, 2 if the input was refused.
    """
    args = parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    return run(args)
