"""What is refused, by which status and with which reason; and that nothing else changes by it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import KEY, batch, datum, httpx, sdk, served, tinker, tiny_service, zstandard
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.request_conv import forward_backward_request_to_proto

from lossfns.errors import LossInputError
from lossfns.server import wire

types = tinker.types
PROTOBUF = {"content-type": wire.PROTOBUF}


class Raw:
    """Requests without the SDK."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=f"{url}/api/v1", timeout=60.0)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(path, **({"json": body} if body is not None else {}), **options)

    def result(self, answer: httpx.Response) -> Any:
        assert answer.status_code == 200, answer.text
        return self.post("retrieve_future", {"request_id": answer.json()["request_id"]}).json()

    def model(self) -> str:
        """Create a session and a model of it; return the model's id."""
        session = self.post("create_session", {"tags": [], "user_metadata": {}, "sdk_version": "0"}).json()
        body = {"session_id": session["session_id"], "model_seq_id": 0, "base_model": "Tiny"}
        model: str = self.result(self.post("create_model", body))["model_id"]
        return model


@contextmanager
def raw(service: Any = None, **options: Any) -> Iterator[Raw]:
    with served(service or tiny_service(), **options) as url:
        yield Raw(url)


def message(model: str, seq_id: int, data: list[Any] | None = None, loss_fn: str = "cross_entropy") -> Any:
    given = types.ForwardBackwardInput(batch() if data is None else data, loss_fn)
    return forward_backward_request_to_proto(types.ForwardBackwardRequest(given, model, seq_id))


def step(model: str, seq_id: int, **more: Any) -> dict[str, Any]:
    return {"model_id": model, "seq_id": seq_id, "adam_params": {"learning_rate": 1e-2}, **more}


def test_a_failed_request_is_the_only_one_that_fails() -> None:
    bad = {
        "ids beyond the vocabulary": ([datum([1, 5000, 3])], "cross_entropy", None, "datum\\[0\\].model_input"),
        "another length": ([datum([1, 2, 3], weights=[1.0])], "cross_entropy", None, "weights"),
        "an unknown loss": (batch(), "dpo", None, "loss_fn"),
        "an unknown setting": (batch(), "ppo", {"epsilon": 0.2}, "loss_fn_config"),
        "a missing field": (batch(), "ppo", None, "logprobs"),
        "no published formula": (batch(), "stable_reinforce", None, "not published"),
        "nan": ([datum([1, 2, 3], weights=[float("nan"), 1.0])], "cross_entropy", None, "weights"),
        "an image": (
            [types.Datum(types.ModelInput(chunks=[types.ImageChunk(data=b"x", format="png", expected_tokens=1)]), {})],
            "cross_entropy",
            None,
            "data\\[0\\].model_input\\[0\\].*image",
        ),
    }
    with sdk() as service:
        client = service.create_lora_training_client("Tiny", rank=4, seed=1).result()
        other = service.create_lora_training_client("Tiny", rank=4, seed=1).result()
        for name, (data, loss_fn, config, place) in bad.items():
            with pytest.raises(tinker.RequestFailedError, match=place) as caught:
                client.forward_backward(data, loss_fn, config).result(timeout=20)
            assert caught.value.category is types.RequestErrorCategory.User, name
            assert "Traceback" not in str(caught.value), name
        for each in (client, other):  # the failures have changed neither this model nor another one
            each.forward_backward(batch(), "cross_entropy").result(timeout=20)
        norms = [c.optim_step(types.AdamParams()).result(timeout=20).metrics["grad_norm"] for c in (client, other)]
        assert norms[0] == norms[1]
        with pytest.raises(tinker.RequestFailedError, match="accumulated gradient"):
            client.optim_step(types.AdamParams()).result(timeout=20)
        with pytest.raises(tinker.RequestFailedError, match="the name of a checkpoint"):
            client.save_state("../../outside").result(timeout=20)
        with pytest.raises(tinker.RequestFailedError, match="ttl_seconds"):
            client.save_state("a", ttl_seconds=3600).result(timeout=20)
        client.save_state("a").result(timeout=20)
        with pytest.raises(tinker.RequestFailedError, match="exist"):
            client.save_state("a").result(timeout=20)
        with pytest.raises(tinker.BadRequestError, match="adamw"):
            service.create_lora_training_client("Tiny", optimizer=types.DimuonOptimizerConfig()).result(timeout=20)
        with pytest.raises(tinker.RequestFailedError, match="base_model"):
            service.create_lora_training_client("Huge").result(timeout=20)
        with pytest.raises(tinker.RequestFailedError, match="tinker://"):
            service.create_training_client_from_state("tinker://../../etc/passwd").result(timeout=20)
        with pytest.raises(tinker.BadRequestError, match="base_model"):
            service.create_sampling_client(base_model="Huge").result(timeout=20)
        sampler = service.create_sampling_client(base_model="Tiny").result(timeout=20)
        with pytest.raises(tinker.RequestFailedError, match="max_tokens"):
            sampler.sample(types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=0)).result(timeout=20)


