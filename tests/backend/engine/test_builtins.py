"""The built-in losses by name: their formulas, their configs, and what they refuse.

Each is compared with the public loss with ``token_sum``, passed as a custom loss, and with the formula written out on
each datum's logprobs, differentiated straight through the model. All in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
from batches import sdks
from tiny import assert_same_gradients, byte_client, own_metrics, take_gradients
from torch import Tensor

import lossfns
from lossfns import LossInputError, TensorData, token_sum
from lossfns.backend import LocalTrainingClient
from lossfns.export.builtins import BUILTINS

RATIO = tuple(name for name, builtin in BUILTINS.items() if "ratio_log_cap" in builtin.config)
POLICY = tuple(name for name in BUILTINS if name != "cross_entropy")


def client() -> LocalTrainingClient:
    return byte_client(dtype=torch.float64)


def batch(name: str, sdk: Any = lossfns, count: int = 6) -> list[Any]:
    """Datums with the fields that a built-in requires: ratios on both sides of every bound, each sign of advantage.

    The first third of each sequence is the prompt: mask and advantage 0. One sequence has a single token.
    """
    rng = Random(11)
    data = []
    for i in range(count):
        ids = [rng.randrange(256) for _ in range(2 if i == 3 else rng.randint(5, 14))]
        n = len(ids) - 1
        mask = [float(j >= n // 3) for j in range(n)]
        rows = {
            "logprobs": [-5.5 + rng.gauss(0, 0.4) for _ in range(n)],
            "ref_logprobs": [-5.5 + rng.gauss(0, 0.4) for _ in range(n)],
            "advantages": [rng.choice((-2, -1, 0.5, 1.5)) * m for m in mask],
            "sequence_ratio_mask": mask,
        }
        fields = {"target_tokens": sdk.TensorData(ids[1:], "int64", [n])}
        fields |= {key: sdk.TensorData(rows[key], "float32", [n]) for key in rows if key in needs(name)}
        data.append(sdk.Datum(sdk.ModelInput.from_ints(ids[:-1]), fields))
    return data


def needs(name: str) -> tuple[str, ...]:
    return BUILTINS[name].required + (("ref_logprobs",) if name == "grpo" else ())


def make_loss(data: list[Any]) -> list[Any]:
    """Add weights of all kinds, among them a sequence of zeros."""
    rng = Random(12)
    for i, d in enumerate(data):
        n = len(d.loss_fn_inputs["target_tokens"].data)
        row = [0.0] * n if i == 4 else [rng.choice((0.0, 0.5, 1.0, 3.0)) for _ in range(n - 1)] + [1.0]
        d.loss_fn_inputs["weights"] = TensorData(row, "float32", [n])
    return data


@dataclass
class Row:
    """One datum: its logprobs, its columns in float64, and its weights (ones by default) or its mask as ``w``."""

    lp: Tensor
    fields: dict[str, Tensor]

    def __getattr__(self, name: str) -> Tensor:
        return self.fields[name]

    @property
    def w(self) -> Tensor:
        ones = torch.ones_like(self.lp)
        return self.fields.get("weights", self.fields.get("sequence_ratio_mask", ones))

    @property
    def a(self) -> Tensor:
        return self.advantages

    @property
    def d(self) -> Tensor:
        return self.lp - self.logprobs

    @property
    def r(self) -> Tensor:
        return self.d.exp()

    @property
    def sequence_ratio(self) -> Tensor:
        """exp of the log-ratio's weighted mean over the sequence, with each token's own gradient."""
        mean = (self.w * self.d.detach()).sum() / self.w.sum() if self.w.any() else torch.zeros(()).double()
        return (mean + self.lp - self.lp.detach()).exp()


def clip(r: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(r * a, r.clamp(low, high) * a)


def capped(d: Tensor, cap: float) -> Tensor:
    return d.clamp(-cap, cap).exp()


def dual(loss: Tensor, a: Tensor, c: float) -> Tensor:
    return torch.where(a < 0, torch.minimum(loss, -c * a), loss)


def k3(t: Row) -> Tensor:
    return (t.ref_logprobs - t.lp).exp() - (t.ref_logprobs - t.lp) - 1


Case = tuple[str, dict[str, Any], lossfns.Loss, Callable[[Row], Tensor]]
LOW, HIGH, RAW = "clip_low_threshold", "clip_high_threshold", {"weigh": token_sum, "log_ratio_cap": None}
SUM = {"weigh": token_sum}
CASES: list[Case] = [
    ("cross_entropy", {}, lossfns.cross_entropy(**SUM), lambda t: -t.lp),
    ("importance_sampling", {}, lossfns.importance_sampling(**RAW), lambda t: -t.r * t.a),
    (
        "importance_sampling",
        {"ratio_log_cap": 0.25},
        lossfns.importance_sampling(log_ratio_cap=0.25, **SUM),
        lambda t: -capped(t.d, 0.25) * t.a,
    ),
    ("ppo", {}, lossfns.ppo(clip=(0.8, 1.2), **RAW), lambda t: clip(t.r, t.a, 0.8, 1.2)),
    ("ppo", {LOW: 0.95}, lossfns.ppo(clip=(0.95, 1.2), **RAW), lambda t: clip(t.r, t.a, 0.95, 1.2)),
    ("ppo", {HIGH: 1.05}, lossfns.ppo(clip=(0.8, 1.05), **RAW), lambda t: clip(t.r, t.a, 0.8, 1.05)),
    ("ppo", {LOW: 0.5, HIGH: 1.5}, lossfns.ppo(clip=(0.5, 1.5), **RAW), lambda t: clip(t.r, t.a, 0.5, 1.5)),
    (
        "ppo",
        {"ratio_log_cap": 0.1},
        lossfns.ppo(log_ratio_cap=0.1, **SUM),
        lambda t: clip(capped(t.d, 0.1), t.a, 0.8, 1.2),
    ),
    ("cispo", {}, lossfns.cispo(clip=(0.0, 4.0), **RAW), lambda t: -t.r.detach().clamp(0, 4) * t.a * t.lp),
    (
        "cispo",
        {LOW: 0.9, HIGH: 1.1},
        lossfns.cispo(clip=(0.9, 1.1), **RAW),
        lambda t: -t.r.detach().clamp(0.9, 1.1) * t.a * t.lp,
    ),
    (
        "cispo",
        {"ratio_log_cap": 0.2},
        lossfns.cispo(log_ratio_cap=0.2, **SUM),
        lambda t: -capped(t.d.detach(), 0.2) * t.a * t.lp,
    ),
    ("dro", {}, lossfns.dro(beta=0.05, **SUM), lambda t: -(t.lp * t.a - 0.025 * t.d**2)),
    ("dro", {"beta": 2.0}, lossfns.dro(beta=2.0, **SUM), lambda t: -(t.lp * t.a - t.d**2)),
    ("gspo", {}, lossfns.gspo_token(**RAW), lambda t: clip(t.sequence_ratio, t.a, 1 - 3e-4, 1 + 4e-4)),
    (
        "gspo",
        {LOW: 0.8, HIGH: 1.2},
        lossfns.gspo_token(clip=(0.8, 1.2), **RAW),
        lambda t: clip(t.sequence_ratio, t.a, 0.8, 1.2),
    ),
    (
        "gspo",
        {LOW: 0.5, HIGH: 1.5, "ratio_log_cap": 0.1},
        lossfns.gspo_token(clip=(0.5, 1.5), log_ratio_cap=0.1, **SUM),
        lambda t: clip(capped(t.sequence_ratio.log(), 0.1), t.a, 0.5, 1.5),
    ),
    ("gspo-token", {}, lossfns.gspo_token(**RAW), lambda t: clip(t.sequence_ratio, t.a, 1 - 3e-4, 1 + 4e-4)),
    (
        "gspo-token",
        {LOW: 0.9, HIGH: 1.1},
        lossfns.gspo_token(clip=(0.9, 1.1), **RAW),
        lambda t: clip(t.sequence_ratio, t.a, 0.9, 1.1),
    ),
    (
        "gspo-token",
        {"ratio_log_cap": 0.1},
        lossfns.gspo_token(log_ratio_cap=0.1, **SUM),
        lambda t: clip(capped(t.sequence_ratio.log(), 0.1), t.a, 1 - 3e-4, 1 + 4e-4),
    ),
    ("grpo", {}, lossfns.grpo(**RAW), lambda t: clip(t.r, t.a, 0.8, 1.2) + 1e-3 * k3(t)),
    ("grpo", {"kl_beta": 0.5}, lossfns.grpo(kl_beta=0.5, **RAW), lambda t: clip(t.r, t.a, 0.8, 1.2) + 0.5 * k3(t)),
    ("grpo", {"kl_beta": 0.0}, lossfns.grpo(kl_beta=0.0, **RAW), lambda t: clip(t.r, t.a, 0.8, 1.2)),
    (
        "grpo",
        {LOW: 0.9, HIGH: 1.1, "ratio_log_cap": 0.3},
        lossfns.grpo(clip=(0.9, 1.1), log_ratio_cap=0.3, **SUM),
        lambda t: clip(capped(t.d, 0.3), t.a, 0.9, 1.1) + 1e-3 * k3(t),
    ),
    ("dapo", {}, lossfns.dapo(**RAW), lambda t: clip(t.r, t.a, 0.8, 1.28)),
    ("dapo", {LOW: 0.9, HIGH: 1.1}, lossfns.dapo(clip=(0.9, 1.1), **RAW), lambda t: clip(t.r, t.a, 0.9, 1.1)),
    (
        "dapo",
        {"ratio_log_cap": 0.1},
        lossfns.dapo(log_ratio_cap=0.1, **SUM),
        lambda t: clip(capped(t.d, 0.1), t.a, 0.8, 1.28),
    ),
    (
        "dapo",
        {"eps_clip_c": 1.3},
        lossfns.dapo(dual_clip=1.3, **RAW),
        lambda t: dual(clip(t.r, t.a, 0.8, 1.28), t.a, 1.3),
    ),
]
each_case = pytest.mark.parametrize(
    ("name", "config", "loss", "formula"), CASES, ids=[f"{name}{config or ''}" for name, config, *_ in CASES]
)


def by_formula(c: LocalTrainingClient, data: list[Any], formula: Callable[[Row], Tensor]) -> float:
    """Σ w·formula, each datum by itself through the model; its gradient goes to the parameters."""
    total = torch.tensor(0.0, dtype=torch.float64)
    for datum in data:
        fields = {name: torch.tensor(x.data, dtype=torch.float64) for name, x in datum.loss_fn_inputs.items()}
        ids = datum.model_input.to_ints()
        logits = c.model(torch.tensor(ids), [len(ids)]) @ c.model.head.T
        lp = logits.log_softmax(1)[torch.arange(len(ids)), fields.pop("target_tokens").long()]
        t = Row(lp, fields)
        total = total + (t.w * formula(t)).sum()
    total.backward()
    return total.item()


def check(c: LocalTrainingClient, data: list[Any], case: Case) -> None:
    name, config, loss, formula = case
    result = c.forward_backward(data, name, config or None).result()
    got = take_gradients(c)
    expected = by_formula(c, data, formula)
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-9)
    assert_same_gradients(got, take_gradients(c), 1e-9)
    # A raw sum: the denominator only allows a batch without any weight.
    weights = {"weights": [d.loss_fn_inputs["sequence_ratio_mask"].data for d in data]} if name == "gspo" else {}
    if name == "cross_entropy" and "weights" not in data[0].loss_fn_inputs:
        weights = {"weights": [[1.0] * len(d.loss_fn_inputs["target_tokens"].data) for d in data]}
    custom = c.forward_backward_custom(data, loss.bind(**weights)).result()
    assert custom.metrics["loss:sum"] == pytest.approx(result.metrics["loss:sum"], rel=1e-12)
    assert_same_gradients(got, take_gradients(c), 1e-12)
    assert c.forward(data, name, config or None).result().metrics == pytest.approx(
        own_metrics(result.metrics), rel=1e-12
    )


@each_case
def test_a_built_in_is_its_formula_and_the_public_loss(name: str, config: Any, loss: Any, formula: Any) -> None:
    for sdk in sdks():
        check(client(), batch(name, sdk), (name, config, loss, formula))


@pytest.mark.parametrize("case", [case for case in CASES if case[0] != "gspo"], ids=lambda case: f"{case[0]}{case[1]}")
def test_weights_multiply_each_tokens_term(case: Case) -> None:
    check(client(), make_loss(batch(case[0])), case)


def test_the_cases_hold_every_name_and_every_key() -> None:
    for name, own in BUILTINS.items():
        assert set(own.config) == {key for n, config, *_ in CASES for key in config if n == name}, name


def value(c: LocalTrainingClient, name: str, config: Any = None, data: Any = None) -> float:
    return c.forward(data or batch(name), name, config).result().metrics["loss:sum"]


@pytest.mark.parametrize(("name", "key"), [(n, key) for n, own in BUILTINS.items() for key in own.config])
def test_no_key_is_without_effect(name: str, key: str) -> None:
    """A key changes the value if it alone differs from its default."""
    away = {LOW: 0.9, HIGH: 1.05, "ratio_log_cap": 1e-4, "beta": 1.0, "kl_beta": 1.0, "eps_clip_c": 1.3}
    c = client()
    assert value(c, name, {key: away[key]}) != pytest.approx(value(c, name), rel=1e-9)


@pytest.mark.filterwarnings("ignore:.*log-ratio.*")
@pytest.mark.parametrize("name", RATIO)
def test_no_ratio_is_capped_unless_asked(name: str) -> None:
    """A log-ratio of about 30, advantage −1: e³⁰ is 1e13, e²⁰ is 5e8. (cispo's own upper bound of 4 is taken away.)"""
    c, data = client(), batch(name)[:1]
    n = len(data[0].loss_fn_inputs["logprobs"].data)
    for field, x in (("logprobs", -35.5), ("advantages", -1.0), ("sequence_ratio_mask", 1.0)):
        if field in needs(name):
            data[0].loss_fn_inputs[field] = TensorData([x] * n, "float32", [n])
    config = {HIGH: 1e30} if name == "cispo" else {}
    assert abs(value(c, name, config, data)) > 1e12
    assert 1e8 < abs(value(c, name, config | {"ratio_log_cap": 20}, data)) < 1e12


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name in BUILTINS for field in ("target_tokens", *needs(name))]
)
def test_a_missing_field_is_named_as_the_services_name_it(name: str, field: str) -> None:
    c, data = client(), batch(name)
    del data[2].loss_fn_inputs[field]
    with pytest.raises(LossInputError, match=rf"datum\[2\].loss_fn_inputs: .*missing required field '{field}'"):
        c.forward_backward(data, name).result()
    assert all(p.grad is None for p in c.model.parameters())


