"""Malformed requests get a reason, change nothing, and leave the server as it was."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from malformed_requests import malformed
from requests_of_endpoints import PROTOBUF, Malformed, Target, bodies, message, text
from requests_of_endpoints import http as request
from serving import served

from lossfns.server.service import Service

KEY = "tml-fuzz"
REASON_BYTES = 2**15


class Connection:
    """A connection that is opened again when the server has closed it."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self.address = (host, int(port))
        self.socket: socket.socket | None = None
        self.halves: list[socket.socket] = []

    def open(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=60)

    def send(self, raw: bytes) -> tuple[int, bytes] | None:
        """Send a request in bytes; return the status and the body, or None if the connection was closed first."""
        for fresh in (self.socket is None, True):
            self.socket = self.socket or self.open()
            try:
                try:
                    self.socket.sendall(raw)
                except OSError:  # the server may answer before it has read all
                    if not fresh:
                        raise
                response = http.client.HTTPResponse(self.socket, method=raw.partition(b" ")[0].decode("latin-1"))
                response.begin()
                body = response.read()
            except (OSError, http.client.HTTPException):
                self.close()
                if fresh:
                    return None
                continue  # the server had closed a connection that was idle
            if response.will_close:
                self.close()
            return response.status, body
        return None

    def send_half(self, raw: bytes) -> None:
        """Send a part of a request; the last few stay open, and the others are closed."""
        half = self.open()
        half.sendall(raw)
        self.halves.append(half)
        if len(self.halves) > 20:
            self.halves.pop(0).close()

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def close_all(self) -> None:
        self.close()
        while self.halves:
            self.halves.pop().close()


class Client:
    """A client of the fuzzed server, which follows the protocol by hand."""

    def __init__(self, url: str) -> None:
        self.connection = Connection(url)
        self.target = Target(KEY, "", "", "", "", "")

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        return self.json(request(self.target, path, text(body)))

    def json(self, raw: bytes) -> Any:
        answer = self.connection.send(raw)
        assert answer is not None and answer[0] == 200, answer
        return json.loads(answer[1])

    def result(self, request_id: str) -> Any:
        raw = request(self.target, "retrieve_future", text({"request_id": request_id}))
        while (answer := self.connection.send(raw)) is not None and answer[0] == 408:
            pass
        assert answer is not None and answer[0] == 200, answer
        return json.loads(answer[1])

    def run(self, path: str, body: dict[str, Any] | bytes) -> Any:
        raw = (
            request(self.target, path, text(body))
            if isinstance(body, dict)
            else request(self.target, path, body, PROTOBUF)
        )
        result = self.result(self.json(raw)["request_id"])
        assert "error" not in result, result
        return result

    def create_model(self, session_id: str, number: int) -> str:
        lora = {"rank": 4, "seed": 1}
        body = {"session_id": session_id, "model_seq_id": number, "base_model": "Decoder", "lora_config": lora}
        return str(self.run("create_model", body)["model_id"])

    def prepare(self) -> None:
        """Make the target: a model with a step, a checkpoint, a sampler, and an accumulated gradient."""
        target = self.target
        target.session_id, other = (self.ask("create_session", {})["session_id"] for _ in range(2))
        target.model_id = self.create_model(target.session_id, 0)
        target.decoy = self.create_model(other, 0)
        rng = Random(0)
        for name in ("forward_backward", "optim_step", "save_weights", "forward_backward"):
            body = bodies(rng, target)[name]
            raw = request(target, name, text(body))
            if name == "forward_backward":
                raw = request(target, name, message(target).SerializeToString(), PROTOBUF)
            target.sent.append(raw)
            result = self.result(self.json(raw)["request_id"])
            assert "error" not in result, result
            target.seq_id += 1
            target.checkpoint = result.get("path", target.checkpoint)
        body = bodies(rng, target)["create_sampling_session"]
        target.sampler_id = self.ask("create_sampling_session", body)["sampling_session_id"]
        self.ask("get_info", {"model_id": target.model_id})

    def logprobs(self) -> Any:
        """The logprobs of the model: a good request, in its place."""
        good = message(self.target)
        good.forward_only = True
        outputs = self.run("forward", good.SerializeToString())["loss_fn_outputs"]
        self.target.seq_id += 1
        return outputs

    def step(self) -> Any:
        """Take a step with the accumulated gradient; after a gradient that failed, the first one is refused."""
        for _ in range(2):
            body = bodies(Random(0), self.target)["optim_step"]
            result = self.result(self.ask("optim_step", body)["request_id"])
            self.target.seq_id += 1
            if "error" not in result:
                return result["metrics"]
            assert "requests before it that succeed" in result["error"], result
        raise AssertionError(result)


def outcome(client: Client, bad: Malformed) -> tuple[str, str | None]:
    """Send a malformed request. Return what came back, and what is wrong with that."""
    if bad.half:
        client.connection.send_half(bad.raw)
        return "half sent", None
    answer = client.connection.send(bad.raw)
    if answer is None:
        # The answer to a head that is not read to its end may be lost with the connection.
        return "closed", None if bad.kind.startswith("frame, header of 1 MB") else "closed without an answer"
    if bad.kind.startswith("frame"):
        client.connection.close()  # what follows may have become a part of it
    status, body = answer
    if status >= 500:
        return str(status), f"{status}: {body[:300]!r}"
    if status >= 400:
        return str(status), None if bad.raw.startswith(b"HEAD") else fault_of_reason(body.decode())
    if bad.kind == "random bytes":
        return str(status), None
    answered = json.loads(body or b"{}")
    if "request_id" not in answered:
        if "error" in answered:
            return f"{status} error", fault_of_reason(body.decode())
        return str(status), None if bad.harmless else f"accepted: {body[:200]!r}"
    request_id = answered["request_id"]
    result = client.result(request_id)
    if request_id == f"{client.target.model_id}:{client.target.seq_id}":
        client.target.seq_id += 1
    if bad.harmless:
        return "200, as before", None
    if "error" not in result:
        return "200, done", f"accepted: {str(result)[:200]}"
    if result["category"] != "user":
        return "200, server error", f"{result}"
    return "200, error", fault_of_reason(result["error"])


