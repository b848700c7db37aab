"""The door: the bytes of requests become datums and arguments. Nothing here has a state.

The forms are those of the ``tinker`` SDK: protobuf for forward and backward passes, JSON for all else. SDKs before 0.25
send JSON alone. Every field is checked: an error is a ``LossInputError`` with the place, such as
``data[3].loss_fn_inputs["weights"]``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import zstandard
from google.protobuf.message import DecodeError
from tinker.proto import tinker_public_pb2 as pb

from lossfns.datum import Datum, TensorData
from lossfns.errors import LossInputError, show
from lossfns.server.parts import check_json_parts, check_protobuf_parts

PROTOBUF, JSON = "application/x-protobuf", "application/json"
DTYPES: dict[int, tuple[str, np.dtype]] = {
    pb.DTYPE_FLOAT32: ("float32", np.dtype("<f4")),
    pb.DTYPE_INT64: ("int64", np.dtype("<i8")),
}
MAX_CELLS = 2**26
"""The most values of the tensors of a request. A sparse tensor of few bytes may claim a shape of any size."""

JSON_BYTES = 2**26
"""The largest JSON body: in memory it may take twenty times as much."""

INT64 = np.dtype("<i8")


@dataclass(frozen=True)
class TokenInput:
    """The model input of a datum: token ids [N], as ``ModelInput.to_ints`` returns them, but not copied to a list."""

    ids: np.ndarray

    def to_ints(self) -> np.ndarray:
        return self.ids

    @property
    def length(self) -> int:
        return len(self.ids)


class Pass(NamedTuple):
    """A forward or a forward-backward request.

    Attributes:
        model_id, seq_id: the model, and the place of the request in the model's sequence, from 1.
        forward_only: whether it computes no gradient.
        loss_fn, config: the name of the loss and its settings.
        data: the datums, or the error for which they are refused. The request still has its place in the sequence.
    """

    model_id: str
    seq_id: int
    forward_only: bool
    loss_fn: str
    config: dict[str, Any]
    data: list[Datum] | LossInputError


# Bodies


def media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def check_json(content_type: str, expected: str = JSON) -> None:
    """Refuse a body that is not declared as JSON: a page of another site may send only other types without asking."""
    if media_type(content_type) != JSON:
        raise LossInputError("Content-Type", expected, show(content_type), "Declare what the body is, such as JSON.")


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """Decompress a body of the content encoding ``zstd``; refuse one of more than ``limit`` bytes when decompressed."""
    if encoding in ("", "identity"):
        return body
    if encoding != "zstd":
        raise LossInputError("Content-Encoding", "zstd or identity", show(encoding), "Send the body as it is.")
    fix = "Send one whole zstd frame, a smaller one, or no compression."
    decompressor, size = zstandard.ZstdDecompressor(max_window_size=2**27), 0
    try:
        reader = decompressor.stream_reader(body)
        while part := reader.read(2**20):  # count the bytes before any are kept
            size += len(part)
            if size > limit:
                raise LossInputError("body", f"at most {limit} bytes, decompressed", "more", fix)
        frame = decompressor.decompressobj()
        data: bytes = frame.decompress(body)
    except zstandard.ZstdError as error:
        raise LossInputError("body", "zstd", f"{error}", fix) from None
    if not frame.eof or frame.unused_data:
        got = "a part of one" if not frame.eof else f"{len(frame.unused_data)} bytes after it"
        raise LossInputError("body", "a zstd frame", got, fix)
    return data


def json_object(body: bytes) -> dict[str, Any]:
    """Parse a body that must be a JSON object, without repeated names in any object."""
    fix = "Send {...}."
    if len(body) > JSON_BYTES:
        raise LossInputError("body", f"at most {JSON_BYTES} bytes of JSON", f"{len(body)}", "Send protobuf.")
    check_json_parts(body)
    try:
        value = json.loads(body, object_pairs_hook=object_without_repeats)
    except LossInputError:
        raise
    except (ValueError, RecursionError) as error:  # also for bytes that are not UTF-8
        raise LossInputError("body", "a JSON object", f"{type(error).__name__}: {str(error)[:200]}", fix) from None
    if not isinstance(value, dict):
        raise LossInputError("body", "a JSON object", f"a {type(value).__name__}", fix)
    return value


def object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise LossInputError(repeated, "one value", f"{names.count(repeated)}", "Send each field once.")
    return value


REQUIRED: Any = object()


def field(body: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any = REQUIRED) -> Any:
    """Return a field of a JSON object that must be of a type; ``default`` where it is missing or null."""
    value = body.get(name)
    if value is None and default is not REQUIRED:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(TYPE_NAMES.get(k, k.__name__) for k in kinds)
        raise LossInputError(name, names, "nothing" if value is None else show(value), f"Send {names}.")
    return value


TYPE_NAMES: dict[type, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    list: "a list",
    bool: "true or false",
}


def only(body: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse fields that are not read: a setting without an effect would be a mistake that nobody sees."""
    if unknown := sorted(set(body) - {*names, "type"}):
        raise LossInputError(unknown[0], f"only {', '.join(sorted(names))}", show(body[unknown[0]]), "Leave it out.")