def test_a_step_is_refused_once_after_a_gradient_that_failed() -> None:
    with raw() as server:
        model = server.model()

        def submit(seq_id: int, **more: Any) -> httpx.Response:
            data = message(model, seq_id, **more).SerializeToString()
            return server.post("forward_backward", content=data, headers=PROTOBUF)

        server.result(submit(1))
        failed = submit(2, data=[datum([1, 999])])
        assert "optim_step" in server.result(server.post("optim_step", step(model, 3)))["error"]
        assert "grad_norm" in server.result(server.post("optim_step", step(model, 4)))["metrics"]
        assert "error" in server.result(failed)
        assert "error" in server.result(submit(5, data=[datum([1, 999])]))
        server.result(submit(6))  # after the failure was read: the client has made up for it
        assert "grad_norm" in server.result(server.post("optim_step", step(model, 7)))["metrics"]


def test_requests_run_in_the_order_of_their_ids_and_once() -> None:
    with raw(tiny_service(gap_seconds=0.5)) as server:
        model = server.model()
        body = message(model, 1).SerializeToString()
        later = server.post("optim_step", step(model, 2))
        first = [server.post("forward_backward", content=body, headers=PROTOBUF) for _ in range(3)]
        assert len({answer.json()["request_id"] for answer in first}) == 1
        norm = server.result(later)["metrics"]["grad_norm"]
        other = server.post("forward_backward", content=message(model, 1, loss_fn="ppo").SerializeToString(),
                            headers=PROTOBUF)  # fmt: skip
        assert other.status_code == 400 and "Another request" in other.json()["error"]
        alone = server.model()
        server.post("forward_backward", content=message(alone, 1).SerializeToString(), headers=PROTOBUF)
        assert server.result(server.post("optim_step", step(alone, 2)))["metrics"]["grad_norm"] == norm
        # An id that does not come: the request behind it waits, and runs in the end.
        answer = server.post("forward_backward", content=message(model, 4).SerializeToString(), headers=PROTOBUF)
        assert "metrics" in server.result(answer)
        late = server.post("forward_backward", content=message(model, 3).SerializeToString(), headers=PROTOBUF)
        assert late.status_code == 400 and "has passed" in late.json()["error"]
        assert "has passed" in server.result(server.post("optim_step", step(model, 5)))["error"]
        assert "grad_norm" in server.result(server.post("optim_step", step(model, 6)))["metrics"]
        save = {"model_id": model, "seq_id": 7, "path": "a"}
        assert server.result(server.post("save_weights", save))["path"].endswith("/weights/a")


