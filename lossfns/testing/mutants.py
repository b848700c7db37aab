"""Known-wrong losses: any loss with any bug of the catalogue planted in it.

A mutant is a contract function ``(data, logprobs_list) -> (loss, metrics)`` with its settings as keywords. A mutant of
group advantages is ``(rewards, groups) -> advantages``. A mutant has the attributes ``bug``, ``kind`` and ``like``, the
correct loss that it claims to be. Bugs of the value or the gradient are planted in the oracle
(``lossfns.testing.planted``). Bugs of the call, such as a mutated input, are planted in the library's losses here.

>>> from lossfns.testing.mutants import MUTANTS, mutant
>>> wrong = mutant("ratio-inverted", "ppo", clip=(0.9, 1.1))
>>> wrong.bug, wrong.kind, wrong.like.name
('ratio-inverted', 'policy', 'ppo')
>>> from lossfns.testing.mutants import gspo_ratio_product
>>> gspo_ratio_product.like.name, len(MUTANTS) > 200
('gspo', True)
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lossfns.advantages import group_advantages
from lossfns.datum import Datum, TensorData
from lossfns.loss import Loss
from lossfns.testing import field, oracle, planted
from lossfns.testing.bugs import BUGS
from lossfns.testing.laws.trace import Trace
from lossfns.testing.public import public
from lossfns.testing.vectors.flags import arguments
from lossfns.testing.vectors.library import build_loss
from lossfns.testing.vectors.vector import METHODS, is_estimator, load
from lossfns.tokens import PAIRS, TARGETS

CLOSED_FORMS = tuple(
    loss for loss in METHODS if loss == "group_advantages" or getattr(oracle, loss).__module__ == oracle.__name__
)
"""The methods whose oracle has its gradient in closed form. The laws of the kit are measured on their mutants."""

Data = Sequence[Any]
Logprobs = Sequence[Tensor]
Result = tuple[Tensor, dict[str, Any]]
Config = Mapping[str, Any]
Subject = Callable[..., Any]


def mutant(bug: str, loss: str, **settings: Any) -> Subject:
    """Make a loss that is correct except for one bug.

    Args:
        bug: an id of ``lossfns.testing.bugs``.
        loss: the name of a method that has golden vectors, or of a loss in ``lossfns.testing.field`` with this bug.
        settings: the settings, with their names in the vectors. A missing one is taken from the method's first vector.
            A loss of the field takes none.
    """
    if (loss, bug) in field.WRONG:
        kind = field.KIND_OF[loss, bug]
        return described(field.WRONG[loss, bug], bug, loss, kind, group_advantages if kind == "advantages" else None)
    config = {**load(loss)[0].config, **settings}
    like = correct_loss(loss, config)
    built: Subject
    if loss == "group_advantages":
        built = partial(planted.ADVANTAGE_BUGS[bug], **config)
    else:
        built = CALL_BUGS[bug](like) if bug in CALL_BUGS else oracle_loss(bug, loss, config)
    return described(built, bug, loss, loss_kind(like), like)


def described(built: Subject, bug: str, loss: str, kind: str, like: Any) -> Subject:
    """Set the attributes of a mutant."""
    name, words = f"{loss}_{bug.replace('-', '_')}", f"{loss}, but {BUGS[bug].description}."
    attributes = {"bug": bug, "kind": kind, "like": like, "__name__": name, "__doc__": words}
    for attribute, value in attributes.items():
        setattr(built, attribute, value)
    return built


def correct_loss(loss: str, config: Config) -> Any:
    """Return the correct loss with these settings."""
    return public(loss) if is_estimator(loss) else build_loss(loss, config)


def loss_kind(like: Any) -> str:
    """Return the kind of laws for a correct loss."""
    if not isinstance(like, Loss):
        return "advantages"
    return "policy" if "advantages" in like.reads else "preference" if like.rows == PAIRS else "likelihood"


def settings_showing(bug: str, loss: str) -> list[Config]:
    """Return the settings in the golden vectors of a loss with which the loss can have the bug."""
    vectors = [v for v in load(loss) if v.error is None and v.denominator is None]
    possible = bug in CALL_BUGS and APPLIES_TO.get(bug, is_loss)(correct_loss(loss, vectors[0].config))
    return list({repr(v.config): v.config for v in vectors if possible or bug in v.flags}.values())


# Bugs of the value or the gradient


class FixedGradient(torch.autograd.Function):
    """A value whose gradient is given."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, value: float, gradient: list[float]) -> Tensor:
        ctx.gradient = logprobs.new_tensor(gradient)
        return logprobs.new_tensor(value)

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor, None, None]:
        return by * ctx.gradient, None, None


