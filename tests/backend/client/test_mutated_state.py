"""Checkpoints with a good seal and bad content: refused by name, with the client as it was."""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SHAPE, client, gradients, same, texts
from torch import Tensor

from lossfns import LossInputError
from lossfns.backend import AdamParams, Decoder, LocalServiceClient, LocalTrainingClient
from lossfns.backend.storage import checkpoint, file

Tensors, Data = dict[str, Tensor], dict[str, Any]


def service() -> LocalServiceClient:
    return LocalServiceClient({"tiny": lambda: Decoder(**SHAPE)}, device="cpu")


def trained(c: LocalTrainingClient) -> LocalTrainingClient:
    """Return the client after three steps, with a gradient."""
    for seed in range(3):
        c.forward_backward(texts(Random(seed)), "cross_entropy")
        c.optim_step(AdamParams()).result()
    c.forward_backward(texts(Random(4)), "cross_entropy").result()
    return c


def everything(c: LocalTrainingClient) -> list[Any]:
    """Return copies of all that a load may change."""
    engine = c._engine
    kept = [x.clone() for state in engine.optimizer.state.values() for x in state.values()]
    counts = torch.tensor([engine.steps, *engine.gradients.accumulated[:2]])
    return [*(x.clone() for x in c.model.state_dict().values()), *gradients(c), *kept, counts, torch.get_rng_state()]


# Every kind of damage by name


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors, Data], None]:
    def apply(tensors: Tensors, data: Data) -> None:
        tensors[name] = change(tensors[name].clone())

    return apply