def sequence_id(value: int, name: str = "seq_id", start: int = 1) -> int:
    """Return a sequence id, a whole number from ``start``."""
    if not start <= value < 2**62:
        raise LossInputError(name, f"a whole number from {start}", str(value), "Number the requests one by one.")
    return value


# Forward and backward passes


def read_pass(body: bytes, content_type: str, *, forward_only: bool = False) -> Pass:
    """Read a request for a pass, from protobuf or JSON.

    ``forward_only`` is that of the endpoint; a protobuf body has a field for it as well. Datums that are refused
    are an error in ``data``.

    Raises:
        LossInputError: for a body of another form, and without a model or a place in the sequence.
    """
    if media_type(content_type) == PROTOBUF:
        made = pass_of_protobuf(body)
        return made._replace(forward_only=True) if forward_only else made
    check_json(content_type, f"{PROTOBUF} or {JSON}")
    return pass_of_json(json_object(body), forward_only)


def pass_of_protobuf(body: bytes) -> Pass:
    message = pb.ForwardBackwardRequest()
    check_protobuf_parts(body, pb.ForwardBackwardRequest.DATA_FIELD_NUMBER)
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        fix = "Send tinker_public_pb2.ForwardBackwardRequest."
        raise LossInputError("body", "a protobuf ForwardBackwardRequest", f"{error}", fix) from None
    if not message.model_id:
        raise LossInputError("model_id", "the id of a model", "nothing", "create_model returns it.")
    config = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():  # where both have a key, this one is the newer form
        if value.WhichOneof("value") is not None:
            config[key] = value.text if value.WhichOneof("value") == "text" else value.number
    data = data_or_error(datum_of_protobuf, message.data)
    return Pass(message.model_id, sequence_id(message.seq_id), message.forward_only, message.loss_fn, config, data)


def pass_of_json(body: dict[str, Any], forward_only: bool) -> Pass:
    name = "forward_input" if forward_only else "forward_backward_input"
    only(body, ("model_id", "seq_id", name))
    model_id, seq_id = field(body, "model_id", str), sequence_id(field(body, "seq_id", int))
    request = field(body, name, dict)
    only(request, ("data", "loss_fn", "loss_fn_config"))
    config = field(request, "loss_fn_config", dict, {})
    data = data_or_error(datum_of_json, field(request, "data", list))
    return Pass(model_id, seq_id, forward_only, field(request, "loss_fn", str), config, data)


def data_or_error(read: Callable[[Any, str], Datum], data: Sequence[Any]) -> list[Datum] | LossInputError:
    """Read the datums of a request; return the error of the first that is refused."""
    datums, cells = [], 0
    try:
        for i, each in enumerate(data):
            datums.append(read(each, f"data[{i}]"))
            cells += sum(prod(tensor.shape) for tensor in datums[-1].loss_fn_inputs.values())
            if cells > MAX_CELLS:
                got, fix = f"{cells} up to data[{i}]", "Send several requests."
                raise LossInputError("data", f"at most {MAX_CELLS} values", got, fix)
    except LossInputError as error:
        return error
    return datums


