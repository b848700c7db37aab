"""Sums of losses with denominators of their own: the oracle, any split, every form, exports, and refusals."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from batches import apart, random_batch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import lossfns
from lossfns import (
    Datum,
    Loss,
    LossInputError,
    ModelInput,
    Tokens,
    cross_entropy,
    dpo,
    evaluate,
    grpo,
    gspo,
    importance_sampling,
    kto,
    merge_metrics,
    ppo,
    reinforce,
    sequence_sum_mean,
    sum_losses,
    token_gradient,
    token_sum,
)
from lossfns.export import as_datum_fn, with_denominators
from lossfns.inspect import grad_report, preflight
from lossfns.integrations.trainer import denominator_for, for_trainer
from lossfns.testing import check, oracle
from lossfns.testing.oracle import Part

Rows = list[list[float]]
pytestmark = pytest.mark.filterwarnings("ignore::lossfns.LossWarning")
POLICY = ("advantages", "old_logprobs")
SFT = partial(Part, oracle.cross_entropy)


@dataclass(frozen=True)
class Sum:
    """A sum of losses, and the oracle's parts of the same names."""

    loss: Loss
    parts: dict[str, Part]


KL = {"kl": "k3", "kl_beta": 0.1}
SUMS = [
    Sum(
        sum_losses(rl=grpo(kl_beta=0.1), ce=cross_entropy(weigh=sequence_sum_mean), coefficients={"ce": 0.3}),
        {
            "rl": Part(oracle.grpo, 1, "weights", (*POLICY, "ref_logprobs"), KL),
            "ce": SFT(0.3, "ce_weights", (), {"weigh": "sequence_sum_mean"}),
        },
    ),
    Sum(
        sum_losses(rl=importance_sampling(), ce=cross_entropy(), pull=reinforce(), coefficients={"pull": -0.5}),
        {
            "rl": Part(oracle.importance_sampling, 1, "weights", POLICY),
            "ce": SFT(1, "ce_weights"),
            "pull": Part(oracle.reinforce, -0.5, "pull_weights", ("advantages",)),
        },
    ),
    Sum(
        lossfns.chord(gspo(), mu=0.25),
        {
            "rl": Part(oracle.gspo, 0.75, "weights", POLICY, {"weigh": "sequence_mean"}),
            "sft": SFT(0.25, "sft_weights"),
        },
    ),
    Sum(
        sum_losses(rl=ppo(weigh=token_sum), ce=cross_entropy()),
        {"rl": Part(oracle.ppo, 1, "weights", POLICY, {"weigh": "token_sum"}), "ce": SFT(1, "ce_weights")},
    ),
    Sum(
        lossfns.echo(reinforce()),
        {"rl": Part(oracle.reinforce, 1, "weights", ("advantages",)), "ce": SFT(0.1, "ce_weights")},
    ),
    Sum(
        lossfns.vapo_nll(ppo()),
        {"rl": Part(oracle.ppo, 1, "weights", POLICY), "nll": SFT(0.1, "nll_weights")},
    ),
    Sum(
        lossfns.oreal(reinforce(), positive_factor=0.5, negative_factor=2.0, sft_factor=3.0),
        {
            "negative": Part(oracle.reinforce, 2, "weights", ("advantages",)),
            "positive": Part(oracle.reinforce, 0.5, "positive_weights", ("advantages",)),
            "sft": SFT(1.5, "positive_weights"),
        },
    ),
    Sum(
        sum_losses(labels=kto(), ce=cross_entropy()),
        {
            "labels": Part(oracle.kto, 1, "weights", ("ref_logprobs", "labels", "reference_point")),
            "ce": SFT(1, "ce_weights"),
        },
    ),
]
PAIR_SUMS = [
    Sum(
        sum_losses(dpo=dpo(), nll=cross_entropy(), coefficients={"nll": 0.2}),
        {"dpo": Part(oracle.dpo, 1, "weights", ("ref_logprobs",)), "nll": SFT(0.2, "nll_weights")},
    ),
    Sum(
        lossfns.rpo(dpo(), alpha=0.5),
        {
            "preference": Part(oracle.dpo, 1, "weights", ("ref_logprobs",)),
            "nll": Part(oracle.chosen_nll, 0.5, "weights"),
        },
    ),
    Sum(
        lossfns.mpo(dpo(), lossfns.orpo()),
        {
            "preference": Part(oracle.dpo, 0.8, "weights", ("ref_logprobs",)),
            "quality": Part(oracle.orpo, 0.2, "weights"),
            "nll": Part(oracle.chosen_nll, 1, "weights"),
        },
    ),
]
ALL = [*SUMS, *PAIR_SUMS]