def oracle_loss(bug: str, loss: str, config: Config) -> Subject:
    """Return a contract function with the oracle's value and gradient, and with the bug, if ``bug`` is not empty.

    It refuses every input that the library's loss refuses.
    """
    like = build_loss(loss, config)
    door = without_terms(like)
    # The oracle's function takes every column of the method, also columns that these settings do not use.
    names = dict.fromkeys(("weights", *build_loss(loss, load(loss)[0].config).reads, *like.reads))
    plain = {name: x for name, x in config.items() if isinstance(x, (float, tuple, list))}

    def answer(data: Data, logprobs_list: Logprobs, **settings: Any) -> Result:
        if Trace.recording:
            raise RuntimeError("the oracle computes in plain floats, which cannot be traced")
        door(data, [lp.detach() for lp in logprobs_list])
        a = arguments({**config, **settings}, columns(data, logprobs_list, names))
        targets = logprobs_list[0].shape[-1] if like.rows == TARGETS else 0
        if targets and "teacher_logprobs" in names:
            a["targets"] = targets  # as in ``arguments``, which sees flat rows here
        wrong = planted.wrong_loss(bug, loss, a, targets) if bug else None
        value, rows = wrong if wrong is not None else getattr(oracle, loss)(**a)
        detached = [bug == "gradient-missing" and not any(w) for w in a["weights"]]
        leaves = torch.cat([(lp.detach() if out else lp).flatten() for lp, out in zip(logprobs_list, detached)])
        total: Tensor = FixedGradient.apply(leaves, value, [g for row in rows for g in row])  # type: ignore[no-untyped-call]
        return total, {"loss": value, "tokens": float(sum(len(oracle.active(w)) for w in a["weights"]))}

    # The laws find settings as parameters with a default.
    positional = inspect.signature(answer).parameters
    knobs = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=x) for name, x in plain.items()]
    vars(answer)["__signature__"] = inspect.Signature([positional["data"], positional["logprobs_list"], *knobs])
    return answer


def without_terms(loss: Loss) -> Loss:
    """Return a loss that checks its input as this one does, and is 0."""
    return replace(loss, terms=lambda t: (torch.zeros_like(loss.share(t)), {}))


def columns(data: Data, logprobs_list: Logprobs, names: Iterable[str]) -> list[dict[str, list[float]]]:
    """Return these columns and the logprobs of each datum as plain floats. Move all logprobs to the host at once."""
    flat = torch.cat([lp.detach().flatten().double() for lp in logprobs_list]).tolist()
    rows = []
    for datum, lp in zip(data, logprobs_list):
        named = {name: datum.loss_fn_inputs[name].to_numpy().ravel().tolist() for name in names}
        rows.append({"logprobs": flat[: lp.numel()], **named})
        flat = flat[lp.numel() :]
    return rows


# Bugs of the call


def tensors_in_metrics(loss: Loss, data: Data, logprobs_list: Logprobs) -> Result:
    """Return the metrics as tensors."""
    value, metrics = loss(data, logprobs_list)
    return value, {name: torch.tensor(x) for name, x in metrics.items()}


def one_element(loss: Loss, data: Data, logprobs_list: Logprobs) -> Result:
    """Return a loss of shape [1]."""
    value, metrics = loss(data, logprobs_list)
    return value.reshape(1), metrics


def sets_the_seed(loss: Loss, data: Data, logprobs_list: Logprobs) -> Result:
    """Set the seed of the random generator."""
    torch.manual_seed(0)
    return loss(data, logprobs_list)


