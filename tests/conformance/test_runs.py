"""Runs of the suite: on this project's server, on servers with a planted defect, and on what does not answer."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

for name in ("starlette", "uvicorn"):
    pytest.importorskip(name)
tinker = pytest.importorskip("tinker", "0.38")

from serving import served

from lossfns.cli import main
from lossfns.conformance import runner
from lossfns.conformance.base import Check, Result
from lossfns.conformance.checks import CHECKS
from lossfns.conformance.client import Connection
from lossfns.conformance.command import chosen
from lossfns.conformance.report import Report
from lossfns.conformance.runner import Target, run, unreachable
from lossfns.server.service import Service
from tests.conformance.faulty import DEFECTS
from tests.conformance.running import IMPATIENT, command_on, run_on
from tests.conformance.shown import BROKEN_BY

UNSUPPORTED = {"unpublished-loss"}
"""What this project's server says that it does not have."""


def test_our_server_passes_every_check() -> None:
    report = run_on("")
    others = {r.check: (r.verdict, r.seen) for r in report.results if r.verdict != "pass"}
    assert set(others) == UNSUPPORTED, others
    assert {verdict for verdict, _ in others.values()} == {"unsupported"}
    assert report.ok and len(report.results) == len(CHECKS)


BASE = {
    "forward",
    "forward-backward",
    "output-shape",
    "loss-sum",
    "save-state",
    "create-from-state",
    "gradient-descent",
}

QUICK = {
    "narrow-clip": {"offers-ppo", "value-ppo"},
    "gradient-mean": {"calls-add-up"},
    "cuts-to-the-shortest": {"weights-too-short"},
}
"""A few defects with the checks that should find them; the rest is for the exhaustive run."""


def test_a_defect_is_named_by_the_first_check_that_fails() -> None:
    for defect, checks in QUICK.items():
        report = run_on(defect, BASE | checks)
        assert report.bug == DEFECTS[defect].bug, f"{defect}: {report.summary}"


@pytest.mark.exhaustive
def test_each_check_fails_on_a_planted_defect() -> None:
    """Each check runs with those that it needs on a server with a defect that it must see."""
    for defect, names in BROKEN_BY.items():
        checks = chosen(CHECKS, "full", names.split())
        report = run_on(defect, {check.name for check in checks})
        blind = set(names.split()) - {r.check for r in report.broken}
        assert not blind, f"{defect} breaks no {', '.join(sorted(blind))}: {report.summary}"
    shown = {name for names in BROKEN_BY.values() for name in names.split()}
    assert {check.name for check in CHECKS} - shown == NOT_SHOWN


NOT_SHOWN = {"custom-is-builtin", "offers-cross-entropy", "offers-importance-sampling", "unpublished-loss"}
"""Checks without a defect of their own: a custom loss is a chain of requests that other checks see break first, and
the rest is ``offers-ppo`` for other losses."""


# What does not answer


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in IMPATIENT.items():
        monkeypatch.setattr(runner, name, value)


def check(name: str, act: Callable[[Any], Any], needs: tuple[str, ...] = ()) -> Check:
    return Check(name, f"{name}.", "constant-factor", act, needs=needs)


def fine(bench: Any) -> None:
    """Pass."""


def sleeps(bench: Any) -> None:
    time.sleep(60)


def dies(bench: Any) -> None:
    os._exit(3)


def raises(bench: Any) -> None:
    raise RuntimeError("poisoned")


def counts_processes(bench: Any) -> None:
    raise ValueError(f"process {os.getpid()}")


def fake() -> Target:
    """Return a target whose connection is never used, with a model of its own."""
    return Target(lambda: Connection(lambda: None, None), lambda: "", "model")


def verdicts(results: list[Result]) -> list[str]:
    return [r.verdict for r in results]


@pytest.mark.usefixtures("impatient")
def test_a_check_that_hangs_dies_or_raises_ends_alone() -> None:
    checks = [check("a", fine), check("b", fine), check("c", sleeps), check("d", dies), check("e", raises),
              check("f", fine)]  # fmt: skip
    report = run(fake(), checks, Report("fake", "0", "full"))
    assert verdicts(report.results) == ["pass", "pass", "error", "error", "error", "pass"]
    seen = [r.seen for r in report.results]
    assert "no answer within" in seen[2] and "exit status 3" in seen[3] and "RuntimeError: poisoned" in seen[4]
    assert not report.stopped and not report.ok