def entry(value: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x.view(-1)[0] = value
        return x

    return change


def told(**changes: Any) -> Callable[[Tensors, Data], None]:
    return lambda tensors, data: data.update(changes)


WEIGHT = "norm.weight"
FIRST, SECOND, STEP = (f"optimizer/{key}/{WEIGHT}" for key in ("exp_avg", "exp_avg_sq", "step"))

DAMAGE: dict[str, tuple[Callable[[Tensors, Data], None], str]] = {
    "a random state of zeros": (put("random/cpu", torch.zeros_like), "random numbers that torch refuses"),
    "a random state of ones": (put("random/cpu", torch.ones_like), "random numbers that torch refuses"),
    "a short random state": (put("random/cpu", lambda x: x[:-1]), "random numbers that torch refuses"),
    "a random state of floats": (put("random/cpu", Tensor.float), "random numbers that torch refuses"),
    "no random state": (lambda tensors, data: tensors.pop("random/cpu"), "no state of random numbers"),  # type: ignore[dict-item, return-value]
    "nan in the first moment": (put(FIRST, entry(np.nan)), "moments of norm.weight that are negative, nan or inf"),
    "inf in the first moment": (put(FIRST, entry(-np.inf)), "moments of norm.weight that are negative, nan or inf"),
    "nan in the second moment": (put(SECOND, entry(np.nan)), "moments of norm.weight that are negative, nan or inf"),
    "inf in the second moment": (put(SECOND, entry(np.inf)), "moments of norm.weight that are negative, nan or inf"),
    "a negative second moment": (put(SECOND, entry(-1e-30)), "moments of norm.weight that are negative, nan or inf"),
    "moments of another shape": (put(SECOND, lambda x: x[:-1]), "moments of norm.weight of shapes"),
    "moments of doubles": (put(FIRST, Tensor.double), "moments of norm.weight of dtypes"),
    "moments of integers": (put(SECOND, Tensor.long), "moments of norm.weight of dtypes"),
    "moments of complex numbers": (put(SECOND, lambda x: x.to(torch.complex64)), "moments of norm.weight of dtypes"),
    "a step of nan": (put(STEP, entry(np.nan)), "moments of norm.weight after nan of 3 steps"),
    "a step of 0": (put(STEP, entry(0)), "moments of norm.weight after 0.0 of 3 steps"),
    "a negative step": (put(STEP, entry(-2)), "moments of norm.weight after -2.0 of 3 steps"),
    "a fraction of a step": (put(STEP, entry(1.5)), "moments of norm.weight after 1.5 of 3 steps"),
    "more steps than there were": (put(STEP, entry(4)), "moments of norm.weight after 4.0 of 3 steps"),
    "a step that is a row": (put(STEP, lambda x: x[None]), "moments of norm.weight of shapes"),
    "nan in the weights": (put(WEIGHT, entry(np.nan)), "nan or inf in norm.weight"),
    "inf in the weights": (put(WEIGHT, entry(np.inf)), "nan or inf in norm.weight"),
    "weights of another shape": (put(WEIGHT, lambda x: x[None]), "norm.weight is (1, 8) in place of (8,)"),
    "weights of integers": (put(WEIGHT, Tensor.long), "norm.weight is torch.int64 in place of torch.float32"),
    "weights of complex numbers": (put(WEIGHT, lambda x: x.to(torch.complex64)), "norm.weight is torch.complex64"),
    "weights of half precision": (put(WEIGHT, Tensor.half), "norm.weight is torch.float16 in place of torch.float32"),
    "an unknown tensor": (
        lambda tensors, data: tensors.update(extra=torch.ones(1)),
        "extra is (1,) in place of nothing",
    ),
    "an unknown moment": (
        lambda tensors, data: tensors.update({"optimizer/max_exp_avg_sq/norm.weight": torch.ones(8)}),
        "optimizer/max_exp_avg_sq/norm.weight, which AdamW does not keep",
    ),
    "moments of another parameter": (
        lambda tensors, data: tensors.update({f"optimizer/{k}/x": torch.ones(1) for k in ("exp_avg", "step")}),
        "an incomplete optimizer",
    ),
    "steps that are a text": (told(steps="3"), "steps = '3'"),
    "steps that are true": (told(steps=True), "steps = True"),
    "negative steps": (told(steps=-1), "steps = -1"),
    "steps of 400 digits": (told(steps=10**400), "steps = 1000"),
    "steps of 0 with moments": (told(steps=0), "an incomplete optimizer"),
    "a shape that is a list": (told(shape=[1]), "shape is [1] in place of"),
    "another shape": (told(shape=SHAPE | {"heads": 1}), "heads is 1 in place of 2"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_sealed_checkpoint_of_bad_content_is_refused_before_anything_is_replaced(what: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[what]
    source, c = trained(client(seed=1)), trained(client(seed=2))
    source._engine.gradients.clear()
    tensors, data = checkpoint.load(source.save_state(tmp_path / "good").result().path)
    damage(tensors, data)
    checkpoint.save(tmp_path / "bad", tensors, data)
    before = everything(c)
    with pytest.raises(LossInputError) as caught:
        c.load_state_with_optimizer(tmp_path / "bad").result()
    assert message in str(caught.value) and str(tmp_path / "bad") in str(caught.value)
    assert same(everything(c), before)
    c.load_state_with_optimizer(tmp_path / "good").result()


def test_weights_that_overflow_the_models_dtype_are_refused(tmp_path: Path) -> None:
    c = client()
    tensors, data = checkpoint.load(c.save_state(tmp_path / "good").result().path)
    tensors[WEIGHT] = torch.full((8,), 1e300, dtype=torch.float64)
    checkpoint.save(tmp_path / "bad", tensors, data)
    before = everything(c)
    with pytest.raises(LossInputError, match=r"nan or inf in norm\.weight"):
        c.load_state(tmp_path / "bad").result()
    assert same(everything(c), before)


LORA: dict[str, Any] = {
    "a list": [1],
    "a text": "x",
    "without a rank": {"parts": ["mlp"], "alpha": 32},
    "with more": {"rank": 2, "parts": ["mlp"], "alpha": 32, "seed": 0},
    "a rank that is a text": {"rank": "2", "parts": ["mlp"], "alpha": 32},
    "a rank of 400 digits": {"rank": 10**400, "parts": ["mlp"], "alpha": 32},
    "a rank beyond all memory": {"rank": 10**12, "parts": ["mlp"], "alpha": 32},
    "parts that are lists": {"rank": 2, "parts": [["mlp"]], "alpha": 32},
    "a part that is unknown": {"rank": 2, "parts": ["x"], "alpha": 32},
    "an alpha of 0": {"rank": 2, "parts": ["mlp"], "alpha": 0},
    "no parts": {"rank": 2, "parts": [], "alpha": 32},
}


@pytest.mark.parametrize("what", LORA)
def test_settings_of_adapters_that_no_model_can_have_are_refused_with_the_path(what: str, tmp_path: Path) -> None:
    c = service().create_lora_training_client("tiny", 2)
    tensors, data = checkpoint.load(c.save_state(tmp_path / "good").result().path)
    checkpoint.save(tmp_path / "bad", tensors, data | {"lora": LORA[what]})
    creators = ("create_training_client_from_state", "create_training_client_from_state_with_optimizer")
    for name in (*creators, "create_sampling_client"):
        with pytest.raises(LossInputError, match="path: expected adapters that this model can have, got") as caught:
            getattr(service(), name)(tmp_path / "bad")
        assert str(tmp_path / "bad") in str(caught.value)


# Thousands of random ones

JUNK: list[Any] = [None, True, -1, 0, 2.5, 10**30, 10**400, "x", "\ud800", [], {}, [[1]], {"rank": -1}, float("nan")]


def spoil_tensor(tensors: Tensors, rng: Random) -> None:
    """Change a tensor's values, shape, dtype or name, or drop it, or exchange it with another."""
    name, other = rng.choice(list(tensors)), rng.choice(list(tensors))
    x = tensors[name].clone()
    match rng.randrange(7):
        case 0:
            numbers = (np.nan, np.inf, -np.inf, -1, 0, 1e30, -1e30)
            x.view(-1)[rng.randrange(x.numel())] = rng.choice(numbers) if x.is_floating_point() else rng.randrange(256)
        case 1:
            x = rng.choice([x[None], x.flatten()[:-1], x.flatten(), torch.zeros(0), x[:0] if x.dim() else x])
        case 2:
            kinds = (
                torch.float64,
                torch.float16,
                torch.bfloat16,
                torch.int64,
                torch.uint8,
                torch.bool,
                torch.complex64,
            )
            x = x.to(rng.choice(kinds))
        case 3:
            del tensors[name]
            tensors[rng.choice([name + "x", "x", f"optimizer/{name}", name.upper()])] = x
            return
        case 4:
            del tensors[name]
            return
        case 5:
            x = tensors[other]
        case _:
            x = (
                torch.from_numpy(np.frombuffer(rng.randbytes(x.nbytes), dtype=np.uint8).copy())
                .view(x.dtype)
                .view(x.shape)
            )
    tensors[name] = x


def spoil_data(data: Any, rng: Random) -> None:
    """Put junk into the data or into a dict within it."""
    key = rng.choice(list(data))
    if isinstance(data[key], dict) and data[key] and rng.random() < 0.6:
        spoil_data(data[key], rng)
    elif rng.random() < 0.2:
        del data[key]
    else:
        data[key] = rng.choice(JUNK)


def spoil_bytes(content: bytes, rng: Random, *, seal: bool) -> bytes:
    """Overwrite, cut or double a stretch of the file. A stretch of the tensors' bytes can be sealed anew."""
    start = 8 + int.from_bytes(content[:8], "little") if seal else 0
    header, body = content[:start], content[start:]
    a = rng.randrange(len(body))
    b = min(len(body), a + 2 ** rng.randrange(8))
    body = rng.choice([body[:a] + rng.randbytes(b - a) + body[b:], body[:a] + body[b:], body[:b] + body[a:], body[:a]])
    return sealed(header[8:], body) if seal else body


def spoil_text(content: bytes, rng: Random) -> bytes:
    """Change characters of the JSON in a file, and seal it anew."""
    start = 8 + int.from_bytes(content[:8], "little")
    text = bytearray(content[8:start])
    for _ in range(rng.randint(1, 3)):
        text[rng.randrange(len(file.PREFIX), len(text))] = rng.choice(b'09e-"[]{},:nx')
    return sealed(bytes(text), content[start:])


def sealed(header: bytes, body: bytes) -> bytes:
    """A file with the checksums that such a header and body have."""
    before = header.index(b'"sha256":"') + 10 if b'"sha256":"' in header else 0
    if before:
        header = header[:before] + hashlib.sha256(body).hexdigest().encode() + header[before + file.DIGEST :]
    whole, start = len(header).to_bytes(8, "little") + header, 8 + len(file.PREFIX)
    return whole[:start] + file.seal_of(whole) + whole[start + file.DIGEST :] + body


def spoiled(good: Path, bad: Path, rng: Random) -> None:
    """Write a mutated copy of a checkpoint."""
    kind = rng.choice(("tensors", "data", "text", "sealed bytes", "bytes"))
    if kind in ("tensors", "data"):
        tensors, data = checkpoint.load(good)
        for _ in range(rng.choice((1, 1, 2))):
            spoil_tensor(tensors, rng) if kind == "tensors" else spoil_data(data, rng)
        checkpoint.save(bad, tensors, data)
    elif kind == "text":
        bad.write_bytes(spoil_text(good.read_bytes(), rng))
    else:
        bad.write_bytes(spoil_bytes(good.read_bytes(), rng, seal=kind == "sealed bytes"))


LOADS: dict[str, Callable[[LocalTrainingClient, Path], Any]] = {
    "load_state_with_optimizer": lambda c, path: c.load_state_with_optimizer(path).result(60),
    "load_state": lambda c, path: c.load_state(path).result(60),
    "create_sampling_client": lambda c, path: c.create_sampling_client(path),
    "create_training_client_from_state": lambda c, path: service().create_training_client_from_state(path),
    "from_state_with_optimizer": lambda c, path: service().create_training_client_from_state_with_optimizer(path),
}


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize(
    "count", [pytest.param(100, marks=pytest.mark.repeated), pytest.param(250, marks=pytest.mark.exhaustive)]
)
def test_mutated_checkpoints_are_refused_by_name_and_change_nothing(count: int, tmp_path: Path) -> None:
    """A mutation that is accepted is a state of this model: it can be trained on, or a step is refused by name."""
    bases = [lambda: service().create_training_client("tiny"), lambda: service().create_lora_training_client("tiny", 2)]
    goods = []
    for i, make in enumerate(bases):
        source = trained(make())
        source._engine.gradients.clear()
        goods.append(Path(source.save_state(tmp_path / f"good{i}").result().path))
    clients = [trained(make()) for make in bases]
    refused = 0
    for i in range(count):
        rng = Random(i)
        which = rng.randrange(2)
        bad, load = tmp_path / "bad", rng.choice(list(LOADS))
        spoiled(goods[which], bad, rng)
        c = clients[which]
        before = everything(c)
        try:
            loaded = LOADS[load](c, bad)
        except LossInputError as error:
            refused += 1
            assert str(bad) in str(error) or "base_model" in str(error), (i, load)
            if "from_state" in load:  # a service builds its base model with random numbers of torch
                torch.set_rng_state(before[-1])
            assert same(everything(c), before), (i, load)
        else:
            usable = loaded if isinstance(loaded, LocalTrainingClient) else c
            with contextlib.suppress(LossInputError):  # of weights so large that logprobs or a gradient overflow
                usable.forward_backward(texts(Random(1)), "cross_entropy").result()
                usable.optim_step(AdamParams()).result()
            assert all(p.isfinite().all() for p in usable.model.parameters()), (i, load)
            if usable is c:
                clients[which] = trained(bases[which]())
    assert count > refused > count / 2