def reports_masked(loss: Loss, data: Data, logprobs_list: Logprobs) -> Result:
    """Report the mean logprob over all slots."""
    value, metrics = loss(data, logprobs_list)
    return value, metrics | {"logprob_mean": torch.cat([lp.detach().flatten() for lp in logprobs_list]).mean().item()}


def reports_negative_kl(loss: Loss, data: Data, logprobs_list: Logprobs) -> Result:
    """Report mean(new − old) as approx_kl, whose estimate is mean(old − new)."""
    value, metrics = loss(data, logprobs_list)
    old = [torch.from_numpy(datum.loss_fn_inputs["old_logprobs"].to_numpy()) for datum in data]
    gaps = torch.cat([(lp.detach() - row)[active(d)] for d, lp, row in zip(data, logprobs_list, old)])
    return value, metrics | {"approx_kl": gaps.mean().item()}


def lowers_entropy(loss: Loss, data: Data, logprobs_list: Logprobs, entropy_coef: float = 0.01) -> Result:
    """Subtract a sampled entropy bonus sg(lp)·lp where it is to be added."""
    value, metrics = loss(data, logprobs_list)
    weights = [torch.from_numpy(datum.loss_fn_inputs["weights"].to_numpy()) for datum in data]
    lp = torch.cat([torch.where(w != 0, lp, 0).flatten() for w, lp in zip(weights, logprobs_list)])
    w = torch.cat([w.flatten() for w in weights])
    return value - entropy_coef * (w * lp.detach() * lp).sum() / w.sum(), metrics


def pushes_alike(loss: Loss, data: Data, logprobs_list: Logprobs, entropy_coef: float = 0.01) -> Result:
    """Subtract −lp as an entropy bonus, the gradient of which is the same for all tokens."""
    value, metrics = loss(data, logprobs_list)
    weights = [torch.from_numpy(datum.loss_fn_inputs["weights"].to_numpy()) for datum in data]
    lp = torch.cat([torch.where(w != 0, lp, 0).flatten() for w, lp in zip(weights, logprobs_list)])
    w = torch.cat([w.flatten() for w in weights])
    return value + entropy_coef * (w * lp).sum() / w.sum(), metrics


def counts_unclipped(loss: Loss, data: Data, logprobs_list: Logprobs) -> Result:
    """Report the share of the tokens that are not clipped as the clip fraction."""
    value, metrics = loss(data, logprobs_list)
    return value, metrics | {"clip_fraction": 1 - metrics["clip_low"] - metrics["clip_high"]}


def blanks_in_place(loss: Loss, data: Data, logprobs_list: Logprobs) -> Result:
    """Overwrite masked logprobs in place."""
    for datum, lp in zip(data, logprobs_list):
        lp.detach().masked_fill_(~active(datum), 0)
    return loss(data, logprobs_list)


def shrinks_with_calls(loss: Loss, calls: list[int], data: Data, logprobs_list: Logprobs) -> Result:
    """Make the loss smaller with every call."""
    calls.append(1)
    value, metrics = loss(data, logprobs_list)
    return value * 0.99 ** len(calls), metrics


def item_per_datum(loss: Loss, data: Data, logprobs_list: Logprobs) -> Result:
    """Call ``.item()`` for each datum."""
    value, metrics = loss(data, logprobs_list)
    sums = [torch.where(active(datum), lp.detach(), 0).sum().item() for datum, lp in zip(data, logprobs_list)]
    return value, metrics | {"logprob_sum_min": min(sums)}


def item_in_the_maths(loss: Loss, data: Data, logprobs_list: Logprobs) -> Result:
    """Use the value as a Python number, which a trace keeps constant."""
    value, metrics = loss(data, logprobs_list)
    return value - value.detach() + value.item(), metrics


def no_grad(loss: Loss, data: Data, logprobs_list: Logprobs) -> Result:
    """Make a term constant by ``no_grad``, which a trace loses."""
    value, metrics = loss(data, logprobs_list)
    with torch.no_grad():
        constant, _ = loss(data, logprobs_list)
    return value + (constant - value.detach()), metrics


