"""grad_report against gradients derived by hand, on our losses and on plain functions; its table and its picture."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches import sdks

import lossfns
from lossfns import ON_POLICY, LossInputError, dpo, grpo, multi_target_cross_entropy, ppo, with_tis
from lossfns.inspect import GradReport, grad_report
from lossfns.inspect.pictures import MASKED, Cells, Strip, cells
from lossfns.inspect.probe import split_by_datum
from lossfns.testing.batch import Batch

E = math.exp(0.5)
CLIPPED = Batch(
    logprobs=[[-2.0, -2.0, -2.0], [-2.0, -2.0]],
    weights=[[1.0, 1.0, 0.0], [1.0, 1.0]],
    columns={
        "advantages": [[1.0, 1.0, 5.0], [-2.0, -2.0]],
        "old_logprobs": [[-2.0, -2.5, -9.0], [-2.5, -1.5]],
    },
)
"""Log-ratios 0, ½ and a masked one; ½ and −½. With clip (0.8, 1.2) and D = 4 active tokens, −A·r·w / D is

    −1/4, 0 (r = √e > 1.2 with A > 0), masked;   2√e/4, 0 (r = 1/√e < 0.8 with A < 0).
"""
PAIR = Batch(
    [[-1.0, -1.0], [-1.0, -3.0, -1.0]],
    [[0.0, 1.0], [1.0, 1.0, 1.0]],
    {"ref_logprobs": [[-1.0, -2.0], [-1.0, -2.0, -1.0]]},
)
"""Σ w·(lp − ref) is 1 for the chosen side and −1 for the rejected: m = 2."""


def column(datum: Any, name: str) -> torch.Tensor:
    return torch.from_numpy(datum.loss_fn_inputs[name].to_numpy().copy())


def plain_ppo(data: list[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """PPO's clip with a token mean, as one would write it."""
    total, count = torch.zeros(()), 0.0
    for datum, lp in zip(data, logprobs):
        w, a, old = (column(datum, name) for name in ("weights", "advantages", "old_logprobs"))
        r = torch.where(w > 0, lp - old, 0.0).exp()
        total = total - (w * torch.minimum(r * a, r.clamp(0.8, 1.2) * a)).sum()
        count += float(w.sum())
    return total / count, {}


