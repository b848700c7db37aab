"""Results as bytes: protobuf for the SDKs that ask for it, JSON for the others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from tinker.proto import tinker_public_pb2 as pb

from lossfns.backend.types import ForwardBackwardOutput, SampleResponse
from lossfns.server.wire import JSON, PROTOBUF


class Encoded(NamedTuple):
    """A result in both forms. Where it has no protobuf form, both are JSON."""

    protobuf: bytes
    json: bytes


def encode(result: Any, accept: str) -> tuple[str, bytes]:
    """Return the content type and the bytes of a result, in protobuf where it has that form and the client takes it."""
    if isinstance(result, Encoded):
        binary = PROTOBUF in accept and result.protobuf != result.json
        return (PROTOBUF, result.protobuf) if binary else (JSON, result.json)
    if PROTOBUF in accept and isinstance(result, ForwardBackwardOutput):
        return PROTOBUF, output_to_protobuf(result)
    if PROTOBUF in accept and isinstance(result, SampleResponse):
        return PROTOBUF, samples_to_protobuf(result)
    return JSON, to_json(as_plain(result))


def to_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def as_plain(result: Any) -> Any:
    """Return a result as plain data."""
    if isinstance(result, ForwardBackwardOutput):
        return {
            "loss_fn_output_type": "ArrayRecord",
            "loss_fn_outputs": [
                {name: {"data": x.data, "dtype": x.dtype, "shape": x.shape} for name, x in record.items()}
                for record in result.loss_fn_outputs
            ],
            "metrics": result.metrics,
        }
    if isinstance(result, SampleResponse):
        sequences = [
            {"stop_reason": s.stop_reason, "tokens": s.tokens, "logprobs": s.logprobs} for s in result.sequences
        ]
        return {"type": "sample", "sequences": sequences, "prompt_logprobs": result.prompt_logprobs}
    return result


def output_to_protobuf(output: ForwardBackwardOutput) -> bytes:
    """One record for each run of datums whose arrays have the same trailing shape, [] or [K], and dtype."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics=output.metrics)
    for name, arrays in runs(output.loss_fn_outputs):
        record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(arrays))
        batched = record.fields[name]
        batched.data = b"".join(x.tobytes() for x in arrays)
        batched.offsets = np.cumsum([0, *(x.nbytes for x in arrays)], dtype="<i8").tobytes()
        batched.dtype = pb.DTYPE_FLOAT32
        batched.trailing_shape.extend(arrays[0].shape[1:])
    data: bytes = message.SerializeToString()
    return data


def runs(outputs: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Group the datums' arrays, one field each, by name and trailing shape, in order."""
    named = [(name, x.to_numpy()) for record in outputs for name, x in record.items()]
    for (name, _), group in groupby(named, key=lambda pair: (pair[0], pair[1].shape[1:])):
        yield name, [x for _, x in group]


STOP_REASONS = {"stop": pb.STOP_REASON_STOP, "length": pb.STOP_REASON_LENGTH}


def samples_to_protobuf(response: SampleResponse) -> bytes:
    message = pb.SampleResponse()
    for s in response.sequences:
        tokens, logprobs = np.array(s.tokens, "<i4").tobytes(), np.array(s.logprobs, "<f4").tobytes()
        message.sequences.add(stop_reason=STOP_REASONS[s.stop_reason], tokens=tokens, logprobs=logprobs)
    if response.prompt_logprobs is not None:
        message.prompt_logprobs = np.array(response.prompt_logprobs, "<f4").tobytes()  # None becomes nan
    data: bytes = message.SerializeToString()
    return data
