"""Rewards: a number for each sample of a problem. They judge text, so they hold for every tokenizer."""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import partial
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossfns.errors import LossInputError, show
from lossfns.loading import described, load, place_of

if TYPE_CHECKING:
    from lossfns.train.examples import Problem

Reward = Callable[["Problem", str], float]
"""``reward(problem, text)``: a finite number for the text of a sample, without the tokens that end it."""

SPECS = "exact, number, regex:PATTERN, json-schema:FILE, module:function or file.py:function"

WITHOUT_ANSWERS = (
    "Pass a --reward that needs none: regex:PATTERN, json-schema:FILE, or your own file.py:function or module:function."
)
"""The fix for rows without answers."""


def reward_of(spec: str) -> Reward:
    """Return the reward that ``--reward SPEC`` names. It raises for a sample to which it gives no finite number.

    Args:
        spec: ``exact``, ``number``, ``regex:PATTERN``, ``json-schema:FILE``; or ``module:function`` or
            ``file.py:function`` for a function ``(problem, text) -> number``.

    Raises:
        LossInputError: if there is no such reward, or the pattern, schema or function cannot be used.

    >>> from lossfns.train.examples import Problem
    >>> reward_of("number")(Problem([], "1,200"), "That makes 3 * 400 = $1200.00.")
    1.0
    """
    kind, _, rest = spec.partition(":")
    reward: Any
    if spec in BY_ANSWER:
        reward = BY_ANSWER[spec]
    elif kind in ("regex", "json-schema") and rest:
        reward = pattern_reward(rest) if kind == "regex" else schema_reward(rest)
    elif rest:
        reward = load(spec, "--reward")
        if not callable(reward):
            raise LossInputError("--reward", "a function (problem, text)", f"{spec}, {show(reward)}", "Name another.")
        check_arguments(spec, reward)
        reward = partial(reward_of_copy, reward)
    else:
        raise LossInputError("--reward", SPECS, repr(spec), "See docs/train.md.")
    return partial(finite_reward, spec, reward)


