"""``lossfns serve`` as a process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from serving import httpx, tinker

from lossfns.cli import main
from lossfns.errors import LossWarning
from lossfns.server.command import log_warning


def serve(*options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "lossfns", "serve", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_the_sdk_needs_no_address_where_the_environment_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    process = serve("--port", "0")
    assert process.stdout is not None
    monkeypatch.setenv("TINKER_BASE_URL", process.stdout.readline().split()[-1])
    monkeypatch.setenv("TINKER_API_KEY", "tml-local")
    try:
        with tinker.ServiceClient() as service:
            assert service.create_sampling_client(base_model="Decoder").result().get_base_model() == "Decoder"
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_a_server_starts_logs_and_ends_by_a_signal(tmp_path: Path) -> None:
    process = serve("--port", "0", "--state", str(tmp_path), "--log", "--model", "small=decoder", "--model", "decoder")
    assert process.stdout is not None
    url = process.stdout.readline().split()[-1]
    models = httpx.get(f"{url}/api/v1/get_server_capabilities", timeout=60).json()["supported_models"]
    assert [model["model_name"] for model in models] == ["small", "Decoder"]
    assert httpx.post(f"{url}/api/v1/optim_step", json={"model_id": "x", "seq_id": 1}).status_code == 404
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))):  # accepted while the server stops
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "stopped.json").exists()
    assert "GET /api/v1/get_server_capabilities 200" in log
    assert "POST /api/v1/optim_step 404" in log and "'x' is unknown" in log and "Traceback" not in log


def test_a_warning_is_one_line_of_the_log_without_its_place(caplog: pytest.LogCaptureFixture) -> None:
    """A thread that runs a request is no place where anyone could change a call."""
    log_warning(LossWarning("the old_logprobs\n  are 0\x1b[2J"), LossWarning, "/usr/lib/thread.py", 58)
    assert caplog.messages == [r"LossWarning: the old_logprobs are 0\x1b[2J"]


def test_what_cannot_be_served_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, reason in (
            (["--host", "0.0.0.0"], "--api-key: expected a key for 0.0.0.0"),
            (["--port", port], "in use"),
            (["--model", "decoder", "--model", "decoder"], "each name once"),
            (["--device", "abacus"], "a device of this machine"),
        ):
            assert main(["serve", *options]) == 2, options
            assert reason in capsys.readouterr().err, options
