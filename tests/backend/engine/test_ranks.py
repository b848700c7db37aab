"""Two processes agree with one: results, parameters, checkpoints and runs. Ranks that disagree get an error."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import combinations_with_replacement, pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import ranks
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from lossfns import LossInputError
from lossfns.backend import Decoder
from lossfns.backend.engine.ranks import copied_with, rank_bounds, start, transformer_layers
from lossfns.backend.engine.state import tied_names
from lossfns.backend.storage import checkpoint
from lossfns.backend.storage.folder import remove_other_parts
from lossfns.cli import main
from lossfns.train.run import METRICS, RESULT

pytestmark = pytest.mark.long  # the fixture ``folder``: two processes run all scenarios
HERE = Path(__file__).parent
METHODS = ("sft", "dpo", "grpo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and a stopped run of one process, and the results of two processes."""
    pytest.importorskip("torch", "2.13")  # as the extra `ranks` asks for
    folder = tmp_path_factory.mktemp("ranks")
    ranks.rows_of(folder)
    ranks.save(None, folder / "one")
    ranks.stopped(folder, folder / "one-stopped", rank=0)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(HERE / "ranks.py"), str(folder)]
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    helpers = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen(command, env=helpers, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = process.communicate(timeout=120)[1]
        finally:
            process.terminate()  # the ranks wait for one another: end all of them
    assert process.returncode == 0, said
    return folder


def same(two: dict[str, Any], one: dict[str, Any]) -> None:
    """Entries near 0 carry the rounding of the large ones beside them."""
    assert two.keys() == one.keys()
    for name, x in one.items():
        scale = max(1.0, float(torch.as_tensor(x).abs().max()))
        torch.testing.assert_close(two[name], x, rtol=1e-5, atol=1e-5 * scale, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("scenario", ranks.SCENARIOS)
def test_two_ranks_are_one(scenario: str, rank: int, folder: Path) -> None:
    two = torch.load(folder / f"rank{rank}.pt")[scenario]
    same(two, by_one_process(scenario))


@cache
def by_one_process(scenario: str) -> dict[str, Any]:
    return ranks.SCENARIOS[scenario](None)


def test_two_ranks_take_half_as_many_micro_batches(folder: Path) -> None:
    """The budget holds for each rank, and includes the weights that it gathers from the others."""
    one = ranks.count_of(ranks.within_budget(None), ranks.coupled)
    for rank in (0, 1):
        two = json.loads((folder / f"rank{rank}.json").read_text())["micro_batches"]
        assert one / 2 <= two <= one / 2 + 1 < one


@pytest.mark.parametrize("written_by", ["one", "two"])
def test_a_checkpoint_is_loaded_by_any_number_of_ranks(written_by: str, folder: Path) -> None:
    """Written by one process or by two: the weights agree bit for bit, and so do the next three steps."""
    one = ranks.go_on(None, folder / written_by)
    for rank in (0, 1):
        two = torch.load(folder / f"rank{rank}.pt")[f"from {written_by}"]
        same(two, one)
        assert all(torch.equal(two[name], x) for name, x in one.items() if name.startswith(("loaded", "weights")))
    assert one["steps"] == 2
    assert checkpoint.metadata(folder / written_by)["user_metadata"] == {"who": "ranks"}


def test_what_one_rank_alone_does_wrong_is_an_error_on_all(folder: Path) -> None:
    """It changes nothing: the gradient is that of the two correct requests."""
    told = [json.loads((folder / f"rank{rank}.json").read_text())["told"] for rank in (0, 1)]
    assert told[0].keys() == told[1].keys() == ranks.MISTAKES
    for name in ("other data", "other calls", "other advantages", "other models"):
        assert told[0][name] == told[1][name] and "request: expected the same on all ranks" in told[0][name]
    assert "step (" in told[0]["other calls"] and "forward (" in told[0]["other calls"]
    assert "loss: expected the same on all ranks" in told[0]["a loss that draws"]
    assert told[1]["a loss that fails on one"] == "KeyError: 'advantage'"
    assert "on rank 1 (KeyError: 'advantage')" in told[0]["a loss that fails on one"]
    assert all("no such" in each["unread"] for each in told)
    assert "a file that does not exist yet" in told[0]["saved over"] and "rank 0" in told[1]["saved over"]
    assert all("memory_budget: expected at least" in each["too long"] for each in told)
    c, good = ranks.client(None), ranks.pairs(Random(10))
    for _ in range(2):
        c.forward_backward(good, "cross_entropy").result()
    for rank in (0, 1):
        same(torch.load(folder / f"rank{rank}.pt")["mistakes"], ranks.gradients(c))


# Runs


def metrics(run: Path) -> list[tuple[str, dict[str, float]]]:
    """The phase and the numbers of each step, without those that depend on the machine."""
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    apart = ("phase", "seconds", "peak_memory")
    return [(row["phase"], {name: x for name, x in row.items() if name not in apart}) for row in rows]


def same_run(two: Path, one: Path) -> None:
    assert len(metrics(two)) == len(metrics(one))
    for (phase, a), (other, b) in zip(metrics(two), metrics(one)):
        assert phase == other and a == pytest.approx(b, rel=1e-4, abs=1e-5)
    outcomes = [json.loads((run / RESULT).read_text()) for run in (two, one)]
    assert [o["stopped_early"] for o in outcomes] == [False, False]
    (name,) = outcomes[1].keys() - {"stopped_early", "seconds", "samples"}
    assert outcomes[0][name] == pytest.approx(outcomes[1][name], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_two_ranks_is_that_of_one_process(method: str, folder: Path, tmp_path: Path) -> None:
    assert ranks.command(folder, method, tmp_path / "run") == 0
    same_run(folder / f"two-{method}", tmp_path / "run")


def test_ranks_stop_together_and_any_number_of_them_goes_on(folder: Path) -> None:
    """Rank 1 was told to stop. One process finishes the run of two, and two have finished the run of one."""
    assert (folder / "two-stopped" / "checkpoint" / "meta.json").exists()
    assert main(["train", "--resume", str(folder / "two-stopped")]) == 0
    same_run(folder / "two-stopped", folder / "two-sft")
    same_run(folder / "one-stopped", folder / "two-sft")
    assert (
        not (folder / "two-stopped" / "checkpoint").exists()
        and not (folder / "one-stopped" / "checkpoint.safetensors").exists()
    )


# Checkpoints in folders


def test_ranks_export_what_one_process_exports_from_their_folder(folder: Path, tmp_path: Path) -> None:
    assert main(["export", str(folder / "two"), str(tmp_path / "one")]) == 0
    theirs, ours = (folder / "exported", tmp_path / "one")
    assert {file.name for file in theirs.iterdir()} == {file.name for file in ours.iterdir()}
    one, two = (load_file(path / "model.safetensors") for path in (ours, theirs))
    assert one.keys() == two.keys() and all(torch.equal(x, two[name]) for name, x in one.items())
    weights = checkpoint.load(folder / "two")[0]
    assert torch.equal(one["model.embed_tokens.weight"], weights["embed.weight"])


@pytest.fixture
def written(folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint of two ranks."""
    return shutil.copytree(folder / "two", tmp_path / "two")


def test_a_folder_has_one_checkpoint_and_no_pickle(written: Path) -> None:
    """The older checkpoint of the path is gone."""
    files = sorted(file.suffix for file in written.rglob("*") if file.is_file())
    assert files == [".json", ".safetensors", ".safetensors"]


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def other_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [shortened, other_bit, Path.unlink])
@pytest.mark.parametrize("which", ["meta.json", "*/shard-00001*", "*/shard-00002*"])
def test_a_damaged_folder_is_refused(which: str, damage: Callable[[Path], None], written: Path) -> None:
    damage(next(written.glob(which)))
    c = ranks.client(None)
    before = ranks.parameters(c)
    with pytest.raises(LossInputError, match=re.escape(str(written))):
        c.load_state_with_optimizer(written).result()
    assert all(torch.equal(x, before[name]) for name, x in ranks.parameters(c).items())


def test_a_folder_with_other_files_in_it_is_refused(written: Path) -> None:
    (next(written.glob("*.part")) / "more.safetensors").write_bytes(b"")
    with pytest.raises(LossInputError, match="not those that were written"):
        checkpoint.load(written)


def test_what_a_killed_save_leaves_is_not_the_checkpoint(written: Path) -> None:
    """It has written tensors, but ``meta.json`` names the older ones until it is replaced."""
    left = written / "0123456789ab.part"
    shutil.copytree(next(written.glob("*.part")), left)
    shortened(next(left.glob("shard-00002*")))
    assert checkpoint.load(written)[1]["steps"] == 2
    remove_other_parts(written)
    assert len(list(written.glob("*.part"))) == 1 and checkpoint.load(written)[1]["steps"] == 2


def test_a_folder_of_another_model_is_refused(written: Path) -> None:
    with pytest.raises(LossInputError, match="a checkpoint of this model"):
        ranks.client(None, tied=False, dim=16).load_state(written).result()


# Parts


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 5))
def test_shares_cover_the_datums_and_the_most_are_the_fewest(lengths: list[int], size: int) -> None:
    """Compare with all ways to split the datums in order."""
    bounds = rank_bounds(lengths, size)
    assert bounds[0] == 0 and bounds[-1] == len(lengths) and len(bounds) == size + 1 and bounds == sorted(bounds)

    def most(cuts: Sequence[int]) -> int:
        return max(sum(lengths[a:b]) for a, b in pairwise([0, *cuts, len(lengths)]))

    every = combinations_with_replacement(range(len(lengths) + 1), size - 1)
    assert most(bounds[1:-1]) == min(map(most, every))


@pytest.mark.parametrize("one", [True, False])
def test_a_copy_with_other_tensors_is_tied_as_the_model_is(one: bool) -> None:
    model = Decoder(**ranks.SHAPE, tied=one)
    model.norm.weight.requires_grad_(False)
    copied = copied_with(model, {name: torch.zeros_like(p) for name, p in model.named_parameters()})
    assert (copied.unembed.weight is copied.embed.weight) == one
    assert all((p == 0).all() for p in copied.parameters()) and model.embed.weight.any()
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in model.parameters()]
    assert tied_names(model) == ({"unembed.weight": "embed.weight"} if one else {})


def test_layers_are_the_items_of_the_outermost_lists() -> None:
    inner = nn.ModuleList([nn.Linear(2, 2)])
    block = nn.Sequential(inner)
    model = nn.ModuleDict(
        {"deep": nn.ModuleDict({"layers": nn.ModuleList([block, nn.Identity()])}), "head": nn.Linear(2, 2)}
    )
    assert [layer is block for layer in transformer_layers(model)] == [True, False]


def test_a_process_on_its_own_has_no_mesh() -> None:
    assert start() is None
