"""``lossfns data FILE``: show what a file of rows is, how a model sees it, and what training would refuse."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from lossfns.errors import LossInputError
from lossfns.terminal import console_on, print_refusal, printable, say, status, while_read
from lossfns.train import files, formats
from lossfns.train.examples import Demonstration, Example, Labelled, Preference, Problem, demonstration, sequences
from lossfns.train.formats import Format
from lossfns.train.models import renderer_of
from lossfns.train.options import check_option, naming
from lossfns.train.render import DATED, Renderer
from lossfns.train.rewards import WITHOUT_ANSWERS, default_reward, last_number
from lossfns.train.tasks import MAX_LENGTH, length, longest_of
from lossfns.train.values import Row, counted, shown

if TYPE_CHECKING:
    from rich.text import Text

KINDS: dict[str, type[Example]] = {
    "preference": Preference,
    "labelled": Labelled,
    "demonstration": Demonstration,
    "problem": Problem,
}
"""The kinds of examples by name. A file that has several is shown as the first of them."""

TITLES = {
    "preference": "preferences",
    "labelled": "completions with labels",
    "demonstration": "demonstrations",
    "problem": "problems",
}

TRAIN = {"preference": "dpo", "labelled": "kto", "demonstration": "sft", "problem": "grpo"}
"""A method that reads each kind."""

SHOWN, LINES, WIDTH, MESSAGES = 3, 16, 76, 8
END_TOKENS = 4 * WIDTH * (LINES // 2)
"""The tokens at each end of a very long sequence that are decoded: a character has at most four."""
"""The rows that are shown, the most lines of each, their width, and the refusals that are listed."""

Usable = tuple[Row, Sequence[Example], int]
"""A usable row, its examples, and the length of the longest of them in tokens."""


class Findings(NamedTuple):
    """A file as one kind of example.

    Attributes:
        name: the kind.
        format: the format of the rows.
        rows: the usable rows.
        unread: the names of the fields that are not read.
        errors: the errors of the other rows, in the order of the file.
        others: the names of other kinds of examples that the rows give, too.
    """

    name: str
    format: Format
    rows: list[Usable]
    unread: list[str]
    errors: list[LossInputError]
    others: list[str]


def add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``data`` command to a command line."""
    p = commands.add_parser(
        "data",
        help="show what a file of rows is, and what training would refuse",
        description="Show the format of the rows, three of them as the model sees them with the trained tokens marked, "
        "the lengths, and the rows that lossfns train would refuse. Exit status 1 if there are any.",
    )
    add = p.add_argument
    add("source", metavar="FILE", help="JSONL, a JSON array, CSV, Parquet or Arrow; a folder saved by datasets, or the "
        "name of a data set: OWNER/NAME, OWNER/NAME:CONFIG:SPLIT (extra data)")  # fmt: skip
    add("--kind", choices=KINDS, help="the kind of examples to read (default: by the fields)")
    add("--model", metavar="MODEL", help="take the tokenizer and the chat template of this model")
    add("--max-length", type=int, default=MAX_LENGTH, metavar="N", help=f"longest row (default: {MAX_LENGTH} tokens)")
    add("--drop-longer", action="store_true", help="count longer rows as left out, not as refused")
    p.set_defaults(run=data_command, parser=p)


def data_command(args: argparse.Namespace) -> int:
    """Run ``lossfns data``.

    Returns:
        0, 1 if ``lossfns train`` would refuse the file, or 2 if nothing of it can be shown.
    """
    try:
        check_option("FILE", args.source)
        check_option("max_length", args.max_length)
        with naming({"source": "--model", "--data": "FILE"}), status() as tell:
            renderer = renderer_of(args.model)
            tell(f"reading {args.source}")
            findings = examine(args.source, renderer, args.kind)
    except (LossInputError, OSError, ImportError) as error:
        return print_refusal(error)
    except KeyboardInterrupt:
        os._exit(130)
    limit = longest_of(renderer, args.max_length)
    longer = [(row, n) for row, _, n in findings.rows if n > limit]
    different = len({repr(examples) for _, examples, n in findings.rows if n <= limit})
    usable = not findings.errors and (not longer or args.drop_longer) and different >= 2
    with while_read(sys.stdout):
        print_format(args.source, findings, args.model, renderer)
        for row, examples, _ in findings.rows[:SHOWN]:
            print_row(row, examples, renderer)
        print_lengths(findings)
        print_refused(findings, longer, limit, args)
        say(f"lossfns train {'takes' if usable else 'refuses'} it{reason_of(findings, len(longer), different)}")
    return 0 if usable else 1


