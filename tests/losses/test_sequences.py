"""Losses with one row for each datum, shown with unpaired preference: −log σ(y·β·m), y = ±1 and m = Σ w·(lp − ref)."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lossfns
from lossfns import LossInputError, Rows, Tokens, datum_from_tokens, datum_mean, datum_sum, export
from lossfns.inspect import preflight
from lossfns.loss import Loss, Statistics
from lossfns.preset import make_loss, preset
from lossfns.segments import sequence_value, weighted_sum
from lossfns.testing.kinds import detect_kind
from lossfns.weigh import Weighing

BETA = 0.5


@preset
def unpaired(weigh: Weighing = datum_mean) -> Loss:
    """−log σ(y·β·m) of each datum; the label y is one number for each datum."""

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        margin = sequence_value(t, t.label) * weighted_sum(t, t.logprobs - t.ref_logprobs)
        return -F.logsigmoid(BETA * margin), {"margin": margin.detach()}

    return make_loss(terms, ("ref_logprobs", "label"), weigh, rows=Rows.SEQUENCES)


DATA = [
    datum_from_tokens([5, 6, 7], prompt_length=1),
    datum_from_tokens([5, 6], prompt_length=2),  # no active token
    datum_from_tokens([5, 6, 7, 8], prompt_length=2),
]
REF = [[-1.0, -1.0], [-1.0], [-9.0, -2.0, -2.0]]
LABELS = [1.0, 1.0, -1.0]
MARGINS = (1.0, -3.0)
"""Datum 0: +((−0.5 + 1) + (−0.5 + 1)). Datum 2, the first slot masked: −((−1 + 2) + (0 + 2))."""


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    values = [[-0.5, -0.5], [-7.0], [-3.0, -1.0, 0.0]]
    return [torch.tensor(row, dtype=dtype, requires_grad=True) for row in values]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def bound(weigh: Weighing = datum_mean) -> Any:
    return unpaired(weigh=weigh).bind(ref_logprobs=REF, label=LABELS)


def test_value_gradient_and_metrics_by_hand() -> None:
    """L = (log(1 + e^(−β·1)) + log(1 + e^(β·3))) / 2; ∂L/∂lp = −y·β·σ(−β·y·m) / 2 at each active token."""
    logprobs = leaves()
    loss, metrics = bound()(DATA, logprobs)
    loss.backward()
    a, b = MARGINS
    assert float(loss.detach()) == pytest.approx((softplus(-BETA * a) + softplus(-BETA * b)) / 2, rel=1e-12)
    g0, g2 = (-y * BETA / (1 + math.exp(BETA * m)) / 2 for y, m in ((1, a), (-1, b)))
    torch.testing.assert_close(logprobs[0].grad, torch.tensor([g0, g0], dtype=torch.float64))
    assert logprobs[1].grad is not None and logprobs[1].grad.tolist() == [0.0]
    torch.testing.assert_close(logprobs[2].grad, torch.tensor([0.0, g2, g2], dtype=torch.float64))
    assert (metrics["datums"], metrics["sequences"], metrics["sequences_empty"], metrics["tokens"]) == (2, 3, 1, 4)
    assert (metrics["count"], metrics["denominator"], metrics["margin"]) == (2, 2, -1)


def test_the_sum_is_the_mean_times_the_datums_that_count() -> None:
    total, metrics = bound(datum_sum)(DATA, leaves())
    mean, _ = bound()(DATA, leaves())
    assert float(total.detach()) == pytest.approx(2 * float(mean.detach()), rel=1e-12)
    assert "count" not in metrics and metrics["denominator"] == 1


def test_chunks_sum_to_the_whole_and_their_metrics_merge() -> None:
    whole, metrics = bound()(DATA, leaves())
    denominator = bound().denominator(DATA)
    parts = [slice(0, 1), slice(1, 2), slice(2, 3)]
    results = [bound().part(p).bind(denominator=denominator)(DATA[p], leaves()[p]) for p in parts]
    assert denominator == 2
    assert sum(float(loss.detach()) for loss, _ in results) == pytest.approx(float(whole.detach()), rel=1e-12)
    merged = lossfns.merge_metrics([each for _, each in results])
    assert {name: merged[name] for name in ("datums", "margin", "sequences", "loss")} == pytest.approx(
        {name: metrics[name] for name in ("datums", "margin", "sequences", "loss")}
    )


def test_the_traced_form_has_the_same_gradient() -> None:
    """One datum at a time: share / denominator rides in the field ``share``, as the terms read the weights."""
    logprobs, by_datum = leaves(torch.float32), leaves(torch.float32)
    loss, metrics = bound()(DATA, logprobs)
    loss.backward()
    fn = export.as_datum_fn(bound())
    traced = torch.fx.symbolic_trace(fn)  # type: ignore[arg-type]
    assert fn.__code__.co_varnames == ("logprobs", "weights", "share", "ref_logprobs", "label")
    total, margins, rows = torch.tensor(0.0), 0.0, 0.0
    for datum, lp in zip(export.with_denominators(bound(), DATA), by_datum):
        names = ("weights", "share", "ref_logprobs", "label")
        columns = [torch.from_numpy(datum.loss_fn_inputs[name].to_numpy()) for name in names]
        value, sums = traced(lp, *columns)
        total, margins = total + value, margins + float(sums["custom/margin:sum"])
        rows += float(sums["custom/rows:sum"])
    total.backward()
    assert float(total.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert (rows, margins / rows) == (metrics["datums"], pytest.approx(metrics["margin"]))
    for ours, theirs in zip(logprobs, by_datum):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_micro_batch_streams_and_gives_the_gradient_of_the_whole() -> None:
    """In the local backend, in one request and in two with the denominator of both."""
    from lossfns.backend import LocalTrainingClient

    whole, halves = (LocalTrainingClient(seed=3, dtype=torch.float64) for _ in range(2))
    result = whole.forward_backward_custom(DATA, bound()).result()
    denominator = bound().denominator(DATA)
    for part in (slice(0, 2), slice(2, 3)):
        halves.forward_backward_custom(DATA[part], bound().part(part).bind(denominator=denominator)).result()
    assert result.metrics["datums"] == 2
    for one, two in zip(whole.model.parameters(), halves.model.parameters()):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-12)


def test_a_label_may_be_a_number_or_a_row_and_logprobs_may_not() -> None:
    rows = [[y] * len(ref) for y, ref in zip(LABELS, REF)]
    numbers, _ = bound()(DATA, leaves())
    listed, _ = unpaired().bind(ref_logprobs=REF, label=rows)(DATA, leaves())
    array, _ = unpaired().bind(ref_logprobs=REF, label=np.array(LABELS))(DATA, leaves())
    assert float(numbers.detach()) == float(listed.detach()) == float(array.detach())
    with pytest.raises(LossInputError, match="ref_logprobs: expected a row for each datum"):
        unpaired().bind(ref_logprobs=[-1.0, -1.0, -1.0], label=LABELS)(DATA, leaves())


def test_what_is_not_of_sequences_is_refused() -> None:
    with pytest.raises(LossInputError, match="weigh: expected a weighing of sequences"):
        unpaired(weigh=lossfns.token_mean)
    with pytest.raises(LossInputError, match="weigh: expected a weighing of tokens"):
        lossfns.ppo(weigh=datum_mean)
    with pytest.raises(LossInputError, match="a loss whose tokens stand for themselves"):
        export.token_gradient(bound(), DATA)
    with pytest.raises(LossInputError, match="expected one of"):
        export.fold(bound(), DATA)
    with pytest.raises(LossInputError, match="a loss whose rows are tokens"):
        lossfns.with_kl(make_loss(lambda t: (weighted_sum(t, t.logprobs), {}), (), datum_mean, Rows.SEQUENCES))


def test_a_value_of_a_sequence_is_exact_where_a_mean_would_round() -> None:
    t = Tokens(torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([3, 1]))
    x = torch.tensor([0.1, 0.1, 0.1, 0.0])
    assert sequence_value(t, x).tolist() == [x[0].item(), 0.0]
    assert sequence_value(Tokens(t.logprobs[:3], t.weights[:3]), -x[:3]).tolist() == [-x[0].item()]


def test_the_kit_takes_a_loss_of_labels_for_what_it_is() -> None:
    """Whether tokens become likelier depends on the labels, so no direction is an error; and it is no likelihood."""
    report = preflight(bound().bind(label=[-1.0, 1.0, -1.0]), DATA)
    assert not [finding for finding in report.findings if "wrong way" in finding.message and finding.level == "error"]
    assert detect_kind(unpaired()) == ("any", False)
