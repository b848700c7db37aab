"""Tensors as loops hold them: padded and packed batches give the loss, gradient and metrics of the datum form."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lossfns
from lossfns import Datum, Loss, LossInputError, ModelInput
from lossfns.describe import presets
from lossfns.segments import sequence_value
from lossfns.tokens import DATUM_COLUMNS, PAIRS, TARGETS

B, T, K = 6, 7, 3
TOKEN_LOSSES = [
    lossfns.cross_entropy(),
    lossfns.cross_entropy(weigh=lossfns.token_sum),
    lossfns.multi_target_cross_entropy(),
    lossfns.reinforce(weigh=lossfns.sequence_mean),
    lossfns.importance_sampling(weigh=lossfns.sequence_sum_mean),
    lossfns.ppo(dual_clip=3.0),
    lossfns.grpo(kl_beta=0.1),
    lossfns.dapo(weigh=lossfns.fixed_length(8)),
    lossfns.gspo(clip=(0.9, 1.1)),
    lossfns.gspo_token(clip=(0.9, 1.1)),
    lossfns.cispo(),
    lossfns.dro(),
    lossfns.with_tis(lossfns.gspo(clip=(0.9, 1.1)), level=lossfns.sequence_level),
]
PAIR_LOSSES = [lossfns.dpo(), lossfns.dpo(label_smoothing=0.1, weigh=lossfns.pair_sum), lossfns.orpo()]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def batch(loss: Loss, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return logprobs, weights and columns ``[B, T]`` or ``[B, T, K]``, with padding on either side and fractions."""
    g = torch.Generator().manual_seed(seed)
    shape = (B, T, K) if loss.rows is TARGETS else (B, T)
    lp = -3 * torch.rand(shape, generator=g, dtype=torch.float64) - 0.01
    weights = torch.randint(0, 4, shape, generator=g) / 2
    weights[0, :3] = 0  # left padding
    weights[1, 2:] = 0  # right padding
    weights[:, 1] = 1.0
    columns = {
        name: (lp + 0.4 * torch.randn(shape, generator=g, dtype=torch.float64)).clamp(max=0)
        for name in loss.reads
        if name != "advantages"
    }
    if "advantages" in loss.reads:
        columns["advantages"] = torch.randn(B, generator=g, dtype=torch.float64)
    as_given = {name: x.to(dtype) for name, x in {"logprobs": lp, **columns}.items()}
    return {"weights": weights.to(torch.float32), **as_given}


def test_the_fix_for_a_shape() -> None:
    """Weights of positions where there are candidates; a number for each pair where there is one for each side."""
    lp, scores = -torch.ones(2, 3, 4), torch.zeros(4, 2)
    with pytest.raises(LossInputError, match=r"Repeat it for each of the K targets: x.unsqueeze\(-1\).expand_as"):
        lossfns.top_k_jsd().padded(lp, torch.ones(2, 3), teacher_logprobs=lp)
    with pytest.raises(LossInputError, match="one number for each sequence; both sides of a pair count"):
        lossfns.bradley_terry_margin().padded(scores, torch.ones(4, 2), target_margin=torch.ones(2))


def datums(weights: Any) -> list[Datum]:
    return [
        Datum(ModelInput.from_ints([0] * len(w)), {"target_tokens": np.zeros(tuple(w.shape), np.int64), "weights": w})
        for w in weights
    ]


