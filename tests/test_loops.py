"""The loops in ``examples/loops``, run as their first lines say: they are short, they learn, and any split is exact."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "loops"
LOOPS = ("grpo", "dpo", "sft")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SHORT = ("--dtype", "float64", "--steps", "4")
Parameters = dict[str, Tensor]


def run(loop: str, *options: str, launcher: tuple[str, ...] = ()) -> str:
    """Run a loop as its first lines say, in processes of its own and without network, and return what it prints."""
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, f"examples/loops/{loop}.py", *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(name: str, printed: str) -> list[float]:
    return [float(x) for x in re.findall(rf"{name} (-?[\d.]+)", printed)]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_has_at_most_60_lines(loop: str) -> None:
    lines = (FOLDER / f"{loop}.py").read_text().splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 120


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a loop in this process, which has imported torch and transformers already, and return its variables."""

    def call(loop: str, *options: str) -> dict[str, Any]:
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.setattr(sys, "argv", [f"{loop}.py", *options])
        with torch.random.fork_rng():
            return runpy.run_path(str(FOLDER / f"{loop}.py"), run_name="__main__")

    return call


def test_grpo_raises_the_reward(run_here: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A random policy writes a character of the right kind in one case of seven. Seeds 0 to 5 end above 0.9."""
    run_here("grpo")
    rewards = numbers("reward", capsys.readouterr().out)
    assert rewards[0] < 0.25 and rewards[-1] > 0.5


def test_dpo_learns_pairs_that_it_has_not_seen(run_here: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """At first the model is its own reference, so that every pair is a tie. Seeds 0 to 9 end above 0.75."""
    run_here("dpo")
    printed = capsys.readouterr().out
    accuracies, margins = numbers("accuracy", printed), numbers("margin", printed)
    assert accuracies[0] == 0.5 and margins[0] == 0.0
    assert accuracies[-1] > 0.65 and margins[-1] > 5


def test_sft_lowers_the_loss_of_rows_that_it_has_not_seen() -> None:
    """Seeds 0 to 5 end below a sixth of the first loss."""
    losses = numbers("held-out loss", run("sft", "--steps", "31"))
    assert losses[-1] < 0.4 * losses[0]


@pytest.fixture
def train(run_here: Run) -> Callable[..., Parameters]:
    """Run the SFT loop in this process, and return the trained parameters."""

    def parameters(*options: str) -> Parameters:
        model = run_here("sft", *SHORT, *options)["model"]
        return {name: x.detach() for name, x in model.named_parameters()}

    return parameters


def assert_same(got: Parameters, expected: Parameters) -> None:
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=1e-9, msg=f"{name}: {(got[name] - x).abs().max()}")


def test_parts_of_a_batch_train_the_same_model(train: Callable[..., Parameters]) -> None:
    """The parts have answers of different lengths, so that a mean of their means is another gradient."""
    whole = train("--accumulate", "1")
    assert_same(train("--accumulate", "2"), whole)
    assert_same(train("--accumulate", "3"), whole)


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
def test_two_processes_train_the_same_model(
    options: tuple[str, ...], train: Callable[..., Parameters], tmp_path: Path
) -> None:
    """Each of two processes computes half a batch in two parts."""
    pytest.importorskip("torch", "2.13")  # as the extra `ranks` asks for
    from safetensors.torch import load_file

    run("sft", *SHORT, *options, "--out", str(tmp_path), launcher=TORCHRUN)
    saved = load_file(tmp_path / "model.safetensors")
    whole = train("--accumulate", "1")
    assert saved.keys() == whole.keys()
    assert_same(saved, whole)