def reason_of(findings: Findings, longer: int, different: int) -> str:
    """Return why there are too few rows; "" if there are enough."""
    used = len(findings.rows) - longer
    if used < 2:
        rows = counted(len(findings.rows) + len(findings.errors), "row")
        return f": it needs 2 usable rows, and {used} of {rows} {'is' if used == 1 else 'are'}"
    return "" if different >= 2 else f": it needs 2 different rows, and all {used} are equal"


def examine(source: str, renderer: Renderer, name: str | None) -> Findings:
    """Make the examples of all rows, and collect the errors of those that cannot be used.

    Raises:
        LossInputError: if no row can be read, or their format is not known.
    """
    errors: list[LossInputError] = []
    rows = files.read_rows(source, errors.append)
    if not rows:
        raise errors[0] if errors else LossInputError("FILE", "at least 2 rows", f"0 in {source}", "It is empty.")
    names = [each for each in KINDS if is_of(each, rows[0], renderer)]
    by_fields = (each for each in KINDS if formats.matching(rows[0], formats.FORMATS[KINDS[each]]))
    kind = name or (names[0] if names else next(by_fields, "demonstration"))  # without examples, by the fields alone
    row_format = formats.recognise(rows[0], KINDS[kind])
    used: list[Usable] = []
    for row in rows:
        try:
            examples = formats.examples_of(row, row_format, renderer)
        except LossInputError as error:
            errors.append(error)
        else:
            used.append((row, examples, max(length(each, renderer) for each in examples)))
    if kind == "problem":
        problems = [example for _, examples, _ in used for example in examples if isinstance(example, Problem)]
        if default_reward(problems) == "number":
            used, without = with_numbers(used)
            errors += without
    errors.sort(key=line_of)
    unread = formats.unread(rows, row_format)
    return Findings(kind, row_format, used, unread, errors, [each for each in names if each != kind])


def with_numbers(used: list[Usable]) -> tuple[list[Usable], list[LossInputError]]:
    """Return the rows whose answers have a number, which the reward ``number`` needs, and the errors of the others."""
    kept: list[Usable] = []
    errors: list[LossInputError] = []
    for row, examples, n in used:
        answers = [example.answer or "" for example in examples if isinstance(example, Problem)]
        wrong = [answer for answer in answers if last_number(answer) is None]
        if wrong:
            expected, fix = "a number in the answer (--reward number)", "Mend the row, or train with another --reward."
            errors.append(LossInputError(row.place, expected, shown(wrong[0]), fix))
        else:
            kept.append((row, examples, n))
    return kept, errors


def is_of(name: str, row: Row, renderer: Renderer) -> bool:
    """Whether a row has examples of a kind. A prompt alone counts only if the row has nothing else."""
    row_format = formats.matching(row, formats.FORMATS[KINDS[name]])
    if row_format is None or (row_format.keys == ("prompt",) and len(row.fields) > 1):
        return False
    try:
        return bool(formats.examples_of(row, row_format, renderer))
    except LossInputError:
        return False


def line_of(error: LossInputError) -> int:
    """Return the line that an error names; 0 if it names none."""
    line = error.field.rpartition(":")[2]
    return int(line) if line.isdecimal() else 0


# What was recognised


def print_format(source: str, findings: Findings, model: str | None, renderer: Renderer) -> None:
    """Print the format, the methods that read it, what makes the tokens, and the fields that are not read."""
    place = findings.rows[0][0].place.rpartition(":")[0] if findings.rows else source
    say(printable(f"{place}: {counted(len(findings.rows) + len(findings.errors), 'row')} of {findings.format.name}"))
    say(f"  read as {TITLES[findings.name]}, for {formats.KINDS[KINDS[findings.name]]}")
    for name in findings.others:
        say(f"  also {TITLES[name]}, for {formats.KINDS[KINDS[name]]}:")
        how = f"`lossfns data FILE --kind {name}` shows them; `train {TRAIN[name]}` reads them so"
        print_indented(how, "    ", "")
    if findings.format.keys == ("prompt",):
        print_indented(f"The rows have no answer. {WITHOUT_ANSWERS}", "  ")
    written = "as plain lines" if renderer.template is None else "by its chat template"
    print_indented(f"tokens of {model or 'the embedded model'}; messages are written {written}", "  ")
    if renderer.dated:
        print_indented(DATED, "  ")
    if findings.unread:
        print_indented(f"not read: {', '.join(map(shown, findings.unread))}", "  ")


