"""Checkpoints of format 2, which versions until 2026-11 have written: read, or refused by name.

``old/format-2.npz`` is a state of such a version, and ``old/format-2.json`` the logprobs of its model.
"""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from tiny import DATA, RATE, SHAPE, logprobs

from lossfns import LossInputError
from lossfns.backend import Decoder, LocalServiceClient, LocalTrainingClient
from lossfns.backend.model import lora
from lossfns.backend.storage import checkpoint, folder, npz

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

OLD = Path(__file__).parent / "old/format-2.npz"


def build() -> Decoder:
    return Decoder(**SHAPE | {"dim": 4, "hidden": 4})


def client() -> LocalTrainingClient:
    model = lora.adapt(build(), rank=1, parts=["attn", "unembed"])
    return LocalTrainingClient(model, device="cpu", name="tiny")


def assert_continued(c: LocalTrainingClient) -> None:
    expected = json.loads(OLD.with_suffix(".json").read_text())
    for got, wanted in zip(logprobs(c), expected, strict=True):
        torch.testing.assert_close(got, torch.tensor(wanted), rtol=0, atol=1e-5)
    assert c.get_info().steps == 2 and len(c._engine.optimizer.state) == 6
    c.forward_backward(DATA, "cross_entropy")
    c.optim_step(RATE).result()


def test_an_old_checkpoint_is_read_by_every_way_in_and_saved_in_the_new_format(tmp_path: Path) -> None:
    service = LocalServiceClient({"tiny": build}, device="cpu")
    c = client()
    c.load_state_with_optimizer(OLD).result()
    new = c.save_state(tmp_path / "new").result().path
    assert_continued(c)
    assert_continued(service.create_training_client_from_state_with_optimizer(OLD))
    c.load_state(OLD).result()
    samplers = [service.create_sampling_client(OLD), c.create_sampling_client(OLD), c.create_sampling_client(new)]
    scores = [s.compute_logprobs(DATA[0].model_input).result()[1:] for s in samplers]
    assert scores[0] == scores[1] == scores[2]
    assert checkpoint.metadata(OLD)["user_metadata"] == checkpoint.metadata(new)["user_metadata"] | {"kind": "a test"}
    names = set(checkpoint.load(new)[0])
    assert {"layers.0.qkv.weight", "base_model.model.layers.0.qkv.lora_A.weight", "random/cpu"} < names
    assert "optimizer/exp_avg/base_model.model.unembed.lora_B.weight" in names and "unembed.weight" not in names


def test_an_old_folder_is_read(tmp_path: Path) -> None:
    with OLD.open("rb") as file:
        tensors, data = npz.load(file)
    tensors["model.unembed.base_layer.weight"] = tensors["model.embed.weight"]  # tied: the folder notes it
    folder.save(tmp_path / "old", tensors, data, folder.ONE)
    c = client()
    c.load_state_with_optimizer(tmp_path / "old").result()
    assert_continued(c)


def test_tied_weights_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    tensors, data = checkpoint.load(OLD)
    tensors["model.unembed.base_layer.weight"] = tensors["model.embed.weight"] + 1
    path = checkpoint.save(tmp_path / "x", tensors, data)
    for load in (client().load_state, client().load_state_with_optimizer):
        with pytest.raises(LossInputError, match=r"x, in which unembed\.weight is not embed\.weight, to which"):
            load(path).result()


def test_a_damaged_old_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    whole, rng, path = OLD.read_bytes(), Random(0), tmp_path / "x.npz"
    damages: list[Callable[[int], bytes]] = [
        lambda i: whole[:i],
        lambda i: whole[:i] + bytes([whole[i] ^ rng.randint(1, 255)]) + whole[i + 1 :],
        lambda i: whole[:i] + whole[i + 1 :],
        lambda i: whole[:i] + rng.randbytes(9) + whole[i:],
    ]
    for i in [*range(40), *(rng.randrange(len(whole)) for _ in range(60)), *range(len(whole) - 20, len(whole))]:
        for damage in damages:
            path.write_bytes(damage(i))
            try:
                checkpoint.load(path)
            except LossInputError as error:
                assert str(path) in str(error)
            else:
                raise AssertionError(f"damage at {i} is not seen")