def test_malformed_requests_have_a_status_and_a_reason() -> None:
    with raw(body_bytes=10_000, decompressed_bytes=20_000, poll_seconds=0.2) as server:
        model = server.model()
        proto = message(model, 1).SerializeToString()
        bomb = {**PROTOBUF, "content-encoding": "zstd"}
        fb = "forward_backward"
        cases: list[tuple[str, dict[str, Any], int, str]] = [
            (fb, {"content": b"\xff" * 50, "headers": PROTOBUF}, 400, "protobuf"),
            (fb, {"content": b"", "headers": PROTOBUF}, 400, "model_id"),
            (fb, {"content": proto[:40], "headers": PROTOBUF}, 400, ""),
            (fb, {"content": message("nobody:train:0", 1).SerializeToString(), "headers": PROTOBUF}, 404, "nobody"),
            (fb, {"content": message(model, 0).SerializeToString(), "headers": PROTOBUF}, 400, "seq_id"),
            (fb, {"content": bytes(20_000), "headers": PROTOBUF}, 413, "10000"),
            (fb, {"content": zstandard.compress(bytes(10**6)), "headers": bomb}, 400, "decompressed"),
            (fb, {"content": b"no zstd", "headers": bomb}, 400, "zstd"),
            (fb, {"content": b"{}", "headers": {"content-encoding": "br"}}, 400, "Content-Encoding"),
            (fb, {"body": {"model_id": model, "seq_id": 1}}, 400, "forward_backward_input"),
            ("optim_step", {"content": b"{"}, 400, "JSON"),
            ("optim_step", {"content": b"[" * 100_0}, 400, "JSON"),
            ("optim_step", {"body": []}, 400, "a JSON object"),
            ("optim_step", {"body": step(model, True)}, 400, "seq_id"),
            ("optim_step", {"body": step("nobody", 1)}, 404, "nobody"),
            ("create_model", {"body": {"session_id": "x", "model_seq_id": 0, "base_model": "Tiny"}}, 404, "session"),
            ("create_model", {"body": {"session_id": 3, "model_seq_id": 0, "base_model": "Tiny"}}, 400, "session_id"),
            ("retrieve_future", {"body": {"request_id": "x"}}, 410, "unknown"),
            ("retrieve_future", {"body": {}}, 400, "request_id"),
            ("session_heartbeat", {"body": {"session_id": "x"}}, 404, "session"),
            ("weights_info", {"body": {"tinker_path": "tinker://x"}}, 400, "tinker://"),
            ("unload_model", {"body": {}}, 404, "no such call"),
        ]
        for path, request, status, reason in cases:
            answer = server.post(path, **request)
            assert answer.status_code == status and reason in answer.json()["error"], (path, request, answer.text)
            assert "Traceback" not in answer.text
        for method, path, status in (
            ("GET", "optim_step", 404),
            ("GET", "training_runs/..%2F..%2Fetc/checkpoints", 404),
            ("GET", "training_runs?limit=x", 400),
            ("DELETE", f"training_runs/{model}/checkpoints/weights/..", 404),
        ):
            assert server.http.request(method, path).status_code in (status, 400), (method, path)
        failing = (  # the model and the place are known: the place is taken, and the future fails
            ("optim_step", step(model, 1, learning_rate=1.0), "learning_rate"),
            ("optim_step", {"model_id": model, "seq_id": 2}, "adam_params"),
            ("optim_step", {"model_id": model, "seq_id": 3, "adam_params": {"learning_rate": "high"}}, "learning_rate"),
            ("optim_step", {"model_id": model, "seq_id": 4, "optimizer_params": {"type": "dimuon"}}, "AdamW"),
            ("save_weights", {"model_id": model, "seq_id": 5}, "path"),
            ("save_weights", {"model_id": model, "seq_id": 6, "path": "a", "color": 1}, "color"),
            ("load_weights", {"model_id": model, "seq_id": 7, "path": "/etc/passwd", "optimizer": False}, "tinker://"),
            ("save_weights_external", {"model_id": model, "seq_id": 8, "path": "a"}, "external"),
        )
        for path, body, reason in failing:
            answer = server.result(server.post(path, body))
            assert reason in answer["error"] and answer["category"] == "user", (path, body, answer)
        save = {"model_id": model, "seq_id": 9, "path": "a"}
        assert server.result(server.post("save_weights", save))["path"].endswith("/weights/a")


def test_tensors_that_are_not_what_they_claim_are_refused_with_their_place() -> None:
    f4, i8 = pb.DTYPE_FLOAT32, pb.DTYPE_INT64

    def tensor(dtype: int = f4, shape: tuple[int, ...] = (2,), dense: bytes = bytes(8)) -> Any:
        return pb.Tensor(dtype=dtype, shape=shape, dense=dense)

    def csr(crow: list[int], col: list[int], values: int = 2, shape: tuple[int, ...] = (2, 3)) -> Any:
        parts = [b"".join(i.to_bytes(8, "little", signed=True) for i in x) for x in (crow, col)]
        sparse = pb.SparseCsr(values=bytes(4 * values), crow_indices=parts[0], col_indices=parts[1])
        return pb.Tensor(dtype=f4, shape=shape, sparse_csr=sparse)

    cases = {
        "cut": tensor(dense=bytes(7)),
        "fewer values": tensor(shape=(3,)),
        "a negative size": tensor(shape=(-2,)),
        "three dimensions": tensor(shape=(1, 2, 1)),
        "a huge shape": tensor(shape=(2**31, 2**31), dense=b""),
        "no dtype": tensor(dtype=pb.DTYPE_UNSPECIFIED),
        "bfloat16": tensor(dtype=pb.DTYPE_BFLOAT16),
        "integers of half the bytes": tensor(dtype=i8),
        "too few row pointers": csr([0, 2], [0, 1]),
        "row pointers that fall": csr([0, 3, 2], [0, 1]),
        "row pointers beyond the values": csr([0, 1, 5], [0, 1]),
        "a start above 0": csr([1, 1, 2], [0, 1]),
        "a column out of range": csr([0, 1, 2], [0, 3]),
        "a negative column": csr([0, 1, 2], [-1, 0]),
        "columns out of order": csr([0, 2, 2], [1, 0]),
        "a column twice": csr([0, 2, 2], [1, 1]),
        "a huge sparse shape": csr([0, 1, 2], [0, 1], shape=(2, 2**40)),
        "a sparse row": csr([0, 1, 2], [0, 1], shape=(2,)),
    }
    for name, x in cases.items():
        request = message("m", 1, [datum([1, 2, 3]), datum([1, 2, 3])])
        request.data[1].loss_fn_inputs["weights"].CopyFrom(x)
        refused = wire.read_pass(request.SerializeToString(), wire.PROTOBUF).data
        assert isinstance(refused, LossInputError), name
        assert str(refused).startswith('data[1].loss_fn_inputs["weights"]: '), (name, str(refused))
    accepted = csr([0, 2, 2], [0, 2])
    request.data[1].loss_fn_inputs["weights"].CopyFrom(accepted)
    data = wire.read_pass(request.SerializeToString(), wire.PROTOBUF).data
    assert not isinstance(data, LossInputError) and data[1].loss_fn_inputs["weights"].shape == [2, 3]