@pytest.mark.parametrize("name", BUILTINS)
@pytest.mark.parametrize("key", ["mask", "loss_mask", "old_logprobs", "sampler_logprobs", "comment"])
def test_a_key_that_nothing_reads_is_refused(name: str, key: str) -> None:
    data = batch(name)
    data[1].loss_fn_inputs[key] = TensorData([1.0] * len(data[1].loss_fn_inputs["target_tokens"].data), "float32")
    with pytest.raises(LossInputError, match=rf"datum\[1\].loss_fn_inputs: expected only .* for {name}, got '{key}'"):
        client().forward_backward(data, name).result()


@pytest.mark.parametrize("name", [name for name in POLICY if name != "grpo"])
def test_reference_logprobs_are_read_by_grpo_alone(name: str) -> None:
    data = batch(name)
    data[0].loss_fn_inputs["ref_logprobs"] = data[0].loss_fn_inputs["logprobs"]
    with pytest.raises(LossInputError, match="got 'ref_logprobs'"):
        client().forward_backward(data, name).result()


def test_grpo_without_a_kl_needs_no_reference() -> None:
    c, data = client(), batch("grpo")
    both = value(c, "grpo", {"kl_beta": 0.0}, data)
    for d in data:
        del d.loss_fn_inputs["ref_logprobs"]
    assert value(c, "grpo", {"kl_beta": 0.0}, data) == both == value(c, "ppo", None, data)
    with pytest.raises(LossInputError, match=r"missing required field 'ref_logprobs'.*'kl_beta': 0.0"):
        c.forward(data, "grpo").result()


