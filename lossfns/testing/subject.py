"""The loss under test: import it, find out its form, turn it into a contract function, and vary its settings."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch

from lossfns.errors import LossInputError
from lossfns.loss import BoundLoss, Loss
from lossfns.sums import with_shared_weights
from lossfns.testing.factories import FactoryLoss
from lossfns.testing.forms import (
    FORMS,
    PROBE,
    ContractLoss,
    PaddedLoss,
    refuse_foreign,
)
from lossfns.testing.laws.base import LossFn, NotApplicable
from lossfns.testing.names import COLUMN_BY_NAME, PARAMETER_NAMES, column_of
from lossfns.testing.public import presets, public
from lossfns.testing.settings import Target, fills, parameters, signature

__all__ = ["PARAMETER_NAMES", "FactoryLoss", "PaddedLoss", "adapt", "adapt_advantages", "padded"]


def parse_method(text: str) -> Loss:
    """Build the loss that a text such as ``grpo(kl_beta=0.04, weigh=sequence_mean)`` describes."""
    try:
        tree = ast.parse(text, mode="eval").body
        named = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        built = parse_value(named)
    except (SyntaxError, AttributeError, TypeError, ValueError) as error:
        fix = "Write a preset, such as ppo or grpo(kl_beta=0.04, weigh=sequence_mean)."
        raise LossInputError("like", "a loss of ours", repr(text), f"{fix} ({error})") from error
    if not isinstance(built, Loss):
        raise LossInputError("like", "a loss of ours", repr(text), "Name a preset, such as ppo.")
    return built


def parse_value(node: ast.expr) -> Any:
    """Return the value of a literal, of a public name, or of a call of one. Nothing else is evaluated.

    >>> parse_value(ast.parse("with_tis(dapo(clip=(0.9, 1.1)), cap=3)", mode="eval").body).knobs["cap"]
    3

    Raises:
        AttributeError: for a name that is not public.
        ValueError: for any other expression.
    """
    if isinstance(node, ast.Name):
        return public(node.id)
    if isinstance(node, ast.Call):
        settings = {k.arg or "**": parse_argument(k.value) for k in node.keywords}
        return public(ast.unparse(node.func))(*map(parse_argument, node.args), **settings)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)} is no number, text, name or call") from None


def parse_argument(node: ast.expr) -> Any:
    """Return the value of an argument. A preset without a call is a loss there, with its defaults.

    >>> parse_argument(ast.parse("with_kl(with_tis(dapo), 0.1)", mode="eval").body).name
    'with_kl'
    """
    value = parse_value(node)
    return value() if value in presets().values() else value


# The form of a subject


def adapt(subject: Any, *, factory: bool | None = None) -> LossFn:
    """Turn a subject of any form into a contract function that reads every column from the datums.

    Args:
        subject: see ``FORMS``.
        factory: whether it is a factory; found out if left out.

    Raises:
        LossInputError: if the subject has none of the forms, or does not run in its form.
    """
    if isinstance(subject, PaddedLoss):
        return with_form(subject)
    if isinstance(subject, Loss):
        return with_shared_weights(subject)  # the batches of the laws have one column of weights
    if isinstance(subject, (BoundLoss, ContractLoss, FactoryLoss)):
        return subject
    if not callable(subject):
        raise LossInputError("subject", "a loss function or a factory of one", repr(subject), FORMS)
    if inspect.isclass(subject):
        return adapt_class(subject)
    required = [p.name for p in parameters(subject) if p.default is p.empty]
    if factory is False:
        return subject  # type: ignore[no-any-return]
    if factory is None:
        refuse_named_forms(required)
    if factory is None and follows_contract(subject, required):
        return adapt_contract(Target(subject))
    refuse_unknown(subject, required)
    columns = list(map(column_of, required))
    if factory is None and any(column and column.split(" ")[-1] == "logprobs" for column in columns):
        return with_form(PaddedLoss(subject))
    return adapt_factory(subject, required) if required else adapt_maker(subject)


def adapt_class(subject: Any) -> LossFn:
    """Adapt a class whose instances are losses: a module, or a class with ``__call__``."""
    required = [p.name for p in parameters(subject) if p.default is p.empty]
    if not required:
        return adapt_maker(subject)
    refuse_unknown(subject, required)
    return adapt_factory(subject, required)


def adapt_maker(subject: Any) -> LossFn:
    """Adapt a class or a factory that is called without arguments, or with settings alone."""
    target = Target(subject, makes=True)
    try:
        made = target.fn
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        fix = "Make the arguments that it needs parameters without a default."
        raise LossInputError("subject", "a factory that runs without arguments", got, fix) from error
    if isinstance(made, (Loss, BoundLoss)):
        return made
    if not callable(made):
        got = f"{target.name}() is a {type(made).__name__}"
        raise LossInputError("subject", "a factory of a loss function", got, FORMS)
    required = [p.name for p in parameters(made) if p.default is p.empty]
    refuse_named_forms(required)
    if follows_contract(made, required):
        return adapt_contract(target)
    refuse_unknown(made, required)
    if not any((column_of(name) or "").split(" ")[-1] == "logprobs" for name in required):
        got = f"{target.name}() takes {', '.join(required) or 'nothing'}"
        raise LossInputError("subject", "a function of the logprobs", got, FORMS)
    return with_form(PaddedLoss(target))


def adapt_factory(subject: Any, required: Sequence[str]) -> LossFn:
    """Adapt a factory of columns, or a class that takes columns. A column that is None by default is passed too."""
    optional = [p.name for p in parameters(subject) if p.name not in required and fills(p)]
    for passed in (optional, []):
        made = FactoryLoss(subject, required, passed)
        try:
            made.forms = made.find_forms()
        except LossInputError:
            if not passed:
                raise
            continue
        made.unused = made.find_unused()
        break
    return made


def with_form(loss: PaddedLoss) -> PaddedLoss:
    """Return the loss after its form has been found."""
    loss.find_form()
    return loss


def adapt_contract(target: Target) -> LossFn:
    """Adapt a contract function. A plain one that reads the fields by their own names stays as it is.

    Raises:
        LossInputError: if it reads a field that no datum has, or is a factory with parameters that are no columns.
    """
    loss = ContractLoss(target)
    failure = None
    for targets in (0, 3):
        batch = PROBE.with_targets(targets)
        loss.missing.clear()
        try:
            result = loss(batch.data(), batch.tensors(torch.float32))
        except NotApplicable:
            raise
        except Exception as error:
            failure = failure or (error, set(loss.missing))
            continue
        if callable(result) and not isinstance(result, torch.Tensor):
            refuse_unknown(target.fn, [p.name for p in parameters(target.fn) if p.default is p.empty])
        if isinstance(result, (tuple, list)) and result and isinstance(result[0], (np.ndarray, np.generic)):
            refuse_foreign(result[0])
        failure = None
        break
    if failure and isinstance(failure[0], KeyError) and failure[1]:
        fields = ", ".join(sorted(FIELDS))
        got = f"it reads the field {', '.join(map(repr, sorted(failure[1])))}, which no datum of the kit has"
        raise LossInputError("subject", "a loss that reads known fields", got, f"Known fields: {fields}.")
    loss.renames = any(
        name not in (*PROBE.columns, "weights", "mask", "logprobs", "target_tokens") for name in loss.read
    )
    return loss if loss.renames or target.maker is not None else target.subject


FIELDS = {"target_tokens", "mask", "logprobs", "weights", *PROBE.columns}
"""The fields of the kit's datums."""


