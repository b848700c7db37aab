"""Patches of this process's server that plant a defect in one of its functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lossfns.backend.engine import engine
from lossfns.backend.types import ForwardBackwardOutput
from lossfns.datum import Datum, TensorData
from lossfns.server import endpoints
from lossfns.server.wire import Pass


class Defect(NamedTuple):
    """A defect: the bug that a report should name first, and a function that patches this process's server."""

    bug: str
    plant: Callable[[], None]


# Patches of passes


def requests(edit: Callable[[Pass], Pass]) -> None:
    """Edit each pass before it runs."""
    run = endpoints.run_pass

    async def edited(client: Any, request: Pass, *args: Any) -> Any:
        return await run(client, edit(request) if isinstance(request.data, list) else request, *args)

    endpoints.run_pass = edited


def answers(edit: Callable[[Pass, ForwardBackwardOutput], ForwardBackwardOutput]) -> None:
    """Edit the answer to each pass."""
    run = endpoints.run_pass

    async def edited(client: Any, request: Pass, *args: Any) -> Any:
        return edit(request, await run(client, request, *args))

    endpoints.run_pass = edited


def with_fields(datum: Datum, **fields: Any) -> Datum:
    """Return a datum with other fields; None takes a field out."""
    made = dict(datum.loss_fn_inputs)
    for name, x in fields.items():
        made.pop(name, None)
        if x is not None:
            made[name] = TensorData.from_numpy(np.asarray(x, np.int64 if name == "target_tokens" else np.float32))
    return Datum(datum.model_input, made)


def weights(edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[], None]:
    """Return a defect that edits the weights of cross_entropy."""

    def edited(datum: Datum) -> Datum:
        if "weights" not in datum.loss_fn_inputs:
            return datum
        return with_fields(datum, weights=edit(datum.loss_fn_inputs["weights"].to_numpy()))

    return lambda: requests(lambda request: request._replace(data=[edited(datum) for datum in request.data]))


def metrics(edit: Callable[[dict[str, float]], dict[str, float]]) -> Callable[[], None]:
    return lambda: answers(lambda request, result: replace(result, metrics=edit(dict(result.metrics))))


def logprobs(edit: Callable[[Pass, int, np.ndarray], np.ndarray]) -> Callable[[], None]:
    """Return a defect that edits the logprobs of the answers."""

    def edited(request: Pass, result: ForwardBackwardOutput) -> ForwardBackwardOutput:
        arrays = [record["logprobs"].to_numpy() for record in result.loss_fn_outputs]
        made = [{"logprobs": TensorData.from_numpy(np.asarray(edit(request, i, x), np.float32))}
                for i, x in enumerate(arrays)]  # fmt: skip
        return replace(result, loss_fn_outputs=made)

    return lambda: answers(edited)


def settings(**fixed: Any) -> Callable[[], None]:
    """Return a defect that fixes settings of AdamW."""

    def plant() -> None:
        read = engine.adam_settings

        def edited(adam: Any, dtypes: Any) -> dict[str, Any]:
            given = read(adam, dtypes)
            return given | {name: x(given[name]) if callable(x) else x for name, x in fixed.items()}

        engine.adam_settings = edited

    return plant