def test_gspo_is_gspo_token_with_the_mask_as_weights() -> None:
    c, data = client(), batch("gspo")
    masked = value(c, "gspo", {LOW: 0.8, HIGH: 1.2}, data)
    for d in data:
        d.loss_fn_inputs["weights"] = d.loss_fn_inputs.pop("sequence_ratio_mask")
    assert value(c, "gspo-token", {LOW: 0.8, HIGH: 1.2}, data) == masked


def test_gspos_prompt_reaches_nothing() -> None:
    """Old logprobs outside of the mask may be anything, even null as a server sends it."""
    c, data = client(), batch("gspo")
    c.forward_backward(data, "gspo").result()
    expected = take_gradients(c)
    for d in data:
        mask, old = (d.loss_fn_inputs[key].to_torch() for key in ("sequence_ratio_mask", "logprobs"))
        d.loss_fn_inputs["logprobs"] = TensorData.from_torch(torch.where(mask == 0, torch.nan, old))
    c.forward_backward(data, "gspo").result()
    assert_same_gradients(expected, take_gradients(c), 1e-12)


def test_a_sequence_outside_of_gspos_mask_has_no_gradient() -> None:
    c, data = client(), batch("gspo")
    expected = value(c, "gspo", None, data[1:])
    fields = data[0].loss_fn_inputs
    for name in ("sequence_ratio_mask", "advantages"):
        fields[name] = TensorData([0.0] * len(fields[name].data), "float32")
    result = c.forward_backward(data, "gspo").result()
    assert result.metrics["loss:sum"] == pytest.approx(expected) and result.metrics["sequences_empty:sum"] == 1
    with pytest.raises(LossInputError, match="gspo: weights: expected at least one active token in the batch"):
        c.forward_backward(data[:1], "gspo").result()