def follows_contract(fn: Callable[..., Any], required: Sequence[str]) -> bool:
    """Return whether a function looks like a contract function ``(data, logprobs_list)``.

    It has two required parameters: the first names no column, and the second names none or the logprobs. Or it has
    ``*args`` and no required parameter.
    """
    if len(required) == 2:
        return column_of(required[0]) is None and column_of(required[1]) in (None, "logprobs")
    has_var_args = any(p.kind is p.VAR_POSITIONAL for p in signature(fn).parameters.values())
    return has_var_args and not required


NAMED_FORMS = {
    "a function of logits": "logits lm_logits shift_logits policy_logits student_logits teacher_logits ref_logits "
    "model_logits next_token_logits",
    "a function of a model's outputs": "outputs output model_output model_outputs student_outputs",
    "a method of a trainer": "self model trainer",
    "a function of a batch": "inputs batch micro_batch mini_batch samples",
}
"""Form that cannot be tested → names of required parameters that tell it."""

RECIPES = {
    "a function of logits": "Gather log_softmax(logits) at the targets outside, and test the function "
    "(logprobs, mask) that is left.",
    "a function of a model's outputs": "Gather log_softmax(outputs.logits) at the targets outside, and test the "
    "function (logprobs, mask) that is left.",
    "a method of a trainer": "Move what follows the forward pass to a function (per_token_logps, "
    "old_per_token_logps, advantages, completion_mask), and test that; or name a bound method of an instance.",
    "a function of a batch": "Take the columns as parameters: (logprobs, old_logprobs, advantages, mask).",
}


