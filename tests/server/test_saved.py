"""A server that stops saves all that its clients need, and the next one in the same folder goes on."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import KEY, batch, httpx, sdk, served, tinker, tiny_service

from lossfns.errors import LossInputError
from lossfns.server import local_service

types = tinker.types


def trained(tmp_path: Path, stops: bool) -> dict[str, torch.Tensor]:
    """Train a little, with a gradient that has not been used in the middle, where the server may stop."""
    first = tiny_service(state=tmp_path)
    with served(first) as url:
        port = int(url.rpartition(":")[2])
        client_of = tinker.ServiceClient(base_url=url, api_key=KEY)
        client = client_of.create_lora_training_client("Tiny", rank=4, seed=1).result()
        client.forward_backward(batch(), "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        client.forward_backward(batch(), "cross_entropy").result()
        sampler = client_of.create_sampling_client(base_model="Tiny").result()
        expected = sampler.compute_logprobs(types.ModelInput.from_ints([1, 2])).result()
        if not stops:
            return rest_of(client, client_of, first, sampler, expected)
    second = tiny_service(state=tmp_path)
    assert (tmp_path / "stopped.json").exists()
    with served(second, port=port):
        assert not (tmp_path / "stopped.json").exists()
        return rest_of(client, client_of, second, sampler, expected)


def rest_of(client: Any, client_of: Any, service: Any, sampler: Any, expected: Any) -> dict[str, torch.Tensor]:
    client.forward_backward(batch()[:1], "cross_entropy").result()
    client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    assert sampler.compute_logprobs(types.ModelInput.from_ints([1, 2])).result() == expected
    model = service.models[client.model_id].client.model
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    client_of.close("success").result()
    return weights


def test_clients_go_on_after_a_restart(tmp_path: Path) -> None:
    alone, restarted = (trained(tmp_path / str(stops), stops) for stops in (False, True))
    for name, x in alone.items():
        assert torch.equal(restarted[name], x), name


def test_results_that_nobody_has_read_survive(tmp_path: Path) -> None:
    with served(tiny_service(state=tmp_path)) as url:
        http = httpx.Client(base_url=f"{url}/api/v1", timeout=60)
        session = http.post("create_session", json={}).json()["session_id"]
        body = {"session_id": session, "model_seq_id": 0, "base_model": "Tiny"}
        created = http.post("create_model", json=body).json()["request_id"]
        model = http.post("retrieve_future", json={"request_id": created}).json()["model_id"]
        step = http.post("optim_step", json={"model_id": model, "seq_id": 1, "adam_params": {}}).json()["request_id"]
        waits = http.post("optim_step", json={"model_id": model, "seq_id": 3, "adam_params": {}}).json()["request_id"]
    with served(tiny_service(state=tmp_path)) as url:
        http = httpx.Client(base_url=f"{url}/api/v1", timeout=60)
        outcomes = [http.post("retrieve_future", json={"request_id": each}).json() for each in (created, step, waits)]
        assert outcomes[0]["model_id"] == model
        assert "accumulated gradient" in outcomes[1]["error"]
        assert "the server stopped" in outcomes[2]["error"]
        save = {"model_id": model, "seq_id": 4, "path": "a"}
        saved = http.post("save_weights", json=save).json()["request_id"]
        assert http.post("retrieve_future", json={"request_id": saved}).json()["path"].endswith("/a")


def test_what_waits_for_a_result_is_sent_away_when_the_server_stops() -> None:
    service = tiny_service(gap_seconds=60.0)
    answers: list[int] = []
    with served(service) as url:
        http = httpx.Client(base_url=f"{url}/api/v1", timeout=60)
        session = http.post("create_session", json={}).json()["session_id"]
        body = {"session_id": session, "model_seq_id": 0, "base_model": "Tiny"}
        created = http.post("create_model", json=body).json()["request_id"]
        model = http.post("retrieve_future", json={"request_id": created}).json()["model_id"]
        waits = {"model_id": model, "seq_id": 2, "adam_params": {}}
        request = {"request_id": http.post("optim_step", json=waits).json()["request_id"]}

        def ask() -> None:
            answers.append(httpx.post(f"{url}/api/v1/retrieve_future", json=request, timeout=60).status_code)

        poll = threading.Thread(target=ask)
        poll.start()
        while not any(future.waiters for future in service.futures.by_id.values()):
            time.sleep(0.01)
    poll.join()
    assert answers == [408]


def test_nothing_is_kept_without_a_folder() -> None:
    service = tiny_service()
    with sdk(service) as client_of:
        client_of.create_lora_training_client("Tiny", rank=4).result().save_state("a").result()
        assert service.state.root.exists()
    assert not service.state.root.exists()


def test_a_service_without_a_socket_is_saved_as_well(tmp_path: Path) -> None:
    with local_service(tiny_service(state=tmp_path)) as client_of:
        path = client_of.create_lora_training_client("Tiny", rank=4).result().save_state("a").result().path
    assert (tmp_path / "stopped.json").exists()
    with local_service(tiny_service(state=tmp_path)) as client_of:
        assert not (tmp_path / "stopped.json").exists()
        assert client_of.create_training_client_from_state(path).result().get_info().lora_rank == 4


def test_a_model_that_cannot_be_restored_is_named_and_kept(tmp_path: Path) -> None:
    with served(tiny_service(state=tmp_path)) as url:
        service = tinker.ServiceClient(base_url=url, api_key=KEY)
        damaged, whole = (service.create_lora_training_client("Tiny", rank=4).result().model_id for _ in range(2))
    (tmp_path / damaged.replace(":train:", "/") / "stopped.state").write_bytes(b"damaged")
    again = tiny_service(state=tmp_path)
    with served(again):
        assert list(again.models) == [whole]
        (entry,) = json.loads((tmp_path / "not_restored.json").read_text())["models"]
        assert entry["model_id"] == damaged


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    first = tiny_service(state=tmp_path)
    with pytest.raises(LossInputError, match="which another server has"):
        tiny_service(state=tmp_path)
    with served(first):
        pass
    tiny_service(state=tmp_path).state.close()
