"""Losses on a device: every form, with columns on either side, gives value, gradient and metrics of the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerator import CPU, DEVICE, assert_same, on_device, recorded_waits
from torch import Tensor

import lossfns
from lossfns import (
    ON_POLICY,
    Datum,
    Loss,
    LossInputError,
    ModelInput,
    TensorData,
    target_logprobs,
    targets_from_labels,
    weights_from_labels,
    weights_from_mask,
)
from lossfns.export import token_gradient
from lossfns.inspect import grad_report, preflight
from lossfns.testing.public import presets
from lossfns.tokens import LOGPROB_COLUMNS, MODEL_COLUMNS

LENGTHS = [3, 5, 1, 4]
PRESETS = {name: preset() for name, preset in presets().items()}
LOSSES = [
    *{(loss.rows, loss.output, loss.couples_groups): loss for loss in PRESETS.values()}.values(),
    lossfns.with_kl(lossfns.with_tis(lossfns.ppo(dual_clip=3.0), level=lossfns.sequence_level), kl_beta=0.1),
    lossfns.grpo(weigh=lossfns.sequence_mean, kl_beta=0.1),
    lossfns.dapo(weigh=lossfns.fixed_length(8)),
    lossfns.chord(lossfns.ppo(), mu=0.3),
    lossfns.rpo(lossfns.dpo()),
]

"""One preset of each kind, and combinations. They run in every form."""

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)


class Batch:
    """A batch of four sequences, as lists of rows: logprobs, weights and the columns that a loss reads."""

    def __init__(self, loss: Loss) -> None:
        g = torch.Generator("cpu").manual_seed(0)
        trailing = (3,) if loss.rows == "targets" else ()

        def rows(draw: Callable[[tuple[int, ...]], Tensor]) -> list[Tensor]:
            return [draw((n, *trailing)) for n in LENGTHS]

        self.loss = loss
        self.logprobs = rows(lambda shape: -3 * torch.rand(shape, generator=g) - 0.01)
        self.weights = rows(lambda shape: torch.randint(0, 3, shape, generator=g) / 2)
        for row in self.weights:
            row[-1] = 1.0
        self.columns: dict[str, Any] = {
            name: [(lp + 0.2 * torch.randn(lp.shape, generator=g)).clamp(max=-1e-3) for lp in self.logprobs]
            for name in loss.reads
        }
        groups = [1.0, 1.0, 1.0, 1.0] if loss.rows == "pairs" else [1.0, 1.0, 0.0, 0.0]
        given = {"labels": [1.0, 0.0, 1.0, 0.0], "groups": groups}
        given |= {name: [0.5, 1.0, 0.25, 1.0] for name in MODEL_COLUMNS}
        for name in set(loss.reads) - {*LOGPROB_COLUMNS, "teacher_logprobs"}:
            numbers = torch.tensor(given.get(name, [0.5, -1.0, 0.0, 2.0]))
            self.columns[name] = [numbers[i].expand(lp.shape).clone() for i, lp in enumerate(self.logprobs)]

    def datums(self) -> list[Datum]:
        return [
            Datum(ModelInput.from_ints([0] * len(w)), {"target_tokens": torch.zeros(w.shape, dtype=torch.long)})
            for w in self.weights
        ]

    def padded(self, rows: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def evaluate(call: Callable[[Any], tuple[Tensor, Any]], leaves: Any, waits: int = 1) -> tuple[Any, ...]:
    """Return value, gradients and metrics of a call on leaves. Check how often the host waits for the device."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    with recorded_waits() as recorded:
        loss, metrics = call(leaves)
        loss.backward()
    assert len(recorded) == (waits if leaves[0].device == DEVICE else 0), recorded
    assert loss.device == leaves[0].device
    return loss, [x.grad for x in leaves], metrics


SIDES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "columns on the device": (on_device, on_device),
    "columns on the host": (on_device, lambda x: x),
    "lists": (on_device, lambda x: [row.tolist() for row in x]),
    "data of the SDKs": (on_device, lambda x: [TensorData.from_torch(row) for row in x]),
    "one row on the host": (on_device, lambda x: [x[0], *on_device(x[1:])]),
}


@every_loss
@pytest.mark.parametrize("side", SIDES)
def test_the_datum_form(loss: Loss, side: str) -> None:
    batch = Batch(loss)
    columns = {"weights": batch.weights, **batch.columns}
    expected = evaluate(lambda lps: loss.bind(**columns)(batch.datums(), lps), batch.logprobs)
    move_logprobs, move_columns = SIDES[side]
    bound = loss.bind(**{name: move_columns(rows) for name, rows in columns.items()})
    assert_same(evaluate(lambda lps: bound(batch.datums(), lps), move_logprobs(batch.logprobs)), expected)