@pytest.mark.usefixtures("impatient")
def test_the_check_after_an_error_runs_in_another_process() -> None:
    report = run(fake(), [check(name, counts_processes) for name in "abc"], Report("fake", "0", "full"))
    assert len({r.seen for r in report.results}) == 3


@pytest.mark.usefixtures("impatient")
def test_a_check_without_what_it_needs_is_inconclusive_and_an_expected_failure_is_no_failure() -> None:
    checks = [check("a", fine), check("b", raises), check("c", fine, needs=("b",)), check("d", fine, needs=("c",))]
    report = run(fake(), checks, Report("fake", "0", "full"), xfails=["b", "a"])
    assert verdicts(report.results) == ["xpass", "xfail", "inconclusive", "inconclusive"]
    assert report.ok


@pytest.mark.usefixtures("impatient")
def test_a_run_ends_after_a_few_checks_without_an_answer_or_when_the_server_is_gone() -> None:
    checks = [check("a", fine), check("b", fine), *(check(f"s{i}", sleeps) for i in range(9))]
    report = run(fake(), checks, Report("fake", "0", "full"))
    assert "checks in a row had no answer; 5 checks were not run" in report.stopped
    gone = Target(fake().open, iter(["", "refused"]).__next__, "model")
    report = run(gone, [check("a", fine), check("b", raises), check("c", fine)], Report("fake", "0", "full"))
    assert report.stopped == "the server is gone since the check b: refused; 1 checks were not run"


@pytest.fixture
def silent() -> Iterator[str]:
    """Return the address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture
def babbling() -> Iterator[str]:
    """Return the address of a server that answers each request with 500."""
    with socket.create_server(("127.0.0.1", 0)) as sock:

        def serve() -> None:
            while True:
                try:
                    connection, _ = sock.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        sock.shutdown(socket.SHUT_RDWR)


def test_a_server_that_does_not_serve_ends_with_a_report(silent: str, babbling: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        nobody = f"http://127.0.0.1:{sock.getsockname()[1]}"
    for url, words in (
        (silent, "does not answer within"),
        (nobody, "there is no HTTP server"),
        (babbling, "the last status was 500"),
    ):
        status, out = command_on(url)
        assert status == 1 and words in out, url


def conformance(*options: str) -> tuple[int, str]:
    """Run the command in a process of its own, since this one may have used the SDK, whose threads no fork has."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "lossfns", "conformance", *options]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    return process.returncode, " ".join(process.stdout.split())


def test_a_wrong_key_ends_the_run() -> None:
    with served(Service(device="cpu"), api_key="tml-secret") as url:
        status, out = conformance("--base-url", url, "--api-key", "tml-wrong")
    assert status == 1
    assert "the server refuses the key" in out and f"{len(CHECKS) - 1} checks were not run" in out


def test_a_model_that_the_server_does_not_have_ends_the_run() -> None:
    with served(Service(device="cpu")) as url:
        status, out = conformance("--base-url", url, "--base-model", "nope")
    assert status == 1
    assert "the server has no model 'nope'; it offers 'Decoder'; " in out and "most likely" not in out


def test_a_server_of_something_else_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        assert main(["conformance", "--base-url", f"http://127.0.0.1:{other.server_port}"]) == 1
        other.shutdown()
    words = "no server of this API: GET /api/v1/healthz gives 404, POST /api/v1/client/config 501"
    assert words in " ".join(capsys.readouterr().out.split())


def test_a_server_with_any_answer_is_alive(babbling: str) -> None:
    assert unreachable(babbling) == ""


def test_the_command_writes_its_reports(tmp_path: Path) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("json", "junit", "html")}
    options = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    with served(Service(device="cpu")) as url:
        status, out = conformance("--base-url", url, "--check", "weights-cancel", *options)
    assert status == 0
    found = json.loads(files["json"].read_text())
    names = [r["check"] for r in found["results"]]
    assert names == ["forward-backward", "save-state", "create-from-state", "gradient-descent", "weights-cancel"]
    assert found["sdk"] == tinker.__version__ and found["ok"] and "5 of 5 checks hold" in out
    assert ElementTree.parse(files["junit"]).getroot().get("tests") == "5"
    assert "The chosen checks hold" in files["html"].read_text() and f"page {files['html']}" in out