@dataclass
class Batch:
    """Rows of floats; ``columns`` holds weights and all columns, with nan where no part reads them."""

    logprobs: Rows
    columns: dict[str, Rows]

    def take(self, indices: list[int]) -> "Batch":
        picked = {name: [rows[i] for i in indices] for name, rows in self.columns.items()}
        return Batch([self.logprobs[i] for i in indices], picked)

    def data(self, *names: str) -> list[Datum]:
        """Datums that hold these columns in float64."""
        return [
            Datum(
                ModelInput.from_ints([0] * len(row)),
                {
                    "target_tokens": np.zeros(len(row), np.int64),
                    **{name: np.array(self.columns[name][i]) for name in names},
                },
            )
            for i, row in enumerate(self.logprobs)
        ]

    def tensors(self) -> list[Tensor]:
        return [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in self.logprobs]


def draw(case: Sum, rng: Random, *, empty: str = "") -> Batch:
    """A ragged batch with weights for each part; the part ``empty`` has none. Unread slots are nan."""
    pairs = case.loss.rows.datums == 2
    base = random_batch(rng, pairs=pairs)
    columns = {**base.columns, "weights": base.weights}
    for name in case.loss.masks:
        weights = [[rng.choice((0.0, 0.0, 1.0, 0.5)) for _ in row] for row in base.weights]
        weights[0][0] = 1.0
        if rng.random() < 0.3:
            weights[rng.randrange(len(weights))] = [0.0] * len(weights[0])
            weights = [w if len(w) == len(lp) else [0.0] * len(lp) for w, lp in zip(weights, base.logprobs)]
        columns[name] = weights
    if empty:
        column = case.parts[empty].weights
        columns[column] = [[0.0] * len(row) for row in base.weights]
    reads = {name: [part.weights for part in case.parts.values() if name in part.reads] for name in case.loss.reads}
    poison = lambda: rng.choice((math.nan, math.inf, -math.inf, 1e30))  # noqa: E731
    for name, masks in reads.items():
        if name not in case.loss.masks:
            columns[name] = [
                [x if any(columns[m][i][j] for m in masks) else poison() for j, x in enumerate(row)]
                for i, row in enumerate(columns[name])
            ]
    every = {part.weights for part in case.parts.values()}
    logprobs = [
        [x if any(columns[m][i][j] for m in every) else poison() for j, x in enumerate(row)]
        for i, row in enumerate(base.logprobs)
    ]
    return Batch(logprobs, {name: columns[name] for name in ("weights", *case.loss.reads)})


def call(case: Sum, batch: Batch, **bind: Any) -> tuple[float, Rows, dict[str, float]]:
    """Value, gradients and metrics, with every column bound."""
    leaves = batch.tensors()
    value, metrics = case.loss.bind(**batch.columns, **bind)(batch.data(), leaves)
    value.backward()
    return value.item(), [x.grad.tolist() for x in leaves if x.grad is not None], metrics