def print_indented(text: str, indent: str, deeper: str = "  ") -> None:
    """Print text in lines of 80 columns."""
    say(
        textwrap.fill(
            printable(text), 80, initial_indent=indent, subsequent_indent=indent + deeper, break_on_hyphens=False
        )
    )


# Rows as the model sees them


def print_row(row: Row, examples: Sequence[Example], renderer: Renderer) -> None:
    """Print each sequence of a row: trained tokens in colour on a terminal, and in [[ ]] elsewhere."""
    say("")
    for example in examples:
        for title, sequence in titled(example, renderer):
            trained = "" if isinstance(example, Problem) else f", {trained_tokens(sequence)} trained"
            say(printable(f"{row.place}{title}: {counted(len(sequence.tokens), 'token')}{trained}"))
            print_sequence(sequence, renderer)


def titled(example: Example, renderer: Renderer) -> Iterator[tuple[str, Demonstration]]:
    """Yield the sequences of an example with their titles. That of a problem is its prompt."""
    if isinstance(example, Problem):
        answer = "no answer" if example.answer is None else f"the answer {shown(example.answer)}"
        yield f", prompt with {answer}", demonstration(example.prompt, [])
    elif isinstance(example, Labelled):
        yield f", {'desirable' if example.desirable else 'undesirable'}", example.example
    else:
        titles = (", chosen", ", rejected") if isinstance(example, Preference) else ("",)
        yield from zip(titles, sequences(example))


def print_sequence(sequence: Demonstration, renderer: Renderer) -> None:
    """Print a sequence in lines, the middle of a long one left out. Of a very long one only the ends are decoded."""
    console, half, n = console_on(sys.stdout), LINES // 2, len(sequence.tokens)
    if n > 2 * END_TOKENS:
        ends = (slice(END_TOKENS), slice(-END_TOKENS, None))
        parts = [Demonstration(sequence.tokens[end], sequence.weights[end]) for end in ends]
        first, last = (lines_of(part, renderer, console) for part in parts)
        left_out = f"the middle of {n} tokens"
    else:
        lines = lines_of(sequence, renderer, console)
        first, last = lines[:half], lines[half:]
        left_out = f"{len(lines) - LINES} lines" if len(lines) > LINES else ""
    for line in first[:half]:
        print_line(console, line)
    if left_out:
        say(f"    ... {left_out} ...")
    for line in last[-half:]:
        print_line(console, line)


def lines_of(sequence: Demonstration, renderer: Renderer, console: Any) -> list[Any]:
    """Return the lines of a sequence, its trained tokens marked or coloured."""
    runs = groupby(zip(sequence.tokens, sequence.weights), key=lambda pair: pair[1])
    parts = [(printable(renderer.shown(token for token, _ in run), sys.maxsize), weight) for weight, run in runs]
    if console is not None:
        return list(coloured(parts).wrap(console, WIDTH))
    marked = "".join(mark(text, weight) for text, weight in parts)
    return [line for text in marked.split("\n") for line in wrap(text)]


def print_line(console: Any, line: Any) -> None:
    """Print one line of a sequence behind a margin."""
    if console is None:
        say(f"    {line}")
    else:
        line.pad_left(4)
        console.print(line)


def mark(text: str, weight: float) -> str:
    """Return text with marks around it if it is trained; a weight that is not 1 stands in them."""
    return text if not weight else f"[[{text}]]" if weight == 1 else f"[[{weight:g}: {text}]]"


def wrap(text: str) -> list[str]:
    """Split a line of text into lines that fit."""
    return textwrap.wrap(text, WIDTH, replace_whitespace=False, drop_whitespace=False) or [""]


def coloured(parts: Sequence[tuple[str, float]]) -> Text:
    """Return text coloured by weight: what is read is dim, what is trained green, a weight in between yellow."""
    from rich.text import Text

    styles = {0.0: "dim", 1.0: "bold green"}
    return Text.assemble(*((text, styles.get(weight, "bold yellow")) for text, weight in parts), no_wrap=False)