def test_columns_of_the_device_come_to_logprobs_of_the_host() -> None:
    batch = Batch(lossfns.ppo())
    columns = {"weights": batch.weights, **batch.columns}
    expected = evaluate(lambda lps: batch.loss.bind(**columns)(batch.datums(), lps), batch.logprobs)
    bound = batch.loss.bind(**on_device(columns))
    leaves = [x.detach().requires_grad_() for x in batch.logprobs]
    loss, metrics = bound(batch.datums(), leaves)
    loss.backward()
    assert_same((loss, [x.grad for x in leaves], metrics), expected)


@pytest.mark.parametrize("advantages", [[0.5, -1.0, 0.0, 2.0], torch.tensor([0.5, -1.0, 0.0, 2.0])], ids=type)
def test_a_number_for_each_datum_and_the_current_policy(advantages: Any) -> None:
    batch = Batch(lossfns.ppo())
    columns = {"weights": batch.weights, "old_logprobs": ON_POLICY}
    expected = evaluate(
        lambda lps: batch.loss.bind(advantages=advantages, **columns)(batch.datums(), lps), batch.logprobs
    )
    for numbers in (advantages, on_device(advantages)):
        bound = batch.loss.bind(advantages=numbers, **columns)
        assert_same(evaluate(lambda lps, b=bound: b(batch.datums(), lps), on_device(batch.logprobs)), expected)


def test_options_of_a_call() -> None:
    """Truncation, the metric ``grad_l1``, and a denominator that is a number of the device."""
    batch = Batch(lossfns.ppo())
    longer = {name: [torch.cat([row, row[-1:]]) for row in rows] for name, rows in batch.columns.items()}
    data = [Datum(d.model_input, {}) for d in batch.datums()]
    bound = batch.loss.bind(weights=batch.weights, **longer, align="truncate", grad_l1=True)
    expected = evaluate(lambda lps: bound.bind(denominator=7.0)(data, lps), batch.logprobs)
    for denominator in (7.0, torch.tensor(7.0), on_device(torch.tensor(7.0))):
        found = evaluate(
            lambda lps, d=denominator: bound.bind(denominator=d)(data, lps),
            on_device(batch.logprobs),
        )
        assert_same(found, expected)


FORMS = ("padded", "packed by lengths", "packed by bounds")


def tensors(batch: Batch, form: str) -> tuple[Tensor, dict[str, Any]]:
    """Return the logprobs of a batch in a form, and the other arguments of the call."""
    shape = batch.padded if form == "padded" else torch.cat
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    sequences = {
        "padded": {},
        "packed by lengths": {"lengths": bounds.diff()},
        "packed by bounds": {"cu_seqlens": bounds.int()},
    }
    columns = {name: shape(rows) for name, rows in {"weights": batch.weights, **batch.columns}.items()}
    return shape(batch.logprobs), columns | sequences[form]


