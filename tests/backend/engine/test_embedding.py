"""Losses over embeddings: pooled hidden states, their gradient, and what is refused."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batches import sdks
from tiny import BYTE_SHAPE, assert_same_gradients, byte_client, byte_texts, own_metrics, take_gradients
from torch import Tensor

import lossfns
from lossfns import Datum, LossInputError, ModelInput
from lossfns.backend import ByteTokenizer, Decoder, LocalTrainingClient
from lossfns.loading import from_file

IDS = [[72, 101, 121, 33], [7], [200, 3, 3, 3, 90, 41, 5, 5, 17], [88, 120], [7, 11, 13, 17, 19, 23]]
POOL: dict[str, Callable[[Tensor], Tensor]] = {"mean": lambda h: h.sum(0) / len(h), "last": lambda h: h[-1]}
each_pooling = pytest.mark.parametrize("pooling", POOL)


def datums(ids: Sequence[list[int]] = IDS, sdk: Any = lossfns) -> list[Any]:
    """Datums with whole sequences and no other fields."""
    return [sdk.Datum(sdk.ModelInput.from_ints(row), {}) for row in ids]


def crowd(data: Any, embeddings: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """A loss over all pairs of texts that does not depend on their order."""
    e = torch.stack(list(embeddings))
    near = F.normalize(e, dim=1) @ F.normalize(e, dim=1).T
    return (near / 0.3).exp().sum().log() + 0.1 * e.square().mean(), {"near": near.mean().item()}


def by_hand(model: Any, ids: Sequence[list[int]], pooling: str) -> list[Tensor]:
    """Run each text by itself through the model, and pool it here."""
    return [POOL[pooling](model(torch.tensor(row), [len(row)])) for row in ids]


def exact() -> LocalTrainingClient:
    """In float64, since these gradients are large: an untrained model gives all texts nearly the same embedding."""
    return byte_client(dtype=torch.float64)


def embedded(result: Any) -> list[Tensor]:
    return [output["embedding"].to_torch() for output in result.loss_fn_outputs]


@each_pooling
@pytest.mark.parametrize("sdk", sdks(), ids=lambda sdk: sdk.__name__)
def test_an_embedding_is_the_pooled_output_of_the_final_norm(sdk: Any, pooling: str) -> None:
    c, seen = exact(), []
    c.model.norm.weight.data.uniform_(
        0.5, 2.0
    )  # a norm of ones would not show whether the states are taken before or after it
    result = c.forward(datums(sdk=sdk), "cross_entropy", output="embedding", pooling=pooling).result()
    with c.model.norm.register_forward_hook(lambda module, given, out: seen.append(out)):
        by_hand(c.model, IDS, pooling)
    expected = [POOL[pooling](hidden.detach()) for hidden in seen]
    assert [output["embedding"].shape for output in result.loss_fn_outputs] == [[BYTE_SHAPE["dim"]]] * len(IDS)
    for got, want in zip(embedded(result), expected):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want.float(), rtol=1e-6, atol=1e-6)
    assert all(p.grad is None for p in c.model.parameters()) and result.metrics == {}


def test_forward_takes_output_and_pooling_by_name_or_in_the_config() -> None:
    c = byte_client()
    ask = lambda *args, **kwargs: embedded(c.forward(datums(), "cross_entropy", *args, **kwargs).result())  # noqa: E731
    mean, last = ask(output="embedding"), ask(output="embedding", pooling="last")
    assert any((a != b).any() for a, b in zip(mean, last))
    assert torch.equal(mean[1], last[1])  # one token
    assert all(map(torch.equal, ask({"output": "embedding"}), mean))
    assert all(map(torch.equal, ask({"output": "embedding", "pooling": "last"}), last))
    assert all(map(torch.equal, ask({"pooling": "last"}, output="embedding"), last))


def test_forward_takes_logprobs_by_name_too() -> None:
    c, data = byte_client(), byte_texts()
    plain = c.forward(data, "cross_entropy").result()
    for named in (c.forward(data, "cross_entropy", {"output": "logprobs"}), c.forward(data, "cross_entropy", {})):
        assert named.result().metrics == plain.metrics


@each_pooling
@pytest.mark.parametrize("sdk", sdks(), ids=lambda sdk: sdk.__name__)
def test_the_gradient_is_autograds_straight_through_the_model(sdk: Any, pooling: str) -> None:
    c = exact()
    result = c.forward_backward_custom(datums(sdk=sdk), crowd, output="embedding", pooling=pooling).result()
    cut = take_gradients(c)
    loss, metrics = crowd(None, by_hand(c.model, IDS, pooling))
    loss.backward()
    assert_same_gradients(cut, take_gradients(c), 1e-9)
    assert result.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-9)
    assert result.metrics["near"] == pytest.approx(metrics["near"], rel=1e-9)


@each_pooling
def test_the_gradient_is_the_slope_of_the_loss(pooling: str) -> None:
    """A central difference along a random direction, in float64: no autograd in the expectation."""
    c = exact()
    c.forward_backward_custom(datums(), crowd, output="embedding", pooling=pooling).result()
    slopes = take_gradients(c)
    generator = torch.Generator().manual_seed(1)
    way = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in c.model.parameters()]
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, direction in zip(c.model.parameters(), way):
                p += sign * step * direction
            values.append(crowd(None, by_hand(c.model, IDS, pooling))[0].item())
    expected = sum((g * w).sum().item() for g, w in zip(slopes, way))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=1e-6)


@each_pooling
def test_the_order_of_the_texts_does_not_matter(pooling: str) -> None:
    c, order = exact(), [3, 0, 4, 2, 1]
    c.forward_backward_custom(datums(), crowd, output="embedding", pooling=pooling).result()
    straight = take_gradients(c)
    mixed = datums([IDS[i] for i in order])
    c.forward_backward_custom(mixed, crowd, output="embedding", pooling=pooling).result()
    assert_same_gradients(straight, take_gradients(c), 1e-9)


@each_pooling
def test_gradients_accumulate_over_calls(pooling: str) -> None:
    """A loss that is a sum over texts, in one call or in five."""

    def lengths(data: Any, embeddings: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return torch.stack([(e**3).sum() for e in embeddings]).sum(), {}

    c = exact()
    whole = c.forward_backward_custom(datums(), lengths, output="embedding", pooling=pooling).result()
    expected = take_gradients(c)
    parts = [
        c.forward_backward_custom([datum], lengths, output="embedding", pooling=pooling).result().metrics["loss:sum"]
        for datum in datums()
    ]
    assert_same_gradients(expected, take_gradients(c), 1e-9)
    assert sum(parts) == pytest.approx(whole.metrics["loss:sum"], rel=1e-9)


@each_pooling
@pytest.mark.parametrize("own", range(len(IDS)))
def test_a_text_does_not_feel_the_others(own: int, pooling: str) -> None:
    """Embedding and gradient of a text are the same alone and among longer and shorter texts."""
    v = torch.linspace(-1, 1, BYTE_SHAPE["dim"], dtype=torch.float64)

    def among(data: Any, embeddings: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return embeddings[own] @ v + sum(0.0 * e.sum() for i, e in enumerate(embeddings) if i != own), {}

    c = exact()
    crowded = c.forward_backward_custom(datums(), among, output="embedding", pooling=pooling).result()
    expected = take_gradients(c)
    alone = c.forward_backward_custom(
        datums(IDS[own : own + 1]), lambda data, e: (e[0] @ v, {}), output="embedding", pooling=pooling
    ).result()
    assert_same_gradients(expected, take_gradients(c), 1e-9)
    torch.testing.assert_close(embedded(crowded)[own], embedded(alone)[0], rtol=1e-6, atol=1e-6)


def test_a_loss_gets_tensors_cut_off_from_the_model_and_the_datums_as_they_are() -> None:
    c, data = byte_client(), datums()
    seen = {}

    def loss_fn(given: Any, embeddings: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        seen.update(given=given, leaves=list(embeddings))
        return torch.stack(embeddings).sum(), {}

    c.forward_backward_custom(data, loss_fn, output="embedding").result()
    assert all(a is b for a, b in zip(seen["given"], data))
    assert all(e.requires_grad and e.dtype == torch.float32 for e in seen["leaves"])
    (leaf,) = {e._base for e in seen["leaves"]}
    assert leaf is not None and leaf.is_leaf


def test_embeddings_of_a_half_precision_model_are_pooled_in_float32() -> None:
    """The mean of 4,001 bfloat16 states. If each addition were rounded, little of it would be left."""
    c = LocalTrainingClient(Decoder(**BYTE_SHAPE), tokenizer=ByteTokenizer(), device="cpu", dtype=torch.bfloat16)
    ids = [[65] * 4001]
    (got,) = embedded(c.forward(datums(ids), "cross_entropy", output="embedding").result())
    with torch.no_grad():
        hidden = c.model(torch.tensor(ids[0]), [len(ids[0])])
    torch.testing.assert_close(got, hidden.double().mean(0).float(), rtol=1e-4, atol=1e-5)


def test_metrics_follow_the_profile() -> None:
    """Tinker has the loss and the surrogate Σ e·∂L/∂e, here thrice the loss; Fireworks only the surrogate."""

    def cubes(data: Any, embeddings: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return torch.stack([(e**3).sum() for e in embeddings]).sum(), {"texts": 5.0}

    e = torch.stack(embedded(byte_client().forward(datums(), "cross_entropy", output="embedding").result()))
    loss = (e**3).sum().item()
    tinker = byte_client().forward_backward_custom(datums(), cubes, output="embedding").result().metrics
    assert own_metrics(tinker) == pytest.approx(
        {"texts": 5.0, "loss:sum": loss, "surrogate_loss:sum": 3 * loss}, rel=1e-4
    )
    fireworks = LocalTrainingClient(Decoder(**BYTE_SHAPE), tokenizer=ByteTokenizer(), device="cpu", profile="fireworks")
    metrics = fireworks.forward_backward_custom(datums(), cubes, output="embedding").result().metrics
    assert own_metrics(metrics) == pytest.approx({"texts": 5.0, "loss:sum": 3 * loss}, rel=1e-4)


def total(data: Any, embeddings: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return torch.stack(embeddings).sum(), {}


def without_third(data: Any, embeddings: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return torch.stack([e for i, e in enumerate(embeddings) if i != 2]).sum(), {}


def distance_to_itself(data: Any, embeddings: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Finite, but the square root of 0 has no slope."""
    value, metrics = total(data, embeddings)
    return value + (embeddings[3] - embeddings[3]).square().sum().sqrt(), metrics


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"output": "embeddings"}, "Unsupported output='embeddings'"),
    ({"output": "projection"}, "Unsupported output='projection'"),
    ({"output": ["embedding"]}, "Unsupported output="),
    ({"pooling": "max"}, "Unsupported pooling='max'; expected 'mean' or 'last'"),
    ({"pooling": ["mean"]}, "Unsupported pooling="),
    ({"loss_type_input": "embedding"}, "Set output='embedding' instead of loss_type_input"),
    ({"loss_type_input": "logits"}, "Unsupported loss_type_input='logits'. Supported values are: logprobs"),
    ({"data": []}, "No data provided"),
    ({"data": datums([[1], []])}, r"datum\[1\].model_input: .*Cannot pool embedding from an empty text sequence"),
    ({"data": datums([[1], [257]])}, r"datum\[1\].model_input: .*\[0, 257\)"),
    ({"loss_fn": without_third}, r"datum\[2\].embedding: .*No gradient computed for embedding tensor"),
    ({"loss_fn": distance_to_itself}, r"datum\[3\].embedding: expected a finite gradient"),
    ({"loss_fn": lambda data, e: (e[0].sum() * math.nan, {})}, "loss: expected a finite value, got nan"),
    ({"loss_fn": lambda data, e: (torch.stack(e), {})}, r"loss: expected a 0-d tensor, got shape \(5, 32\)"),
    ({"loss_fn": lambda data, e: (e[0].detach().sum(), {})}, "constant without grad_fn"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_bad_call_is_refused_and_the_accumulated_gradient_kept(change: dict[str, Any], message: str) -> None:
    c = byte_client()
    c.forward_backward_custom(datums(), crowd, output="embedding").result()
    before = [p.grad.clone() for p in c.model.parameters() if p.grad is not None]
    call = {"data": datums(), "loss_fn": total, "output": "embedding"} | change
    with pytest.raises(LossInputError, match=message):
        c.forward_backward_custom(call.pop("data"), call.pop("loss_fn"), **call).result()
    after = [p.grad for p in c.model.parameters() if p.grad is not None]
    assert before and all(map(torch.equal, before, after))
    c.forward_backward_custom(datums(), crowd, output="embedding").result()


@pytest.mark.parametrize(
    ("config", "keywords", "message"),
    [
        ({"output": "hidden"}, {}, "Unsupported output='hidden'"),
        (None, {"output": "hidden"}, "Unsupported output='hidden'"),
        ({"output": "embedding", "pooling": "max"}, {}, "Unsupported pooling='max'; expected 'mean' or 'last'"),
        ({"output": "embedding", "poling": "last"}, {}, "loss_fn_config: .*for an embedding, got 'poling'"),
    ],
)
def test_forward_refuses_the_same(config: Any, keywords: dict[str, Any], message: str) -> None:
    c = byte_client()
    with pytest.raises(LossInputError, match=message):
        c.forward(datums(), "cross_entropy", config, **keywords).result()
    assert len(embedded(c.forward(datums(), "cross_entropy", output="embedding").result())) == len(IDS)


def test_a_likelihood_loss_is_no_loss_of_embeddings() -> None:
    with pytest.raises(LossInputError):
        byte_client().forward_backward_custom(datums(), lossfns.cross_entropy(), output="embedding").result()


def test_the_contrastive_example_trains() -> None:
    example = from_file(str(Path(__file__).parents[3] / "examples" / "contrastive.py"))
    losses = list(example.train(example.new_client(), example.sentences()[128:], steps=4))
    assert losses[-1] < losses[0] * 3 / 4


@pytest.mark.exhaustive
def test_the_contrastive_example_learns() -> None:
    """A quarter of its training: among 128 held-out pairs a guess is right in 0.8 % of cases."""
    example = from_file(str(Path(__file__).parents[3] / "examples" / "contrastive.py"))
    pairs = example.sentences()
    held_out, known = pairs[:128], pairs[128:]
    assert not set(held_out) & set(known) and len({document for _, document in pairs}) == 4096
    c = example.new_client()
    assert max(example.recall(c, held_out)) < 0.05
    losses = list(example.train(c, known, steps=50))
    assert losses[-1] < losses[0] / 2
    assert min(example.recall(c, held_out)) > 0.2


def test_the_examples_loss_is_half_of_both_directions() -> None:
    """Two pairs at right angles: S/τ = [[2, 0], [0, 1]] for τ = 0.5 and a second document half turned away."""
    example = from_file(str(Path(__file__).parents[3] / "examples" / "contrastive.py"))
    q = [torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 0.1, 0.0])]
    d = [torch.tensor([7.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, math.sqrt(3)])]
    loss, metrics = example.info_nce(0.5)(None, [*q, *d])
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2, rel=1e-6)
    assert metrics == {"recall@1": 1.0}


def test_datums_of_plain_ids_need_no_targets() -> None:
    """The whole sequence, its last token too: leaving it out gives another embedding."""
    c = byte_client()
    ask = lambda ids: embedded(  # noqa: E731
        c.forward([Datum(ModelInput.from_ints(ids))], "cross_entropy", output="embedding", pooling="last").result()
    )[0]
    assert not torch.equal(ask(IDS[0]), ask(IDS[0][:-1]))