def refuse_named_forms(required: Sequence[str]) -> None:
    """Refuse forms that hold more than a loss, by the names of their parameters, with a recipe."""
    if len(required) == 2 and required[0] in ("batch", "samples", "inputs") and "log" in required[1]:
        return  # a contract function
    for form, names in NAMED_FORMS.items():
        if any(name.lower() in names.split() for name in required):
            got = f"{form}, ({', '.join(required)})"
            raise LossInputError("subject", "a function of logprobs", got, f"{RECIPES[form]} {FORMS}")


SETTING_WORDS = frozenset(
    "beta eps epsilon clip cliprange coef coeff alpha gamma tau delta temperature lambda lam kl range mode type config "  # noqa: SIM905
    "cfg args agg reduction scale cap threshold ratio steps num max min label smoothing penalty".split()
)


def refuse_unknown(subject: Any, required: Sequence[str]) -> None:
    """Refuse required parameters that name no column. The error suggests what each might be."""
    unknown = [p for p in parameters(subject) if p.name in required and column_of(p.name) is None]
    if unknown:
        got = ", ".join(repr(p.name) for p in unknown)
        fix = " ".join(map(likely_meaning, unknown))
        raise LossInputError("subject", "parameters that name columns", got, f"{fix} {FORMS}")


def likely_meaning(p: inspect.Parameter) -> str:
    """Return what a parameter that names no column might be, in a sentence."""
    known = [*COLUMN_BY_NAME, "old_logprobs", "ref_logprobs", "sampler_logprobs", "teacher_logprobs"]
    similar = get_close_matches(p.name.lower(), known, n=1, cutoff=0.7)
    if similar:
        return f"Did you mean {similar[0]!r} by {p.name!r}?"
    plain = str(getattr(p.annotation, "__name__", p.annotation)) in ("float", "int", "str", "bool")
    if plain or SETTING_WORDS & set(p.name.lower().split("_")):
        return f"{p.name!r} may be a setting: give it a default, or pass functools.partial(fn, {p.name}=...)."
    return f"{p.name!r} is no column: rename it if it is one, or give it a default."


def padded(fn: Callable[..., Any], **settings: Any) -> LossFn:
    """Turn a function of padded ``[B, T]`` tensors, or of sums, into a contract function.

    ``settings`` are passed on to it.

    >>> def pg(logprobs, advantages, mask):
    ...     return -(logprobs * advantages * mask).sum() / mask.sum()
    >>> loss_fn = padded(pg)
    """
    return PaddedLoss(fn, settings)


# Group advantages

