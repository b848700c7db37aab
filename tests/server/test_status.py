"""The status page, as data and in a browser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from serving import KEY, batch, httpx, served, tinker, tiny_service

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(url: str, *options: str) -> str:
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,800", *options, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_status_tells_of_models_and_their_metrics() -> None:
    with served(tiny_service()) as url:
        assert "none yet" in httpx.get(url).text
        with tinker.ServiceClient(base_url=url, api_key=KEY) as service:
            client = service.create_lora_training_client("Tiny", rank=4).result()
            loss = client.forward_backward(batch(), "cross_entropy").result().metrics["loss:sum"]
            now = httpx.get(f"{url}/status.json").json()
            (model,) = now["models"]
            assert model["model_id"] == client.model_id and model["metrics"]["loss:sum"] == loss
            assert (model["requests"], model["waiting"], model["running"]) == (1, 0, None)
            assert (now["sessions"], now["base_models"], now["state"]) == (1, ["Tiny"], "running")
            html = httpx.get(url).text
            assert client.model_id in html and f"loss:sum {loss:.5g}" in html
            assert "http://" not in html and "https://" not in html and "<script" not in html
            assert '<link rel="icon" href="data:,">' in html  # else a browser asks for /favicon.ico, and logs a 404
        assert httpx.get(f"{url}/status.json").json()["models"] == []


def test_the_status_page_asks_for_the_key() -> None:
    with served(tiny_service(), api_key=KEY) as url:
        refused = httpx.get(url)
        assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic")
        assert httpx.get(url, auth=("any", "tml-other")).status_code == 401
        assert httpx.get(url, auth=("any", KEY)).status_code == 200
        assert httpx.post(f"{url}/api/v1/telemetry", json={}, headers={"x-api-key": KEY}).status_code == 200
        page = {"x-api-key": KEY, "origin": "http://example.org"}
        assert httpx.post(f"{url}/api/v1/telemetry", json={}, headers=page).status_code == 403


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium or google-chrome")
def test_a_browser_shows_the_status(tmp_path: Path) -> None:
    with served(tiny_service()) as url, tinker.ServiceClient(base_url=url, api_key=KEY) as service:
        client = service.create_lora_training_client("Tiny", rank=4).result()
        client.forward_backward(batch(), "cross_entropy").result()
        shown = browse(url, "--dump-dom")
        assert f"<code>{client.model_id}</code>" in shown and "nll:mean" in shown and "MiB" in shown
        browse(url, f"--screenshot={tmp_path / 'status.png'}")
        assert (tmp_path / "status.png").stat().st_size > 10_000