def datum_of_protobuf(message: Any, place: str) -> Datum:
    chunks = [tokens_of_protobuf(chunk, f"{place}.model_input[{j}]") for j, chunk in enumerate(message.model_input)]
    fields = {
        name: tensor_of_protobuf(tensor, f'{place}.loss_fn_inputs["{name}"]')
        for name, tensor in message.loss_fn_inputs.items()
    }
    ids = concatenate(chunks)
    check_spans(message.model_input_spans, len(ids), f"{place}.model_input_spans")
    targets = fields.get("target_tokens")
    rows = len(ids) if targets is None or not targets.shape else targets.shape[0]
    check_spans(message.loss_fn_input_spans, rows, f"{place}.loss_fn_input_spans")
    return Datum(TokenInput(ids), fields)


def concatenate(chunks: list[np.ndarray]) -> np.ndarray:
    return chunks[0] if len(chunks) == 1 else np.concatenate([np.zeros(0, np.int32), *chunks])


def tokens_of_protobuf(chunk: Any, place: str) -> np.ndarray:
    kind = chunk.WhichOneof("chunk")
    if kind != "encoded_text":
        raise not_text(kind or "nothing", place)
    return array_of_bytes(chunk.encoded_text.tokens, np.dtype("<i4"), place)


def not_text(kind: str, place: str) -> LossInputError:
    return LossInputError(place, "encoded_text", kind, "Send token ids: the models of this server read text alone.")


def check_spans(spans: Sequence[Any], length: int, place: str) -> None:
    """Check the provenance of a datum's tokens. Only a loss that this server does not have reads it."""
    if not spans:
        return
    if len(spans) > length:
        raise LossInputError(place, f"at most {length} runs", f"{len(spans)}", "Send no empty runs.")
    runs = [getattr(span, span.WhichOneof("span")) for span in spans if span.WhichOneof("span")]
    valid = len(runs) == len(spans) and all(run.length >= 0 and run.offset >= 0 for run in runs)
    if not valid or sum(run.length for run in runs) != length:
        got, fix = f"{len(spans)} runs that do not", "Send each token in one run."
        raise LossInputError(place, f"runs that cover {length} tokens", got, fix)


def array_of_bytes(data: bytes, dtype: np.dtype, place: str) -> np.ndarray:
    """Return bytes as numbers, in memory of their own: torch may write to it."""
    if len(data) % dtype.itemsize:
        got, fix = f"{len(data)} bytes", "Send all bytes of each number."
        raise LossInputError(place, f"a multiple of {dtype.itemsize} bytes, {dtype.name}", got, fix)
    return np.frombuffer(bytearray(data), dtype)


def tensor_of_protobuf(tensor: Any, place: str) -> TensorData:
    if tensor.dtype not in DTYPES:
        got = pb.DType.Name(tensor.dtype) if tensor.dtype in pb.DType.values() else str(tensor.dtype)
        raise LossInputError(place, "DTYPE_FLOAT32 or DTYPE_INT64", got, "Convert it.")
    name, dtype = DTYPES[tensor.dtype]
    if tensor.WhichOneof("encoding") == "sparse_csr":
        csr = tensor.sparse_csr
        values = array_of_bytes(csr.values, dtype, place)
        crow, col = (array_of_bytes(x, INT64, place) for x in (csr.crow_indices, csr.col_indices))
        return sparse_tensor(name, values, crow, col, list(tensor.shape), place)
    values = array_of_bytes(tensor.dense, dtype, place)
    return dense_tensor(name, values, list(tensor.shape) or [len(values)], place)


def dense_tensor(dtype: str, values: np.ndarray, shape: list[int], place: str) -> TensorData:
    check_shape(shape, place)
    if prod(shape) != len(values):
        got, fix = f"{len(values)} values", "Send all values, in row-major order."
        raise LossInputError(place, f"{prod(shape)} values, for shape {shape}", got, fix)
    return TensorData.from_numpy(values.reshape(shape))