def truncates(loss: Loss, data: Data, logprobs_list: Logprobs) -> Result:
    """Cut every row to the shortest one of its datum."""
    rows = [{name: d.loss_fn_inputs[name].to_numpy() for name in ("weights", *loss.reads)} for d in data]
    shortest = [min(len(lp), *map(len, row.values())) for row, lp in zip(rows, logprobs_list)]
    cut = [with_columns(d, {name: x[:n] for name, x in row.items()}) for d, row, n in zip(data, rows, shortest)]
    return loss(cut, [lp[:n] for lp, n in zip(logprobs_list, shortest)])


EOS = 5
"""The id of the token that ends a sequence."""


def masks_eos(loss: Loss, data: Data, logprobs_list: Logprobs) -> Result:
    """Mask every end-of-sequence token, as if it were padding. Keep the denominator."""
    masked = [
        with_columns(d, {"weights": d.loss_fn_inputs["weights"].to_numpy() * (targets.to_numpy() != EOS)})
        for d, targets in ((d, d.loss_fn_inputs["target_tokens"]) for d in data)
    ]
    return loss.bind(denominator=loss.denominator(data))(masked, logprobs_list)


def scaled_by_ranks(loss: Loss, data: Data, logprobs_list: Logprobs) -> Result:
    """Multiply the loss by the number of ranks."""
    value, metrics = loss(data, logprobs_list)
    return value * int(os.environ.get("WORLD_SIZE", "1")), metrics


def drops_odd(loss: Loss, data: Data, logprobs_list: Logprobs) -> Result:
    """Use ``len(data) // 2`` pairs and ignore an odd datum."""
    count = len(data) // 2 * 2
    value, metrics = loss(data[:count], logprobs_list[:count])
    return value + sum(0 * lp.sum() for lp in logprobs_list[count:]), metrics


def metrics_of_last_datum(loss: Loss, data: Data, logprobs_list: Logprobs) -> Result:
    """Report the metrics of the last datum, or pair, with active tokens."""
    value, metrics = loss(data, logprobs_list)
    step = 2 if loss.rows == PAIRS else 1
    parts = [slice(i, i + step) for i in range(0, len(data), step)]
    last = next(part for part in reversed(parts) if any(active(datum).any() for datum in data[part]))
    _, last_metrics = loss(data[last], [lp.detach() for lp in logprobs_list[last]])
    return value, last_metrics | {"loss": metrics["loss"]}


def scaled_metrics(loss: Loss, data: Data, logprobs_list: Logprobs) -> Result:
    """Scale metrics that are scaled already."""
    value, metrics = loss(data, logprobs_list)
    return value, {name: 0.1 * x if name in ("loss", "kl_ref", "reward_margin") else x for name, x in metrics.items()}


def counts_outside(loss: Loss, data: Data, logprobs_list: Logprobs) -> Result:
    """Count every ratio outside the bounds as clipped, whether or not it loses its gradient."""
    value, metrics = loss(data, logprobs_list)
    low, high = loss.knobs["clip"]
    old = [torch.from_numpy(datum.loss_fn_inputs["old_logprobs"].to_numpy()) for datum in data]
    ratios = torch.cat([(lp.detach() - row)[active(d)].exp() for d, lp, row in zip(data, logprobs_list, old)])
    return value, metrics | {"clip_fraction": ((ratios < low) | (ratios > high)).double().mean().item()}


def other_method(loss: Loss) -> Loss | None:
    """Return the loss of another method that reads the same columns, or None."""
    others = [
        build_loss(name, load(name)[0].config) for name in CLOSED_FORMS if name not in (loss.name, "group_advantages")
    ]
    return next((other for other in others if (other.reads, other.rows) == (loss.reads, loss.rows)), None)


def active(datum: Any) -> Tensor:
    """Return the mask of a datum's active tokens."""
    return torch.from_numpy(datum.loss_fn_inputs["weights"].to_numpy() != 0)


def with_columns(datum: Any, changed: Mapping[str, Any]) -> Datum:
    """Return the datum with some of its columns replaced."""
    fields = {name: TensorData.from_numpy(values) for name, values in changed.items()}
    return Datum(datum.model_input, {**datum.loss_fn_inputs, **fields})