REWARDS = ("rewards", "reward", "scores", "token_level_rewards", "group_rewards", "raw_rewards", "rewards_list")
GROUPS = ("groups", "group", "group_ids", "group_id", "index", "indices", "uids", "uid", "prompt_ids", "prompt_uids",
    "prompts", "problem_ids")  # fmt: skip
GROUP_SIZES = ("num_generations", "group_size", "n", "k", "num_samples", "n_samples", "num_samples_per_prompt",
    "n_samples_per_prompt", "num_return_sequences", "rollouts_per_prompt", "samples_per_prompt")  # fmt: skip
LENGTHS = ("lengths", "length", "response_lengths", "response_length", "completion_lengths", "seq_lens", "num_tokens")
AdvantageForms = dict[str, Callable[[list[float], list[Any]], Any]]

REWARD_FORMS: AdvantageForms = {
    "list": lambda rewards, groups: list(rewards),
    "tensor": lambda rewards, groups: torch.tensor(rewards),
    "array": lambda rewards, groups: np.array(rewards),
    "column": lambda rewards, groups: torch.tensor(rewards)[:, None],
    "column array": lambda rewards, groups: np.array(rewards)[:, None],
    "grid": lambda rewards, groups: torch.tensor(rewards).reshape(len(set(groups)), -1),
    "grid array": lambda rewards, groups: np.array(rewards).reshape(len(set(groups)), -1),
    "tokens": lambda rewards, groups: torch.nn.functional.pad(torch.tensor(rewards)[:, None], (2, 0)),
}
GROUP_FORMS: AdvantageForms = {
    "list": lambda rewards, groups: list(groups),
    "ids": lambda rewards, groups: [sorted(set(groups)).index(g) for g in groups],
    "tensor": lambda rewards, groups: torch.tensor([sorted(set(groups)).index(g) for g in groups]),
    "array": lambda rewards, groups: np.array(groups),
}


def adapt_advantages(fn: Any) -> Callable[[Sequence[float], Sequence[Any]], list[float]]:
    """Turn a function of group advantages into one of lists ``(rewards, groups)``, in the order of the rewards.

    Rewards may be a list, an array, a tensor ``[B]``, a grid ``[G, n]`` or token-level ``[B, T]`` with a mask; groups
    may be a list, an array or a tensor of ids, or the number of samples of each group. A function without groups gets
    one group at a time, or a grid. A function of several rewards gets one, as ``[B, 1]``. All lengths are equal.

    A function of two parameters of other names, or one that runs in none of these forms, gets the two lists.

    Raises:
        LossInputError: if it has required parameters of other names, and not two, or if it returns rewards themselves
            as returns to go do.

    >>> def rloo(rewards, num_generations):
    ...     grid = rewards.view(-1, num_generations)
    ...     return ((grid - grid.mean(1, keepdim=True)) * num_generations / (num_generations - 1)).flatten()
    >>> adapt_advantages(rloo)([1.0, 0.0, 0.0, 1.0], ["a", "b", "a", "b"])
    [1.0, -1.0, -1.0, 1.0]
    """
    fn = fn() if inspect.isclass(fn) else fn
    required = [p for p in parameters(fn) if p.default is p.empty or p.name in (*GROUPS, *GROUP_SIZES)]
    names = [p.name for p in required]
    known = (*REWARDS, *GROUPS, *GROUP_SIZES, *LENGTHS)
    unknown = [n for n in names if n not in known and column_of(n) != "weights"]
    if unknown and takes_two(fn):
        return fn  # type: ignore[no-any-return]
    if unknown:
        fix = "Known: rewards with groups, group_ids or num_generations; or rewards alone."
        raise LossInputError("subject", "a function (rewards, groups)", ", ".join(map(repr, unknown)), fix)
    by_id, by_size = (any(name in known for name in names) for known in (GROUPS, GROUP_SIZES))
    masked = any(column_of(name) == "weights" for name in names)
    by_token = any("token" in name for name in names) or (masked and not by_id and not by_size)
    rewards, groups = [0.0, 1.0, 0.5, 2.0, 1.0, 0.25], ["a", "a", "a", "b", "b", "b"]
    for one_by_one in (False,) if by_id or by_size else (True, False):
        for reward_form in sorted(REWARD_FORMS, key=lambda form: "array" in form, reverse=uses_numpy(fn)):
            grid = reward_form.startswith("grid")
            if (reward_form == "tokens") != by_token or (one_by_one and grid):
                continue
            if not (by_id or by_size or one_by_one or grid) or (reward_form.startswith("column") and not by_id):
                continue
            for group_form in GROUP_FORMS if by_id else ("list",):
                call = functools.partial(call_advantages, fn, required, reward_form, group_form)
                adapted = functools.partial(regrouped, call, one_by_one, by_size or grid)
                try:
                    result = adapted(rewards, groups)
                except Exception:
                    continue
                if masked and one_by_one and result == rewards:
                    fix = "Check the function that takes off a baseline, or whitens them."
                    raise LossInputError("subject", "a function of advantages", "returns without a baseline", fix)
                if np.isfinite(result).all():
                    return adapted
    return fn  # type: ignore[no-any-return]


