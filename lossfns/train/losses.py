"""The loss of a run: one of the family by its name, or a sum or combination of them, with its settings.

The method follows from the columns that the loss reads; see ``method_of``. A function of the user is an ``OwnLoss``;
see ``own_losses.py``.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from lossfns.datum import Datum, tensor_data
from lossfns.describe import makers, signature
from lossfns.errors import LossInputError, did_you_mean, show
from lossfns.loading import described
from lossfns.loss import Loss, LossFn
from lossfns.tokens import PAIRS, TARGETS

METHODS = ("supervised", "preference", "unpaired", "policy", "distillation")
"""The training methods: on demonstrations, on pairs, on labelled answers, on samples, and from a teacher."""

ALIASES = {"sft": "cross_entropy"}
"""Other names of losses."""

SAMPLED = frozenset({"advantages", "old_logprobs", "sampler_logprobs", "rewards"})
"""Columns that only samples of the policy have."""


@dataclass(frozen=True)
class OwnLoss:
    """A loss of the user: a contract function that reads its columns from the datums.

    Attributes:
        name: the name of the function.
        function: ``(data, logprobs_list) -> (loss, metrics)``.
        reads: the columns that it reads besides ``logprobs`` and ``weights``.
        method: the training method, which follows from the columns and from what the gradients depend on.
        settings: its settings of ``--set``, as texts by name.
        place: the file and line where it is defined; an empty text if they are not known.
    """

    name: str
    function: LossFn
    reads: tuple[str, ...]
    method: str
    settings: tuple[tuple[str, str], ...] = ()
    place: str = ""

    def bind(self, /, **columns: Any) -> LossFn:
        """Return the function for a batch with these columns: a number or a row for each datum.

        Its metrics have the loss that it returns as ``loss``. What it raises becomes an error with the place.
        """
        return functools.partial(call_with_columns, self, columns)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value}' for name, value in self.settings)})"


AnyLoss = Loss | OwnLoss


@contextmanager
def naming_own(loss: AnyLoss) -> Iterator[None]:
    """Add the name of a loss of the user, and its file and line, to a ``LossInputError`` of the block without a name.

    Such an error is about what the function returned, as a loss that is nan.
    """
    try:
        yield
    except LossInputError as error:
        if isinstance(loss, OwnLoss) and error.loss is None and not error.field.startswith("--"):
            error.loss = f"--loss {loss.name}{loss.place and f' ({loss.place})'}"
        raise


def call_with_columns(loss: OwnLoss, columns: Mapping[str, Any], data: list[Any], logprobs_list: list[Any]) -> Any:
    """Call the function of a loss with the columns, and the mask, as fields of the datums."""
    filled = []
    for i, datum in enumerate(data):
        weights = datum.loss_fn_inputs["weights"].to_numpy()
        rows: dict[str, Any] = {"mask": (weights != 0).astype("float32")}
        for name, column in columns.items():
            rows[name] = [column[i]] * len(weights) if isinstance(column[i], (int, float)) else column[i]
        fields = {name: tensor_data(name, row) for name, row in rows.items()}
        filled.append(Datum(datum.model_input, {**datum.loss_fn_inputs, **fields}))
    try:
        result = loss.function(filled, logprobs_list)
    except (LossInputError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        fix = "Correct it there."
        raise LossInputError(f"--loss {loss.name}", "a loss for each batch", described(error), fix) from error
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict):
        value, metrics = result
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
            return value, {**metrics, "loss": float(value.detach())}
    return result  # the client refuses it


def family_loss(text: str, settings: Mapping[str, Any]) -> Loss:
    """Return a loss of the family by its name, or by a call with settings and other losses."""
    try:
        node = ast.parse(canonical(text), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise no_loss(text) from None
    called = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    make = makers().get(ast.unparse(called.func))
    if make is None:
        raise no_loss(text)
    known = defaults_and_required(make)
    if called.args and not any(p.kind is p.POSITIONAL_OR_KEYWORD for p in signature(make).parameters.values()):
        example = "Such as sum_losses(rl=grpo(), ce=sft(), weights={'ce': 'weights'})."
        raise LossInputError("--loss", "a name for each part of the sum", show(text), example)
    check_settings(text, known, settings)
    try:
        arguments = [evaluated(node) for node in called.args]
        given = {k.arg or "": evaluated(k.value) for k in called.keywords}
        given |= {name: value_of(value, known.get(name)) for name, value in settings.items()}
        needed = [name for name, default in known.items() if default is inspect.Parameter.empty]
        refuse_incomplete(text, [name for name in needed[len(arguments) :] if name not in given])
        loss = make(*arguments, **given)
    except LossInputError:
        raise
    except AttributeError as error:
        expected, name = "the name of a loss, or of a value that one takes", error.name or ""
        raise LossInputError("--loss", expected, f"{name!r} in {text}", hint_of(name)) from None
    except (TypeError, ValueError) as error:
        fix = "Write a name, or a call such as with_tis(dapo(), cap=2)."
        raise LossInputError("--loss", "a loss with its settings", show(text), f"{fix} ({error})") from None
    if not isinstance(loss, Loss):
        raise LossInputError("--loss", "a loss of logprobs", text, "It is a loss of embeddings: train it in a loop.")
    return loss


def spelled(text: str) -> str:
    """Return a name with underscores in place of hyphens: ``gspo-token`` is ``gspo_token``."""
    return text.replace("-", "_") if text.replace("-", "_").isidentifier() else text


def canonical(text: str) -> str:
    """Return the function name of a loss for an alias or a name with hyphens; any other text as it is."""
    return ALIASES.get(text, spelled(text))


def no_loss(text: str) -> LossInputError:
    """Return the error for a text that names no loss."""
    return LossInputError("--loss", "the name of a loss, or module:function", show(text), hint_of(text))


def hint_of(text: str) -> str:
    """Return the loss that a text may mean, or where all of them are."""
    hint = did_you_mean(text.partition("(")[0], [*makers(), *ALIASES]) if len(text) < 40 else ""
    return hint if hint.startswith("Did you mean") else "lossfns list has them all; one's own is FILE.py:FUNCTION."


def defaults_and_required(make: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments of a function that makes a loss, with their defaults."""
    kinds = signature(make).parameters.values()
    return {p.name: p.default for p in kinds if p.kind is not p.VAR_KEYWORD}


