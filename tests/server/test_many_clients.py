"""Many clients at once, and a server that stops under load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import KEY, datum, served, tinker, tiny_model, tiny_service

from lossfns.backend.client.service import LocalServiceClient
from lossfns.backend.types import AdamParams

types = tinker.types


def requests(seed: int, count: int) -> list[Callable[[Any], Any]]:
    """Gradients and steps, some of which only one order computes."""
    generator = torch.Generator().manual_seed(seed)

    def one(i: int) -> Callable[[Any], Any]:
        row = torch.randint(0, 256, (6,), generator=generator).tolist()
        rate = float(torch.rand((), generator=generator)) / 50
        if i % 3 == 2:
            return lambda client: client.optim_step(AdamParams(learning_rate=rate))
        return lambda client: client.forward_backward([datum(row)], "cross_entropy")

    return [one(i) for i in range(count - count % 3)]


def by_sdk(call: Callable[[Any], Any], client: Any) -> Any:
    """Make a call with the SDK's own AdamParams."""

    class Client:
        forward_backward = client.forward_backward

        @staticmethod
        def optim_step(adam: Any) -> Any:
            return client.optim_step(types.AdamParams(learning_rate=adam.learning_rate))

    return call(Client)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def serial(seed: int, count: int) -> dict[str, torch.Tensor]:
    client = LocalServiceClient({"Tiny": tiny_model}, device="cpu").create_lora_training_client("Tiny", 4, seed)
    for call in requests(seed, count):
        call(client).result()
    return weights(client.model)


def run_many(clients: int, count: int) -> None:
    """Let clients train models of their own at once, and compare with one after the other."""
    service = tiny_service()
    with served(service) as url:

        def train(seed: int) -> dict[str, torch.Tensor]:
            with tinker.ServiceClient(base_url=url, api_key=KEY) as service_client:
                client = service_client.create_lora_training_client("Tiny", rank=4, seed=seed).result()
                futures = [by_sdk(call, client) for call in requests(seed, count)]
                results = [future.result() for future in futures]
                assert len(results) == count - count % 3
                return weights(service.models[client.model_id].client.model)

        with ThreadPoolExecutor(clients) as pool:
            trained = list(pool.map(train, range(clients)))
    for seed, ours in enumerate(trained):
        for name, expected in serial(seed, count).items():
            assert torch.equal(ours[name], expected), (seed, name)


def test_clients_at_once_train_as_one_after_the_other() -> None:
    run_many(clients=4, count=30)


@pytest.mark.exhaustive
def test_sixteen_clients_with_two_hundred_requests_each() -> None:
    run_many(clients=16, count=200)


SERVER = """
import sys
sys.path.insert(0, {tests!r})
from serving import tiny_service
from lossfns.server import create_app, serve
serve(create_app(tiny_service(state=sys.argv[1])), port=int(sys.argv[2]))
"""


def start(state: Path, port: int = 0) -> tuple[subprocess.Popen[str], str]:
    code = SERVER.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(state), str(port)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    return process, process.stdout.readline().split()[-1]


def stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert process.stdout is not None
    process.stdout.close()


def run_restarted(tmp_path: Path, clients: int, count: int) -> None:
    """Stop the server while clients train, and start it again: they notice nothing."""
    process, url = start(tmp_path)
    port = int(url.rpartition(":")[2])
    begun = threading.Barrier(clients + 1)

    def train(seed: int) -> dict[str, Any]:
        with tinker.ServiceClient(base_url=url, api_key=KEY) as service_client:
            client = service_client.create_lora_training_client("Tiny", rank=4, seed=seed).result()
            calls = requests(seed, count)
            by_sdk(calls[0], client).result()
            begun.wait(60)
            for future in [by_sdk(call, client) for call in calls[1:]]:
                future.result()
            return {"path": client.save_state("end").result().path}

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(train, seed) for seed in range(clients)]
        begun.wait(60)
        stop(process)
        process, _ = start(tmp_path, port)
        paths = [future.result(120)["path"] for future in futures]
    stop(process)
    service = tiny_service(state=tmp_path)
    for seed, path in enumerate(paths):
        trained = service.local.create_training_client_from_state(service.state.checkpoint(path)).model
        for name, expected in serial(seed, count).items():
            assert torch.equal(weights(trained)[name], expected), (seed, name)


@pytest.mark.exhaustive
def test_a_server_that_stops_under_load_goes_on_where_it_was(tmp_path: Path) -> None:
    run_restarted(tmp_path, clients=8, count=120)