@pytest.mark.parametrize(
    ("field", "position", "number", "message"),
    [
        ("sequence_ratio_mask", -1, 0.5, r"datum\[1\].sequence_ratio_mask: expected 0 or 1"),
        ("sequence_ratio_mask", -1, -1.0, r"datum\[1\].sequence_ratio_mask: expected 0 or 1"),
        ("sequence_ratio_mask", -1, float("nan"), r"datum\[1\].sequence_ratio_mask: expected 0 or 1"),
        ("advantages", 0, 1.0, r"datum\[1\].advantages: expected 0 where sequence_ratio_mask is 0"),
        ("advantages", 0, float("nan"), r"datum\[1\].advantages: expected 0 where sequence_ratio_mask is 0"),
        ("advantages", -1, float("nan"), r"datum\[1\].advantages\[\d+\]: expected a finite number"),
        ("logprobs", -1, 0.5, r"datum\[1\].old_logprobs\[\d+\]: expected a logprob"),
    ],
)
def test_gspos_mask_holds_zeros_and_ones_and_covers_every_advantage(
    field: str, position: int, number: float, message: str
) -> None:
    data = batch("gspo")
    row = data[1].loss_fn_inputs[field].data
    row[position] = number
    data[1].loss_fn_inputs[field] = TensorData(row, "float32")
    with pytest.raises(LossInputError, match=message):
        client().forward_backward(data, "gspo").result()