def check_settings(text: str, known: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a setting that the loss does not have."""
    for name in settings:
        if name not in known and canonical(text) != "sum_losses":
            raise LossInputError("--set", f"a setting of {text}", show(name), did_you_mean(name, known))


def refuse_incomplete(text: str, missing: list[str]) -> None:
    """Refuse a combination without a loss to combine."""
    if missing:
        fix = f"Add {' '.join(f'--set {name}=...' for name in missing)}; a loss is named, such as dapo."
        raise LossInputError("--loss", f"{text} with {' and '.join(missing)}", f"no {missing[0]}", fix)


def evaluated(node: ast.expr) -> Any:
    """Return a literal, or what a public name, an alias of a loss, or a call of one stands for."""
    from lossfns.testing.subject import parse_argument  # which takes half a second to import

    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            each.id = ALIASES.get(each.id, each.id)
    return parse_argument(node)


def value_of(value: Any, default: Any = None) -> Any:
    """Return the value of a setting: a tuple for a list, and the public object that a text names, if there is one."""
    if isinstance(value, (list, tuple)):
        return tuple(map(value_of, value))
    if not isinstance(value, str) or isinstance(default, str):
        return value
    try:
        return evaluated(ast.parse(value, mode="eval").body)
    except (SyntaxError, AttributeError, TypeError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, LossInputError):
            raise
        return value  # the loss refuses it, or takes it as a text


def parse_setting(text: str) -> tuple[str, Any]:
    """Return name and value of a setting of the command line, as TOML could hold them.

    >>> parse_setting("clip=0.8,1.28"), parse_setting("weigh=sequence_mean"), parse_setting("dual_clip=inf")
    (('clip', [0.8, 1.28]), ('weigh', 'sequence_mean'), ('dual_clip', inf))

    Raises:
        LossInputError: if it is no ``name=value``.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name.isidentifier() or not value:
        raise LossInputError("--set", "NAME=VALUE, such as clip=0.8,1.28", show(text), "Write one for each setting.")
    if "," in value and not any(c in value for c in "([{'\""):
        return name, [parse_number(part.strip()) for part in value.split(",")]
    return name, parse_number(value)


def parse_number(text: str) -> Any:
    """Return a number or a bool for its text; any other text as it is."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    return text


def method_of(loss: AnyLoss) -> str:
    """Return the training method of a loss, one of ``METHODS``.

    Pairs are preferences, several targets of a position come from a teacher, advantages and the sampler's logprobs need
    samples, and labels without them are labels of answers in the data. Every other loss trains on demonstrations.

    Raises:
        LossInputError: for a loss of scores, which needs a value head or a reward head.
    """
    if isinstance(loss, OwnLoss):
        return loss.method
    if loss.output == "scores":
        fix = "It trains a value head or a reward head. Bind it in a loop of your own; see docs/train.md."
        raise LossInputError("--loss", "a loss of the logprobs of a language model", f"{loss.name}, of scores", fix)
    reads = set(loss.reads)
    if loss.rows == PAIRS:
        return "preference"
    if loss.rows == TARGETS or ("teacher_logprobs" in reads and not reads & SAMPLED):
        return "distillation"
    if reads & SAMPLED:
        return "policy"
    return "unpaired" if "labels" in reads else "supervised"
