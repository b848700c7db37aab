"""Uploaded losses on the wire: their metrics, and what is refused without harm to the client."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import INPUTS, X, function, whole
from serving import httpx, served, tinker
from torch import Tensor

from lossfns.server import local_service
from lossfns.server.service import Service

types = tinker.types
RANKS: dict[str, Any] = {"logprobs": 1, "weights": 1}


def datums(count: int = 2) -> list[Any]:
    tokens = types.ModelInput.from_ints([1, 2, 3])
    return [types.Datum(tokens, {"target_tokens": [2, 3, 4], "weights": [1.0, 0.5 + i, 2.0]}) for i in range(count)]


def weighted(logprobs: Tensor, weights: Tensor) -> Any:
    return -(logprobs * weights).sum(), {"custom/total:sum": weights.sum(), "custom/total:mean": weights.sum()}


def random(logprobs: Tensor, weights: Tensor) -> Any:
    return (logprobs * torch.rand_like(weights)).sum(), {}


def masked(logprobs: Tensor, weights: Tensor) -> Any:
    return logprobs[weights > 1].sum(), {}


def infinite(logprobs: Tensor, weights: Tensor) -> Any:
    return (weights - weights).sqrt().sum() + (logprobs - logprobs).sqrt().sum(), {}


def test_metrics_of_an_uploaded_loss_are_reduced_over_datums_and_over_chunks() -> None:
    """Weights add up to 3.5 and 4.5; the loss is the built-in's own."""
    with local_service(Service(device="cpu")) as sdk:
        client = sdk.create_lora_training_client("Decoder", rank=4, seed=1).result()
        handle = sdk.create_custom_loss(weighted, RANKS).result()
        result = client.forward_backward_custom(datums(), handle).result()
        builtin = client.forward_backward(datums(), "cross_entropy").result()
        assert result.metrics["custom/total:sum"] == 8.0 and result.metrics["custom/total:mean"] == 4.0
        assert result.metrics["loss:sum"] == pytest.approx(builtin.metrics["loss:sum"], rel=1e-6)
        assert [len(x["logprobs"].data) for x in result.loss_fn_outputs] == [3, 3]


def test_what_is_refused_names_the_reason_and_leaves_the_client_usable() -> None:
    with local_service(Service(device="cpu")) as sdk:
        client = sdk.create_lora_training_client("Decoder", rank=4, seed=1).result()
        with pytest.raises(tinker.RequestFailedError, match=r"torch\.rand_like"):
            sdk.create_custom_loss(random, RANKS).result()
        for fn, reason in ((masked, r"use torch\.where"), (infinite, "a finite gradient")):
            handle = sdk.create_custom_loss(fn, RANKS).result()
            with pytest.raises(tinker.RequestFailedError, match=reason):
                client.forward_backward_custom(datums(), handle).result()
        handle = sdk.create_custom_loss(weighted, RANKS).result()
        for config in ({"loss_id": "nobody"}, {}, {"loss_id": handle.loss_id, "scale": 2.0}):
            with pytest.raises(tinker.RequestFailedError, match="the id of an uploaded loss"):
                client.forward_backward(datums(), "custom", config).result()
        with pytest.raises(tinker.RequestFailedError, match="a built-in loss"):
            client.forward(datums(), "custom", {"loss_id": handle.loss_id}).result()
        result = client.forward_backward_custom(datums(), handle).result()
        assert client.optim_step(types.AdamParams(learning_rate=1e-3)).result().metrics["grad_norm"] > 0
        after = client.forward_backward_custom(datums(), handle).result()
        assert after.metrics["loss:sum"] < result.metrics["loss:sum"]


def test_an_uploaded_loss_belongs_to_its_session() -> None:
    service = Service(device="cpu")
    with local_service(service) as sdk:
        handle = sdk.create_custom_loss(weighted, RANKS).result()
        with tinker.ServiceClient(base_url="http://local", api_key="tml-local") as other:
            client = other.create_lora_training_client("Decoder", rank=4, seed=1).result()
            with pytest.raises(tinker.RequestFailedError, match="it belongs to the session"):
                client.forward_backward(datums(), "custom", {"loss_id": handle.loss_id}).result()


def test_a_graph_that_the_sdk_would_not_send_is_refused_by_name_and_a_repeated_one_is_stored_once() -> None:
    service = Service(device="cpu")
    with served(service) as url, httpx.Client(base_url=f"{url}/api/v1") as http:

        def post(call: str, **body: Any) -> Any:
            return http.post(f"/{call}", json=body, headers={"X-API-Key": "tml-local"})

        session = post("create_session", tags=[], sdk_version="0.38.0").json()["session_id"]

        def upload(number: int, graph: Any, inputs: Any = INPUTS, **more: Any) -> dict[str, Any]:
            body = {"session_id": session, "custom_loss_seq_id": number, "name": "loss"}
            answer = post("create_custom_loss", **body, graph=graph, inputs=inputs, **more)
            if answer.status_code != 200:
                return {"error": answer.text}
            found: dict[str, Any] = post("retrieve_future", request_id=answer.json()["request_id"]).json()
            return found

        attacks = ("builtins.eval", "os.system", "torch.load", "torch.ops.aten.add", "builtins.__import__")
        for number, target in enumerate(attacks):
            answer = upload(number, whole(function(target, "print(1)")))
            assert target in answer["error"] and answer["category"] == "user", answer
        assert "expected an object" in upload(50, [])["error"] or "graph" in upload(51, [])["error"]
        assert "custom_loss_seq_id" in upload(-1, whole())["error"]
        assert "code" in upload(52, whole(), code="import os")["error"]
        stored = upload(100, whole(function("torch.exp", X)))
        assert stored == upload(100, whole(function("torch.exp", X))) and stored["loss_id"].endswith(":loss:100")
        assert "Another request" in upload(100, whole())["error"]
