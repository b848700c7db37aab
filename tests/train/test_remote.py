"""``lossfns train --base-url``: the recipes through the SDK on a server have the numbers of a local run."""

from __future__ import annotations

import json
import re
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from serving import served

from lossfns.backend.client.sampling import LocalSamplingClient
from lossfns.cli import main
from lossfns.errors import LossInputError
from lossfns.server.service import Service
from lossfns.train import methods
from lossfns.train.remote import Gathered, seed_of_prompt

OPTIONS = {
    "sft": ["--batch", "4"],
    "dpo": ["--batch", "4", "--warmup-steps", "2"],
    "grpo": ["--batch", "4", "--group", "4", "--warmup-steps", "1", "--max-tokens", "3"],
}
DATA = [{"prompt": f"{i}+1=", "completion": "2", "chosen": "2", "rejected": "3", "answer": "2"} for i in range(20)]


NUMBERS = count()


@pytest.fixture(autouse=True)
def without_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)


def arguments(folder: Path, method: str, *more: str) -> list[str]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA))
    out = str(folder / f"run{next(NUMBERS)}")
    return [
        "train",
        method,
        "--steps",
        "3",
        *OPTIONS[method],
        "--data",
        str(folder / "rows.jsonl"),
        "--out",
        out,
        *more,
    ]


def rows(run: str) -> list[dict[str, Any]]:
    """The metrics of a run, without times and what a request costs."""
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    others = ("seconds", "passes", "micro_batches", "peak_memory")
    return [{k: x for k, x in json.loads(line).items() if k not in others} for line in lines]


def outcome(run: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((Path(run) / "result.json").read_text())
    return {name: x for name, x in result.items() if name != "seconds"}


def sample_by_prompt(sampler: LocalSamplingClient, prompts: Any, samples: int, params: Any) -> Gathered:
    """The requests that a run on a server makes."""
    seeds = [seed_of_prompt(params.seed, i) for i in range(len(prompts))]
    return Gathered([sampler.sample(p, samples, type(params)(**vars(params) | s)) for p, s in zip(prompts, seeds)])


def test_a_run_on_a_server_has_the_numbers_of_a_local_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are sampled one by one on a server, each with a seed of its own; here locally, too."""
    with served(Service(device="cpu")) as url:
        remote = {method: arguments(tmp_path, method, "--base-url", url) for method in OPTIONS}
        for method, given in remote.items():
            assert main(given) == 0, method
    monkeypatch.setattr(LocalSamplingClient, "sample_batch", sample_by_prompt)
    for method, given in remote.items():
        local = arguments(tmp_path, method)
        assert main(local) == 0, method
        there, here = given[given.index("--out") + 1], local[local.index("--out") + 1]
        assert len(rows(there)) == len(rows(here)) >= 3
        for a, b in zip(rows(there), rows(here)):
            assert a.pop("phase") == b.pop("phase")
            assert a == pytest.approx(b, rel=1e-5, abs=1e-6), (method, a, b)
        for name, x in outcome(here).items():
            if isinstance(x, dict):
                assert outcome(there)[name] == pytest.approx(x, rel=1e-5, abs=1e-6), method


def test_a_run_on_a_server_is_resumed_and_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third step fails; the run continues from the state after two, with a new session."""
    original, steps = methods.train_step, []

    def failing(*given: Any) -> dict[str, float]:
        steps.append(1)
        if len(steps) == 3:
            raise LossInputError("step", "a step", "none", "Again.")
        return original(*given)

    with served(Service(device="cpu", state=tmp_path / "state")) as url:
        whole = arguments(tmp_path, "sft", "--base-url", url)
        assert main(whole) == 0
        broken = arguments(tmp_path, "sft", "--base-url", url, "--save-every", "1")
        run = broken[broken.index("--out") + 1]
        monkeypatch.setattr(methods, "train_step", failing)
        assert main(broken) == 2
        monkeypatch.setattr(methods, "train_step", original)
        assert len(rows(run)) == 2 and main(["train", "--resume", run]) == 0
        assert rows(run) == rows(whole[whole.index("--out") + 1])
        capsys.readouterr()
        sample = ["sample", run, "1+1=", "--max-tokens", "4", "--samples", "2"]
        assert main(sample) == 0
        first = capsys.readouterr().out
        assert main(sample) == 0
        assert capsys.readouterr().out == first and first.startswith("sample 1:")
        assert main(["export", run, str(tmp_path / "model")]) == 2
        way = re.search(r"newest checkpoint is tinker://.* lossfns export STATE/(\S+) DIR", capsys.readouterr().err)
        assert way and main(["export", str(tmp_path / "state" / way[1]), str(tmp_path / "model")]) == 0


def test_what_a_server_cannot_do_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(Service({"other": lambda: None}, device="cpu")) as url:  # type: ignore[dict-item, return-value]
        assert main(arguments(tmp_path, "sft", "--base-url", url)) == 2
        message = capsys.readouterr().err
        assert "'Decoder'" in message and "lossfns serve" in message and message.count("\n") == 1
    for address in (url, "nowhere"):
        assert main(arguments(tmp_path, "sft", "--base-url", address)) == 2
        assert "--base-url: expected the address of a server" in capsys.readouterr().err
    for name, value in (("--device", "cpu"), ("--init", "a.npz")):
        with pytest.raises(SystemExit):
            main(arguments(tmp_path, "sft", "--base-url", url, name, value))
        assert f"{name}: expected no --base-url with it" in capsys.readouterr().err
