"""The SDK's clients of one server: calls with a deadline, datums from arrays, and nothing that only one version has."""

from __future__ import annotations

import hashlib
import logging
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Row:
    """One datum: the model's input, and the fields of the loss as arrays of N or [N, K] numbers.

    ``sparse`` names the fields that are sent in CSR form.
    """

    tokens: tuple[int, ...]
    fields: Arrays
    sparse: tuple[str, ...] = ()

    def having(self, **fields: Any) -> Row:
        """Return the row with these fields added or replaced. A field that is None is left out."""
        arrays = {name: as_field(name, x) for name, x in fields.items() if x is not None}
        kept = {name: x for name, x in self.fields.items() if name not in fields}
        return Row(self.tokens, kept | arrays, self.sparse)

    @property
    def weights(self) -> np.ndarray:
        return self.fields["weights"]


def as_field(name: str, values: Any) -> np.ndarray:
    """Return the array of a field: int64 for tokens, float32 for all else."""
    return np.asarray(values, np.int64 if name == "target_tokens" else np.float32)


Rows = Sequence[Row]


@dataclass(frozen=True)
class Answer:
    """The result of a forward or forward-backward request.

    Attributes:
        records: for each datum its outputs as the server has returned them: name → object with dtype and data.
        metrics: the metrics.
    """

    records: list[Any]
    metrics: dict[str, float]

    @property
    def logprobs(self) -> list[np.ndarray]:
        """The logprobs of each datum, in float64."""
        return [np.asarray(record["logprobs"].to_numpy(), np.float64) for record in self.records]


class NoAnswer(Exception):
    """The server gave no answer to a call in time."""


class Connection:
    """A session with a server, through the SDK's ``ServiceClient``.

    Args:
        open_session: returns the SDK's service client, or one with its calls. It is called for each session.
        types: the classes ``Datum``, ``ModelInput``, ``TensorData``, ``AdamParams`` and ``SamplingParams``.
        deadline: when calls stop waiting, in seconds of ``time.monotonic()``. The caller moves it.
    """

    def __init__(self, open_session: Callable[[], Any], types: Any, deadline: float = np.inf) -> None:
        self.open_session, self.types, self.deadline = open_session, types, deadline
        self.service = open_session()

    def wait(self, future: Any, call: str) -> Any:
        """Return the result of a call, or raise NoAnswer at the deadline.

        Some versions return a client where others return a future of one.
        """
        if not hasattr(future, "result"):
            return future
        left = None if np.isinf(self.deadline) else max(0.0, self.deadline - time.monotonic())
        try:
            return future.result(left)
        except TimeoutError as error:
            raise NoAnswer(f"{call} has no answer in time") from error

    def create(self, base_model: str, **options: Any) -> Trainer:
        """Create a training client with new adapters."""
        future = self.service.create_lora_training_client(base_model=base_model, **options)
        return Trainer(self, self.wait(future, "create_lora_training_client"))

    def from_state(self, path: str, *, optimizer: bool = False) -> Trainer:
        """Create a training client from a saved state."""
        call = "create_training_client_from_state" + ("_with_optimizer" if optimizer else "")
        return Trainer(self, self.wait(getattr(self.service, call)(path), call))

    def sampler(self, path: str) -> Any:
        """Create a sampling client of saved weights."""
        return self.wait(self.service.create_sampling_client(model_path=path), "create_sampling_client")

    def datum(self, row: Row) -> Any:
        """Return a row as a datum of the SDK."""
        fields = {name: self.tensor(x, name in row.sparse) for name, x in row.fields.items()}
        return self.types.Datum(model_input=self.types.ModelInput.from_ints(list(row.tokens)), loss_fn_inputs=fields)

    def tensor(self, x: np.ndarray, sparse: bool) -> Any:
        """Return an array as the SDK's tensor, in CSR form if ``sparse``: zeros are then left out."""
        dtype = "int64" if x.dtype == np.int64 else "float32"
        if not sparse:
            return self.types.TensorData(data=x.reshape(-1).tolist(), dtype=dtype, shape=list(x.shape))
        crow = [0, *np.cumsum(np.count_nonzero(x, axis=1)).tolist()]
        return self.types.TensorData(data=x[x != 0].tolist(), dtype=dtype, shape=list(x.shape),
            sparse_crow_indices=crow, sparse_col_indices=np.nonzero(x)[1].tolist())  # fmt: skip

    def close(self, seconds: float = 3.0) -> bool:
        """End the session, so that the server may free its models. Return whether SDK and server can do that."""
        try:
            self.service.close("success").result(seconds)
        except Exception:
            return False
        return True