def call_of(loss: Any, form: str, arguments: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda leaves: getattr(loss, form.split()[0])(leaves[0], **arguments)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(name: str) -> None:
    logprobs, arguments = tensors(Batch(PRESETS[name]), "padded")
    expected = evaluate(call_of(PRESETS[name], "padded", arguments), [logprobs])
    assert_same(evaluate(call_of(PRESETS[name], "padded", on_device(arguments)), on_device([logprobs])), expected)


@every_loss
@pytest.mark.parametrize("form", FORMS)
def test_padded_packed_and_deferred(loss: Loss, form: str) -> None:
    """Deferred, neither the loss nor its backward pass makes a wait, and ``finalise`` makes one."""
    logprobs, arguments = tensors(Batch(loss), form)
    expected = evaluate(call_of(loss, form, arguments), [logprobs])
    for each in (arguments, on_device(arguments)):
        assert_same(evaluate(call_of(loss, form, each), on_device([logprobs])), expected)
        value, gradients, metrics = evaluate(call_of(loss.deferred(), form, each), on_device([logprobs]), waits=0)
        assert all(x.device == DEVICE for x in metrics.tensors.values())
        with recorded_waits() as waits:
            numbers = metrics.finalise()
        assert len(waits) == 1
        assert_same((value, gradients, numbers), expected)


def test_pairs_in_halves_and_in_two_tensors() -> None:
    batch = Batch(lossfns.dpo())
    logprobs, columns = tensors(batch, "padded")

    def halves(columns: dict[str, Any]) -> Callable[[Any], Any]:
        return lambda leaves: batch.loss.padded(leaves[0], **columns, layout="halves")

    def two(columns: dict[str, Any]) -> Callable[[Any], Any]:
        return lambda leaves: batch.loss.padded(tuple(leaves), **columns)

    sides = {name: (x[:2], x[2:, :4]) for name, x in columns.items()}
    for form, leaves, arguments in ((halves, [logprobs], columns), (two, [logprobs[:2], logprobs[2:, :4]], sides)):
        expected = evaluate(form(arguments), leaves)
        for each in (arguments, on_device(arguments)):
            assert_same(evaluate(form(each), on_device(leaves)), expected)


def test_logits_labels_and_masks() -> None:
    """From logits of a padded batch to a loss: one wait, for its metrics."""
    g = torch.Generator("cpu").manual_seed(1)
    logits = torch.randn(2, 5, 11, generator=g)
    labels = torch.tensor([[-100, -100, 3, 4, 10], [-100, 2, 3, -100, -100]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])

    def call(leaves: Any) -> Any:
        (z,), device = leaves, leaves[0].device
        ids, seen = labels.to(device, non_blocking=True), mask.to(device, non_blocking=True)
        lp = target_logprobs(z[:, :-1], targets_from_labels(ids), temperature=0.7)
        weights = weights_from_labels(ids, attention_mask=seen) * weights_from_mask(seen, prompt_lengths=[1, 1])
        return lossfns.cross_entropy().padded(lp, weights)

    assert_same(evaluate(call, on_device([logits])), evaluate(call, [logits]))


@pytest.mark.parametrize("form", ["datums", *FORMS])
def test_errors_name_the_same_place(form: str) -> None:
    batch = Batch(lossfns.ppo())
    batch.columns["old_logprobs"][1][-1] = torch.nan  # the last token of a sequence has a weight
    messages = []
    for move in (lambda x: x, on_device):
        with pytest.raises(LossInputError, match=r"datum\[1\].old_logprobs\[4\]") as caught:
            if form == "datums":
                columns = {name: move(rows) for name, rows in {"weights": batch.weights, **batch.columns}.items()}
                batch.loss.bind(**columns)(batch.datums(), move(batch.logprobs))
            else:
                logprobs, arguments = tensors(batch, form)
                call_of(batch.loss, form, {name: move(x) for name, x in arguments.items()})([move(logprobs)])
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_lengths_of_the_device_are_checked_with_the_metrics() -> None:
    batch = Batch(lossfns.cross_entropy())
    lp, w = on_device(torch.cat(batch.logprobs)), on_device(torch.cat(batch.weights))
    _, metrics = batch.loss.deferred().packed(lp, w, lengths=on_device(torch.tensor([3, 5, 1, 5])))
    with pytest.raises(LossInputError, match="lengths"):
        metrics.finalise()


def test_the_gradient_by_token() -> None:
    batch = Batch(lossfns.ppo())
    bound = batch.loss.bind(weights=batch.weights, **batch.columns)
    lp, rows = torch.cat(batch.logprobs), slice(0, sum(LENGTHS))
    expected = token_gradient(bound, batch.datums(), CPU)(lp, rows)
    assert_same(token_gradient(bound, batch.datums(), DEVICE)(on_device(lp), rows), expected)


def test_reports_before_training_are_those_of_the_cpu() -> None:
    batch = Batch(lossfns.ppo())
    bound = batch.loss.bind(weights=batch.weights, **batch.columns)
    reports = [grad_report(bound, batch.datums(), move(batch.logprobs)) for move in (lambda x: x, on_device)]
    assert str(reports[0]) == str(reports[1])
    checked = [preflight(bound, batch.datums(), logprobs=move(batch.logprobs)) for move in (lambda x: x, on_device)]
    assert [str(f) for f in checked[0].findings] == [str(f) for f in checked[1].findings]


def test_denominators_of_a_sum_may_be_on_the_device() -> None:
    """The call and its gradient wait for nothing. A denominator that cannot divide is refused with the metrics."""
    loss = lossfns.sum_losses(rl=lossfns.reinforce(), ce=lossfns.cross_entropy())
    lp = torch.tensor([[-1.0, -2.0]], device=DEVICE)
    given = {"ce_weights": torch.tensor([[0.0, 3.0]], device=DEVICE), "advantages": torch.tensor([2.0], device=DEVICE)}
    weights = torch.tensor([[1.0, 0.0]], device=DEVICE)
    for divisors, expected in (([2.0, 6.0], 2.0), ([2.0, 0.0], None)):
        divisor = torch.tensor(divisors, device=DEVICE)
        leaf = lp.clone().requires_grad_()
        with recorded_waits() as waits:
            total, metrics = loss.deferred().padded(leaf, weights, denominator=divisor, **given)
            total.backward()
        assert not waits
        if expected is None:
            with pytest.raises(LossInputError, match="denominator: expected a finite number above 0, in the part 'ce'"):
                metrics.finalise()
        else:
            assert metrics.finalise()["ce/denominator"] == 6.0 and total.item() == expected
