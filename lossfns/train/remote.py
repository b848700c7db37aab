"""The calls that the recipes make, on a server of the Tinker API, through the ``tinker`` SDK."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.engine.ranks import SingleProcess
from lossfns.backend.futures import Resolved
from lossfns.backend.model.tokenizer import ByteTokenizer
from lossfns.backend.types import AdamParams, SamplingParams
from lossfns.errors import LossInputError
from lossfns.loss import LossFn

MODEL = "Decoder"
"""The model that the recipes train: its tokens are the bytes of the built-in data."""

CHECKPOINT, REFERENCE = "checkpoint.json", "reference.json"
"""Files of a run that name a checkpoint on the server."""


class RemoteTrainingClient:
    """A training client of the SDK with the calls of ``LocalTrainingClient`` that the recipes make.

    A checkpoint stays on the server. ``save_state`` writes a file with its path.

    Args:
        service: the SDK's ``ServiceClient``.
        client: the SDK's ``TrainingClient``.
    """

    ranks = SingleProcess()

    def __init__(self, service: Any, client: Any) -> None:
        self._service, self._client, self._saves = service, client, 0

    def forward(self, data: Sequence[Any], loss_fn: str) -> Any:
        return self._client.forward([to_sdk(datum) for datum in data], loss_fn)

    def forward_backward_custom(self, data: Sequence[Any], loss_fn: LossFn) -> Any:
        return self._client.forward_backward_custom([to_sdk(datum) for datum in data], loss_fn)

    def optim_step(self, params: AdamParams) -> Any:
        import tinker

        return self._client.optim_step(tinker.AdamParams(**vars(params)))

    def save_weights_and_get_sampling_client(self) -> RemoteSamplingClient:
        return RemoteSamplingClient(self._client.save_weights_and_get_sampling_client().result())

    def save_state(self, path: str | Path, user_metadata: Mapping[str, str] | None = None) -> Resolved:
        """Save the state on the server, and its path there into a file.

        Two names take turns on the server, so that the last state stays complete while the next one is written.

        Args:
            path: a file that does not exist.
            user_metadata: strings by name, which the file holds as well.
        """
        self._saves += 1
        name = f"{Path(path).stem}-{self._saves % 2}"
        saved = self._client.save_state(name, overwrite=True).result()
        content = {"path": saved.path, "user_metadata": dict(user_metadata or {})}
        with open(path, "x", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        return Resolved()

    def load_state(self, path: str | Path) -> Resolved:
        self._client = self._service.create_training_client_from_state(path_on_server(path)).result()
        return Resolved()

    def load_state_with_optimizer(self, path: str | Path) -> Resolved:
        create = self._service.create_training_client_from_state_with_optimizer
        self._client = create(path_on_server(path)).result()
        return Resolved()

    def from_state(self, path: str | Path) -> RemoteTrainingClient:
        """Return another client with the weights of a state."""
        client = self._service.create_training_client_from_state(path_on_server(path)).result()
        return RemoteTrainingClient(self._service, client)

    def get_tokenizer(self) -> ByteTokenizer:
        """Return the tokenizer of the embedded model, which is the one that a server must have."""
        return ByteTokenizer()

    def describe(self) -> dict[str, Any]:
        """Return the description of the model for ``config.json``."""
        info = self._client.get_info()
        return {"model_name": info.model_data.model_name, "arch": info.model_data.arch}


class RemoteSamplingClient:
    """A sampling client of the SDK with ``sample_batch``: one request for each prompt, each with a seed of its own."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def sample_batch(self, prompts: Sequence[Any], num_samples: int, params: SamplingParams) -> Gathered:
        import tinker

        settings = {name: value for name, value in vars(params).items() if value is not None}
        return Gathered(
            [
                self._client.sample(
                    tinker.ModelInput.from_ints(list(prompt.to_ints())),
                    num_samples,
                    tinker.SamplingParams(**settings | seed_of_prompt(params.seed, i)),
                )
                for i, prompt in enumerate(prompts)
            ]
        )


def seed_of_prompt(seed: int | None, i: int) -> dict[str, int]:
    """Return the seed of the i-th prompt of a batch. With one seed, all prompts would have the same draws."""
    return {} if seed is None else {"seed": (seed + 1_000_003 * i) % 2**31}


class Gathered:
    """A future of several requests."""

    def __init__(self, futures: Sequence[Any]) -> None:
        self._futures = futures

    def result(self) -> list[Any]:
        return [future.result() for future in self._futures]


def to_sdk(datum: Any) -> Any:
    """Return a datum as the SDK's own class."""
    import tinker

    tokens = tinker.ModelInput.from_ints(list(datum.model_input.to_ints()))
    fields = {name: tinker.TensorData.from_numpy(x.to_numpy()) for name, x in datum.loss_fn_inputs.items()}
    return tinker.Datum(model_input=tokens, loss_fn_inputs=fields)


def read_pointer(path: str | Path) -> dict[str, Any]:
    """Return the content of a file that names a checkpoint on a server.

    Raises:
        LossInputError: if the file is missing or damaged.
    """
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(content["path"], str) and isinstance(content["user_metadata"], dict):
            return content
    except (KeyError, OSError, TypeError, ValueError, RecursionError):
        pass
    fix = "Restore the file, or start a new run."
    raise LossInputError("path", "a file that names a checkpoint on a server", str(path), fix)


def path_on_server(path: str | Path) -> str:
    """Return a path on the server: ``path`` itself, or the path in a file of a run."""
    return str(path) if str(path).startswith("tinker://") else str(read_pointer(path)["path"])


Client = LocalTrainingClient | RemoteTrainingClient
"""A client that the recipes can train with."""


@contextmanager
def connected(base_url: str) -> Iterator[RemoteTrainingClient]:
    """Yield a client that trains all parameters of the server's embedded model, and close the session at the end.

    The key is ``TINKER_API_KEY`` of the environment. A server on this machine may need none.

    Raises:
        LossInputError: if the SDK is not installed, the server does not have the model, or a request fails.
    """
    try:
        import tinker
    except ModuleNotFoundError as error:
        got, fix = f"no {error.name}", "pip install 'lossfns[tinker]'"
        raise LossInputError("--base-url", "the tinker SDK", got, fix) from None
    check_reachable(base_url)
    key = os.environ.get("TINKER_API_KEY", "tml-local")
    try:
        with tinker.ServiceClient(base_url=base_url, api_key=key) as service:
            client = service.create_lora_training_client(MODEL, rank=0).result()
            yield RemoteTrainingClient(service, client)
    except tinker.TinkerError as error:
        got = f"{type(error).__name__} from {base_url}: {str(error)[:300].rstrip('.')}"
        fix = f"lossfns serve starts a server with the model {MODEL}, of which all parameters are trained."
        raise LossInputError("--base-url", "a server that runs all requests", got, fix) from error


def check_reachable(base_url: str) -> None:
    """Refuse an address at which nothing listens: the SDK would try for minutes."""
    try:
        with urlopen(f"{base_url.rstrip('/')}/api/v1/healthz", timeout=30):
            pass
    except HTTPError:
        pass  # the server answers
    except (OSError, ValueError, HTTPException) as error:
        got, fix = f"{base_url} ({error})", "Start one: lossfns serve."
        raise LossInputError("--base-url", "the address of a server", got, fix) from None
