"""Results as bytes: protobuf for the SDKs that ask for it, JSON for the others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from tinker.proto import tinker_public_pb2 as pb

from lossfns.backend.types import ForwardBackwardOutput, SampleResponse
from lossfns.datum import TensorData
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
    if PROTOBUF in accept and isinstance(result, Samples):
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
    if isinstance(result, Samples):
        return samples_as_plain(result)
    return result


def output_to_protobuf(output: ForwardBackwardOutput) -> bytes:
    """Write one record for each group of consecutive datums whose arrays have the same trailing shape, [] or [K]."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics=output.metrics)
    for name, arrays in group_arrays(output.loss_fn_outputs):
        record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(arrays))
        batched = record.fields[name]
        batched.data = b"".join(x.tobytes() for x in arrays)
        batched.offsets = np.cumsum([0, *(x.nbytes for x in arrays)], dtype="<i8").tobytes()
        batched.dtype = pb.DTYPE_FLOAT32
        batched.trailing_shape.extend(arrays[0].shape[1:])
    data: bytes = message.SerializeToString()
    return data


def group_arrays(outputs: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Yield the name and the arrays of consecutive datums with the same field and the same trailing shape."""
    named = [(name, x.to_numpy()) for record in outputs for name, x in record.items()]
    for (name, _), group in groupby(named, key=lambda pair: (pair[0], pair[1].shape[1:])):
        yield name, [x for _, x in group]


class Top(NamedTuple):
    """The most probable tokens of each position: ids [n, k] and logprobs; an empty row is 0 and ``NO_LOGPROB``."""

    ids: np.ndarray
    logprobs: np.ndarray


NO_LOGPROB = -99999.0


class Samples(NamedTuple):
    """The result of a sampling request.

    Attributes:
        response: the samples.
        top_of_prompt: for each token of the prompt; None if not requested.
        top_of_samples: for each sample, for each of its tokens; None if not requested.
        targets: the logprobs of the tokens that the request names, in their layout; None if not requested.
    """

    response: SampleResponse
    top_of_prompt: Top | None = None
    top_of_samples: list[Top] | None = None
    targets: TensorData | None = None


def samples_as_plain(samples: Samples) -> dict[str, Any]:
    sequences = []
    for i, s in enumerate(samples.response.sequences):
        top = None if samples.top_of_samples is None else top_as_plain(samples.top_of_samples[i])
        row = {"stop_reason": s.stop_reason, "tokens": s.tokens, "logprobs": s.logprobs, "topk_logprobs": top}
        sequences.append({name: x for name, x in row.items() if x is not None})
    plain = {
        "type": "sample",
        "sequences": sequences,
        "prompt_logprobs": samples.response.prompt_logprobs,
        "topk_prompt_logprobs": None if samples.top_of_prompt is None else top_as_plain(samples.top_of_prompt),
        "target_prompt_logprobs": None if samples.targets is None else tensor_as_plain(samples.targets),
    }
    return {name: x for name, x in plain.items() if x is not None}


def top_as_plain(top: Top) -> list[Any]:
    rows = zip(top.ids.tolist(), top.logprobs.tolist(), strict=True)
    return [None if lps[:1] == [NO_LOGPROB] else list(zip(ids, lps, strict=True)) for ids, lps in rows]


def tensor_as_plain(x: TensorData) -> dict[str, Any]:
    indices = {"sparse_crow_indices": x.sparse_crow_indices, "sparse_col_indices": x.sparse_col_indices}
    return {"data": x.data, "dtype": x.dtype, "shape": x.shape, **{k: v for k, v in indices.items() if v is not None}}


STOP_REASONS = {"stop": pb.STOP_REASON_STOP, "length": pb.STOP_REASON_LENGTH}


def samples_to_protobuf(samples: Samples) -> bytes:
    message, response = pb.SampleResponse(), samples.response
    for i, s in enumerate(response.sequences):
        tokens, logprobs = np.array(s.tokens, "<i4").tobytes(), np.array(s.logprobs, "<f4").tobytes()
        sequence = message.sequences.add(stop_reason=STOP_REASONS[s.stop_reason], tokens=tokens, logprobs=logprobs)
        if samples.top_of_samples is not None:
            sequence.topk_sampled_logprobs.CopyFrom(top_to_protobuf(samples.top_of_samples[i]))
    if response.prompt_logprobs is not None:
        message.prompt_logprobs = np.array(response.prompt_logprobs, "<f4").tobytes()  # None becomes nan
    if samples.top_of_prompt is not None:
        message.topk_prompt_logprobs.CopyFrom(top_to_protobuf(samples.top_of_prompt))
    if samples.targets is not None:
        message.target_prompt_logprobs.CopyFrom(tensor_to_protobuf(samples.targets))
    data: bytes = message.SerializeToString()
    return data


def top_to_protobuf(top: Top) -> Any:
    ids, logprobs = top.ids.astype("<i4").tobytes(), top.logprobs.astype("<f4").tobytes()
    return pb.TopkLogprobs(token_ids=ids, logprobs=logprobs, k=top.ids.shape[1], length=len(top.ids))


def tensor_to_protobuf(x: TensorData) -> Any:
    """Return float32 values in the layout that they have."""
    values = np.asarray(x.data, "<f4").tobytes()
    if x.sparse_crow_indices is None:
        return pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=x.shape, dense=values)
    crow, col = (np.asarray(i, "<i8").tobytes() for i in (x.sparse_crow_indices, x.sparse_col_indices))
    sparse = pb.SparseCsr(values=values, crow_indices=crow, col_indices=col)
    return pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=x.shape, sparse_csr=sparse)