def check_arguments(spec: str, reward: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called with a problem and a text, or that has to be awaited.

    Not every callable has a known signature.
    """
    if any(map(inspect.iscoroutinefunction, (reward, type(reward).__call__))):
        fix = "It is not awaited: use def, and asyncio.run(...) in it."
        raise LossInputError("--reward", "a function (problem, text)", f"{spec}, an async function", fix)
    try:
        signature = inspect.signature(reward)
    except ValueError:
        return
    try:
        signature.bind(None, "")
    except TypeError:
        fix = "It must take (problem, text) and return a number."
        raise LossInputError("--reward", "a function (problem, text)", f"{spec}{signature}", fix) from None


def reward_of_copy(reward: Callable[[Problem, str], Any], problem: Problem, text: str) -> Any:
    """Call a function of the user with a copy of the problem: what it changes there cannot reach the training."""
    return reward(problem._replace(prompt=[*problem.prompt], fields=copy.deepcopy(problem.fields)), text)


def default_reward(problems: Iterable[Problem]) -> str:
    """Return the reward for these problems: ``number`` for GSM8K, whose answers end in ``#### 72``; else ``exact``."""
    return "number" if any("####" in str(each.fields.get("answer", "")) for each in problems) else "exact"


def check_reward(spec: str, problems: Sequence[Problem]) -> Reward:
    """Return the reward after a trial with the problems' own answers, before anything is trained.

    A function of the user may be slow: it is tried with one problem.

    Raises:
        LossInputError: if the rows have no answers, or naming the answer for which the reward has no number.
    """
    reward = reward_of(spec)
    if spec in BY_ANSWER and any(problem.answer is None for problem in problems):
        raise LossInputError(f"--reward {spec}", "an answer in each row", "rows that have no answer", WITHOUT_ANSWERS)
    for problem in problems if spec == "number" else ():
        if last_number(problem.answer or "") is None:
            fix = "Mend the row, or pass another --reward."
            raise LossInputError("--reward number", "a number in each answer", show(problem.answer), fix)
    for problem in problems if spec in BY_ANSWER else problems[:1]:
        reward(problem, problem.answer or "")
    return reward


def finite_reward(spec: str, reward: Callable[[Problem, str], Any], problem: Problem, text: str) -> float:
    """Return the reward of a sample.

    Raises:
        LossInputError: if the reward raises, or returns no finite number. The error names the reward and the sample.
    """
    sample = f" for the sample {show(text)} to a problem with the answer {show(problem.answer)}"
    try:
        value = reward(problem, text)
    except OutOfTime:
        got = f"more for a text of {len(text)} characters, {show(text)}"
        fix = "A repetition within a repetition, such as (a+)+, takes exponential time: write it without one."
        raise LossInputError(f"--reward {spec}", f"at most {TIME_LIMIT} s for each sample", got, fix) from None
    except (Exception, SystemExit) as error:
        fix = "Correct it there." if place_of(error) else "Give each row such an answer, or name another reward."
        got = f"{described(error)}{sample}"
        raise LossInputError(f"--reward {spec}", "a finite number for each sample", got, fix) from error
    with suppress(TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        if not isinstance(value, (str, bytes)) and math.isfinite(number := float(value)):
            return number
    if inspect.iscoroutine(value):
        value.close()  # or Python warns that nobody awaited it
    got = f"{show(value)}{sample}"
    raise LossInputError(f"--reward {spec}", "a finite number for each sample", got, "Return 0.0 for a bad sample.")


# Rewards by the answer


def exact(problem: Problem, text: str) -> float:
    """Return 1 if the sample is the answer, up to space at its ends, else 0."""
    if problem.answer is None:
        raise ValueError("the row has no answer")
    return float(text.strip() == problem.answer.strip())


def number(problem: Problem, text: str) -> float:
    """Return 1 if the last number of the sample equals that of the answer, else 0. See ``last_number``."""
    right = last_number(problem.answer or "")
    if right is None:
        raise ValueError("the answer has no number")
    return float(last_number(text) == right)


BY_ANSWER: dict[str, Reward] = {"exact": exact, "number": number}
"""The rewards that need an answer in each row."""

NUMBER = re.compile(
    r"(?:(?<![\w.^)\]])([-−]))?[$€£¥]?"  # a minus follows no operand, as it does in 5-3
    r"(?<![\w.^])((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"  # no part of a word (x2) or an exponent (m^2)
    r"(?:[eE]([-+]?\d+))?(?:/(\d+))?"
)
MAX_DIGITS, MAX_EXPONENT = 400, 4
"""The most characters of a number and of its exponent. A longer one counts as no number."""


def last_number(text: str) -> Fraction | None:
    """Return the last number of a text, exactly; None if there is none.

    It may have a sign, a currency, commas between thousands, decimals, an exponent, a denominator, and a unit after it.
    Digits in a word (``x2``) and after ``^`` do not count. If the text has ``####`` (GSM8K), it is read from there on.

    >>> last_number("12 apples at $0.50 are -$6.00 (or 6 m^2)."), last_number("3/4"), last_number("#### 1,024 km")
    (Fraction(6, 1), Fraction(3, 4), Fraction(1024, 1))
    """
    found = list(NUMBER.finditer(text.rpartition("####")[2]))
    if not found or len(found[-1][0]) > MAX_DIGITS:
        return None
    minus, digits, exponent, divisor = found[-1].groups(default="")
    if len(exponent) > MAX_EXPONENT:
        return None
    value = Fraction(f"{minus and '-'}{digits.replace(',', '')}e{exponent or 0}")
    return None if int(divisor or 1) == 0 else value / int(divisor or 1)


# Rewards by the form

TIME_LIMIT = 5
"""The seconds of CPU time that a regular expression or a schema may take for a sample."""


class OutOfTime(Exception):
    """Raised when a sample takes longer than ``TIME_LIMIT``."""


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise ``OutOfTime`` if the block takes more CPU time than ``TIME_LIMIT``; the matching of ``re`` is interrupted.

    A signal can do this in the main thread alone, where ``lossfns train`` runs, and not on Windows: elsewhere there is
    no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, TIME_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def pattern_reward(pattern: str) -> Reward:
    """Return a reward that is 1 if the regular expression is found in the sample, else 0."""
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise LossInputError("--reward", "a regular expression", f"{pattern!r} ({error})", "Correct it.") from None

    def reward(problem: Problem, text: str) -> float:
        with time_limit():
            return float(compiled.search(text) is not None)

    return reward


def schema_reward(file: str) -> Reward:
    """Return a reward that is 1 if the whole sample is JSON that fits the schema in a file, else 0.

    Nothing is loaded from elsewhere: ``check_references`` refuses such a schema. Extra ``rewards``.
    """
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError:
        fix = "pip install 'lossfns[rewards]'"
        raise LossInputError("--reward", "the package jsonschema", "none", fix) from None
    try:
        schema = json.loads(Path(file).read_text(encoding="utf-8"))
        form = validator_for(schema)
        form.check_schema(schema)
        check_references(file, schema, form.ID_OF(form.META_SCHEMA))
    except LossInputError:
        raise
    except Unresolvable as error:
        got, fix = f"{file} with a reference to {show(error.ref)}", "Nothing else is loaded: write it under '$defs'."
        raise LossInputError("--reward", "a schema with references within itself", got, fix) from None
    except (AttributeError, OSError, TypeError, ValueError, RecursionError, SchemaError) as error:
        got = f"{file} ({str(error).splitlines()[0]})"
        raise LossInputError("--reward", "a file with a JSON schema", got, "Correct it, or name another.") from None
    validator = form(schema, registry=Registry())

    def reward(problem: Problem, text: str) -> float:
        try:
            with time_limit():
                return float(validator.is_valid(json.loads(text, parse_constant=refuse_constant)))
        except (ValueError, OverflowError, RecursionError):  # no JSON, a number like 1e400, or nested too deeply
            return 0.0

    return reward


REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
"""The keywords of references in a schema."""


def check_references(file: str, schema: Any, dialect: str) -> None:
    """Refuse references that lead in a circle without a step into the value: the check of a value would not end.

    Raises:
        Unresolvable: for a reference that leads out of the schema, or to nothing.
    """
    from jsonschema_specifications import REGISTRY  # the published drafts, in the package
    from referencing.jsonschema import specification_with

    specification = specification_with(dialect)
    root = specification.create_resource(schema)
    pending = [(root.contents, REGISTRY.resolver_with_root(root))]
    known: dict[int, Any] = {}
    after: dict[int, list[int]] = {}  # the schemas that judge the same value, by the identity of each schema
    while pending:
        each, resolver = pending.pop()
        if not isinstance(each, dict) or id(each) in known:
            continue
        known[id(each)] = each
        targets = [resolver.lookup(each[name]) for name in REFERENCES if name in each]
        same_value = [target.contents for target in targets]
        same_value += [part for name in ("allOf", "anyOf", "oneOf") for part in each.get(name, ())]
        same_value += [each[name] for name in ("not", "if", "then", "else") if name in each]
        same_value += [part for name in ("dependentSchemas", "dependencies") for part in each.get(name, {}).values()]
        after[id(each)] = [id(part) for part in same_value if isinstance(part, dict)]
        pending += [(target.contents, target.resolver) for target in targets]
        parts = specification.create_resource(each).subresources()  # with the lists of names in ``dependencies``
        pending += [(part.contents, resolver.in_subresource(part)) for part in parts if isinstance(part.contents, dict)]
    try:
        TopologicalSorter(after).prepare()
    except CycleError as error:
        circle = [known[i] for i in error.args[1]]
        references = dict.fromkeys(show(each[name]) for each in circle for name in REFERENCES if name in each)
        got, fix = f"{file} with a circle of references to {', '.join(references)}", "Mend the schema."
        raise LossInputError("--reward", "a schema whose check of a value ends", got, fix) from None


def refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which Python reads, but which are not JSON."""
    raise ValueError(name)
