"""The differences between the hosted services, side by side: Tinker (SDK 0.38) and Fireworks (SDK 1.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lossfns.backend.engine.batch import check_not_empty
from lossfns.backend.engine.differentiate import Differentiated
from lossfns.errors import LossInputError, did_you_mean


class Profile(NamedTuple):
    """The behaviour of one service, where the services differ."""

    name: str
    check_at_call: Callable[[Any], None]
    """Refuses data at the call, rather than when the result is read."""
    check_custom_data: Callable[[Sequence[Any]], None]
    """Refuses datums of a custom loss over logprobs."""
    custom_call_waits: bool
    """Whether forward_backward_custom waits for its result, so that an error is raised at the call."""
    builtin_metrics: Callable[[str, Differentiated], dict[str, float]]
    """The metrics of a built-in loss of this name."""
    custom_metrics: Callable[[Differentiated], dict[str, Any]]
    """The metrics of a custom loss, its own among them."""


# Checks


def accept_any(data: Any) -> None:
    """Refuse nothing."""


CUSTOM_KEYS = ("target_tokens", "weights")


def check_custom_keys(data: Sequence[Any]) -> None:
    """Refuse keys that Fireworks does not know: its SDK sends a custom loss's datums to the service as they are."""
    for i, datum in enumerate(data):
        extra = sorted(set(datum.loss_fn_inputs) - set(CUSTOM_KEYS))
        if extra:
            got = (
                "forward_backward_custom only supports loss_fn_inputs keys {'target_tokens', 'weights'}; "
                f"found unexpected keys: {extra}"
            )
            fix = f"Pass it with bind({extra[0]}=...), or take profile='tinker'."
            raise LossInputError("loss_fn_inputs", "target_tokens and weights alone", got, fix, datum=i)


# Metrics

SUMS = ("loss", "tokens", "sequences", "sequences_empty", "micro_batches")
MAXIMA = ("passes", "peak_memory")


def reduction(name: str) -> str:
    """Return how a metric combines over requests: ``"sum"``, ``"max"`` or ``"mean"``."""
    return "sum" if name in SUMS else "max" if name in MAXIMA else "mean"


def with_reductions(metrics: dict[str, float]) -> dict[str, float]:
    """Rename metrics to the services' form ``name:reduction``, without the denominator."""
    return {f"{name}:{reduction(name)}": x for name, x in metrics.items() if name != "denominator"}


def request_cost(result: Differentiated) -> dict[str, float]:
    """Return the passes over the model, the micro-batches and the planned peak of memory in bytes."""
    return {
        "passes": float(result.passes),
        "micro_batches": float(result.micro_batches),
        "peak_memory": float(result.peak_memory),
    }


def tinker_builtin_metrics(loss_fn: str, result: Differentiated) -> dict[str, float]:
    """Return the metrics of the loss."""
    return with_reductions(result.metrics)


def fireworks_builtin_metrics(loss_fn: str, result: Differentiated) -> dict[str, float]:
    """Return the metrics of the loss; a cross-entropy also has the number of entries with a weight."""
    counted = {"response_tokens": result.nonzero} if loss_fn == "cross_entropy" else {}
    return with_reductions(result.metrics) | counted


def tinker_custom_metrics(result: Differentiated) -> dict[str, Any]:
    """Return the loss as ``loss:sum`` beside the surrogate. They replace metrics of the loss with these names."""
    return {**result.metrics, "loss:sum": result.loss, "surrogate_loss:sum": result.surrogate}


def fireworks_custom_metrics(result: Differentiated) -> dict[str, Any]:
    """Return the surrogate Σ lp·∂L/∂lp as ``loss:sum``. Metrics of the loss replace those of the service."""
    counted = {"response_tokens": result.nonzero} if result.outputs.name == "logprobs" else {}
    return {"loss:sum": result.surrogate, **counted, **result.metrics}


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="tinker",
            check_at_call=check_not_empty,
            check_custom_data=accept_any,
            custom_call_waits=False,
            builtin_metrics=tinker_builtin_metrics,
            custom_metrics=tinker_custom_metrics,
        ),
        Profile(
            name="fireworks",
            check_at_call=accept_any,
            check_custom_data=check_custom_keys,
            custom_call_waits=True,
            builtin_metrics=fireworks_builtin_metrics,
            custom_metrics=fireworks_custom_metrics,
        ),
    )
}


def find_profile(name: Any) -> Profile:
    """Return the profile of that name, or refuse the name."""
    if not isinstance(name, str) or name not in PROFILES:
        raise LossInputError("profile", "'tinker' or 'fireworks'", repr(name), did_you_mean(str(name), PROFILES))
    return PROFILES[name]
