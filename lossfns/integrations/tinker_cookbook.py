"""tinker_cookbook: its RL datums as our losses read them.

Fields as in tinker_cookbook 0.6.1 (``rl/data_processing.py``, ``supervised/common.py``). Its supervised datums have
``weights`` and ``target_tokens``, and can be passed as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lossfns.errors import LossInputError
from lossfns.export.datums import with_inputs


def mask_as_weights(data: Sequence[Any]) -> list[Any]:
    """Copy RL datums with their ``mask`` as ``weights``.

    Args:
        data: datums with ``target_tokens``, ``logprobs``, ``advantages`` and ``mask``, as ``assemble_training_data``
            returns them. Our losses read ``logprobs`` as ``old_logprobs``.

    Raises:
        LossInputError: if a datum has no ``mask``, or has ``weights`` besides it.

    >>> from lossfns import Datum, ModelInput, TensorData
    >>> inputs = {"target_tokens": [6, 7], "logprobs": [0.0, -1.0], "advantages": [0.0, 2.0]}
    >>> inputs["mask"] = TensorData([0.0, 1.0], "float32")
    >>> (datum,) = mask_as_weights([Datum(ModelInput.from_ints([5, 6]), inputs)])
    >>> sorted(datum.loss_fn_inputs), datum.loss_fn_inputs["weights"].tolist()
    (['advantages', 'logprobs', 'target_tokens', 'weights'], [0.0, 1.0])
    """
    for i, datum in enumerate(data):
        fields = datum.loss_fn_inputs
        if "mask" not in fields or "weights" in fields:
            got = "weights" if "weights" in fields else "neither mask nor weights"
            fix = "Supervised datums have weights, and need no conversion."
            raise LossInputError("mask", "a mask and no weights", got, fix, datum=i)
    return [with_fields(datum, weights_in_place_of_mask(datum.loss_fn_inputs)) for datum in data]


def weights_in_place_of_mask(fields: Any) -> dict[str, Any]:
    """Return the fields with ``mask`` under the name ``weights``."""
    return {"weights" if name == "mask" else name: x for name, x in fields.items()}


def with_fields(datum: Any, fields: dict[str, Any]) -> Any:
    """Copy a datum with other fields, and with all that its class has besides."""
    if dataclasses.is_dataclass(datum) and not isinstance(datum, type):
        return dataclasses.replace(datum, loss_fn_inputs=fields)
    return with_inputs(datum, fields)