def test_gspo_takes_no_weights_beside_its_mask() -> None:
    with pytest.raises(LossInputError, match="got 'weights'"):
        client().forward_backward(make_loss(batch("gspo")), "gspo").result()


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, own in BUILTINS.items() for field in own.required + own.optional]
)
def test_a_field_of_another_length_is_refused_by_name(name: str, field: str) -> None:
    data = batch(name)
    data[1].loss_fn_inputs[field] = TensorData([0.0], "float32")
    with pytest.raises(LossInputError, match=rf"datum\[1\].*(old_)?{field}: expected"):
        client().forward_backward(data, name).result()


@pytest.mark.parametrize("name", POLICY)
def test_several_targets_of_a_position_are_for_cross_entropy_alone(name: str) -> None:
    data = batch(name)
    for d in data:
        for key, x in d.loss_fn_inputs.items():
            d.loss_fn_inputs[key] = TensorData([v for v in x.data for _ in range(2)], x.dtype, [len(x.data), 2])
    with pytest.raises(LossInputError, match=r"logprobs: expected \[N\], got shape \(\d+, 2\)"):
        client().forward_backward(data, name).result()


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("ppo", {"clip": (0.8, 1.2)}, "loss_fn_config: expected clip_low_threshold, .* for ppo, got 'clip'"),
        ("ppo", {LOW: 0.2, HIGH: 0.28}, r"epsilons: pass clip=\(0.8, 1.28\)"),
        ("ppo", {HIGH: 0.9}, "enclose the ratio 1|epsilons"),
        ("ppo", {LOW: 1.1}, "enclose the ratio 1"),
        ("ppo", {LOW: -0.1}, "enclose the ratio 1"),
        ("ppo", {LOW: "0.8"}, "ratio bounds"),
        ("ppo", {LOW: True}, "ratio bounds"),
        ("ppo", {HIGH: float("nan")}, "enclose the ratio 1"),
        ("ppo", {"ratio_log_cap": 0}, "ratio_log_cap|log_ratio_cap"),
        ("ppo", {"eps_clip_c": 3.0}, "for ppo, got 'eps_clip_c'"),
        ("dapo", {"eps_clip_c": 1.0}, "a number above 1, or None"),
        ("dro", {"beta": 0}, "loss_fn_config beta: expected a finite number above 0"),
        ("dro", {LOW: 0.9}, "expected beta for dro, got 'clip_low_threshold'"),
        ("grpo", {"kl_beta": -1}, "loss_fn_config kl_beta: expected a finite number of at least 0"),
        ("grpo", {"kl": "k2"}, "for grpo, got 'kl'"),
        ("cross_entropy", {"beta": 1}, "expected nothing for cross_entropy, got 'beta'"),
        ("ppo", [("beta", 1)], "loss_fn_config: expected a dict or None, got a list"),
        ("gspo_token", None, "Did you mean 'gspo-token'"),
        ("custom", None, "the name of a built-in loss"),
        (None, None, "the name of a built-in loss"),
    ],
)
def test_a_bad_name_or_config_is_refused(name: Any, config: Any, message: str) -> None:
    c = client()
    with pytest.raises(LossInputError, match=message):
        c.forward_backward(batch(name if name in BUILTINS else "ppo"), name, config).result()
    assert all(p.grad is None for p in c.model.parameters())


