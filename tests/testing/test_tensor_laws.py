"""Every law of the kit through the tensor forms: each batch of datums becomes padded or packed tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lossfns
from lossfns import Loss, TensorData
from lossfns.testing import check
from lossfns.testing.report import BROKEN
from lossfns.tokens import PAIRS

LOSSES = [
    lossfns.cross_entropy(),
    lossfns.ppo(dual_clip=3.0),
    lossfns.grpo(kl_beta=0.1, weigh=lossfns.sequence_mean),
    lossfns.with_tis(lossfns.gspo(clip=(0.9, 1.1)), level=lossfns.sequence_level),
    lossfns.dpo(),
    lossfns.orpo(),
]
MORE = [
    lossfns.reinforce(weigh=lossfns.sequence_sum_mean),
    lossfns.importance_sampling(),
    lossfns.dapo(weigh=lossfns.fixed_length(8)),
    lossfns.gspo_token(),
    lossfns.cispo(weigh=lossfns.token_sum),
    lossfns.dro(),
    lossfns.dpo(label_smoothing=0.1, weigh=lossfns.pair_sum),
]
GARBAGE = (float("nan"), float("inf"), 1e30)


def rows_of(data: Sequence[Any], name: str) -> list[Tensor]:
    """Return a column of the datums as tensors, in float64 as they hold it."""
    names = ("old_logprobs", "logprobs") if name == "old_logprobs" else (name,)
    found = [next(d.loss_fn_inputs[n] for n in names if n in d.loss_fn_inputs) for d in data]
    rows = [x.to_numpy() if isinstance(x, TensorData) else x for x in found]
    return [torch.as_tensor(np.asarray(row, dtype=np.float64)) for row in rows]


def in_halves(rows: list[Tensor]) -> list[Tensor]:
    return rows[0::2] + rows[1::2]


def pad(rows: list[Tensor], value: float) -> Tensor:
    """Lay the rows side by side; every second one is padded on the left."""
    width = max(map(len, rows)) + 1
    fills = [row.new_full((width - len(row), *row.shape[1:]), value) for row in rows]
    return torch.stack(
        [torch.cat((fill, row) if i % 2 else (row, fill)) for i, (row, fill) in enumerate(zip(rows, fills))]
    )


def padded(loss: Loss, layout: str | None) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    def subject(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        order = in_halves if layout == "halves" else list
        columns = {name: order(rows_of(data, name)) for name in loss.reads}
        filled = {name: pad(rows, GARBAGE[i % 3]) for i, (name, rows) in enumerate(columns.items())}
        weights = pad(order(rows_of(data, "weights")), 0.0)
        return loss.padded(pad(order(list(logprobs_list)), float("nan")), weights, layout=layout, **filled)

    return subject


def packed(loss: Loss, layout: str | None) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    def subject(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        order = in_halves if layout == "halves" else list
        columns = {name: torch.cat(order(rows_of(data, name))) for name in ("weights", *loss.reads)}
        ordered = order(list(logprobs_list))
        return loss.packed(torch.cat(ordered), lengths=list(map(len, ordered)), layout=layout, **columns)

    return subject


def broken(loss: Loss, form: Any, layout: str | None, examples: int) -> list[str]:
    kind = "preference" if loss.rows is PAIRS else "policy" if "advantages" in loss.reads else "likelihood"
    report = check(form(loss, layout), kind=kind, like=loss, name=f"{form.__name__} {loss!r}", examples=examples)
    assert sum(v.verdict == "pass" for v in report.verdicts) >= 20
    return [f"{v.law}: {v.seen}" for v in report.verdicts if v.verdict in BROKEN]


@pytest.mark.parametrize("form", [padded, packed], ids=lambda form: form.__name__)
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_every_law_holds_through_tensors(loss: Loss, form: Any) -> None:
    assert not broken(loss, form, "halves" if loss.rows is PAIRS else None, examples=1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", [padded, packed], ids=lambda form: form.__name__)
@pytest.mark.parametrize("loss", MORE, ids=repr)
def test_every_law_holds_through_tensors_for_more_losses(loss: Loss, form: Any) -> None:
    assert not broken(loss, form, None, examples=1)


def test_a_wrong_loss_in_tensors_is_found() -> None:
    """Here a mean over padding too."""

    class Unmasked:
        rows, reads = lossfns.cross_entropy().rows, ()

        def padded(self, logprobs: Tensor, weights: Tensor, **options: Any) -> tuple[Tensor, dict[str, float]]:
            loss, metrics = lossfns.cross_entropy(weigh=lossfns.token_sum).padded(logprobs, weights)
            return loss / weights.numel(), metrics

    report = check(padded(Unmasked(), None), kind="likelihood", examples=1)  # type: ignore[arg-type]
    assert any(v.verdict in BROKEN for v in report.verdicts)
