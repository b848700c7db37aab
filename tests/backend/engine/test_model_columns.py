"""The client supplies entropy and Σp² of its model, with the gradient of the definition by autograd on full logits."""

import math
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from tiny import SHAPE, client, own_metrics, texts
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lossfns
from lossfns import (
    Loss,
    LossInputError,
    datum_from_tokens,
    dpo,
    eaft,
    grpo,
    reinforce,
    sequence_mean,
    with_clip_b,
    with_entropy,
    with_top_entropy,
)
from lossfns.backend import AdamParams, Decoder, LocalTrainingClient
from lossfns.backend.engine.differentiate import computed_columns
from lossfns.backend.model import lora
from lossfns.logprobs import linear, plans, tiles
from lossfns.preset import make_loss
from lossfns.tokens import MODEL_COLUMNS, TARGETS, Tokens
from lossfns.weigh import pair_mean, token_mean

RNG = Random(0)
PROMPT = [RNG.randrange(31) for _ in range(9)]
DATA = [
    datum_from_tokens(PROMPT + [RNG.randrange(31) for _ in range(RNG.randint(2, 7))], prompt_length=9) for _ in range(6)
]
"""Six completions of one prompt, which is long enough to be computed once."""
ADVANTAGES = [0.5, -1.0, 1.0, 2.0, -0.5, -2.0]


def squares(loss: Loss, coef: float) -> Loss:
    """The loss + c·Σp²."""

    def terms(t: Tokens) -> Any:
        term, statistics = loss.terms(t)
        return term + coef * t.sum_square_probs, statistics

    return make_loss(terms, (*loss.reads, "sum_square_probs"), token_mean)


def model(kind: str) -> nn.Module:
    """A decoder in float64 with an untied head, a tied one, or adapters, whose head is then frozen or adapted."""
    m = Decoder(**SHAPE, seed=1, tied=kind == "tied").double()
    parts = {"adapters": ("attn", "mlp"), "adapted head": ("attn", "mlp", "unembed")}.get(kind)
    if parts is not None:
        lora.adapt(m, rank=2, parts=parts, seed=1)
        for name, p in m.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(0))
    return m