def test_none_switches_a_cap_or_a_dual_clip_off() -> None:
    c = client()
    assert value(c, "dapo", {"eps_clip_c": None, "ratio_log_cap": None}) == value(c, "dapo")


def candidates(weights: Any = None) -> list[Any]:
    """One datum of 6 positions with 4 weighted candidates at each, and one of 9."""
    rng = Random(13)
    data = []
    for n in (6, 9):
        ids = TensorData([rng.randrange(257) for _ in range(4 * n)], "int64", [n, 4])
        fields = {"target_tokens": ids} | ({} if weights is None else {"weights": weights(n)})
        data.append(lossfns.Datum(lossfns.ModelInput.from_ints([rng.randrange(256) for _ in range(n)]), fields))
    return data


def few(n: int) -> torch.Tensor:
    """Two weights that are not 0, one of them negative."""
    w = torch.zeros(n, 4)
    w[1, 2], w[n - 1, 0] = 0.75, -0.5
    return w


@pytest.mark.parametrize(
    ("form", "dense"),
    [
        (None, lambda n: torch.ones(n, 4)),
        (lambda n: TensorData.from_torch(few(n)), few),
        (lambda n: TensorData.from_torch_sparse(few(n)), few),
        (lambda n: TensorData(few(n).flatten().tolist(), "float32"), few),
    ],
    ids=["absent", "dense", "sparse", "flat"],
)
def test_cross_entropy_of_several_targets_is_the_sum_over_all_of_them(form: Any, dense: Any) -> None:
    c, data = client(), candidates(form)
    result = c.forward_backward(data, "cross_entropy").result()
    got, total = take_gradients(c), torch.tensor(0.0, dtype=torch.float64)
    for d in data:
        ids = d.model_input.to_ints()
        logprobs = (c.model(torch.tensor(ids), [len(ids)]) @ c.model.head.T).log_softmax(1)
        total = total - (dense(len(ids)) * logprobs.gather(1, d.loss_fn_inputs["target_tokens"].to_torch())).sum()
    total.backward()
    assert result.metrics["loss:sum"] == pytest.approx(total.item(), rel=1e-9)
    assert_same_gradients(got, take_gradients(c), 1e-9)
    assert [output["logprobs"].shape for output in result.loss_fn_outputs] == [[6, 4], [9, 4]]


@pytest.mark.parametrize("shape", [lambda n: [n], lambda n: [n, 2], lambda n: [4, n]])
def test_weights_of_another_shape_than_the_targets_are_refused(shape: Any) -> None:
    data = candidates(lambda n: TensorData.from_torch(torch.ones(shape(n))))
    with pytest.raises(LossInputError, match=r"datum\[0\].weights: expected"):
        client().forward_backward(data, "cross_entropy").result()
