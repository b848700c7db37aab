"""The command line: ``lossfns list``, ``describe``, ``check``, ``vectors``, ``data``, ``train``, ``plot``, ``sample``,
``export``, ``serve``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from typing import Any, NoReturn

from lossfns.catalogue import add_describe, add_list
from lossfns.conformance.command import add_conformance
from lossfns.errors import LossWarning
from lossfns.server.command import add_serve
from lossfns.terminal import OutputError, print_refusal, printable, say, while_read
from lossfns.testing.command import add_check
from lossfns.testing.vectors.command import add_vectors
from lossfns.train.command import add_train
from lossfns.train.compare_command import add_compare
from lossfns.train.data_command import add_data
from lossfns.train.export_command import add_export
from lossfns.train.plot_command import add_plot
from lossfns.train.sample_command import add_sample
from lossfns.version import __version__


class Parser(argparse.ArgumentParser):
    """A parser of which an error is two lines: what is wrong, and the command that shows all arguments.

    The parsers of the commands are of this class, too.
    """

    def error(self, message: str) -> NoReturn:
        """End the process with an error and exit status 2."""
        see = f"See {self.prog} --help."
        self.exit(2, f"{self.prog}: {printable(message.removesuffix(see).rstrip(), sys.maxsize)}\n{see}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse arguments that the parser does not know. The parser of a command thus refuses those after it."""
        known, others = super().parse_known_args(args, namespace)
        if others:
            hint = closest(others[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(others)}{hint}")
        return known, others

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += closest(value, action.choices or ())
            raise

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help, the version or an error; argparse would go on if the file cannot be written."""
        with while_read(file or sys.stderr):
            print(message, end="", file=file or sys.stderr)


def closest(word: str, known: Iterable[str]) -> str:
    """Return a hint with the most similar of the known words; an empty text if none is similar.

    >>> closest("trian", ["train", "list"])
    '. Did you mean train?'
    """
    similar = get_close_matches(word, list(known), n=1)
    return f". Did you mean {similar[0]}?" if similar else ""


class Overview(argparse.RawDescriptionHelpFormatter):
    """The help of the command line, with the commands in one column directly below their title."""

    def _iter_indented_subactions(self, action: argparse.Action) -> Generator[argparse.Action, None, None]:
        yield from getattr(action, "_get_subactions", list)()

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        return text.partition("\n")[2] if action.nargs == argparse.PARSER else text


FIRST = """first commands:
  lossfns train grpo      train a small model on sums, in about a minute
  lossfns describe grpo   show what that loss computes and which settings it has
  lossfns train --help    show all options of a command"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. Each command is defined beside its code."""
    p: argparse.ArgumentParser = Parser(
        prog="lossfns",
        description="LLM post-training losses: train with them, test your own.",
        epilog=FIRST,
        formatter_class=Overview,
    )
    p.add_argument("--version", action="version", version=f"lossfns {__version__}")
    commands = p.add_subparsers(dest="command", title="commands", metavar="COMMAND")
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
    """Run the command line. Without a command, print an overview.

    Returns:
        0 if the command succeeded, 1 if a check failed or the output cannot be written, 2 if the input was refused.
    """
    try:
        args = parser().parse_args(argv)
        with plain_warnings():
            status: int = show_overview() if args.command is None else args.run(args)
        with while_read(sys.stdout):
            return status  # after what a command has printed is written
    except OutputError as error:
        with suppress(OutputError):
            print_refusal(error)
        return 1


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print each different ``LossWarning`` once, as a line without the place in the code that Python adds."""
    others, shown = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, LossWarning):
            others(message, category, *place, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            with while_read(sys.stderr):
                say(f"lossfns: warning: {printable(str(message))}", sys.stderr)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = others


def show_overview() -> int:
    """Print the commands with a line for each, and return 0."""
    with while_read(sys.stdout):
        parser().print_help()
    return 0