def uses_numpy(fn: Any) -> bool:
    """Return whether a function is written for arrays: its annotations say so, or its module knows numpy alone."""
    annotations = " ".join(str(p.annotation) for p in parameters(fn))
    if "Tensor" in annotations or "ndarray" in annotations:
        return "ndarray" in annotations
    scope = getattr(fn, "__globals__", {})
    return any(value is np for value in scope.values()) and not any(value is torch for value in scope.values())


def takes_two(fn: Any) -> bool:
    """Return whether a function can be called with two positional arguments."""
    try:
        signature(fn).bind(None, None)
    except TypeError:
        return False
    return True


def call_advantages(fn: Any, required: Any, reward_form: str, group_form: str, rewards: Any, groups: Any) -> Any:
    """Call a function of group advantages with its arguments in these forms; return one number for each reward."""
    shaped = REWARD_FORMS[reward_form](list(rewards), list(groups))
    arguments: dict[str, Any] = {}
    for p in required:
        if p.name in GROUP_SIZES:
            arguments[p.name] = len(rewards) // len(set(groups))
        elif p.name in LENGTHS:
            arguments[p.name] = REWARD_FORMS[reward_form]([4.0] * len(rewards), list(groups))
        elif p.name in GROUPS:
            arguments[p.name] = GROUP_FORMS[group_form](list(rewards), list(groups))
        else:
            arguments[p.name] = shaped if p.name in REWARDS else torch.ones_like(shaped)
    positional = [arguments.pop(p.name) for p in required if p.kind is p.POSITIONAL_ONLY]
    result = fn(*positional, **arguments)
    result = result[0] if isinstance(result, tuple) and len(result) < len(rewards) else result
    values = torch.as_tensor(np.asarray(result) if isinstance(result, (list, tuple)) else result).double()
    if values.numel() > len(rewards):
        values = values.reshape(len(rewards), -1)[:, -1]
    if values.numel() != len(rewards):
        raise ValueError(f"{values.numel()} advantages for {len(rewards)} rewards")
    return values.flatten().tolist()


def regrouped(call: Any, one_by_one: bool, equal: bool, rewards: Sequence[float], groups: Sequence[Any]) -> list[float]:
    """Return the advantages in the order of the rewards, from a function that takes its groups one after another."""
    if not (one_by_one or equal):
        return list(call(rewards, groups))
    members: dict[Any, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    if equal and len(set(map(len, members.values()))) > 1:
        raise NotApplicable("it takes groups of equal size")
    parts = list(members.values()) if one_by_one else [[i for own in members.values() for i in own]]
    result = [0.0] * len(rewards)
    for indices in parts:
        values = call([rewards[i] for i in indices], [groups[i] for i in indices])
        for i, value in zip(indices, values):
            result[i] = value
    return result