CALL_BUGS: dict[str, Callable[[Loss], Subject]] = {
    "not-the-contract": lambda loss: partial(one_element, loss),
    "global-state-changed": lambda loss: partial(sets_the_seed, loss),
    "metric-not-a-float": lambda loss: partial(tensors_in_metrics, loss),
    "metric-unmasked": lambda loss: partial(reports_masked, loss),
    "metric-sign": lambda loss: partial(reports_negative_kl, loss),
    "metric-miscounts": lambda loss: partial(counts_unclipped, loss),
    "entropy-sign": lambda loss: partial(lowers_entropy, loss),
    "entropy-constant": lambda loss: partial(pushes_alike, loss),
    "inputs-mutated": lambda loss: partial(blanks_in_place, loss),
    "state-between-calls": lambda loss: partial(shrinks_with_calls, loss, []),
    "host-sync-per-datum": lambda loss: partial(item_per_datum, loss),
    "branch-on-values": lambda loss: partial(item_in_the_maths, loss),
    "no-grad-for-detach": lambda loss: partial(no_grad, loss),
    "silent-truncation": lambda loss: partial(truncates, loss),
    "mask-by-token-id": lambda loss: partial(masks_eos, loss),
    "world-size-factor": lambda loss: partial(scaled_by_ranks, loss),
    "odd-datum-dropped": lambda loss: partial(drops_odd, loss),
    "metric-not-mergeable": lambda loss: partial(metrics_of_last_datum, loss),
    "metric-scaled-twice": lambda loss: partial(scaled_metrics, loss),
    "metric-counts-nonbinding": lambda loss: partial(counts_outside, loss),
    "another-loss": lambda loss: partial(other_method(loss) or loss),
}
"""Bug of the call → how to make the mutant from a correct loss."""


def is_loss(like: Any) -> bool:
    return isinstance(like, Loss)


APPLIES_TO: dict[str, Callable[[Any], bool]] = {
    "odd-datum-dropped": lambda like: is_loss(like) and like.rows == PAIRS,
    "metric-counts-nonbinding": lambda like: is_loss(like) and "clip" in like.knobs,
    "metric-miscounts": lambda like: is_loss(like) and "clip" in like.knobs and like.name != "cispo",
    "metric-sign": lambda like: is_loss(like) and "old_logprobs" in like.reads,
    "entropy-sign": lambda like: is_loss(like) and "advantages" in like.reads,
    "entropy-constant": lambda like: is_loss(like) and "advantages" in like.reads and "ref_logprobs" not in like.reads,
    "another-loss": lambda like: is_loss(like) and other_method(like) is not None,
}
"""Bug of the call → whether a correct loss can have it. Every loss can have the bugs that are not listed."""


def exemplars() -> list[tuple[str, str, Config]]:
    """Return (bug, loss, settings) for each bug and family of losses: a kind, with or without a reference.

    The loss and the settings are the first ones with which the bug shows. The losses of the field follow.
    """
    first: dict[tuple[str, bool, str], tuple[str, str, Config]] = {}
    for loss in CLOSED_FORMS:
        like = correct_loss(loss, load(loss)[0].config)
        family = loss_kind(like), "ref_logprobs" in getattr(like, "reads", ())
        for bug in BUGS:
            if (*family, bug) not in first and (settings := settings_showing(bug, loss)):
                first[*family, bug] = bug, loss, settings[0]
    return [*first.values(), *((bug, loss, {}) for loss, bug in field.WRONG)]


MUTANTS = {(built := mutant(bug, loss, **settings)).__name__: built for bug, loss, settings in exemplars()}
"""The exemplars by name."""

globals().update(MUTANTS)


def __getattr__(name: str) -> Subject:
    """Return the mutant of this name, ``loss_bug``, with the first settings that show the bug. It is no exemplar."""
    for loss in CLOSED_FORMS:
        bug = name.removeprefix(f"{loss}_").replace("_", "-")
        if name.startswith(f"{loss}_") and bug in BUGS and (settings := settings_showing(bug, loss)):
            return mutant(bug, loss, **settings[0])
    raise AttributeError(f"no mutant {name!r}: write the loss, then the bug, as in ppo_ratio_inverted")