# Lengths, and what is left out


def print_lengths(findings: Findings) -> None:
    """Print the shortest, median and longest row, and how many rows have which length."""
    if not findings.rows:
        return
    lengths = sorted(n for *_, n in findings.rows)
    examples = [example for _, group, _ in findings.rows for example in group]
    all_tokens = [each for example in examples for each in sequences(example)]
    say(f"\ntokens of a row: {lengths[0]} at least, {median(lengths):g} median, {lengths[-1]} at most")
    if all_tokens:
        total, trained = (sum(map(count, all_tokens)) for count in (lambda e: len(e.tokens), trained_tokens))
        say(f"in all: {counted(total, 'token')} in {counted(len(all_tokens), 'sequence')}, {trained} of them trained")
    bins = [(low, low * 2 - 1, sum(low <= n < low * 2 for n in lengths)) for low in powers(lengths[0], lengths[-1])]
    most = max(count for *_, count in bins)
    for low, high, count in filter(itemgetter(2), bins):
        bar = "#" * round(40 * count / most) or "."
        say(f"  {low:>7} to {high:<7} {count:>7}  {bar}".rstrip())


def trained_tokens(example: Demonstration) -> int:
    """Return how many tokens of a sequence are trained."""
    return sum(weight > 0 for weight in example.weights[1:])


def powers(low: int, high: int) -> list[int]:
    """Return the powers of two from the one at or below ``low`` to the one at or below ``high``.

    >>> powers(5, 16)
    [4, 8, 16]
    """
    return [2**i for i in range(low.bit_length() - 1, high.bit_length())]


def print_refused(findings: Findings, longer: Sequence[tuple[Row, int]], limit: int, args: argparse.Namespace) -> None:
    """Print which rows are refused or left out, and why. A limit below ``--max-length`` is the context of the model."""
    equal = len(findings.rows) - len({repr(examples) for _, examples, _ in findings.rows})
    say("")
    if equal:
        say(f"equal to other rows, and counted once: {equal}")
    if longer:
        by_model = limit < args.max_length
        other = "take a model with a longer context" if by_model else f"--max-length {max(n for _, n in longer)}"
        fix = "left out" if args.drop_longer else f"refused: pass --drop-longer, or {other}"
        are, why = "is" if len(longer) == 1 else "are", ", the context of the model," if by_model else ""
        what = f"{are} longer than {counted(limit, 'token')}{why} and {are} {fix}"
        print_indented(f"{counted(len(longer), 'row')} {what}", "")
        for row, n in longer[:SHOWN]:
            say(printable(f"  {row.place}: {counted(n, 'token')}"))
    if findings.errors:
        say(f"{counted(len(findings.errors), 'row')} {'is' if len(findings.errors) == 1 else 'are'} refused")
        groups = equal_refusals(findings.errors)
        for group in groups[:MESSAGES]:
            print_indented(refusal(group), "  ")
        if more := sum(map(len, groups[MESSAGES:])):
            say(f"  and {more} more")


def equal_refusals(errors: Sequence[LossInputError]) -> list[list[LossInputError]]:
    """Group the errors that differ by their lines alone. A group stands where its first error does."""
    groups: dict[tuple[str, ...], list[LossInputError]] = {}
    for error in errors:
        key = (error.field.rpartition(":")[0], error.expected, error.got, error.fix)
        groups.setdefault(key, []).append(error)
    return list(groups.values())


def refusal(group: Sequence[LossInputError]) -> str:
    """Return the text of equal errors: where, and what is wrong."""
    if len(group) == 1:
        return str(group[0])
    return f"{len(group)} rows ({ranges(list(map(line_of, group)))}){str(group[0]).removeprefix(group[0].field)}"


def ranges(lines: Sequence[int]) -> str:
    """Return line numbers in few words.

    >>> ranges([1, 2, 3, 7]), ranges(range(1, 40, 3))
    ('1 to 3, 7', '1, 4, 7, 10, 13, 16, 19, 22, ...')
    """
    runs: list[list[int]] = []
    for line in lines:
        if runs and line == runs[-1][-1] + 1:
            runs[-1][1:] = [line]
        else:
            runs.append([line])
    return ", ".join([" to ".join(map(str, run)) for run in runs[:MESSAGES]] + ["..."] * (len(runs) > MESSAGES))