def chunks(rng: Random, count: int, unit: int) -> list[list[int]]:
    """The datums in random chunks; pairs stay together."""
    units = list(range(count // unit))
    rng.shuffle(units)
    cuts = sorted(rng.sample(range(1, len(units)), rng.randint(0, len(units) - 1))) if len(units) > 1 else []
    return [[u * unit + s for u in units[a:b] for s in range(unit)] for a, b in zip([0, *cuts], [*cuts, len(units)])]


def test_a_sum_by_hand() -> None:
    """rl: −2·(−2 − 4) / 2 = 6; ce: (1·1 + 3·5) / 4 = 4; L = 6 + 0.5·4. Gradients −2/2, and −0.5·w/4."""
    loss_fn = sum_losses(rl=reinforce(), ce=cross_entropy(), coefficients={"ce": 0.5})
    logprobs = torch.tensor([[-1.0, -2.0, -4.0, -5.0]], dtype=torch.float64, requires_grad=True)
    rl, ce = torch.tensor([[0, 1, 1, 0]]), torch.tensor([[1, 0, 0, 3]])
    loss, metrics = loss_fn.padded(logprobs, rl, ce_weights=ce, advantages=torch.tensor([2.0]))
    loss.backward()
    assert loss.item() == 8 and logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-0.125, -1.0, -1.0, -0.375]]
    assert loss_fn.bind(ce_weights=ce).denominator(rl).tolist() == [2.0, 4.0]
    assert metrics == {
        "loss": 8.0,
        "tokens": 4.0,
        "sequences": 1.0,
        "sequences_empty": 0.0,
        "rl/loss": 6.0,
        "rl/tokens": 2.0,
        "rl/sequences_empty": 0.0,
        "rl/count": 2.0,
        "rl/denominator": 2.0,
        "ce/loss": 4.0,
        "ce/tokens": 2.0,
        "ce/sequences_empty": 0.0,
        "ce/count": 4.0,
        "ce/denominator": 4.0,
        "rl/coefficient": 1.0,
        "ce/coefficient": 0.5,
        "rl/nll": 3.0,
        "ce/nll": 3.0,
    }


def test_the_oracle_and_any_partition() -> None:
    """Value and gradients are the oracle's, chunks add up, metrics merge; slots that no part reads are poisoned."""
    for case in ALL:
        for seed in range(6):
            rng = Random(seed)
            names = [name for name in case.parts if case.parts[name].weights != "weights"]
            batch = draw(case, rng, empty=names[-1] if names and seed == 5 else "")
            value, gradients, metrics = call(case, batch)
            expected = oracle.sum_losses(case.parts, logprobs=batch.logprobs, columns=batch.columns)
            where = f"{case.loss!r}, seed {seed}"
            assert apart([value, gradients], list(expected)) < 1e-12, where
            assert metrics["loss"] == value
            split = chunks(rng, len(batch.logprobs), case.loss.rows.datums)
            whole = case.loss.bind(**batch.columns).denominator(batch.data())
            each = [case.loss.bind(**batch.take(c).columns).denominator(batch.take(c).data()) for c in split]
            raw = torch.tensor([part.loss.count is None for part in case.loss.parts.values()])
            added = torch.where(raw, 1.0, sum(each))
            torch.testing.assert_close(added, whole, rtol=1e-12, atol=0)
            total, own, with_whole = 0.0, [], []
            for chunk in split:
                chunk_value, chunk_gradients, chunk_metrics = call(case, batch.take(chunk), denominator=whole)
                total += chunk_value
                with_whole.append(chunk_metrics)
                assert apart(chunk_gradients, [gradients[i] for i in chunk]) < 1e-12, where
                if any(w for name in ("weights", *case.loss.masks) for i in chunk for w in batch.columns[name][i]):
                    own.append(call(case, batch.take(chunk))[2])
            assert apart(total, value) < 1e-12, where
            for chunk_metrics in (with_whole, own if len(own) == len(split) else with_whole):
                merged = merge_metrics(chunk_metrics)
                assert merged.keys() == metrics.keys()
                for name, x in metrics.items():
                    assert apart(merged[name], x) < 1e-12, f"{where}: {name}"


