"""Adapters that turn the loss under test into a contract function: from a factory or a function of padded tensors."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lossfns.errors import LossInputError, did_you_mean
from lossfns.loss import BoundLoss, Loss
from lossfns.testing.laws.base import LossFn, NotApplicable
from lossfns.testing.public import LIBRARY, public
from lossfns.weigh import fixed_length

PARAMETER_NAMES = {
    "logprobs": "logprobs logps log_prob log_probs new_logprobs per_token_logps target_logprobs policy_logprobs "
    "pi_logprobs",
    "weights": "weights mask loss_mask response_mask completion_mask action_mask masks token_mask",
    "advantages": "advantages advantage adv",
    "old_logprobs": "old_logprobs old_logprobs_list old_log_prob old_log_probs old_per_token_logps old_logps "
    "inf_logprobs sampling_logprobs",
    "ref_logprobs": "ref_logprobs ref_logprobs_list ref_log_prob ref_log_probs ref_per_token_logps "
    "reference_logprobs ref_logps",
    "sampler_logprobs": "sampler_logprobs rollout_log_probs behavior_logprobs inference_logprobs vllm_logprobs",
    "chosen ref_logprobs": "ref_chosen chosen_ref_logprobs ref_chosen_logprobs reference_chosen_logprobs "
    "reference_chosen_logps",
    "rejected ref_logprobs": "ref_rejected rejected_ref_logprobs ref_rejected_logprobs reference_rejected_logprobs "
    "reference_rejected_logps",
}
"""Column → the parameter names that other frameworks use for it. Such parameters are filled from the datums."""

COLUMN_BY_PARAMETER = {
    parameter: name for name, parameters in PARAMETER_NAMES.items() for parameter in parameters.split()
}


def column_of(parameter: str) -> str | None:
    """Return the column that fills a parameter of this name, or None."""
    return COLUMN_BY_PARAMETER.get(parameter)


def load(path: str) -> Any:
    """Import the object that ``package.module:name`` or ``file.py:name`` names. The name may be dotted."""
    module_name, _, attribute = path.partition(":")
    if not attribute:
        raise LossInputError("subject", "module:loss_fn", repr(path), "Name the function after a colon.")
    try:
        module = from_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise LossInputError("subject", f"that {module_name} can be imported", got, "Check the name.") from error
    result: Any = module
    for name in attribute.split("."):
        if not hasattr(result, name):
            hint = did_you_mean(name, [n for n in dir(result) if not n.startswith("_")])
            raise LossInputError("subject", f"a name in {module_name}", repr(name), hint)
        result = getattr(result, name)
    return result


def parse_method(text: str) -> Loss:
    """Build the loss that a text such as ``grpo(kl_beta=0.04, weigh=sequence_mean)`` describes."""
    try:
        tree = ast.parse(text, mode="eval").body
        named = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        preset = public(ast.unparse(named.func))
        built = preset(*map(parse_value, named.args), **{k.arg or "": parse_value(k.value) for k in named.keywords})
    except (SyntaxError, AttributeError, TypeError, ValueError) as error:
        fix = "Write a preset, such as ppo or grpo(kl_beta=0.04, weigh=sequence_mean)."
        raise LossInputError("like", "a loss of ours", repr(text), f"{fix} ({error})") from error
    if not isinstance(built, Loss):
        raise LossInputError("like", "a loss of ours", repr(text), "Name a preset, such as ppo.")
    return built


def parse_value(node: ast.expr) -> Any:
    """Return the value of a literal, of a public name, or of a call of one. Nothing else is evaluated."""
    if isinstance(node, ast.Name):
        return public(node.id)
    if isinstance(node, ast.Call):
        return public(ast.unparse(node.func))(*map(parse_value, node.args))
    return ast.literal_eval(node)


def from_file(path: str) -> Any:
    """Import a Python file as a module."""
    spec = importlib.util.spec_from_file_location("subject_under_test", path)
    if spec is None or spec.loader is None:
        raise LossInputError("subject", "a Python file", repr(path), "Check the path.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def adapt(subject: Any, *, factory: bool | None = None) -> LossFn:
    """Turn a subject of any form into a contract function that reads every column from the datums."""
    if isinstance(subject, (Loss, BoundLoss)):
        return subject
    if not callable(subject):
        raise LossInputError("subject", "a loss function or a factory of one", repr(subject), "Name a callable.")
    required = [p.name for p in parameters(subject) if p.default is p.empty]
    unknown = [name for name in required if column_of(name) is None]
    if factory is False or (factory is None and follows_contract(subject, required)):
        return subject  # type: ignore[no-any-return]
    if unknown:
        hint = did_you_mean(unknown[0], COLUMN_BY_PARAMETER)
        fix = f"{hint} Or give it a default, or wrap it: a function (data, logprobs_list) that reads the datums."
        raise LossInputError("subject", "parameters that name columns", repr(unknown[0]), fix)
    if factory is None and "logprobs" in map(column_of, required):
        return PaddedLoss(subject)
    if required:
        return FactoryLoss(subject, required)
    try:
        built = subject()
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise LossInputError("subject", "a factory that needs no arguments", got, "Give it required ones.") from error
    return built if isinstance(built, (Loss, BoundLoss)) else FactoryLoss(subject, ())


def follows_contract(fn: Callable[..., Any], required: Sequence[str]) -> bool:
    """Return whether a function looks like a contract function ``(data, logprobs_list)``.

    It has two required parameters, of which the first does not name a column. Or it has ``*args`` and no required
    parameter.
    """
    has_var_args = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(fn).parameters.values())
    return column_of(required[0]) is None if len(required) == 2 else has_var_args and not required


def parameters(fn: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the named parameters of a function."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in inspect.signature(fn).parameters.values() if p.kind not in kinds]


def parameter_rows(data: Sequence[Any], parameter: str) -> list[Tensor]:
    """Return the values of a parameter: float32 rows of all datums, or of one side of each pair.

    A parameter for the weights whose name contains "mask" reads the field ``mask`` instead of ``weights``.
    """
    side, _, column = (column_of(parameter) or "").rpartition(" ")
    selected = {"": data, "chosen": data[0::2], "rejected": data[1::2]}[side]
    field = "mask" if column == "weights" and "mask" in parameter else column
    return [torch.from_numpy(datum.loss_fn_inputs[field].to_numpy().copy()) for datum in selected]


class FactoryLoss:
    """A contract function that passes the batch's columns to a factory, and calls the loss that the factory returns.

    A factory may take a column as a list of tensors, as a list of lists, as one number for each datum (advantages), or
    as the list of the only pair. The first call tries these forms in this order, and keeps the first that gives a loss.
    """

    FORMS: Mapping[str, Callable[[list[Tensor], list[Tensor]], Any]] = {
        "rows": lambda rows, weights: rows,
        "lists": lambda rows, weights: [row.tolist() for row in rows],
        "numbers": lambda rows, weights: list(map(datum_advantage, rows, weights)),
        "row": lambda rows, weights: rows[0].tolist(),
    }

    def __init__(
        self, factory: Callable[..., Any], required: Sequence[str], knobs: Mapping[str, Any] | None = None
    ) -> None:
        self.factory, self.required, self.settings = factory, tuple(required), dict(knobs or {})
        self.forms: tuple[str, ...] | None = None
        self.__name__ = getattr(factory, "__name__", repr(factory))

    def __call__(self, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Any:
        if self.forms is None:
            self.forms = self.find_forms(data, logprobs_list)
        return self.build(data, self.forms)(data, logprobs_list)

    def build(self, data: Sequence[Any], forms: Sequence[str]) -> Any:
        """Call the factory with the columns in these forms."""
        columns = {name: parameter_rows(data, name) for name in self.required}
        weights = parameter_rows(data, "weights")
        arguments = {name: self.FORMS[form](columns[name], weights) for name, form in zip(self.required, forms)}
        return self.factory(**arguments, **self.settings)

    def find_forms(self, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[str, ...]:
        """Return the first candidate forms with which a call returns a 0-d loss."""
        errors = []
        for forms in self.candidate_forms():
            try:
                loss, _ = self.build(data, forms)(data, [lp.detach().clone().requires_grad_() for lp in logprobs_list])
            except NotApplicable:
                raise
            except Exception as error:
                errors.append(f"{', '.join(forms)}: {type(error).__name__}: {error}")
                continue
            if isinstance(loss, Tensor) and loss.ndim == 0:
                return forms
        raise TypeError("no form of the columns gives a 0-d loss: " + "; ".join(errors))

    def candidate_forms(self) -> Iterator[tuple[str, ...]]:
        """Yield the combinations of forms to try, one form for each required parameter."""
        for form in ("rows", "lists"):
            yield (form,) * len(self.required)
        for form in ("rows", "lists"):
            yield tuple("numbers" if column_of(name) == "advantages" else form for name in self.required)
        yield tuple("row" if " " in (column_of(name) or "") else "rows" for name in self.required)


def datum_advantage(row: Tensor, weights: Tensor) -> float:
    """Return the advantage of a datum. Raise NotApplicable if its active tokens have different advantages."""
    active = {x for x, w in zip(row.tolist(), weights.tolist()) if w}
    if len(active) > 1:
        raise NotApplicable("it takes one advantage for each datum")
    return active.pop() if active else 0.0


class PaddedLoss:
    """A contract function that calls a function of padded ``[B, T]`` tensors.

    Parameters are filled by their names (``PARAMETER_NAMES``). The function may return the loss, ``(loss, metrics)``,
    or a tuple that starts with the loss.
    """

    def __init__(self, fn: Callable[..., Any], settings: Mapping[str, Any] | None = None) -> None:
        self.fn, self.settings, self.__name__ = fn, dict(settings or {}), getattr(fn, "__name__", repr(fn))
        self.required = tuple(p.name for p in parameters(fn) if p.name not in self.settings and column_of(p.name))

    def __call__(self, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        rows = {
            name: list(logprobs_list) if column_of(name) == "logprobs" else parameter_rows(data, name)
            for name in self.required
        }
        dtype = logprobs_list[0].dtype
        for name, column_rows in rows.items():
            for i, (row, lp) in enumerate(zip(column_rows, logprobs_list)):
                if row.shape != lp.shape:
                    fix = "Every row has the length of target_tokens."
                    raise LossInputError(name, f"shape {tuple(lp.shape)}", str(tuple(row.shape)), fix, datum=i)
        padded = {
            name: torch.nn.utils.rnn.pad_sequence([row.to(dtype) for row in column_rows], batch_first=True)
            for name, column_rows in rows.items()
        }
        result = self.fn(**padded, **self.settings)
        if not isinstance(result, tuple):
            return result, {}
        metrics = result[1] if len(result) == 2 and isinstance(result[1], dict) else {}
        return result[0], {name: float(value) for name, value in metrics.items()}


def padded(fn: Callable[..., Any], **settings: Any) -> LossFn:
    """Turn a function of padded ``[B, T]`` tensors into a contract function; ``settings`` are passed on to it.

    >>> def pg(logprobs, advantages, mask):
    ...     return -(logprobs * advantages * mask).sum() / mask.sum()
    >>> loss_fn = padded(pg)
    """
    return PaddedLoss(fn, settings)


# Settings


def knobs(loss_fn: LossFn) -> dict[str, Any]:
    """Return name → value of the settings that ``with_settings`` can change."""
    if isinstance(loss_fn, BoundLoss):
        return knobs(loss_fn.loss)
    if isinstance(loss_fn, Loss):
        return {n: v for n, v in loss_fn.knobs.items() if loss_fn.name in vars(LIBRARY) and not isinstance(v, Loss)}
    fn = loss_fn
    if isinstance(loss_fn, (FactoryLoss, PaddedLoss)):
        fn = loss_fn.factory if isinstance(loss_fn, FactoryLoss) else loss_fn.fn
    defaults = {p.name: p.default for p in parameters(fn) if p.default is not p.empty and column_of(p.name) is None}
    return defaults | (loss_fn.settings if isinstance(loss_fn, (FactoryLoss, PaddedLoss)) else {})


def setting_elements(value: Any) -> Iterator[int | None]:
    """Yield the index of each element of a pair or list; yield None for any other value, which changes as a whole."""
    yield from range(len(value)) if isinstance(value, (tuple, list)) else (None,)


def variants(loss_fn: LossFn, name: str, element: int | None = None) -> Iterator[LossFn]:
    """Yield the loss with other values of one setting, or of one element of it. Values that it refuses are skipped."""
    current = knobs(loss_fn)[name]
    for new in other_values(current if element is None else current[element], name):
        try:
            if element is not None:
                new = type(current)([new if i == element else x for i, x in enumerate(current)])
            yield with_settings(loss_fn, **{name: new})
        except (TypeError, ValueError):
            continue


NAMED_VALUES = {
    "kl": ("k2", "k3"),
    "weigh": ("fixed_length", "pair_sum", "pair_mean", "token_sum"),
    "level": ("sequence_level", "token_level"),
}
"""Setting → the public functions that it may be set to."""


def other_values(value: Any, name: str) -> list[Any]:
    """Return other values for a setting, the most plausible first."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value * 2 + 0.125, value / 2, value + 1, 1.5, 0.97, 1.02, 0.05]
    if value is None:
        return [1.01, 0.05, 2.0, 1e-3]
    functions = [public(other) for other in NAMED_VALUES.get(name, ())]
    return [f(3) if f is fixed_length else f for f in functions if f is not value]  # fixed_length(3) is a weighing


def with_settings(loss_fn: LossFn, **settings: Any) -> LossFn:
    """Return the loss with some of its settings replaced."""
    if isinstance(loss_fn, BoundLoss):
        return BoundLoss(with_settings(loss_fn.loss, **settings), loss_fn.columns)  # type: ignore[arg-type]
    if isinstance(loss_fn, Loss):
        return public(loss_fn.name)(**{**loss_fn.knobs, **settings})  # type: ignore[no-any-return]
    if isinstance(loss_fn, FactoryLoss):
        return FactoryLoss(loss_fn.factory, loss_fn.required, {**loss_fn.settings, **settings})
    if isinstance(loss_fn, PaddedLoss):
        return PaddedLoss(loss_fn.fn, {**loss_fn.settings, **settings})
    return functools.partial(loss_fn, **settings)