def outputs(m: Any, data: list[Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logprobs of the targets, entropy and Σp², from the logits of all tokens."""
    ids = [torch.tensor(d.model_input.to_ints()) for d in data]
    lp = (m(torch.cat(ids), list(map(len, ids))) @ m.head.T).log_softmax(-1)
    targets = torch.cat([d.loss_fn_inputs["target_tokens"].to_torch().view(len(x), -1) for d, x in zip(data, ids)])
    columns = {"entropy": -(lp.exp() * lp).sum(-1), "sum_square_probs": (2 * lp).exp().sum(-1)}
    return lp.gather(-1, targets), columns


def expected(m: Any, loss: Any, data: list[Any]) -> tuple[float, list[Tensor]]:
    """Value and gradients by autograd on the definition."""
    logprobs, columns = outputs(m, data)
    lengths = [d.model_input.length for d in data]
    rows = {name: list(x.split(lengths)) for name, x in columns.items() if name in loss.loss.reads}
    given = list(logprobs.squeeze(-1).split(lengths))
    total, _ = loss.bind(**rows)(data, given)
    return total.item(), list(torch.autograd.grad(total, [p for p in m.parameters() if p.requires_grad]))


def found(c: LocalTrainingClient, loss: Any, data: list[Any]) -> Any:
    c.model.zero_grad(set_to_none=True)
    result = c.forward_backward_custom(data, loss).result()
    return result, [p.grad for p in c.model.parameters() if p.requires_grad]


def within(m: nn.Module, data: list[Any], tokens: int) -> LocalTrainingClient:
    """A client whose budget holds so many tokens at a time."""
    engine = LocalTrainingClient(m, device="cpu")._engine
    needed = engine.budget.costs(engine.logprobs(data).inputs, extras=MODEL_COLUMNS).step_bytes(tokens)
    return LocalTrainingClient(m, device="cpu", memory_budget=math.ceil(needed / engine.budget.margin) + 1)


@pytest.mark.parametrize("kind", ["dense", "tied", "adapters", "adapted head"])
def test_the_parameter_gradient_is_that_of_full_logits(kind: str) -> None:
    """To 1e-10 in float64: one pass, streamed in micro-batches, and in two passes where the loss couples a group."""
    groups = {"groups": [0, 0, 1, 1, 0, 1]}
    bonus = with_entropy(reinforce(weigh=sequence_mean), 0.3)
    m = model(kind)
    for name, bound, passes in (
        ("bonus", bonus.bind(advantages=ADVANTAGES), 1),
        ("squares", squares(bonus, 0.7).bind(advantages=ADVANTAGES), 1),
        ("masked", with_top_entropy(bonus, 0.4).bind(advantages=ADVANTAGES, **groups), 2),
        ("clipped", with_clip_b(bonus, 0.5).bind(advantages=ADVANTAGES, **groups), 2),
        ("weighed", eaft().bind(), 1),
    ):
        value, gradients = expected(m, bound, DATA)
        for tokens in (None, 17):
            c = LocalTrainingClient(m, device="cpu") if tokens is None else within(m, DATA, tokens)
            result, got = found(c, bound, DATA)
            counts = result.metrics["micro_batches"], result.metrics["passes"]
            assert counts == (1, 1) if tokens is None else counts[0] > 1 and counts[1] == passes, (name, counts)
            assert abs(result.metrics["loss:sum"] - value) < 1e-10, (name, tokens)
            assert max(float((x - y).abs().max()) for x, y in zip(got, gradients, strict=True)) < 1e-10, (name, tokens)
            assert all(out.keys() == {"logprobs"} for out in result.loss_fn_outputs)


def test_losses_of_targets_and_of_pairs_read_the_outputs_of_the_model() -> None:
    """With K targets, each has the entropy of its position; a pair has Σp² at each token of both sides, as in WPO."""
    rng, m = Random(1), model("dense")
    wide = texts(rng, count=4, longest=9, targets=3)

    def of_targets(t: Tokens) -> Any:
        return -t.logprobs * t.entropy, {}

    def of_pairs(t: Tokens) -> Any:
        confidence = torch.where(t.active, t.sum_square_probs, 1).log()
        weight = lossfns.segments.weighted_mean(t, t.logprobs.detach() - confidence).exp()
        term, statistics = dpo().terms(t)
        return term * weight[0::2] * weight[1::2], statistics

    targets = make_loss(of_targets, ("entropy",), token_mean, TARGETS)
    logprobs, columns = outputs(m, wide)
    weights = torch.cat([d.loss_fn_inputs["weights"].to_torch() for d in wide])
    exact = (weights * -logprobs * columns["entropy"][:, None]).sum() / weights.sum()
    parameters = list(m.parameters())
    result, got = found(LocalTrainingClient(m, device="cpu"), targets, wide)
    assert abs(result.metrics["loss:sum"] - exact.item()) < 1e-10
    for x, y in zip(got, torch.autograd.grad(exact, parameters)):
        assert (x - y).abs().max() < 1e-10
    reads = ("ref_logprobs", "sum_square_probs")
    pairs = make_loss(of_pairs, reads, pair_mean, lossfns.Rows.PAIRS, differentiates=())
    reference = [[-3.0] * d.model_input.length for d in DATA]
    value, gradients = expected(m, pairs.bind(ref_logprobs=reference), DATA)
    result, got = found(LocalTrainingClient(m, device="cpu"), pairs.bind(ref_logprobs=reference), DATA)
    assert abs(result.metrics["loss:sum"] - value) < 1e-10
    for x, y in zip(got, gradients):
        assert (x - y).abs().max() < 1e-10


def test_a_bonus_raises_the_entropy_of_the_model_and_without_one_it_falls() -> None:
    """Twenty steps of reinforce with advantage 1 on fixed tokens, with c = 0, c = 3, and the mask of the other."""
    data = [datum_from_tokens([3, 4, 5, 6, 7], prompt_length=1)]
    after = {}
    for coef in (0.0, 3.0):
        c = client()
        loss = with_entropy(reinforce(), coef).bind(advantages=[1.0])
        reported = []
        for _ in range(20):
            reported.append(c.forward_backward_custom(data, loss).result().metrics["entropy"])
            c.optim_step(AdamParams(learning_rate=3e-2)).result()
        with torch.no_grad():
            after[coef] = float(outputs(c.model, data)[1]["entropy"].mean())
    before = outputs(client().model, data)[1]["entropy"].mean().item()
    assert reported[0] == pytest.approx(before, abs=1e-5)
    assert after[0.0] < before - 0.5 and after[3.0] > after[0.0] + 1


class LargestLogits(TorchDispatchMode):
    """Record the most rows of a tensor with a whole vocabulary in a row."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] == self.vocabulary:
                self.rows = max(self.rows, len(x))
        return result


def test_only_what_a_loss_reads_is_computed_and_never_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    forward_tiles = tiles.forward_tiles

    def recorded(head: Any, hidden: Any, targets: Any, extras: Any, budget: float) -> Any:
        asked.append(tuple(extras))
        return forward_tiles(head, hidden, targets, extras, budget)

    monkeypatch.setattr(plans, "forward_tiles", recorded)
    bonus = with_entropy(reinforce(), 0.1).bind(advantages=ADVANTAGES)
    for loss, names in (
        (reinforce().bind(advantages=ADVANTAGES), ()),
        (bonus, ("entropy",)),
        (squares(bonus.loss, 0.1).bind(advantages=ADVANTAGES), MODEL_COLUMNS),
        (eaft().bind(entropy=[[1.0] * d.model_input.length for d in DATA]), ()),
    ):
        c = client()
        c._engine.budget.plan(c._engine.logprobs(DATA).inputs, extras=names)  # measures the footprint
        asked.clear()
        c.forward_backward_custom(DATA, loss).result()
        assert set(asked) == {names}
    monkeypatch.setattr(tiles, "TILE_TOKENS", 4)
    monkeypatch.setattr(tiles, "BLOCK_LOGITS", 2 * 31)
    c = within(model("dense"), DATA, 80)
    c.forward_backward_custom(DATA, bonus).result()
    with LargestLogits(31) as logits:
        c._engine.backward(bonus, DATA, c._engine.logprobs(DATA, bonus))
    assert 0 < logits.rows <= 31  # the head itself; the batch has more tokens
    assert sum(d.model_input.length for d in DATA) > 31


def test_a_frozen_head_gives_the_entropy_in_its_own_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a constant: a mask costs no product of matrices more. A bonus takes another plan."""
    taken: list[str] = []
    apply = linear.apply
    monkeypatch.setattr(linear, "apply", lambda plan, *args: taken.append(plan.__name__) or apply(plan, *args))
    m = model("adapters")
    columns = {"advantages": ADVANTAGES, "groups": [0] * 6}
    for loss, plan in ((with_top_entropy(reinforce(), 0.4), "Frozen"), (with_entropy(reinforce()), "Swept")):
        bound = loss.bind(**{name: columns[name] for name in loss.reads if name in columns})
        c = LocalTrainingClient(m, device="cpu")
        c.forward_backward_custom(DATA, bound).result()
        assert taken[-1] == plan


def refusal(function: Callable[[], Any]) -> str:
    with pytest.raises(LossInputError) as error:
        function()
    return str(error.value)


def test_numbers_that_are_given_replace_those_of_the_model_and_carry_no_gradient() -> None:
    rows = [[0.5] * d.model_input.length for d in DATA]
    with_field = [lossfns.Datum(d.model_input, {**d.loss_fn_inputs, "entropy": x}) for d, x in zip(DATA, rows)]
    bound = eaft().bind(entropy=rows)
    assert computed_columns(bound, DATA) == computed_columns(eaft(), with_field) == ()
    assert computed_columns(eaft(), DATA) == ("entropy",) and computed_columns(lambda *_: None, DATA) == ()
    results = [client().forward_backward_custom(d, x).result() for d, x in ((DATA, bound), (with_field, eaft()))]
    losses = [own_metrics(result.metrics) for result in results]
    assert losses[0] == losses[1] and losses[0]["entropy"] == 0.5
    bonus = with_entropy(reinforce()).bind(advantages=ADVANTAGES)
    for data, loss in ((with_field, bonus), (DATA, bonus.bind(entropy=rows))):
        message = refusal(lambda: client().forward_backward_custom(data, loss).result())  # noqa: B023
        assert "with_entropy: entropy: expected the model's own" in message and "Leave them out" in message
    some = [*with_field[:1], *DATA[1:]]
    message = refusal(lambda: client().forward_backward_custom(some, eaft()).result())
    assert "datum[1].entropy: expected one row per datum" in message


def test_the_surrogate_of_a_service_has_no_entropy_in_it() -> None:
    """``surrogate_loss:sum`` is Σ lp·∂L/∂lp, and ``num_loss_tokens`` counts tokens with any gradient."""
    zero, bonus = (with_entropy(reinforce(), c).bind(advantages=[0.0] * 6) for c in (0.0, 0.5))
    c = client()
    assert c.forward_backward_custom(DATA, bonus).result().metrics["surrogate_loss:sum"] == 0
    active = sum(int(d.loss_fn_inputs["weights"].to_torch().sum()) for d in DATA)
    assert c._engine.gradients.accumulated.positions == active
    c = client()
    c.forward_backward_custom(DATA, zero).result()
    assert c._engine.gradients.accumulated.positions == 0


def test_a_grpo_step_with_a_bonus_reports_all_statistics() -> None:
    rows = [[-3.4] * d.model_input.length for d in DATA]
    loss = with_entropy(grpo(kl_beta=0.01), 0.01).bind(advantages=ADVANTAGES, old_logprobs=rows, ref_logprobs=rows)
    metrics = client().forward_backward_custom(DATA, loss).result().metrics
    assert {"entropy", "kl_ref", "ratio", "clip_low"} <= metrics.keys() and 3 < metrics["entropy"] < math.log(31)