def fault_of_reason(reason: str) -> str | None:
    if len(reason.strip()) < 10:
        return f"no reason: {reason!r}"
    if len(reason.encode()) > REASON_BYTES:
        return f"a reason of {len(reason)} characters: {reason[:300]}"
    if "Traceback" in reason or "in the server" in reason or re.search(r'File "', reason):
        return reason[:500]
    return None


def fuzz(client: Client, count: int, seed: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Send malformed requests, and now and then a good one. Return outcomes by kind, and all that is wrong."""
    rng, counts, faults = Random(seed), Counter[tuple[str, str]](), []
    expected = client.logprobs()
    for i in range(count):
        bad = malformed(rng, client.target)
        came, fault = outcome(client, bad)
        counts[bad.kind.partition(":")[0].partition(",")[0].partition(" at ")[0], came] += 1
        if fault is not None:
            faults.append(f"{i} {bad.kind}: {fault}")
        if i % 100 == 50 and client.logprobs() != expected:
            faults.append(f"{i} {bad.kind}: the weights have changed")
            expected = client.logprobs()
    return counts, faults


def state_of(service: Service) -> dict[str, Any]:
    """All that requests can change, but for the decoy's weights."""
    models = {}
    for model_id, model in service.models.items():
        of_client = model.client.model
        values = [(n, p.detach(), p.grad) for n, p in of_client.named_parameters()]
        digest = hashlib.sha256(b"".join(x.numpy().tobytes() for _, x, g in values))
        for name, _, gradient in values:
            if gradient is not None:
                digest.update(name.encode() + gradient.numpy().tobytes())
        models[model_id] = (digest.hexdigest(), model.client.get_info().steps, model.user_metadata)
    sessions = {s.session_id: (s.finished, sorted(s.losses), s.user_metadata) for s in service.sessions.values()}
    samplers = {name: (sampler.base_model, sampler.path) for name, sampler in service.samplers.items()}
    return {"models": models, "sessions": sessions, "samplers": samplers, "files": files(service.state.root)}


def files(root: Path) -> dict[str, str]:
    return {
        str(x.relative_to(root)): hashlib.sha256(x.read_bytes()).hexdigest() for x in root.rglob("*") if x.is_file()
    }


def report(counts: Counter[tuple[str, str]]) -> str:
    return "\n".join(f"{count:6} {kind}: {came}" for (kind, came), count in sorted(counts.items()))


def test_malformed_requests_are_refused_and_change_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    service = Service(device="cpu", state=tmp_path, gap_seconds=0.2)
    with served(service, api_key=KEY, body_seconds=0.5, poll_seconds=1.0) as url:
        client = Client(url)
        client.prepare()
        before = state_of(service)
        counts, faults = fuzz(client, 400, 0)
        after = state_of(service)
        decoy = client.target.decoy
        for state in (before, after):
            state["models"][decoy] = None
        print(report(counts))
        client.connection.close_all()
        assert not faults, "\n".join(faults)
        assert after == before
        client.step()
    assert not [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]


@contextmanager
def process(state: Path, log: Path) -> Iterator[tuple[str, int]]:
    """Run ``lossfns serve``; return its address and its process id."""
    command = [sys.executable, "-m", "lossfns", "serve", "--port", "0", "--device", "cpu", "--log", "--api-key", KEY]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}
    with (
        open(log, "wb") as errors,
        subprocess.Popen(
            [*command, "--state", str(state)], stdout=subprocess.PIPE, stderr=errors, env=environment
        ) as server,
    ):
        try:
            assert server.stdout is not None
            line = server.stdout.readline().decode()
            yield line.split()[-1], server.pid
        finally:
            server.terminate()
            server.wait(60)
    assert server.returncode == 0


def resident(pid: int) -> int:
    """The bytes of memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_ten_thousand_malformed_requests_leave_no_trace(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process(tmp_path / "state", log) as (url, pid):
        client, twin = Client(url), Client(url)
        client.prepare()
        twin.prepare()
        _, faults = fuzz(client, 500, 1)
        saved, warm = files(tmp_path / "state"), resident(pid)
        counts, more = fuzz(client, 10_000, 2)
        grown = resident(pid) / warm - 1
        print(report(counts), f"memory: {warm / 2**20:.0f} MiB, {grown:+.1%}", sep="\n")
        faults += more
        assert not faults, "\n".join(faults)
        assert files(tmp_path / "state") == saved
        assert grown < 0.05, f"{grown:.1%}"
        client.connection.close_all()
        assert client.logprobs() == twin.logprobs()
        assert client.step() == twin.step()  # the accumulated gradient is the same
        assert client.logprobs() == twin.logprobs()
    lines = log.read_text().splitlines()
    assert len(lines) > 11_000 and not [line for line in lines if re.search("Traceback|in the server|failed", line)]
    assert all(line.isprintable() for line in lines)