def plain_dpo(data: list[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    h = [(column(d, "weights") * (lp - column(d, "ref_logprobs"))).sum() for d, lp in zip(data, logprobs)]
    return -F.logsigmoid(0.1 * (torch.stack(h[0::2]) - torch.stack(h[1::2]))).mean(), {}


def report(loss_fn: Any, batch: Batch, **options: Any) -> GradReport:
    return grad_report(loss_fn, batch.data(), batch.tensors(), **options)


def cells_of(r: GradReport) -> Cells:
    """The cells of the picture of a report."""
    clipped = None if r.clipped is None else split_by_datum(r.clipped, r.shapes)
    return cells(Strip(r.gradients, split_by_datum(r.active, r.shapes), clipped))


@pytest.mark.parametrize("loss_fn", [ppo(), plain_ppo], ids=["ours", "plain"])
def test_gradients_shares_and_clipped_tokens(loss_fn: Any) -> None:
    """Σ|g| = 1/4 + √e/2, Σg = √e/2 − 1/4; two of four active tokens are clipped."""
    r = report(loss_fn, CLIPPED)
    l1 = 1 / 4 + E / 2
    assert [row.tolist() for row in r.gradients] == [[-0.25, 0.0, 0.0], [pytest.approx(E / 2), 0.0]]
    assert r.l1 == pytest.approx(l1)
    assert r.l2 == pytest.approx(math.hypot(1 / 4, E / 2))
    assert r.cancellation == pytest.approx(1 - (E / 2 - 1 / 4) / l1)
    assert r.clipped is not None and r.clipped.tolist() == [False, True, False, False, True]
    by = r.sequences()
    assert by["share"] == pytest.approx([0.25 / l1, E / 2 / l1])
    assert by["cancellation"] == [0.0, 0.0]  # within a sequence every push has one sign
    assert by["clipped"] == [1, 1] and by["masked"] == [1, 0]
    counts = {name: int(x.sum()) for name, x in r.kinds.items()}
    assert counts == {
        "active": 4, "masked": 1, "positive": 1, "negative": 1, "zero": 2, "clipped": 2, "capped": 0, "leaking": 0,
    }  # fmt: skip


@pytest.mark.parametrize("loss_fn", [ppo(), plain_ppo], ids=["ours", "plain"])
def test_effects_of_columns(loss_fn: Any) -> None:
    """Without advantages nothing is left: Σ|g|. On-policy g = −A·w/D = (−1/4, −1/4), (1/2, 1/2):
    the changes are 0, 1/4, √e/2 − 1/2 and 1/2.
    """
    effects = report(loss_fn, CLIPPED).effects
    assert effects == {
        "advantages": pytest.approx(1 / 4 + E / 2),
        "old_logprobs": pytest.approx(1 / 4 + (E / 2 - 1 / 2) + 1 / 2),
    }


def test_a_clipped_token_is_seen_under_a_kl_term() -> None:
    """dk3/dlp = 1 − exp(ref − lp) = 1 − e at each active token, β/D = 1/40: KL alone is 4·(e − 1)/40.

    The clipped tokens keep that gradient, so theirs is not 0, but the advantage adds nothing to it.
    """
    batch = CLIPPED.having(ref_logprobs=[[-1.0] * 3, [-1.0] * 2])
    r = report(grpo(kl_beta=0.1), batch)
    assert r.clipped is not None and r.clipped.tolist() == [False, True, False, False, True]
    assert r.gradients[0][1].item() == pytest.approx((1 - math.e) / 40)
    assert r.effects["ref_logprobs"] == pytest.approx(4 * (math.e - 1) / 40)
    assert r.effects["advantages"] == pytest.approx(1 / 4 + E / 2)


def test_effect_of_the_sampler() -> None:
    """old − sampler = ½ at one of two tokens: ρ = √e there, g = −ρ·A/D; with the sampler as old ρ = 1."""
    batch = Batch(
        [[-1.0, -1.0]],
        [[1.0, 1.0]],
        {"advantages": [[1.0, 1.0]], "old_logprobs": [[-1.0, -1.0]], "sampler_logprobs": [[-1.5, -1.0]]},
    )
    r = report(with_tis(ppo(), cap=2.0), batch)
    assert r.gradients[0].tolist() == pytest.approx([-E / 2, -1 / 2])
    assert r.effects["sampler_logprobs"] == pytest.approx((E - 1) / 2)


def test_bound_columns_and_other_sdks_are_read_alike() -> None:
    bare = Batch(CLIPPED.logprobs, CLIPPED.weights)
    bound = ppo().bind(**CLIPPED.columns)
    expected = report(ppo(), CLIPPED)
    assert report(bound, bare).as_dict() == expected.as_dict()
    for sdk in sdks():
        assert grad_report(ppo(), CLIPPED.data(sdk), CLIPPED.tensors()).as_dict() == expected.as_dict()


def test_on_policy_by_declaration_leaves_old_logprobs_out_of_sight() -> None:
    r = report(ppo().bind(old_logprobs=ON_POLICY), CLIPPED)
    assert r.gradients[0].tolist() == [-0.25, -0.25, 0.0]
    assert r.clipped is None and r.capped is None and list(r.effects) == ["advantages"]


@pytest.mark.parametrize("loss_fn, pairs", [(dpo(), None), (plain_dpo, True)], ids=["ours", "plain"])
def test_pairs(loss_fn: Any, pairs: bool | None) -> None:
    """∓β·σ(−β·m)·w with β = 0.1, m = 2: one active token on the chosen side, three on the rejected."""
    r = report(loss_fn, PAIR, pairs=pairs)
    g = 0.1 / (1 + math.exp(0.2))
    assert r.gradients[0].tolist() == pytest.approx([0.0, -g])
    assert r.gradients[1].tolist() == pytest.approx([g] * 3)
    assert r.pair_masses() == [{"chosen": pytest.approx(g), "rejected": pytest.approx(3 * g)}]
    assert "rejected" in r.table()
    assert r.effects == {"ref_logprobs": pytest.approx(4 * (0.05 - g))}  # at ref = lp: m = 0, β/2 at each token


def test_many_targets() -> None:
    """−w / Σw: w = 3, 1 at position 0, 0, 4 at position 1; Σw = 8."""
    batch = Batch([[-1.0, -2.0, -3.0, -1.0]], [[3.0, 1.0, 0.0, 4.0]], {}, targets=2)
    r = report(multi_target_cross_entropy(), batch)
    assert r.gradients[0].tolist() == [[-3 / 8, -1 / 8], [0.0, -1 / 2]]
    assert r.largest(2) == [
        {"datum": 0, "position": 1, "target": 1, "gradient": -1 / 2},
        {"datum": 0, "position": 0, "target": 0, "gradient": -3 / 8},
    ]
    assert cells_of(r).gradient.tolist() == [[-1 / 2, -1 / 2]]  # K targets summed


def test_capped_tokens() -> None:
    columns = {"advantages": [[1.0] * 8], "old_logprobs": [[-1.0] * 8]}
    r = report(ppo(), Batch([[-1.0] * 7 + [-22.0]], [[1.0] * 8], columns))
    assert r.capped is not None and r.capped.tolist() == [False] * 7 + [True]


def test_leaves_are_the_reports_own() -> None:
    constants = [lp.detach() for lp in CLIPPED.tensors()]
    leaves = CLIPPED.tensors()
    with torch.no_grad():
        assert grad_report(ppo(), CLIPPED.data(), constants).l1 == grad_report(ppo(), CLIPPED.data(), leaves).l1
    assert all(lp.grad is None for lp in leaves)
    assert not any(lp.requires_grad for lp in constants)


def nan_at_a_masked_token(data: Any, logprobs: Any) -> Any:
    """The mask multiplies after a logarithm of 0: value and gradient of the masked token are nan."""
    w = [column(d, "weights") for d in data]
    return sum(((lp + 2).abs().log() * 0 * (1 - x) - lp * x).sum() for lp, x in zip(logprobs, w)), {}


def test_gradients_that_are_not_finite_are_named_and_left_out_of_sums() -> None:
    batch = Batch([[-2.0, -1.0], [-1.0]], [[0.0, 1.0], [1.0]])
    r = report(nan_at_a_masked_token, batch)
    [entry] = r.nonfinite()
    assert (entry["datum"], entry["position"]) == (0, 0) and math.isnan(entry["gradient"])
    assert r.l1 == 2.0
    assert "not finite: datum 0 position 0" in r.table()
    assert "masked, with a gradient!" in r.table()
    assert json.loads(json.dumps(r.as_dict(), allow_nan=False))["gradients"] == [["nan", -1.0], [-1.0]]


def test_as_dict_and_table() -> None:
    r = report(ppo(), CLIPPED)
    found = json.loads(json.dumps(r.as_dict(), allow_nan=False))
    assert found["signs"] == [[-1.0, 0.0, 0.0], [1.0, 0.0]]
    assert found["tokens"]["all"] == 5 and found["tokens"]["clipped"] == 2
    assert found["columns"]["advantages"]["share"] == pytest.approx(1.0)
    lines = r.table(rows=1).splitlines()
    assert lines[0].startswith("ppo(clip=(0.8, 1.2)")
    assert "  clipped                  2  50.0%" in lines
    assert "(the first 1 of 2; as_dict() has them all)" in lines
    assert max(map(len, lines)) <= 120


def broken(result: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda data, logprobs: result(logprobs)


@pytest.mark.parametrize(
    "result, message",
    [
        (lambda lps: 0.5, r"loss_fn to return \(0-dim tensor, dict\), got float"),
        (lambda lps: lps[0].sum(), r"loss_fn to return \(0-dim tensor, dict\), got Tensor"),
        (lambda lps: (lps[0].sum(), {}, {}), "got a tuple of 3"),
        (lambda lps: (sum(lp.sum() for lp in lps).item(), {}), r"got \(float, ...\). Leave out .item\(\)"),
        (lambda lps: (torch.cat(lps)[:2], {}), r"loss: expected a 0-dim tensor, got shape \(2,\). Reduce it"),
        (lambda lps: (sum(lp.sum() for lp in lps).detach(), {}), r"does not depend on logprobs \(no grad_fn\)"),
        (lambda lps: (lps[0].sum(), {}), r"logprobs_list\[1\]: expected a gradient, got no gradient"),
        (lambda lps: (sum(lp.sum() for lp in lps), None), "metrics: expected a dict of floats, got NoneType"),
        (lambda lps: (sum(lp.sum() for lp in lps), {"x": lps[0].sum()}), r"metrics\['x'\]: expected a float, got a T"),
        (lambda lps: (sum(lp.sum() for lp in lps), {"a:b:c": 1.0}), "names with one ':' at most, got 'a:b:c'"),
    ],
)
def test_a_loss_that_breaks_the_contract(result: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(LossInputError, match=message):
        report(broken(result), CLIPPED)


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(LossInputError, match="2 datums but 1 logprobs tensors"):
        grad_report(ppo(), CLIPPED.data(), CLIPPED.tensors()[:1])
    with pytest.raises(
        LossInputError, match=r"datum\[0\].logprobs: expected 3 rows \(the length of target_tokens\), got 2"
    ):
        grad_report(plain_ppo, CLIPPED.data(), [torch.zeros(2), torch.zeros(2)])
    with pytest.raises(LossInputError, match="odd number"):
        report(plain_ppo, CLIPPED.take([0]), pairs=True)
    with pytest.raises(LossInputError, match="align"):
        report(ppo().bind(align="truncate"), CLIPPED)


# The picture


def test_cells_of_a_known_case() -> None:
    shown = cells_of(report(ppo(), CLIPPED))
    assert shown.gradient.tolist() == [[-0.25, 0.0, 0.0], [pytest.approx(E / 2), 0.0, None]]  # None: past the end
    assert shown.masked.tolist() == [[False, False, True], [False, False, False]]
    assert shown.clipped.tolist() == [[False, True, False], [False, True, False]]


def test_colours_of_a_known_case() -> None:
    """The scale is ±√e/2, so that token is at its red end; −1/4 is blue, 0 in the middle, and masked is grey."""
    axes = report(ppo(), CLIPPED).figure().axes[0]
    gradients, masked, _ = axes.images
    assert gradients.get_clim() == pytest.approx((-E / 2, E / 2))
    image = gradients.to_rgba(gradients.get_array())
    red, blue, white = image[1, 0, :3], image[0, 0, :3], image[0, 1, :3]
    assert red[0] > red[2] and blue[2] > blue[0] and np.ptp(white) < 0.02
    assert image[1, 2, 3] == 0  # nothing past the end of a row
    grey = masked.to_rgba(masked.get_array())
    assert grey[0, 2].tolist() == pytest.approx([float(MASKED)] * 3 + [1.0])
    assert grey[..., 3].sum() == 1  # no other cell is covered
    crosses = axes.collections[0].get_offsets()
    assert crosses.tolist() == [[1.0, 0.0], [1.0, 1.0]]  # position, row


def test_long_and_many_rows_are_binned_and_cut_with_a_note() -> None:
    """100 rows of 600 tokens, cells of 3: position 301 lies in cell 100, and is shown there whatever its neighbours."""
    rows = 100
    batch = Batch([[-1.0] * 600] * rows, [[1.0] * 600] * rows)
    r = report(lambda data, lps: (torch.stack(lps).sum() - 9 * lps[2][301], {}), batch)
    shown = cells_of(r)
    assert shown.gradient.shape == (64, 200) and shown.tokens_each == 3
    assert shown.gradient[2, 100] == -8 and shown.gradient[2, 99] == 1
    [note] = r.figure().texts
    assert "first 64 of 100 sequences" in note.get_text() and "A cell is 3 tokens" in note.get_text()


def test_one_outlier_does_not_pale_the_rest() -> None:
    batch = Batch([[-1.0] * 200], [[1.0] * 200])
    figure = report(lambda data, lps: (lps[0].sum() + 99 * lps[0][7], {}), batch).figure()
    assert figure.axes[0].images[0].get_clim()[1] == pytest.approx(1.0)
    assert "the largest |g| is 100" in figure.texts[0].get_text()


@pytest.mark.parametrize("batch, loss_fn", [(CLIPPED, ppo()), (PAIR, dpo()), (CLIPPED.take([1]), ppo())])
def test_the_picture_is_written(batch: Batch, loss_fn: Any, tmp_path: Path) -> None:
    path = tmp_path / "strip.png"
    report(loss_fn, batch).picture(path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'lossfns\[viz\]'"):
        report(ppo(), CLIPPED).picture(tmp_path / "strip.png")


def test_the_gradient_is_that_of_backward() -> None:
    leaves = CLIPPED.tensors()
    loss, _ = lossfns.ppo()(CLIPPED.data(), leaves)
    loss.backward()
    for own, found in zip(leaves, report(ppo(), CLIPPED).gradients):
        assert own.grad is not None and torch.equal(own.grad, found)
