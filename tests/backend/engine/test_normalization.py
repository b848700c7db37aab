"""An optimizer step: its divisors, the order of its operations, and its refusals."""

import enum
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import sdks
from tiny import byte_client, byte_texts
from torch import Tensor

import lossfns
from lossfns import Datum, LossInputError, ModelInput, TensorData
from lossfns.backend import AdamParams, LocalTrainingClient

MODES = ("num_loss_tokens", "num_sequences")


def row(*values: float) -> TensorData:
    return TensorData(list(values), "float32", [len(values)])


def datum(n: int, **fields: Any) -> Datum:
    """A datum of n tokens, all of them 5, with targets 7."""
    return Datum(ModelInput.from_ints([5] * n), {"target_tokens": row_of_ids(n)} | fields)


def row_of_ids(n: int, k: int = 0) -> TensorData:
    return TensorData([7] * (n * (k or 1)), "int64", [n, k] if k else [n])


def masked(*weights: float) -> Datum:
    return datum(len(weights), weights=row(*weights))


def policy(logprobs: list[float], advantages: list[float]) -> Datum:
    return datum(len(logprobs), logprobs=row(*logprobs), advantages=row(*advantages))


def accumulated(c: LocalTrainingClient) -> float:
    """The norm of the accumulated gradient."""
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in c.model.parameters() if p.grad is not None))