def test_the_newer_form_of_a_setting_goes_before_the_older_one() -> None:
    request = message("m", 1)
    request.loss_fn_config["a"], request.loss_fn_config["b"] = 1.0, 2.0
    request.loss_fn_config_v2["a"].number = 3.0
    request.loss_fn_config_v2["c"].text = "t"
    assert wire.read_pass(request.SerializeToString(), wire.PROTOBUF).config == {"a": 3.0, "b": 2.0, "c": "t"}


def test_a_key_is_needed_where_there_is_one() -> None:
    with served(tiny_service(), api_key=KEY) as url:
        for headers, status in (({}, 401), ({"x-api-key": "tml-other"}, 401), ({"x-api-key": KEY}, 200)):
            assert httpx.get(f"{url}/api/v1/healthz", headers=headers).status_code == status
        with tinker.ServiceClient(base_url=url, api_key=KEY) as service:
            service.create_lora_training_client("Tiny", rank=4).result(timeout=20)


def test_limits() -> None:
    with raw(tiny_service(sessions=2, model_limit=2, queue=3)) as server:
        model = server.model()
        answers = [server.post("optim_step", step(model, i)) for i in range(10, 14)]  # they wait for request 1
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        server.model()
        session = server.post("create_session", {"tags": [], "user_metadata": {}, "sdk_version": "0"})
        assert session.status_code == 429 and "2 sessions" in session.json()["error"]
        body = {"session_id": model.split(":")[0], "model_seq_id": 1, "base_model": "Tiny"}
        assert "at most 2 models" in server.result(server.post("create_model", body))["error"]


def test_a_session_ends_by_the_client_or_by_its_silence() -> None:
    service = tiny_service(session_seconds=0.3)
    with raw(service) as server:
        model = server.model()
        session = model.split(":")[0]
        save = server.post("save_weights", {"model_id": model, "seq_id": 1, "path": "a"})
        path = server.result(save)["path"]
        assert server.post(f"sessions/{session}/finish", {"reason": {"type": "success"}}).status_code == 204
        assert server.post("session_heartbeat", {"session_id": session}).status_code == 410
        assert server.post("optim_step", step(model, 2)).status_code == 410
        silent = server.model()
        for _ in range(2):
            time.sleep(0.5)
            other = server.model()
        assert server.post("optim_step", step(silent, 1)).status_code == 410
        body = {"session_id": other.split(":")[0], "model_seq_id": 1, "path": path, "optimizer": True}
        assert server.result(server.post("load_weights", body))["path"] == path  # checkpoints stay


def test_a_client_that_reads_no_results_stops_no_other_one() -> None:
    with raw(tiny_service(results=20)) as server:
        model, other = server.model(), server.model()
        answers = [server.post("optim_step", step(model, i)).status_code for i in range(1, 16)]
        assert answers.count(429) >= 5 and "this session" in server.post("optim_step", step(model, 16)).json()["error"]
        assert "error" in server.result(server.post("optim_step", step(other, 1)))
        server.post(f"sessions/{model.partition(':')[0]}/finish", {})
        third = server.model()
        assert [server.post("optim_step", step(third, i)).status_code for i in range(1, 9)] == [200] * 8


def test_a_model_that_cannot_be_saved_does_not_keep_the_others_from_it(tmp_path: Path) -> None:
    with raw(tiny_service(state=tmp_path)) as server:
        first, second = server.model(), server.model()
        session = first.partition(":")[0]
        (tmp_path / session / "0" / "stopped.state" / "in the way").mkdir(parents=True)
    with raw(tiny_service(state=tmp_path)) as server:
        assert server.post("get_info", {"model_id": second}).status_code == 200
        assert server.post("get_info", {"model_id": first}).status_code == 404


def test_a_state_that_is_no_folder_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        tiny_service(state=tmp_path / "file")