def padded(case: Sum, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Logprobs ``[6, 7]`` and columns of the same shape; numbers of a datum are ``[6]``."""
    g = torch.Generator().manual_seed(seed)
    shape = (6, 7)
    lp = -3 * torch.rand(shape, generator=g, dtype=torch.float64) - 0.01
    columns = {}
    for name in ("weights", *case.loss.reads):
        if name.endswith("weights"):
            columns[name] = torch.randint(0, 4, shape, generator=g) / 2
            columns[name][:, 1] = 1.0
            columns[name][2, 3:] = 0
        elif name in ("advantages", "labels", "reference_point"):
            columns[name] = torch.randint(0, 2, shape[:1], generator=g).double() + (0 if name == "labels" else 0.5)
        else:
            columns[name] = (lp + 0.3 * torch.randn(shape, generator=g, dtype=torch.float64)).clamp(max=0)
    return lp, columns


def test_every_form_is_the_datum_form() -> None:
    """Padded, packed, deferred, halves: the same loss, gradient and metrics; float32 stays float32."""
    for case in ALL:
        lp, columns = padded(case, 1)
        datums = [lp[i].clone().requires_grad_() for i in range(6)]
        data = [Datum(ModelInput.from_ints([0] * 7), {"target_tokens": np.zeros(7, np.int64)}) for _ in range(6)]
        rows = {name: list(x) if x.ndim == 2 else x for name, x in columns.items()}
        value, metrics = case.loss.bind(**rows)(data, datums)
        value.backward()
        expected = torch.stack([x.grad for x in datums if x.grad is not None])
        flat = {"lengths": [7] * 6, **{n: c.flatten() for n, c in columns.items()}}
        for form in ("padded", "packed", "deferred"):
            leaf = lp.clone().requires_grad_()
            total, found = {
                "padded": partial(case.loss.padded, leaf, **columns),
                "packed": partial(case.loss.packed, leaf.flatten(), **flat),
                "deferred": partial(case.loss.deferred().padded, leaf, **columns),
            }[form]()
            total.backward()
            if form == "deferred":
                assert {name for name in metrics if "/" in name} >= {name for name in found.tensors if "/" in name}
                assert found.tensors.keys() >= {f"{name}/loss" for name in case.parts}
                found = found.finalise()
            assert leaf.grad is not None
            torch.testing.assert_close([total, leaf.grad], [value, expected], rtol=1e-12, atol=1e-15, msg=form)
            assert found == pytest.approx(metrics, rel=1e-12), f"{case.loss!r} {form}"
        whole = case.loss.bind(**{n: x for n, x in columns.items() if n != "weights"}).denominator(columns["weights"])
        narrow = {n: x if n.endswith("weights") else x.float() for n, x in columns.items()}
        total, found = case.loss.padded(lp.float(), **narrow, denominator=whole)
        assert total.dtype is torch.float32 and found == pytest.approx(metrics, rel=1e-4, abs=1e-5)
        if case.loss.rows.datums == 2:
            order = [0, 2, 4, 1, 3, 5]
            halves, found = case.loss.padded(lp[order], **{n: x[order] for n, x in columns.items()}, layout="halves")
            assert halves.item() == pytest.approx(value.item(), rel=1e-12) and found == pytest.approx(
                metrics, rel=1e-12
            )


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Compile with a backend that counts its graphs, and needs no C++ compiler."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    yield counter
    torch.compiler.reset()


def check_compiled(case: Sum, divisor: Tensor | None) -> None:
    compiled = copy.copy(case.loss).compiled()
    for seed in (1, 2):
        lp, columns = padded(case, seed)
        leaves = [lp.clone().requires_grad_() for _ in range(2)]
        given = None if divisor is None else divisor * seed
        found, metrics = compiled.padded(leaves[0], **columns, denominator=given)
        value, expected = case.loss.padded(leaves[1], **columns, denominator=given)
        (2 * found).backward()
        (2 * value).backward()
        torch.testing.assert_close([found, leaves[0].grad], [value, leaves[1].grad], rtol=1e-12, atol=1e-15)
        assert metrics == pytest.approx(expected, rel=1e-12)


def test_a_compiled_sum_is_one_graph(graphs: Any) -> None:
    """Its denominators are an argument of the graph."""
    check_compiled(PAIR_SUMS[0], torch.tensor([3.0, 7.0]))
    assert graphs.frame_count == 1


@pytest.mark.exhaustive
def test_compiled_sums_of_every_kind_of_row(graphs: Any) -> None:
    for case in (SUMS[6], PAIR_SUMS[1]):
        check_compiled(case, None)


def test_the_host_reads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One ``tolist`` for all parts; a call that is deferred reads nothing."""
    case = SUMS[1]
    lp, columns = padded(case, 1)
    reads = []
    for name in ("tolist", "item", "__bool__", "__float__"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda x, f=original, n=name: (reads.append(n), f(x))[1])
    _, metrics = case.loss.deferred().padded(lp, **columns)
    assert reads == []
    metrics.finalise()
    assert reads == ["tolist"]


class Traced(torch.nn.Module):
    """The maths of a loss over flat tensors, with one argument for each column."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logprobs: Tensor, weights: Tensor, lengths: Tensor, *columns: Tensor) -> Tensor:
        given = {name: columns[i] for i, name in enumerate(self.loss.reads)}
        return evaluate(self.loss, Tokens(logprobs, weights, lengths, given))[0]


def test_traces_and_per_example_gradients() -> None:
    case = SUMS[0]
    lp, columns = padded(case, 1)
    given = {name: x if x.ndim == 2 else x[:, None].expand(lp.shape) for name, x in columns.items()}
    whole = case.loss.bind(**{n: x for n, x in given.items() if n != "weights"}).denominator(given["weights"])

    def of_one(x: Tensor, own: dict[str, Tensor]) -> Tensor:
        rows = {name: column[None] for name, column in own.items()}
        return case.loss.deferred().padded(x[None], **rows, denominator=whole)[0]

    leaf = lp.clone().requires_grad_()
    case.loss.padded(leaf, **given)[0].backward()
    assert leaf.grad is not None
    traced = torch.fx.symbolic_trace(Traced(case.loss))
    t = [lp.flatten(), given["weights"].flatten(), torch.tensor([7] * 6)]
    total = traced(*t, *(given[name].flatten() for name in case.loss.reads))
    torch.testing.assert_close(total, case.loss.padded(lp, **given)[0], rtol=1e-12, atol=1e-15)
    together = torch.func.vmap(torch.func.grad(of_one))(lp, given)
    torch.testing.assert_close(together, leaf.grad, rtol=1e-12, atol=1e-15)


def test_exports_fold_every_denominator() -> None:
    """as_datum_fn, traced and not, over with_denominators; token_gradient; grad_report."""
    for case in [*SUMS[:5], SUMS[6], SUMS[7]]:
        batch = draw(case, Random(3))
        value, gradients, _ = call(case, batch)
        data, bound = batch.data(), case.loss.bind(**batch.columns)
        finite = [[x if math.isfinite(x) else -1.0 for x in row] for row in batch.logprobs]
        fn, folded = as_datum_fn(case.loss), with_denominators(bound, data)
        traced = torch.fx.symbolic_trace(fn)
        total, found = 0.0, []
        for datum, row in zip(folded, batch.logprobs):
            names = fn.__code__.co_varnames[1 : fn.__code__.co_argcount]
            args = [torch.from_numpy(datum.loss_fn_inputs[name].to_numpy()).double() for name in names]
            for function in (traced, fn):
                leaf = torch.tensor(row, dtype=torch.float64, requires_grad=True)
                one, metrics = function(leaf, *args)
                one.backward()
            total += one.item()
            found.append(leaf.grad.tolist() if leaf.grad is not None else [])
            assert {key.split("/")[1] for key in metrics} == set(case.parts)
        assert apart([total, found], [value, gradients]) < 2e-6, case.loss  # datums hold float32
        if all(part.loss.rows.per_token and part.loss.name != "gspo" for part in case.loss.parts.values()):
            gradient = token_gradient(bound, data)
            flat = torch.tensor([x for row in finite for x in row], dtype=torch.float64)
            whole = gradient(flat, slice(0, len(flat))).tolist()
            assert apart(whole, [x for row in gradients for x in row]) < 1e-6, case.loss
        report = grad_report(bound, data, [torch.tensor(row, dtype=torch.float64) for row in finite])
        assert not report.kinds["leaking"].any() and apart(report.loss, value) < 1e-6


def test_a_part_without_tokens_adds_nothing_and_a_batch_without_any_is_refused() -> None:
    loss = sum_losses(rl=reinforce(), ce=cross_entropy(), coefficients={"ce": 0.5})
    lp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    ones, zeros, advantages = torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([1.0])
    value, metrics = loss.padded(lp, ones, ce_weights=zeros, advantages=advantages)
    value.backward()
    assert value.item() == 1.5 and metrics["ce/loss"] == metrics["ce/denominator"] == metrics["ce/nll"] == 0
    assert lp.grad is not None and lp.grad.tolist() == [[-0.5, -0.5]]
    data = [Datum(ModelInput.from_ints([0, 0]), {"target_tokens": np.zeros(2, np.int64)})]
    bound = loss.bind(weights=ones, ce_weights=zeros, advantages=[1.0])
    assert [part.divisor for part in bound.by_part(data).values()] == [2.0, 1.0]
    assert token_gradient(bound, data)(lp[0].detach(), slice(0, 2)).tolist() == [-0.5, -0.5]
    alone, metrics = loss.padded(lp, zeros, ce_weights=ones, advantages=torch.tensor([math.nan]))
    assert alone.item() == 0.75 and metrics["rl/loss"] == 0
    with pytest.raises(LossInputError, match="at least one active token"):
        loss.padded(lp, zeros, ce_weights=zeros, advantages=advantages)
    chunk, _ = loss.padded(lp, zeros, ce_weights=zeros, advantages=advantages, denominator=[4, 0])
    assert chunk.item() == 0
    with pytest.raises(LossInputError, match="denominator: expected a finite number above 0, in the part 'ce'"):
        loss.padded(lp, ones, ce_weights=ones, advantages=advantages, denominator=[4, 0])
    raw = sum_losses(a=cross_entropy(weigh=token_sum), b=cross_entropy(weigh=token_sum))
    assert raw.bind(b_weights=zeros).denominator(zeros) == 1.0
    assert raw.padded(lp, zeros, b_weights=zeros, denominator=1.0)[0].item() == 0
    with pytest.raises(LossInputError, match="at least one active token"):
        raw.padded(lp, zeros, b_weights=zeros)
    with pytest.raises(LossInputError, match="a denominator above 0"):
        loss.padded(lp, ones, ce_weights=torch.tensor([[1.0, -1.0]]), advantages=advantages)


def test_a_message_names_the_column_and_the_part() -> None:
    loss = sum_losses(rl=reinforce(), pull=importance_sampling())
    lp, w = torch.tensor([[-1.0, -2.0]]), torch.tensor([[1.0, 0.0]])
    given = {"advantages": torch.ones(1), "old_logprobs": torch.tensor([[math.nan, -2.0]])}
    loss.padded(lp, w, pull_weights=1 - w, **given)  # rl does not read them
    for column, pattern in (
        ({"pull_weights": w}, r"old_logprobs\[0\]: expected a finite number at every active token, in the part 'pull'"),
        ({"pull_weights": w - 1}, r"pull_weights\[1\]: expected a weight of at least 0, in the part 'pull'"),
        ({}, r"pull_weights: .* got nothing. Pass pull_weights="),
    ):
        with pytest.raises(LossInputError, match=pattern):
            loss.padded(lp, w, **column, **given)
    data = [Datum(ModelInput.from_ints([0, 0]), {"target_tokens": np.zeros(2, np.int64), "weights": w[0].numpy()})]
    with pytest.raises(
        LossInputError, match=r"pull_weights: .* Pass bind\(pull_weights=...\): the weights of this part"
    ):
        loss.bind(advantages=[1.0], old_logprobs=[[-1.0, -1.0]])(data, [lp[0]])


def test_refusals() -> None:
    loss = sum_losses(rl=reinforce(), ce=cross_entropy())
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("at least one loss", lambda: sum_losses()),
        ("a Loss such as", lambda: sum_losses(rl=ppo)),
        ("a Loss such as", lambda: sum_losses(rl=ppo().bind(denominator=2))),
        ("a loss of one denominator", lambda: sum_losses(rl=loss)),
        ("names of the parts", lambda: sum_losses(rl=ppo(), coefficients={"ce": 1.0})),
        ("names of the parts", lambda: sum_losses(rl=ppo(), weights={"ce": "weights"})),
        ("a finite number", lambda: sum_losses(rl=ppo(), coefficients={"rl": math.inf})),
        ("a part whose column is 'weights'", lambda: sum_losses(rl=ppo(), weights={"rl": "rl_weights"})),
        ("columns of weights", lambda: sum_losses(rl=ppo(), ce=cross_entropy(), weights={"ce": "advantages"})),
        ("names that are identifiers", lambda: sum_losses(**{"a b": ppo()})),
        ("of one shape", lambda: sum_losses(a=cross_entropy(), b=lossfns.multi_target_cross_entropy())),
        ("a loss of one denominator", lambda: lossfns.with_kl(loss)),
        ("2 finite numbers", lambda: loss.bind(denominator=3.0)),
        ("2 finite numbers", lambda: loss.bind(denominator=[1.0, math.nan])),
        ("2 finite numbers", lambda: loss.bind(denominator=[0.0, 0.0])),
        ("2 finite numbers", lambda: loss.bind(denominator=[-1.0, 2.0])),
        ("2 finite numbers", lambda: loss.bind(denominator="12")),
        ("in \\[0, 1\\]", lambda: lossfns.chord(ppo(), mu=1.5)),
        ("at least 0", lambda: lossfns.echo(ppo(), alpha=-1.0)),
        ("three finite numbers", lambda: lossfns.mpo(dpo(), dpo(), coefficients=(1.0, 2.0))),
        ("a loss of one denominator", lambda: loss.terms(lossfns.Tokens(torch.zeros(1), torch.ones(1)))),
        ("one of the columns of TRL", lambda: for_trainer(loss, "TRL", ("advantages",), ("tokens",))),
        (
            "a loss that is divided by sequences",
            lambda: for_trainer(
                sum_losses(a=cross_entropy(), b=cross_entropy(), weights={"b": "weights"}), "X", (), ("sequences",)
            ),
        ),
        ("forward_backward_custom", lambda: lossfns.export.fold(loss, [])),
    ]
    for pattern, build in refused:
        with pytest.raises(LossInputError, match=pattern):
            build()


def test_repr_copies_and_metrics_of_merged_norms() -> None:
    for case in ALL:
        again = eval(repr(case.loss), dict(vars(lossfns)))
        assert repr(again) == repr(case.loss) == repr(copy.copy(case.loss))
        assert again.reads == case.loss.reads and again.parts.keys() == case.parts.keys()
    case = SUMS[4]
    batch = draw(case, Random(1))
    whole = case.loss.bind(**batch.columns).denominator(batch.data())
    everything = call(case, batch, grad_l1=True)[2]
    halves = [batch.take([0]), batch.take(list(range(1, len(batch.logprobs))))]
    merged = merge_metrics([call(case, half, grad_l1=True, denominator=whole)[2] for half in halves])
    assert merged == pytest.approx(everything, rel=1e-12)
    with pytest.raises(LossInputError, match="denominators of the whole batch"):
        merge_metrics([everything, everything])
    with pytest.raises(LossInputError, match="one coefficient for each part"):
        merge_metrics([everything, everything | {"ce/coefficient": 0.7}])


def test_a_trainer_with_one_mask_takes_a_sum_that_shares_it() -> None:
    """rpo in DPOTrainer: 3 pairs divide both parts."""
    loss = lossfns.rpo(dpo())
    bound = for_trainer(loss, "TRL's DPOTrainer", ("ref_logprobs",), ("pairs",), lossfns.Rows.PAIRS)
    counts = denominator_for(bound.loss, "TRL's DPOTrainer", torch.ones(6, 2), pairs=3)
    assert counts.tolist() == [3.0, 3.0]


def test_the_laws_hold_and_preflight_is_ready() -> None:
    for loss in (SUMS[0].loss, lossfns.rpo(dpo())):
        report = check(loss, examples=2)
        assert report.ok, report
    batch = draw(SUMS[4], Random(2))
    names = ("weights", *SUMS[4].loss.reads)
    finite = [torch.tensor([x if math.isfinite(x) else -1.0 for x in row]) for row in batch.logprobs]
    with warnings.catch_warnings():
        found = preflight(SUMS[4].loss, batch.data(*names), logprobs=finite)
    assert {"its own rl", "its own ce"} <= found.numbers["denominators"].keys()