def run(call: Callable[..., Any], leaves: list[Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor], Any]:
    """Return the loss, the gradients of the leaves, and the metrics."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lossfns.LossWarning)
        loss, metrics = call(*args, **kwargs)
    loss.backward()
    return loss.detach(), [x.grad for x in leaves if x.grad is not None], metrics


def by_datum(loss: Loss, given: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
    leaves = [row.clone().requires_grad_() for row in given["logprobs"]]
    columns = {name: list(x) if x[0].ndim else x for name, x in given.items() if name not in ("logprobs", "weights")}
    value, gradients, metrics = run(loss.bind(**columns), leaves, datums(given["weights"]), leaves)
    return value, torch.stack(gradients), metrics


def columns_of(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in given.items() if name != "logprobs"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", [*TOKEN_LOSSES, *PAIR_LOSSES], ids=repr)
def test_padded_is_the_datum_form_bit_for_bit(loss: Loss, dtype: torch.dtype) -> None:
    given = batch(loss, dtype=dtype)
    value, gradient, metrics = by_datum(loss, given)
    leaf = given["logprobs"].clone().requires_grad_()
    padded_value, (padded_gradient,), padded_metrics = run(loss.padded, [leaf], leaf, **columns_of(given))
    assert torch.equal(padded_value, value) and torch.equal(padded_gradient, gradient)
    assert padded_metrics == metrics


@pytest.mark.parametrize("bounds", ["lengths", "cu_seqlens"])
@pytest.mark.parametrize("loss", [*TOKEN_LOSSES, *PAIR_LOSSES], ids=repr)
def test_packed_is_the_datum_form_bit_for_bit(loss: Loss, bounds: str) -> None:
    """Rows are cut to unequal lengths, and laid end to end."""
    given, lengths = batch(loss), [3, 7, 4, 5, 7, 2]
    rows = {name: [row[:n] if row.ndim else row for row, n in zip(x, lengths)] for name, x in given.items()}
    leaves = [row.clone().requires_grad_() for row in rows["logprobs"]]
    columns = {
        name: x if x[0].ndim else torch.stack(x) for name, x in rows.items() if name not in ("logprobs", "weights")
    }
    value, gradients, metrics = run(loss.bind(**columns), leaves, datums(rows["weights"]), leaves)
    flat = {name: torch.cat(x) if x[0].ndim else torch.stack(x) for name, x in rows.items()}
    leaf = flat.pop("logprobs").clone().requires_grad_()
    ends = np.cumsum([0, *lengths]).astype(np.int32)
    given_bounds = lengths if bounds == "lengths" else torch.from_numpy(ends)
    packed_value, (gradient,), packed_metrics = run(loss.packed, [leaf], leaf, **flat, **{bounds: given_bounds})
    assert torch.equal(packed_value, value) and torch.equal(gradient, torch.cat(gradients))
    assert packed_metrics == metrics


@pytest.mark.parametrize("loss", PAIR_LOSSES, ids=repr)
def test_the_layouts_of_pairs_are_one_loss(loss: Loss) -> None:
    """Interleaved, halves in one tensor, packed halves, and two tensors."""
    given = batch(loss)
    value, gradient, metrics = by_datum(loss, given)

    def close(found: Any, expected: Any) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-16)

    def halves(x: Tensor) -> Tensor:
        return torch.cat([x[0::2], x[1::2]])

    leaf = halves(given["logprobs"]).requires_grad_()
    columns = {name: halves(x) for name, x in columns_of(given).items()}
    found, (grad,), found_metrics = run(loss.padded, [leaf], leaf, **columns, layout="halves")
    close([found, grad], [value, halves(gradient)])
    assert found_metrics == pytest.approx(metrics, rel=1e-14)
    leaf = halves(given["logprobs"]).flatten().requires_grad_()
    flat = {name: x.flatten() for name, x in columns.items()}
    found, (grad,), _ = run(loss.packed, [leaf], leaf, **flat, layout="halves", lengths=[T] * B)
    close([found, grad], [value, halves(gradient).flatten()])
    # Two tensors of different widths: the rejected side has two more tokens of padding.
    sides = [x.clone().requires_grad_() for x in (given["logprobs"][0::2], pad(given["logprobs"][1::2], -1.0))]
    two = {
        name: (x[0::2], pad(x[1::2], 0.0 if name == "weights" else float("nan")))
        for name, x in columns_of(given).items()
    }
    found, grads, _ = run(loss.padded, sides, tuple(sides), **two)
    close([found, grads[0], grads[1][:, :T]], [value, gradient[0::2], gradient[1::2]])
    assert not grads[1][:, T:].any()


def pad(x: Tensor, value: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, 2), value=value)


def test_masks_of_every_dtype_are_weights() -> None:
    given = batch(lossfns.grpo())
    columns = columns_of(given) | {"weights": given["weights"] > 0}
    values = {
        lossfns.grpo().padded(given["logprobs"], **columns | {"weights": columns["weights"].to(dtype)})[0].item()
        for dtype in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64)
    }
    assert len(values) == 1


def test_nothing_of_a_masked_slot_comes_through() -> None:
    loss = lossfns.grpo(kl_beta=0.1)
    given = batch(loss)
    clean, (gradient,), _ = run(
        loss.padded, [leaf := given["logprobs"].clone().requires_grad_()], leaf, **columns_of(given)
    )
    masked = given["weights"] == 0
    dirty = {
        name: x.masked_fill(masked, torch.nan) if x.ndim == 2 and name != "weights" else x for name, x in given.items()
    }
    leaf = dirty["logprobs"].clone().requires_grad_()
    value, (found,), _ = run(loss.padded, [leaf], leaf, **columns_of(dirty))
    assert torch.equal(value, clean) and torch.equal(found, gradient)


def test_the_inputs_are_left_as_they_were() -> None:
    loss = lossfns.grpo(kl_beta=0.1)
    given = batch(loss, dtype=torch.float32)
    before = {name: x.clone() for name, x in given.items()}
    loss.padded(given["logprobs"], **columns_of(given))
    assert all(torch.equal(x, given[name]) for name, x in before.items())


def test_parts_with_one_denominator_sum_to_the_whole() -> None:
    loss = lossfns.dapo()
    given = batch(loss)
    whole, metrics = loss.padded(given["logprobs"], **columns_of(given))
    parts = [{name: x[i : i + 2] for name, x in given.items()} for i in range(0, B, 2)]
    losses = [loss.padded(p["logprobs"], **columns_of(p), denominator=metrics["count"])[0] for p in parts]
    torch.testing.assert_close(sum(losses), whole, rtol=1e-14, atol=0)


@pytest.mark.parametrize("loss", [*TOKEN_LOSSES, *PAIR_LOSSES], ids=repr)
def test_the_denominator_of_padded_weights_is_that_of_their_datums(loss: Loss) -> None:
    weights = batch(loss)["weights"]
    assert loss.denominator(weights) == loss.denominator(datums(weights))
    if loss in PAIR_LOSSES:
        halves = torch.cat([weights[0::2], weights[1::2]])
        assert loss.denominator(halves, layout="halves") == loss.denominator(weights)


def test_bound_columns_are_taken_and_call_columns_replace_them() -> None:
    loss = lossfns.reinforce()
    given = batch(loss)
    bound = loss.bind(advantages=given["advantages"])
    expected = loss.padded(given["logprobs"], given["weights"], advantages=given["advantages"])
    assert bound.padded(given["logprobs"], given["weights"])[1] == expected[1]
    other = loss.padded(given["logprobs"], given["weights"], advantages=-given["advantages"])
    assert bound.padded(given["logprobs"], given["weights"], advantages=-given["advantages"])[1] == other[1]


def test_on_policy_needs_no_old_logprobs() -> None:
    loss = lossfns.ppo()
    given = batch(loss)
    columns = columns_of(given) | {"old_logprobs": lossfns.ON_POLICY}
    assert loss.padded(given["logprobs"], **columns)[1]["ratio"] == 1.0


# No transfer to the host


def test_deferred_metrics_are_tensors_and_then_the_same_numbers() -> None:
    loss = lossfns.grpo(kl_beta=0.1)
    given = batch(loss)
    value, metrics = loss.padded(given["logprobs"], **columns_of(given))
    later_value, later = loss.deferred().padded(given["logprobs"], **columns_of(given))
    assert torch.equal(value, later_value) and later.finalise() == metrics
    assert all(isinstance(x, Tensor) and x.ndim == 0 for x in later.tensors.values())
    assert {name: x.item() for name, x in later.tensors.items()} == pytest.approx(
        {name: metrics[name] for name in later.tensors}, rel=1e-12
    )


def test_a_nan_is_reported_when_the_metrics_are_read() -> None:
    loss = lossfns.reinforce()
    given = batch(loss)
    given["logprobs"][3, 1] = torch.nan
    _, later = loss.deferred().padded(given["logprobs"], **columns_of(given))
    with pytest.raises(LossInputError, match=r"datum\[3\].logprobs\[1\]"):
        later.finalise()


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_columns_that_were_made_in_inference_mode_are_taken(form: str) -> None:
    given = batch(lossfns.ppo(), dtype=torch.float32)
    flat = {"lengths": [T] * B} if form == "packed" else {}
    shape = (lambda x: x.flatten()) if form == "packed" else (lambda x: x)
    leaf = shape(given.pop("logprobs")).requires_grad_()
    expected = run(getattr(lossfns.ppo(), form), [leaf], leaf, **{k: shape(x) for k, x in given.items()}, **flat)
    leaf.grad = None
    with torch.inference_mode():
        made = {name: shape(x.clone()) for name, x in given.items()}
    value, gradients, metrics = run(getattr(lossfns.ppo(), form), [leaf], leaf, **made, **flat)
    assert torch.equal(value, expected[0]) and torch.equal(gradients[0], expected[1][0]) and metrics == expected[2]


def test_kept_metrics_keep_no_graph() -> None:
    logprobs = torch.full((1, 2), -1.0, requires_grad=True)
    _, later = lossfns.cross_entropy().deferred().padded(logprobs * 2, torch.ones(1, 2))
    assert not later.get_batch().logprobs.requires_grad and not later.numbers.values.requires_grad


def test_tensors_whose_parts_lie_on_several_ranks_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        spread = DTensor.from_local(LP, init_device_mesh("cpu", (1,)), [Shard(0)])
        for args in ((spread, W), (LP, spread)):
            with pytest.raises(LossInputError, match="a DTensor"):
                lossfns.cross_entropy().padded(*args)
    finally:
        torch.distributed.destroy_process_group()


def test_a_batch_that_changes_before_its_metrics_are_read_is_refused() -> None:
    logprobs = torch.full((1, 2), torch.nan)
    _, later = lossfns.cross_entropy().deferred().padded(logprobs, torch.ones(1, 2))
    logprobs.fill_(-1.0)
    with pytest.raises(LossInputError, match="a tensor that has changed since"):
        later.finalise()


# What is refused

LP, W = torch.full((4, 3), -1.0), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: lossfns.cross_entropy()(LP, W), "padded"),
        (lambda: lossfns.cross_entropy().padded(LP[0], W[0]), "packed"),
        (lambda: lossfns.cross_entropy().packed(LP, W, lengths=[3] * 4), "padded"),
        (lambda: lossfns.cross_entropy().padded(LP, W[:, :2]), "shape (4, 2)"),
        (lambda: lossfns.cross_entropy().padded(LP, torch.ones(4)), "shape (4,)"),
        (lambda: lossfns.cross_entropy().padded(LP.long(), W), "int64"),
        (lambda: lossfns.cross_entropy().padded([LP], [W]), "list of tensors"),
        (lambda: lossfns.cross_entropy().padded(LP, W, layout="halves"), "layout"),
        (lambda: lossfns.cross_entropy().padded(LP[:0], W[:0]), "at least one token"),
        (lambda: lossfns.cross_entropy().padded(LP, 0 * W), "at least one active token"),
        (lambda: lossfns.reinforce().padded(LP, W), "Pass advantages=...: a number"),
        (lambda: lossfns.reinforce().packed(LP[0], W[0], lengths=[3]), "Pass advantages=...: a number"),
        (lambda: lossfns.cross_entropy().bind(weights=W).padded(LP, W), "bind(weights=...)"),
        (lambda: lossfns.cross_entropy().bind(weights=W[0]).packed(LP[0], W[0], lengths=[3]), "bind(weights=...)"),
        (lambda: lossfns.reinforce().padded(LP, W, advantages=torch.ones(3)), "shape (3,)"),
        (lambda: lossfns.ppo().padded(LP, W, advantages=torch.ones(4), old_logprobs=torch.ones(4)), "old_logprobs"),
        (lambda: lossfns.ppo().padded(LP, W, advantage=torch.ones(4)), "Did you mean 'advantages'"),
        (lambda: lossfns.dpo().padded(LP[:3], W[:3], ref_logprobs=LP[:3]), "odd"),
        (lambda: lossfns.dpo().padded(LP, W, ref_logprobs=LP, layout="half"), "Did you mean 'halves'"),
        (lambda: lossfns.dpo().padded((LP, LP[:2]), (W, W[:2]), ref_logprobs=(LP, LP[:2])), "4 and 2 rows"),
        (lambda: lossfns.dpo().padded((LP, LP), W, ref_logprobs=(LP, LP)), "(chosen, rejected)"),
        (lambda: lossfns.cross_entropy().packed(LP[0], W[0]), "either lengths or cu_seqlens"),
        (lambda: lossfns.cross_entropy().packed(LP[0], W[0], lengths=[1, 1]), "sum to 3"),
        (lambda: lossfns.cross_entropy().packed(LP[0], W[0], lengths=[4, -1]), "sum to 3"),
        (lambda: lossfns.cross_entropy().packed(LP[0], W[0], cu_seqlens=[1, 3]), "cu_seqlens"),
        (lambda: lossfns.cross_entropy().packed(LP[0], W[0], cu_seqlens=[0, 3, 2]), "cu_seqlens"),
        (lambda: lossfns.cross_entropy().packed(LP[0], W[0], lengths=[1.5, 1.5]), "whole numbers"),
        (lambda: lossfns.cross_entropy().padded(LP, W, denominator=0), "denominator"),
        (lambda: lossfns.cross_entropy().denominator(torch.nested.nested_tensor([W[0], W[0, :2]])), "weights"),
        (lambda: lossfns.cross_entropy().denominator(W[0]), "shape (3,)"),
        (lambda: lossfns.cross_entropy().padded(LP + 2, W), "Were probabilities or logits passed?"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(LossInputError) as caught:
        call()
    assert words in str(caught.value), str(caught.value)


def test_pairs_in_halves_are_named_by_their_rows() -> None:
    weights = torch.ones(4, 3)
    weights[3] = 0  # the rejected side of pair 1
    with pytest.raises(LossInputError, match=r"datum\[3\].*rejected side of pair 1"):
        lossfns.dpo().padded(LP, weights, ref_logprobs=LP, layout="halves")


def test_a_number_for_each_datum_and_a_row_of_it_are_the_same() -> None:
    """In every tensor form, with rows of nan for a masked datum, and of two sides also one as numbers, one as rows."""
    g = torch.Generator().manual_seed(0)
    logprobs, others = -torch.rand(8, 5, generator=g), -torch.rand(8, 5, generator=g)
    mask = torch.ones(8, 5)
    mask[2:4], mask[5, 3:] = 0, 0
    for name, preset in presets().items():
        loss = preset()
        numbers = {x: torch.tensor([1.0, 1, math.nan, math.nan, 0, 0, 1, 1]) for x in loss.reads if x in DATUM_COLUMNS}
        if not numbers:
            continue
        columns = {x: others for x in loss.reads if x not in numbers}
        rows = {x: y[:, None].expand(8, 5).contiguous() for x, y in numbers.items()}
        found = {}
        for form, given in (("numbers", columns | numbers), ("rows", columns | rows)):
            found[form] = loss.padded(logprobs, mask, **given)
            flat = {x: y if y.ndim == 1 else y.flatten() for x, y in given.items()}
            found[f"packed {form}"] = loss.packed(logprobs.flatten(), mask.flatten(), lengths=[5] * 8, **flat)
            if loss.rows is PAIRS:
                sides = {x: (y[0::2], y[1::2]) for x, y in given.items()}
                mixed = {x: (y[0::2], rows[x][1::2]) if x in rows else sides[x] for x, y in given.items()}
                both = (logprobs[0::2], logprobs[1::2]), (mask[0::2], mask[1::2])
                found[f"two sides, {form}"] = loss.padded(*both, **sides)
                found[f"two sides, one as {form}"] = loss.padded(*both, **mixed)
        value, metrics = found["rows"]
        for form, (other, theirs) in found.items():
            assert other.item() == pytest.approx(value.item(), rel=1e-6), (name, form)
            assert theirs == pytest.approx(metrics, rel=1e-6), (name, form)
        t = loss.bind(**numbers, **{x: list(y) for x, y in columns.items()}).pack(
            [lossfns.Datum(lossfns.ModelInput.from_ints([1] * 5), {"weights": w}) for w in mask], list(logprobs)
        )
        for x, y in numbers.items():
            assert sequence_value(t, getattr(t, x)).tolist() == y.nan_to_num().tolist(), (name, x)
            moved = replace(t, columns={**t.columns, x: getattr(t, x) - 2})  # another column is no longer that number
            assert sequence_value(moved, getattr(moved, x))[0] == y[0] - 2, (name, x)
