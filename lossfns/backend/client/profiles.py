"""Where the hosted services differ: Tinker (SDK 0.38) and Fireworks (SDK 1.2), side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lossfns.backend.engine.batch import check_some
from lossfns.backend.engine.differentiate import Value
from lossfns.errors import LossInputError, did_you_mean

TOTALS = ("loss", "tokens", "sequences", "sequences_empty")


class Profile(NamedTuple):
    """What one service does its own way."""

    name: str
    check_call: Callable[[Any], None]
    """What is refused at the call, rather than when the result is read."""
    check_custom: Callable[[Sequence[Any]], None]
    """What is refused of the datums of a custom loss over logprobs."""
    custom_blocks: bool
    """Whether forward_backward_custom waits, so that an error surfaces at the call."""
    builtin_metrics: Callable[[str, Value], dict[str, float]]
    custom_metrics: Callable[[Value], dict[str, Any]]


def anything(data: Any) -> None:
    """Refuse nothing."""


CUSTOM_KEYS = ("target_tokens", "weights")


def only_custom_keys(data: Sequence[Any]) -> None:
    """Fireworks sends the datums of a custom loss as they are, and the service knows two fields."""
    for i, datum in enumerate(data):
        extra = sorted(set(datum.loss_fn_inputs) - set(CUSTOM_KEYS))
        if extra:
            got = (
                "forward_backward_custom only supports loss_fn_inputs keys {'target_tokens', 'weights'}; "
                f"found unexpected keys: {extra}"
            )
            fix = f"Pass it with bind({extra[0]}=...), or take profile='tinker'."
            raise LossInputError("loss_fn_inputs", "target_tokens and weights alone", got, fix, datum=i)


MOST = ("passes", "peak_memory")
ADDED = (*TOTALS, "micro_batches")


def cost(value: Value) -> dict[str, float]:
    """How a request was computed: passes over the model, micro-batches, and bytes at the peak as planned."""
    counts = {"passes": value.passes, "micro_batches": value.micro_batches, "peak_memory": value.peak_memory}
    return {name: float(count) for name, count in counts.items()}


def reduction(name: str) -> str:
    return "sum" if name in ADDED else "max" if name in MOST else "mean"


def named(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics in the services' ``name:reduction`` form, which says how they combine over requests."""
    return {f"{name}:{reduction(name)}": x for name, x in metrics.items() if name != "denominator"}


def with_response_tokens(loss_fn: str, value: Value) -> dict[str, float]:
    """Fireworks adds to cross-entropy how many entries have a weight."""
    counted = {"response_tokens": value.nonzero} if loss_fn == "cross_entropy" else {}
    return named(value.metrics) | counted


def true_loss(value: Value) -> dict[str, Any]:
    """``loss:sum`` is the loss itself, whatever the loss calls so; the surrogate stands beside it."""
    return {**value.metrics, "loss:sum": value.loss, "surrogate_loss:sum": value.surrogate}


def surrogate_loss(value: Value) -> dict[str, Any]:
    """``loss:sum`` is the surrogate Σ lp·∂L/∂lp; metrics of the loss win over the service's."""
    counted = {"response_tokens": value.nonzero} if value.outputs.name == "logprobs" else {}
    return {"loss:sum": value.surrogate, **counted, **value.metrics}


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="tinker",
            check_call=check_some,
            check_custom=anything,
            custom_blocks=False,
            builtin_metrics=lambda loss_fn, value: named(value.metrics),
            custom_metrics=true_loss,
        ),
        Profile(
            name="fireworks",
            check_call=anything,
            check_custom=only_custom_keys,
            custom_blocks=True,
            builtin_metrics=with_response_tokens,
            custom_metrics=surrogate_loss,
        ),
    )
}


def profile_of(name: Any) -> Profile:
    """The profile of that name."""
    if not isinstance(name, str) or name not in PROFILES:
        raise LossInputError("profile", "'tinker' or 'fireworks'", repr(name), did_you_mean(str(name), PROFILES))
    return PROFILES[name]