@dataclass
class Trainer:
    """A training client. Each method sends one request and waits for its answer."""

    connection: Connection
    client: Any = field(repr=False)

    def forward(self, rows: Rows, loss: str = "cross_entropy", config: Mapping[str, Any] | None = None) -> Answer:
        return self.answer(self.client.forward(self.datums(rows), loss, config), f"forward({loss})")

    def forward_backward(
        self, rows: Rows, loss: str = "cross_entropy", config: Mapping[str, Any] | None = None
    ) -> Answer:
        return self.answer(self.client.forward_backward(self.datums(rows), loss, config), f"forward_backward({loss})")

    def custom(self, rows: Rows, loss_fn: Any) -> Answer:
        future = self.client.forward_backward_custom(self.datums(rows), loss_fn)
        return self.answer(future, "forward_backward_custom")

    def step(self, **adam: float) -> dict[str, float]:
        """Take a step of AdamW with these settings, and return its metrics."""
        future = self.client.optim_step(self.connection.types.AdamParams(**adam))
        return dict(self.connection.wait(future, "optim_step").metrics or {})

    def save(self, name: str) -> str:
        """Save weights and optimizer, and return the path."""
        return str(self.connection.wait(self.client.save_state(name), "save_state").path)

    def save_for_sampler(self, name: str) -> str:
        """Save weights for a sampling client, and return the path."""
        call = "save_weights_for_sampler"
        return str(self.connection.wait(self.client.save_weights_for_sampler(name), call).path)

    def load(self, path: str) -> None:
        """Load the weights of a saved state into this client."""
        self.connection.wait(self.client.load_state(path), "load_state")

    def datums(self, rows: Rows) -> list[Any]:
        return [self.connection.datum(row) for row in rows]

    def answer(self, future: Any, call: str) -> Answer:
        result = self.connection.wait(future, call)
        return Answer(list(result.loss_fn_outputs), dict(result.metrics or {}))


EPS = 1e6
"""An epsilon of AdamW beside which every gradient vanishes."""


def plain_sgd(rate: float) -> dict[str, float]:
    """Return settings with which AdamW is a step ``−rate·gradient``: without moments, g / (|g| + eps) is g / eps."""
    return {"learning_rate": rate * EPS, "beta1": 0.0, "beta2": 0.0, "eps": EPS}


def key_of(rows: Rows, *settings: Any) -> str:
    """Return a short text that is the same for the same rows and settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for row in rows:
        digest.update(repr((row.tokens, row.sparse)).encode())
        for name, x in sorted(row.fields.items()):
            digest.update(f"{name}{x.shape}".encode() + x.tobytes())
    return digest.hexdigest()[:24]


# The SDK


def connect(base_url: str, api_key: str) -> Connection:
    """Open a session with the SDK that is first on the path."""
    import tinker

    warnings.simplefilter("ignore")  # older and newer calls warn of one another
    return Connection(lambda: tinker.ServiceClient(base_url=base_url, api_key=api_key), tinker.types)


def sdk_version() -> str:
    """Return the version of the SDK that is first on the path."""
    import tinker

    return str(tinker.__version__)


class HttpLog(logging.Handler):
    """The last refusal in the SDK's log. It names the status behind a call that the SDK repeats in silence."""

    PATTERN = re.compile(r'"(?:HTTP/\S+ )?([45]\d\d) ?([^"]*)"')

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.DEBUG)
        self.tell = tell
        for name in ("tinker", "httpx"):
            logger = logging.getLogger(name)
            logger.setLevel(logging.DEBUG)
            logger.handlers, logger.propagate = [self], False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except Exception:
            return
        found = self.PATTERN.search(text)
        path = re.search(r"https?://[^/\s]+(\S+)", text)
        if found and not (found[1] == "408" or "dynamic_config" in text or "telemetry" in text):
            self.tell(f"{found[1]} {found[2]}".strip() + (f" from {path[1]}" if path else ""))