def first_only(data: Any, logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The first token of each datum; the others enter with a factor of 0."""
    return sum(-lp[0] + 0.0 * lp.sum() for lp in logprobs_list), {}


def clipped_by_hand(data: Any, logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """PPO with ratio 1 at even positions and 3 at odd ones, where an advantage of 1 is clipped."""
    loss = torch.tensor(0.0)
    for lp in logprobs_list:
        odd = torch.arange(len(lp)) % 2
        ratio = (lp - lp.detach() + math.log(3) * odd).exp()
        loss = loss - torch.minimum(ratio, ratio.clamp(0.8, 1.2)).sum()
    return loss, {}


Call = Callable[[LocalTrainingClient], Any]


def builtin(name: str, *data: Datum, config: Any = None) -> Call:
    return lambda c: c.forward_backward(list(data), name, config)


def custom(loss: Any, *data: Datum, **options: Any) -> Call:
    return lambda c: c.forward_backward_custom(list(data), loss, **options)


CE = "cross_entropy"
SUM = lossfns.cross_entropy(weigh=lossfns.token_sum)
TARGETS = datum(3, target_tokens=row_of_ids(3, 2))
TWO_OF_THREE = Datum(
    TARGETS.model_input,
    TARGETS.loss_fn_inputs | {"weights": TensorData([0.5, 0.5, 0, 0, 0, 1], "float32", [3, 2])},
)

PAIRS = lossfns.dpo(weigh=lossfns.pair_sum).bind(ref_logprobs=[[-1.0] * 3, [-2.0] * 2])

COUNTS: list[tuple[str, list[Call], int, int]] = [
    ("weights that are not 0", [builtin(CE, masked(0, 1, 1, 1), masked(1, 0))], 4, 2),
    ("no weights: every token", [builtin(CE, datum(5), datum(2))], 7, 2),
    ("a fully masked datum is not counted", [builtin(CE, masked(0, 1), masked(0, 0, 0), masked(1))], 2, 2),
    ("fractional and negative weights count one", [builtin(CE, masked(0.25, -1, 0, 3))], 3, 1),
    ("calls add up", [builtin(CE, masked(0, 1), masked(1)), builtin(CE, masked(1, 0, 1)), builtin(CE, datum(1))], 5, 4),
    ("no advantage, no gradient", [builtin("importance_sampling", policy([-5] * 4, [0, 2, 0, -1]))], 2, 1),
    # An untrained model says about -5.5: ratios of e^4, but for the third token's e^-4.
    ("clipped in a built-in", [builtin("ppo", policy([-9.5, -9.5, -1.5], [1, -1, 1]), policy([-9.5], [1]))], 2, 1),
    ("clipped in a custom loss", [custom(clipped_by_hand, datum(5), datum(2), datum(1))], 5, 3),
    ("a zero times a logprob", [custom(first_only, datum(4), datum(3))], 2, 2),
    ("[N, K]: a position counts once", [builtin(CE, TWO_OF_THREE)], 2, 1),
    ("[N, K] without weights", [builtin(CE, TARGETS)], 3, 1),
    ("[N, K] in a custom loss", [custom(lambda data, lps: (lps[0][0].sum() - lps[0][2, 0], {}), TARGETS)], 2, 1),
    ("kinds mix", [builtin(CE, masked(1, 1, 0)), custom(SUM, masked(1, 0)), custom(first_only, datum(9))], 4, 3),
    ("a pair is two sequences", [custom(PAIRS, masked(0, 1, 1), masked(1, 1))], 4, 2),
    ("nothing has a gradient", [builtin("importance_sampling", policy([-5, -5], [0, 0]))], 1, 1),
]


@pytest.mark.parametrize(("calls", "tokens", "sequences"), [c[1:] for c in COUNTS], ids=[c[0] for c in COUNTS])
def test_the_gradient_is_divided_by_what_has_one(calls: list[Call], tokens: int, sequences: int) -> None:
    for mode, count in (("num_loss_tokens", tokens), ("num_sequences", sequences), (None, 1)):
        c = byte_client()
        for call in calls:
            call(c).result()
        norm = accumulated(c)
        metrics = c.optim_step(AdamParams(), mode).result().metrics
        assert metrics["grad_norm"] == pytest.approx(norm / count, rel=1e-6)
        assert (norm > 0) == (calls is not COUNTS[-1][1])


@pytest.mark.parametrize("mode", MODES)
def test_counts_begin_again_after_a_step(mode: str) -> None:
    c, d = byte_client(), byte_client()
    c.forward_backward([masked(1, 1, 1), masked(1)], CE)
    c.optim_step(AdamParams(learning_rate=0.0), mode).result()
    c.forward_backward([masked(1, 1), masked(0, 1)], CE)
    d.forward_backward([masked(1, 1), masked(0, 1)], CE)
    assert c.optim_step(AdamParams(), mode).result().metrics == d.optim_step(AdamParams(), mode).result().metrics


@pytest.mark.parametrize("mode", MODES)
def test_neither_a_forward_nor_a_request_that_fails_is_counted(mode: str) -> None:
    c, d, data = byte_client(), byte_client(), [masked(1, 1), masked(0, 1)]
    for x in (c, d):
        x.forward_backward(data, CE).result()
    c.forward(data, CE).result()
    with pytest.raises(LossInputError):
        c.forward_backward_custom(data, lambda given, lps: (torch.cat(lps).sum() * math.nan, {})).result()
    assert c.optim_step(AdamParams(), mode).result().metrics == d.optim_step(AdamParams(), mode).result().metrics


def test_one_batch_and_its_parts_step_alike() -> None:
    """The counts make 1, 2 and 4 requests lead to the same step."""
    weights = []
    for size in (4, 2, 1):
        c, data = byte_client(), byte_texts()
        for i in range(0, 4, size):
            c.forward_backward(data[i : i + size], CE)
        c.optim_step(AdamParams(learning_rate=0.1, eps=1.0), "num_loss_tokens").result()
        weights.append([p.detach() for p in c.model.parameters()])
    for other in weights[1:]:
        for a, b in zip(weights[0], other):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
def test_a_step_normalises_then_clips_then_is_adamw(mode: str | None, clip: float) -> None:
    """Compare three steps of different sizes with torch's optimizer. The ε is large, so that the scale matters."""
    batches = [[masked(0, 1, 1), masked(1)], [datum(6)], [masked(1, 0), masked(0, 0), masked(1, 1)]]
    counts = {None: (1, 1, 1), "num_loss_tokens": (3, 6, 3), "num_sequences": (2, 1, 2)}[mode]
    c, d = byte_client(), byte_client()
    adam = AdamParams(learning_rate=1e-2, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1, grad_clip_norm=clip)
    reference = torch.optim.AdamW(d.model.parameters(), lr=1e-2, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1)
    for data, count in zip(batches, counts):
        c.forward_backward(data, CE)
        metrics = c.optim_step(adam, mode).result().metrics
        d.forward_backward(data, CE).result()
        norm = accumulated(d) / count
        factor = min(1.0, clip / (norm + 1e-6)) / count if clip else 1 / count
        for p in d.model.parameters():
            p.grad = None if p.grad is None else p.grad * factor
        reference.step()
        reference.zero_grad()
        assert metrics == pytest.approx({"grad_norm": norm, "lr": 1e-2}, rel=1e-5)
        assert clip != 0.05 or norm > clip  # the bound clips, even after the division
    for a, b in zip(c.model.parameters(), d.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# Names of modes


class Mode(str, enum.Enum):  # noqa: UP042
    """An enumeration of modes like that of a service's SDK."""

    NUM_LOSS_TOKENS = "num_loss_tokens"
    NUM_SEQUENCES = "num_sequences"
    NONE = "none"


class Plain(enum.Enum):
    NUM_SEQUENCES = "num_sequences"


@pytest.mark.parametrize(
    ("mode", "count"),
    [
        (None, 1),
        ("none", 1),
        ("None", 1),
        (Mode.NONE, 1),
        ("NUM_LOSS_TOKENS", 3),
        ("Num_Loss_Tokens", 3),
        (Mode.NUM_LOSS_TOKENS, 3),
        ("num_sequences", 2),
        ("NUM_SEQUENCES", 2),
        (Mode.NUM_SEQUENCES, 2),
        (Plain.NUM_SEQUENCES, 2),
    ],
    ids=repr,
)
def test_a_mode_has_a_name_in_any_case_or_is_an_enumerations(mode: Any, count: int) -> None:
    c = byte_client()
    c.forward_backward([masked(0, 1, 1), masked(1)], CE).result()
    norm = accumulated(c)
    got = c.optim_step(AdamParams(), grad_accumulation_normalization=mode).result().metrics["grad_norm"]
    assert got == pytest.approx(norm / count, rel=1e-6)


@pytest.mark.parametrize("mode", ["foo", "", "num_tokens", "num-sequences", 3, True, ["num_sequences"], object()])
def test_an_unknown_mode_is_refused_in_the_services_words_and_the_gradient_kept(mode: Any) -> None:
    c = byte_client()
    c.forward_backward([masked(0, 1, 1), masked(1)], CE).result()
    norm = accumulated(c)
    with pytest.raises(LossInputError) as caught:
        c.optim_step(AdamParams(), mode).result()
    expected = f"{mode!r}; expected one of: num_loss_tokens, num_sequences, none"
    assert f"Unknown grad_accumulation_normalization {expected}" in str(caught.value)
    assert accumulated(c) == norm and c.get_info().steps == 0
    assert c.optim_step(AdamParams(), "num_sequences").result().metrics["grad_norm"] == pytest.approx(norm / 2)


# Divided twice

MEANS = [
    lossfns.cross_entropy(),
    lossfns.cross_entropy(weigh=lossfns.sequence_mean),
    lossfns.cross_entropy(weigh=lossfns.sequence_sum_mean),
    lossfns.cross_entropy(weigh=lossfns.fixed_length(8)),
    lossfns.cross_entropy().bind(denominator=100.0),
    lossfns.dpo().bind(ref_logprobs=[[-1.0] * 3, [-1.0]]),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", MEANS, ids=lambda loss: repr(getattr(loss, "loss", loss)))
def test_a_mean_is_not_divided_again(loss: Any, mode: str) -> None:
    """The same holds once a sum is added to a mean: the two cannot be separated any more."""
    c, data = byte_client(), [masked(0, 1, 1), masked(1)]
    c.forward_backward(data, CE)
    c.forward_backward_custom(data, loss)
    c.forward_backward(data, CE).result()
    before = [p.grad.clone() for p in c.model.parameters() if p.grad is not None]
    with pytest.raises(LossInputError, match=f"expected None for a mean, got '{mode}' .*token_sum"):
        c.optim_step(AdamParams(), mode).result()
    after = [p.grad for p in c.model.parameters() if p.grad is not None]
    assert before and all(map(torch.equal, before, after))
    assert c.optim_step(AdamParams()).result().metrics["grad_norm"] > 0
    c.forward_backward(data, CE)  # the step has cleared the mean
    c.optim_step(AdamParams(), mode).result()


@pytest.mark.parametrize("mode", MODES)
def test_sums_may_be_divided(mode: str) -> None:
    c, data = byte_client(), [masked(0, 1, 1), masked(1)]
    reference = {"ref_logprobs": [[-1.0] * 3, [-1.0]]}
    c.forward_backward_custom(data, SUM).result()
    c.forward_backward_custom(data, SUM.bind(denominator=3.0)).result()  # which a raw sum ignores
    c.forward_backward_custom(data, lossfns.dpo(weigh=lossfns.pair_sum).bind(**reference)).result()
    assert c.optim_step(AdamParams(), mode).result().metrics["grad_norm"] > 0


# Embeddings


def total(data: Any, embeddings: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return sum((i % 2) * (e**3).sum() for i, e in enumerate(embeddings)), {}


def test_embeddings_are_sequences_and_not_tokens() -> None:
    """Two of five texts have a gradient. A count of tokens has no meaning for embeddings, nor for a mixture."""
    c = byte_client()
    custom(total, *[datum(n) for n in (4, 3, 2, 1, 5)], output="embedding")(c).result()
    norm = accumulated(c)
    with pytest.raises(LossInputError, match=r"grad_accumulation_normalization: .*over embeddings.*'num_sequences'"):
        c.optim_step(AdamParams(), "num_loss_tokens").result()
    assert accumulated(c) == norm
    assert c.optim_step(AdamParams(), "num_sequences").result().metrics["grad_norm"] == pytest.approx(norm / 2)
    custom(total, datum(4), datum(3), output="embedding")(c).result()
    builtin(CE, datum(3))(c).result()
    with pytest.raises(LossInputError, match="over embeddings"):
        c.optim_step(AdamParams(), "num_loss_tokens").result()
    norm = accumulated(c)
    assert c.optim_step(AdamParams(), "num_sequences").result().metrics["grad_norm"] == pytest.approx(norm / 2)


# Refused steps


def huge(data: Any, logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """A loss of 0 whose gradient is so large that float32 holds its norm, but not the norm of twenty times as much."""
    return sum(1e16 * (lp - lp.detach()).sum() for lp in logprobs_list), {}


def test_a_sum_of_gradients_that_is_not_finite_moves_nothing() -> None:
    """The request itself refuses a single one. Divided by a count, the sum would be in range again."""
    c, d = byte_client(), byte_client()
    for x in (c, d):
        x.forward_backward(byte_texts(), CE)
        x.optim_step(AdamParams()).result()
    c.forward_backward(byte_texts(), CE)
    for _ in range(20):
        c.forward_backward_custom([datum(50)], huge).result()
    with pytest.raises(LossInputError, match=r"expected a finite gradient, got a norm of (inf|nan).*dropped"):
        c.optim_step(AdamParams(weight_decay=0.1)).result()
    assert all(map(torch.equal, c.model.parameters(), d.model.parameters())) and c.get_info().steps == 1
    assert all(p.grad is None for p in c.model.parameters())
    for x in (c, d):
        x.forward_backward(byte_texts(), CE)
        x.optim_step(AdamParams()).result()
    assert all(map(torch.equal, c.model.parameters(), d.model.parameters()))


@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_step_without_a_gradient_is_refused(mode: str | None) -> None:
    c = byte_client()
    before = [p.detach().clone() for p in c.model.parameters()]
    with pytest.raises(LossInputError, match="optim_step: expected an accumulated gradient, got none since the last"):
        c.optim_step(AdamParams(weight_decay=0.5), mode).result()
    assert all(map(torch.equal, before, c.model.parameters()))


@pytest.mark.parametrize("sdk", sdks(), ids=lambda sdk: sdk.__name__)
def test_params_go_by_place_or_by_either_name(sdk: Any) -> None:
    params = (AdamParams if sdk is lossfns else sdk.AdamParams)(learning_rate=1e-2)
    clients = [byte_client() for _ in range(3)]
    for c in clients:
        c.forward_backward(byte_texts(), CE)
    a, b, c = clients
    steps = [a.optim_step(params), b.optim_step(optim_params=params), c.optim_step(adam_params=params)]
    assert steps[0].result() == steps[1].result() == steps[2].result()
    assert steps[0].result().metrics["lr"] == 1e-2
    for other in (b, c):
        assert all(map(torch.equal, a.model.parameters(), other.model.parameters()))


def test_both_names_at_once_are_refused_at_the_call() -> None:
    c = byte_client()
    c.forward_backward(byte_texts(), CE).result()
    with pytest.raises(LossInputError, match="Specify optim_params or legacy adam_params, not both"):
        c.optim_step(AdamParams(), adam_params=AdamParams())
    assert c.optim_step(AdamParams()).result().metrics["grad_norm"] > 0


class DimuonParams:
    """Parameters of Tinker's other optimizer."""

    type, learning_rate, grad_clip_norm, beta1 = "dimuon", 1e-3, 0.0, 0.9


def others() -> list[Any]:
    return [DimuonParams(), *(sdk.DimuonParams(learning_rate=1e-3) for sdk in sdks() if hasattr(sdk, "DimuonParams"))]


@pytest.mark.parametrize("params", [None, {"learning_rate": 1e-3}, 1e-3, *others()], ids=lambda p: type(p).__name__)
def test_params_of_anything_but_adam_are_refused(params: Any) -> None:
    c = byte_client()
    c.forward_backward(byte_texts(), CE).result()
    with pytest.raises(LossInputError, match=r"AdamParams.*Expected AdamParams or OptimParamsBase"):
        c.optim_step(params).result()
    assert c.optim_step(AdamParams()).result().metrics["grad_norm"] > 0
