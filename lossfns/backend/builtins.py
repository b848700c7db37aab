"""The built-in losses by name: strings become functions here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lossfns import (
    BoundLoss,
    Loss,
    LossInputError,
    cross_entropy,
    importance_sampling,
    multi_target_cross_entropy,
    ppo,
    token_sum,
)
from lossfns.errors import did_you_mean

BUILTINS: dict[str, Callable[..., Loss]] = {
    "cross_entropy": lambda: cross_entropy(weigh=token_sum),
    "importance_sampling": lambda: importance_sampling(weigh=token_sum, log_ratio_cap=None),
    "ppo": lambda clip_low_threshold=0.8, clip_high_threshold=1.2: ppo(
        clip=(clip_low_threshold, clip_high_threshold), weigh=token_sum, log_ratio_cap=None
    ),
}
"""Raw sums without a log-ratio cap, as at the hosted services; the arguments are the keys of ``loss_fn_config``."""

DATUM_KEYS = {
    "cross_entropy": ("target_tokens", "weights"),
    "importance_sampling": ("target_tokens", "weights", "logprobs", "advantages"),
    "ppo": ("target_tokens", "weights", "logprobs", "advantages"),
}


def builtin(name: str, config: Mapping[str, Any] | None, data: Sequence[Any], targets: int) -> BoundLoss:
    """The loss of that name, bound to the weights of the data: 1 where a datum has none."""
    if not isinstance(name, str) or name not in BUILTINS:
        raise LossInputError("loss_fn", "the name of a built-in loss", repr(name), did_you_mean(str(name), BUILTINS))
    for i, datum in enumerate(data):
        for key in datum.loss_fn_inputs:
            if key not in DATUM_KEYS[name]:
                fix = "Take it out; a mask goes into weights, or into advantages as zeros."
                expected = f"only {', '.join(DATUM_KEYS[name])} for {name}"
                raise LossInputError("loss_fn_inputs", expected, f"{key!r}", fix, datum=i)
    make = multi_target if name == "cross_entropy" and targets else BUILTINS[name]
    try:
        loss = make(**(config or {}))
    except TypeError:
        known = "clip_low_threshold, clip_high_threshold" if name == "ppo" else "nothing"
        got = ", ".join(map(repr, config or {}))
        raise LossInputError("loss_fn_config", f"{known} for {name}", got, "Drop the others.") from None
    # A raw sum ignores the denominator; binding one says that a batch without any weight is a valid part.
    return loss.bind(weights=[weights_of(datum) for datum in data], denominator=1.0)


def multi_target() -> Loss:
    return multi_target_cross_entropy(weigh=token_sum)


def weights_of(datum: Any) -> Any:
    inputs = datum.loss_fn_inputs
    return inputs["weights"] if "weights" in inputs else np.ones(inputs["target_tokens"].to_numpy().shape, np.float32)