def sparse_tensor(
    dtype: str, values: np.ndarray, crow: np.ndarray, col: np.ndarray, shape: list[int], place: str
) -> TensorData:
    """Return a dense tensor of CSR parts: columns within each row must be sorted, each at most once."""
    check_shape(shape, place)
    if len(shape) != 2:
        raise LossInputError(place, "a shape [N, K] of a sparse tensor", f"{shape}", "Send it dense.")
    rows, columns = shape
    fix = "crow_indices count the values up to each row; col_indices ascend within a row."
    if len(crow) != rows + 1 or crow[0] != 0 or crow[-1] != len(values) or (np.diff(crow) < 0).any():
        expected = f"{rows + 1} row pointers that ascend from 0 to {len(values)}"
        raise LossInputError(place, expected, f"{len(crow)}: {show(crow[:8].tolist())}", fix)
    if len(col) != len(values) or (len(col) and not 0 <= col.min() <= col.max() < columns):
        raise LossInputError(place, f"{len(values)} columns in [0, {columns})", show(col[:8].tolist()), fix)
    row = np.repeat(np.arange(rows), np.diff(crow))
    if ((np.diff(col) <= 0) & (np.diff(row) == 0)).any():
        raise LossInputError(place, "columns that ascend within each row", show(col[:8].tolist()), fix)
    dense = np.zeros(shape, values.dtype)
    dense[row, col] = values
    return TensorData.from_numpy(dense)


def check_shape(shape: list[int], place: str) -> None:
    sizes = (0, *shape)
    if len(shape) > 2 or min(sizes) < 0 or max(sizes) > MAX_CELLS or prod(shape) > MAX_CELLS:
        raise LossInputError(place, f"shape [N] or [N, K], of at most {MAX_CELLS} values", show(shape), "Split it.")


def datum_of_json(datum: Any, place: str) -> Datum:
    if not isinstance(datum, dict):
        raise LossInputError(place, "an object", show(datum), "Send {model_input, loss_fn_inputs}.")
    try:
        only(datum, ("model_input", "loss_fn_inputs"))
        ids = tokens_of_json(field(datum, "model_input", dict))
        fields = {
            name: tensor_of_json(tensor, f'loss_fn_inputs["{name}"]')
            for name, tensor in field(datum, "loss_fn_inputs", dict).items()
        }
    except LossInputError as error:
        error.field = f"{place}.{error.field}"
        raise
    return Datum(TokenInput(ids), fields)


def tokens_of_json(model_input: dict[str, Any], place: str = "model_input") -> np.ndarray:
    """Return the ids [N] of a model input: {chunks: [{type: encoded_text, tokens}]}."""
    only(model_input, ("chunks",))
    chunks = []
    for j, chunk in enumerate(field(model_input, "chunks", list)):
        where = f"{place}[{j}]"
        if not isinstance(chunk, dict) or chunk.get("type", "encoded_text") != "encoded_text":
            raise not_text(show(chunk.get("type") if isinstance(chunk, dict) else chunk), where)
        chunks.append(numbers(chunk.get("tokens"), "int64", f"{where}.tokens"))
    return concatenate(chunks)


def numbers(values: Any, dtype: str, place: str) -> np.ndarray:
    """Return a flat JSON list of numbers as an array [N]. Nothing is rounded to an integer."""
    kinds = (int,) if dtype == "int64" else (int, float)
    if not isinstance(values, list) or any(type(x) not in kinds for x in values):
        raise LossInputError(place, f"a flat list of {dtype}", show(values), "Send no null and no strings.")
    try:
        with np.errstate(over="ignore"):  # a number beyond float32 becomes inf, which the loss refuses
            return np.array(values, np.int64 if dtype == "int64" else np.float64).astype(dtype)
    except OverflowError:
        raise LossInputError(place, f"a flat list of {dtype}", "a number beyond it", "Send smaller ones.") from None


def tensor_of_json(tensor: Any, place: str) -> TensorData:
    """Read {data, dtype, shape}, with ``sparse_crow_indices`` and ``sparse_col_indices`` of a CSR tensor."""
    if not isinstance(tensor, dict) or tensor.get("dtype") not in ("float32", "int64"):
        raise LossInputError(place, "{data, dtype, shape}, of float32 or int64", show(tensor), "Send TensorData.")
    crow, col = tensor.get("sparse_crow_indices"), tensor.get("sparse_col_indices")
    dtype, values = tensor["dtype"], numbers(tensor.get("data"), tensor["dtype"], f"{place}.data")
    dimensions = tensor.get("shape")
    shape = [len(values)] if dimensions is None else numbers(dimensions, "int64", f"{place}.shape").tolist()
    if crow is None and col is None:
        return dense_tensor(dtype, values, shape, place)
    rows = numbers(crow, "int64", f"{place}.sparse_crow_indices")
    columns = numbers(col, "int64", f"{place}.sparse_col_indices")
    return sparse_tensor(dtype, values, rows, columns, shape, place)
