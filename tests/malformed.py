"""Malformed calls of everything public, drawn from a seed: a right call in which some values are replaced."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import lossfns
from lossfns import (
    Datum,
    EncodedTextChunk,
    ModelInput,
    Rows,
    TensorData,
    Tokens,
    Weighing,
    datum_from_tokens,
    export,
    kl,
    rollout,
)
from lossfns.export.builtins import BUILTINS, builtin_loss
from lossfns.pack import is_plain
from lossfns.testing.public import presets
from lossfns.tokens import DATUM_COLUMNS, MODEL_COLUMNS, TOKEN_COLUMNS

Make = Callable[[Random], Any]


class Hostile:
    """An object that claims to be a sequence and an array, and raises at every use."""

    def __len__(self) -> int:
        raise OSError("no length")

    def __getitem__(self, index: int) -> Any:
        raise OSError("no items")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise OSError("no array")

    def to_numpy(self) -> Any:
        raise OSError("no array")


def quietly(make: Callable[[], Any]) -> Any:
    """Make a tensor of a form that torch calls a prototype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


NUMBERS: list[Callable[[], Any]] = [
    lambda: None, lambda: True, lambda: -1, lambda: 0, lambda: 3, lambda: 1.5, lambda: -2.5, lambda: 1e300,
    lambda: math.nan, lambda: math.inf, lambda: -math.inf, lambda: 10**400, lambda: -(2**63), lambda: 2**64,
    lambda: 1j, lambda: Fraction(1, 3), lambda: Decimal("0.5"), lambda: np.float64(0.5), lambda: np.int8(-3),
    lambda: np.bool_(True), lambda: np.datetime64("2020-01-01"), lambda: np.str_("x"), lambda: np.float16(1e4),
    lambda: torch.tensor(1.0), lambda: torch.tensor([1.0]), lambda: torch.tensor(-1.0, requires_grad=True),
    lambda: torch.tensor(2), lambda: torch.tensor(1.0, device="meta"),
]  # fmt: skip
WORDS: list[Callable[[], Any]] = [
    lambda: "", lambda: "abc", lambda: "weights", lambda: "token_mean", lambda: "k3", lambda: "std", lambda: "\0",
    lambda: "x: 0)[0] or (lambda y", lambda: "1.0", lambda: b"12", lambda: bytearray(b"1"), lambda: "é" * 500,
]  # fmt: skip
OBJECTS: list[Callable[[], Any]] = [
    object, lambda: len, lambda: lossfns.ppo, lambda: lossfns.ppo(), lambda: lossfns.dpo(), lambda: lossfns.ON_POLICY,
    lambda: lossfns.token_mean, lambda: lossfns.pair_mean, lambda: Rows.PAIRS, lambda: int, lambda: Hostile(),
    lambda: lambda *args: None, lambda: lambda t: t.logprobs, lambda: SimpleNamespace(loss_fn_inputs=None),
    lambda: SimpleNamespace(loss_fn_inputs={}), lambda: SimpleNamespace(loss_fn_inputs={"weights": Hostile()}),
    lambda: SimpleNamespace(to_numpy=lambda: "x", dtype="float32"), lambda: SimpleNamespace(to_ints=lambda: ["a"]),
    lambda: ModelInput.from_ints([1, 2]), lambda: Datum(ModelInput.from_ints([1]), {}),
    lambda: TensorData([1.0, 2.0], "float32", [2]), lambda: TensorData([1, 2], "int64", [2, 1]),
    lambda: Exception("x"), lambda: slice(2), lambda: Ellipsis, lambda: NotImplemented, lambda: math,
]  # fmt: skip
COLLECTIONS: list[Callable[[], Any]] = [
    list, tuple, dict, set, lambda: [[]], lambda: [None], lambda: [1.0], lambda: [-1.0, -2.0], lambda: [0.0, 1.0, 1.0],
    lambda: [[1.0], [1.0, 2.0]], lambda: [[1.0, [2.0]]], lambda: ["a", "b"], lambda: [math.nan, 1.0],
    lambda: [10**400, 1], lambda: {"weights": [1.0]}, lambda: {0: 1.0, 1: 2.0}, lambda: {1.0, 2.0}, lambda: range(3),
    lambda: (x for x in (1.0, 2.0)), lambda: iter([1.0]), lambda: [[-1.0, -2.0], [-3.0]], lambda: (0.8, 1.2),
    lambda: (1.2, 0.8), lambda: (math.nan, 1.2), lambda: (0.2, 0.28), lambda: (None, None), lambda: [{}],
    lambda: [[[]]], lambda: [object()], lambda: [Hostile()], lambda: [torch.zeros(2), None], lambda: ["ab"],
    lambda: [np.zeros(2), torch.zeros(2)], lambda: [[True, False], [True]], lambda: [1, 2.5], lambda: [2**63, 1],
]  # fmt: skip
ARRAYS: list[Callable[[], Any]] = [
    lambda: np.zeros(0), lambda: np.zeros((2, 0)), lambda: np.array(1.0), lambda: np.array(None), lambda: -np.ones(2),
    lambda: np.array([1, "a"], dtype=object), lambda: np.array(["a", "b"]), lambda: np.array([1 + 1j, 2]),
    lambda: np.array(["2020-01-01"], dtype="datetime64[D]"), lambda: np.zeros(2, dtype=[("a", "f4"), ("b", "i4")]),
    lambda: -np.ones(2, dtype=">f4"), lambda: -np.arange(4.0)[::-2], lambda: np.ones(2, np.uint64) * 2**63,
    lambda: np.ones((2, 2, 2)), lambda: -np.ones(2, np.longdouble), lambda: np.zeros(2, np.float16),
    lambda: np.broadcast_to(np.float32(-1), (2,)), lambda: np.ma.masked_array([-1.0, -2.0], [True, False]),
    lambda: np.array([None, 1.0], dtype=object), lambda: np.array([[None, 1.0]], dtype=object),
    lambda: np.zeros(2, np.uint16), lambda: np.array([b"a", b"b"]), lambda: np.array([np.nan, np.inf]),
]  # fmt: skip
TENSORS: list[Callable[[], Any]] = [
    lambda: torch.zeros(0), lambda: torch.zeros(0, 3), lambda: torch.tensor(-1.0), lambda: torch.zeros(2) - 1,
    lambda: torch.zeros(3, dtype=torch.float64) - 1, lambda: torch.zeros(2, 2), lambda: torch.zeros(2, 1, 1),
    lambda: torch.zeros(2, dtype=torch.int32), lambda: torch.ones(2, dtype=torch.bool), lambda: torch.zeros(2) + 1j,
    lambda: torch.zeros(2, dtype=torch.uint8), lambda: torch.zeros(2, dtype=torch.uint16),
    lambda: torch.zeros(2).to_sparse(), lambda: (-torch.ones(1)).expand(2),
    lambda: torch.zeros(2, dtype=torch.float8_e4m3fn), lambda: torch.zeros(2, dtype=torch.bfloat16) - 1,
    lambda: torch.zeros(2, device="meta"), lambda: torch.zeros(2, requires_grad=True),
    lambda: quietly(lambda: torch.zeros(2, 2).to_sparse_csr()), lambda: torch.zeros(2).to_sparse().requires_grad_(),
    lambda: quietly(lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(1)])),
    lambda: quietly(lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)),
    lambda: quietly(lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)),
    lambda: torch.tensor([math.nan, math.inf]), lambda: torch.tensor([-1.0, 2.0]), lambda: torch.zeros(2).half() - 1,
    lambda: torch.zeros(2).as_subclass(torch.nn.Parameter), lambda: torch.tensor([1e300], dtype=torch.float64),
]  # fmt: skip
KINDS = [NUMBERS, WORDS, OBJECTS, COLLECTIONS, ARRAYS, TENSORS]


def junk(rng: Random) -> Any:
    """Return a value that may be wrong anywhere."""
    return rng.choice(rng.choice(KINDS))()


# Right values


def data(rng: Random, count: int = 2) -> list[Datum]:
    """Return datums of three and two tokens, with all columns; the first token of each is the prompt."""
    return [datum_from_tokens([5, 6, 7, 8][: 4 - i % 2], prompt_length=1, **columns(3 - i % 2)) for i in range(count)]


def columns(n: int) -> dict[str, Any]:
    numbers = {name: [1.0] * n for name in ("advantages", *DATUM_COLUMNS, *MODEL_COLUMNS)}
    others = ("old_logprobs", "ref_logprobs", "sampler_logprobs", *TOKEN_COLUMNS[len(MODEL_COLUMNS) :])
    return numbers | {name: [-1.5, -2.5, -0.5][:n] for name in others}


def two_targets(rng: Random) -> list[Datum]:
    ids, weights = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    fields = {"target_tokens": ids, "weights": weights, "teacher_logprobs": -1 - weights}
    return [Datum(ModelInput.from_ints([1, 2]), fields) for _ in range(2)]


def logprobs(rng: Random) -> list[torch.Tensor]:
    return [torch.tensor([-1.0, -2.0, -0.5], requires_grad=True), torch.tensor([-3.0, -1.5], requires_grad=True)]


def logprobs_of_two(rng: Random) -> list[torch.Tensor]:
    return [-torch.ones(2, 2, requires_grad=True) for _ in range(2)]


def bound_columns(rng: Random) -> dict[str, Any]:
    side = columns(3)
    rows = {name: [row, row[:2]] for name, row in side.items()}
    rows["advantages"] = rng.choice([[1.0, -1.0], np.array([1.0, -1.0]), torch.tensor([1.0, -1.0]), rows["advantages"]])
    options = {"weights": [[0.0, 1.0, 0.5], [1.0, 1.0]], "denominator": 4.0, "align": "strict", "grad_l1": True}
    names = rng.sample([*rows, *options], rng.randint(1, 6))
    return {name: (rows | options)[name] for name in names}


def metrics(rng: Random) -> list[dict[str, Any]]:
    one = {
        "loss": 2.0,
        "denominator": 1.0,
        "count": 1.0,
        "tokens": 1.0,
        "sequences": 1.0,
        "nll": 2.0,
        "custom:sum": 1.0,
    }
    return [dict(one), dict(one)]


def a_loss(rng: Random) -> Any:
    loss = rng.choice(LOSSES)
    return loss.bind(align=rng.choice(["strict", "truncate"])) if rng.random() < 0.3 else loss


def is_names(columns: Any) -> bool:
    """Whether Python itself takes the dict as keyword arguments."""
    return isinstance(columns, dict) and all(isinstance(name, str) for name in columns)


LOSSES = [
    *(preset() for preset in presets().values()),
    lossfns.gspo_token(log_ratio_cap=None),
    lossfns.ppo(log_ratio_cap=None, weigh=lossfns.fixed_length(3)),
    lossfns.with_kl(lossfns.with_tis(lossfns.with_dual_clip(lossfns.cispo())), 0.1),
    lossfns.with_tis(lossfns.ppo(log_ratio_cap=None), level=lossfns.sequence_level),
    lossfns.with_rollout_weight(lossfns.ppo(), rollout.within(lossfns.k3, 0.1, lossfns.maximum_level)),
]


def own(rng: Random) -> dict[str, Any]:
    """Return the fields of a loss of one's own."""
    return {
        "name": "own", "knobs": {}, "reads": ("advantages",), "terms": lambda t: (-t.logprobs, {"nll": -t.logprobs}),
        "share": lossfns.token_mean.share, "count": lossfns.token_mean.count, "rows": "tokens",
    }  # fmt: skip


@dataclass
class Call:
    """A right call: a function and its arguments by name, which a mutation changes."""

    what: str
    function: Callable[..., Any]
    arguments: dict[str, Any]


def contract(rng: Random) -> Call:
    loss = a_loss(rng)
    is_multi = getattr(loss, "loss", loss).rows is Rows.TARGETS
    bound = {} if is_multi or rng.random() < 0.5 else bound_columns(rng)
    method = rng.choice(["call", "call", "value", "denominator"])
    arguments = {"data": (two_targets if is_multi else data)(rng), "columns": bound}
    if method != "denominator":
        arguments["logprobs_list"] = (logprobs_of_two if is_multi else logprobs)(rng)

    def call(data: Any, columns: Any, logprobs_list: Any = None) -> Any:
        b = loss.bind(**columns) if is_names(columns) else loss.bind()
        if method == "denominator":
            return b.denominator(data)
        return b(data, logprobs_list) if method == "call" else b.value(data, logprobs_list)

    return Call(f"{method} of {loss!r}", call, arguments)


def building(rng: Random) -> Call:
    name, preset = rng.choice(list(presets().items()))
    return Call(name, preset, dict(preset().knobs))


def combining(rng: Random) -> Call:
    combine = rng.choice([lossfns.with_kl, lossfns.with_tis, lossfns.with_dual_clip, lossfns.with_rollout_weight])
    options = {
        lossfns.with_kl: {"kl_beta": 0.1, "kl": lossfns.k2, "kl_cap": 10.0, "kl_to": "old_logprobs"},
        lossfns.with_rollout_weight: {"weight": rollout.masked((0.5, 2.0))},
        lossfns.with_tis: {"cap": 2.0, "level": "sequence_level"},
        lossfns.with_dual_clip: {"c": 3.0},
    }
    return Call(combine.__name__, combine, {"loss": lossfns.ppo(), **options[combine]})


def correcting(rng: Random) -> Call:
    """A token weight, an estimator or a row of another policy."""
    weights = (rollout.truncated, rollout.masked, rollout.inside)
    bounded = {"bounds": (0.5, 2.0), "level": lossfns.token_level, "numerator": "logprobs"}
    candidates = torch.tensor([[0.5, 0.25, 0.25]] * 2).log()
    right = {"candidate_logprobs": candidates, "sampled": torch.tensor([0, 2])}
    versions = {"versions": torch.tensor([0, 2]), "version": 3}
    names = ("rollout_weight", "rollout_weight_square", "rollout_rejected_sequences", "tokens", "sequences")
    batch = {"data": data(rng), "logprobs_list": logprobs(rng)}
    kept = {"support": torch.ones(2, 3, dtype=torch.bool)}
    choices = [
        *(Call(make.__name__, make, bounded) for make in weights),
        Call("within", rollout.within, {"divergence": lossfns.k3, "high": 0.1, "level": lossfns.maximum_level}),
        Call("without_outliers", rollout.without_outliers, {"bounds": (0.1, 10.0)}),
        Call("ratio_to", rollout.ratio_to, {"column": "old_logprobs", "log_ratio_cap": 20.0}),
        Call("detached", rollout.detached, {"weight": rollout.ratio()}),
        Call("token_normalized", rollout.token_normalized, {"weight": rollout.ratio()}),
        Call("TokenWeight", rollout.TokenWeight, {"name": "w", "reads": (), "factor": lambda t: t.weights}),
        Call("value_capped", kl.value_capped, {"kl": lossfns.k3, "cap": 10.0}),
        Call("straight_through", kl.straight_through, {"value": lossfns.k3, "gradient": lossfns.k2}),
        Call("top_p_support", lossfns.top_p_support, {**right, "top_p": 0.9}),
        Call("support_logprobs", lossfns.support_logprobs, {**right, **kept}),
        Call(
            "proximal_logprobs",
            lossfns.proximal_logprobs,
            {"logprobs": [-1.0, -2.0], "sampler_logprobs": torch.tensor([-1.5, -2.0]), **versions},
        ),
        Call("rollout_summary", lossfns.rollout_summary, {"metrics": dict.fromkeys((*names, "sequences_empty"), 1.0)}),
        Call("accepted_weights", lossfns.accepted_weights, {"weight": rollout.inside((0.5, 2.0)), **batch}),
    ]
    return rng.choice(choices)


def own_loss(rng: Random) -> Call:
    """A loss of one's own, made and called."""

    right = own(rng)

    def make_and_call(**fields: Any) -> Any:
        if any(callable(fields.get(name)) and fields[name] is not x for name, x in right.items() if callable(x)):
            return None  # what another function raises is no error of ours
        return lossfns.Loss(**fields)(data(rng), logprobs(rng))

    return Call("Loss", make_and_call, right)


def own_terms(rng: Random) -> Call:
    """Terms of one's own that return anything."""

    def call(term: Any, statistics: Any, share: Any, count: Any) -> Any:
        whole = term if rng.random() < 0.1 else (term, statistics)
        functions = {"terms": lambda t: whole, "share": lambda t: share, "count": lambda t: count}
        return lossfns.Loss(**(own(rng) | functions))(data(rng), logprobs(rng))

    term = -torch.ones(5, requires_grad=True)
    right = {"term": term, "statistics": {"x": torch.ones(5)}, "share": torch.ones(5), "count": torch.tensor(5.0)}
    return Call("terms", call, right)


def packing(rng: Random) -> Call:
    options = {"reads": ("advantages", "old_logprobs"), "columns": {"advantages": [1.0, 2.0]}, "rows": "tokens"}
    return Call("pack", lossfns.pack, {"data": data(rng), "logprobs_list": logprobs(rng), "align": "strict", **options})


def evaluating(rng: Random) -> Call:
    t = Tokens(-torch.ones(3), torch.ones(3), torch.tensor([2, 1]))
    return Call("evaluate", lossfns.evaluate, {"loss": lossfns.cross_entropy(), "t": t, "denominator": 3.0})


def weighing(rng: Random) -> Call:
    if rng.random() < 0.5:
        return Call("fixed_length", lossfns.fixed_length, {"length": 8})
    fields = {"name": "w", "rows": "tokens", "share": lossfns.token_mean.share, "count": None}
    return Call("Weighing", lambda **x: lossfns.reinforce(weigh=Weighing(**x)), fields)


def advantages(rng: Random) -> Call:
    """Return a call of an estimator of samples or of tokens, with some of its settings."""
    groups = ["a", "a", "b"]
    samples = {"rewards": [1.0, 0.0, 3.0], "groups": groups}
    rows, ones = [[-1.0, -0.5], [-2.0]], [[1.0, 1.0], [1.0]]
    scaling, alone = {"eps": 1e-6, "ddof": 1}, {"group_of_one": "zero", "missing": "abstain"}
    calls: dict[str, dict[str, Any]] = {
        "group_advantages": {**samples, "scale": "std", **scaling, **alone},
        "group_metrics": samples,
        "groups_with_signal": samples,
        "leave_one_out_advantages": {**samples, **alone},
        "opo_advantages": {**samples, "lengths": [3, 1, 2]},
        "pass_at_k_advantages": {**samples, "scale": "std", **scaling},
        "maxrl_advantages": {**samples, "eps": 0.0, **alone},
        "gpg_advantages": {**samples, "alpha": "nonzero", "scale": "none"},
        "asymre_advantages": {**samples, "shift": -0.1},
        "remax_advantages": {"rewards": [1.0, 0.0], "greedy_rewards": [0.5, 0.5]},
        "batch_advantages": {"rewards": [1.0, 0.0], "lengths": [1, 2], **scaling},
        "reinforce_plus_plus_baseline_advantages": {**samples, "lengths": [1, 2, 3], **scaling},
        "gdpo_advantages": {"rewards": [[1.0, 0.0], [0.0, 2.0]], "groups": ["a", "a"], "reward_weights": [1.0, 2.0]},
        "rae_advantages": {"rewards": [1.0, 0.0], "roles": ["a", "b"], "baselines": {"a": 0.5}, "decay": 0.5},
        "hierarchical_advantages": {**samples, "episodes": [1, 1, 2], "roles": groups, "episode_roles": ("a",)},
        "gigpo_advantages": {**samples, "episodes": [1, 2, 1], "states": groups, "omega": 1.0, "gamma": 0.9},
        "token_rewards": {"rewards": [1.0, 2.0], "weights": ones, "penalties": rows},
        "returns_to_go": {"rewards": rows, "weights": ones, "gamma": 0.9, "steps": "slots"},
        "gae": {"rewards": rows, "values": rows, "weights": ones, "gamma": 0.9, "lam": 0.9},
        "reinforce_plus_plus_advantages": {"rewards": rows, "weights": ones, "gamma": 1.0, **scaling},
        "whiten": {"values": rows, "weights": ones, **scaling},
        "kl_penalties": {"logprobs": rows, "ref_logprobs": rows, "weights": ones, "kl_beta": 0.1, "kl": "k3"},
        "optimal_token_advantages": {
            "rewards": rows, "logprobs": rows, "sum_square_probs": [[0.5, 0.5], [0.25]], "weights": ones,
            "groups": ["a", "a"], "importance": ones,
        },
        "explained_variance": {"metrics": {"value_error": 0.0, "value_error_squared": 1.0, "returns": 1.0,
            "returns_squared": 5.0}},
    }  # fmt: skip
    name = rng.choice(list(calls))
    return Call(name, getattr(lossfns, name), calls[name])


def merging(rng: Random) -> Call:
    return Call("merge_metrics", lossfns.merge_metrics, {"parts": metrics(rng)})


def framing(rng: Random) -> Call:
    arguments: dict[str, Any] = {"tokens": [5, 6, 7, 8], "max_length": 3, "reduction": "mean"}
    arguments |= rng.choice([{"prompt_length": 2}, {"weights": [0.0, 0.0, 1.0, 2.0]}])
    if rng.random() < 0.5:
        arguments |= {"logprobs": [-1.0, -2.0, -3.0]}
    if rng.random() < 0.3:
        tokens = ModelInput.from_ints(arguments["tokens"])
        weighted = {"model_input": tokens, "weights": [0.0, 0.0, 1.0, 2.0], "max_length": 3}
        return Call("datum_from_model_input_weights", lossfns.datum_from_model_input_weights, weighted)
    return Call("datum_from_tokens", datum_from_tokens, arguments)


def aligning(rng: Random) -> Call:
    row = rng.choice([[-0.5, -0.25], [None, -3.0, -2.0, -0.5, -0.25], [-3.0, -2.0, -0.5, -0.25]])
    return Call("align", lossfns.align_sampler_logprobs, {"logprobs": row, "targets": 4, "prompt_length": 3})


def tensors(rng: Random) -> Call:
    sparse = {"sparse_crow_indices": [0, 1, 2], "sparse_col_indices": [0, 1]} if rng.random() < 0.5 else {}
    shape = [2, 2] if sparse else [2]
    make = lambda **x: (TensorData(**x).to_numpy(), TensorData(**x).data)  # noqa: E731
    choices = [
        Call("TensorData", make, {"data": [1.0, 2.0], "dtype": "float32", "shape": shape, **sparse}),
        Call("from_numpy", TensorData.from_numpy, {"array": np.ones(2)}),
        Call("from_torch", TensorData.from_torch, {"tensor": torch.ones(2)}),
        Call("from_torch_sparse", TensorData.from_torch_sparse, {"tensor": torch.eye(9)}),
        Call("from_ints", ModelInput.from_ints, {"tokens": [1, 2]}),
        Call("append", ModelInput.from_ints([1]).append, {"chunk": EncodedTextChunk((1, 2))}),
        Call("append_int", ModelInput.from_ints([1]).append_int, {"token": 3}),
        Call("EncodedTextChunk", EncodedTextChunk, {"tokens": [1, 2]}),
        Call("Datum", Datum, {"model_input": None, "loss_fn_inputs": {"weights": [1.0], "target_tokens": [1]}}),
    ]  # fmt: skip
    return rng.choice(choices)


def exporting(rng: Random) -> Call:
    function = rng.choice([export.with_denominators, export.fold, export.token_gradient, export.as_datum_fn])
    loss = a_loss(rng)
    given = (two_targets if "multi_target" in repr(loss) else data)(rng)
    columns = {} if "multi_target" in repr(loss) else bound_columns(rng)

    def call(loss: Any, data: Any, columns: Any, **options: Any) -> Any:
        bound = loss.bind(**columns) if isinstance(loss, lossfns.Loss) and is_names(columns) else loss
        return function(bound) if function is export.as_datum_fn else function(bound, data, **options)

    options = {"device": "cpu"} if function is export.token_gradient else {}
    return Call(function.__name__, call, {"loss": loss, "data": given, "columns": columns, **options})


def built_in(rng: Random) -> Call:
    name = rng.choice(list(BUILTINS))
    config = {key: {"clip": 1.0, "beta": 0.5}.get(knob, 1.5) for key, knob in BUILTINS[name].config.items()}
    return Call("builtin_loss", builtin_loss, {"name": name, "config": config})


CALLS: list[Callable[[Random], Call]] = [
    contract, contract, contract, contract, building, combining, correcting, own_loss, own_terms, packing,
    evaluating, weighing, advantages, merging, framing, aligning, tensors, exporting, exporting, built_in,
]  # fmt: skip


# Mutation


def mutate(value: Any, rng: Random, depth: int = 0) -> Any:
    """Return the value, or a copy of a list, dict or datum, with something in it replaced, added or taken away."""
    if depth > 3 or rng.random() < 0.25:
        return junk(rng)
    if isinstance(value, Datum):
        return SimpleNamespace(
            model_input=value.model_input, loss_fn_inputs=mutate(value.loss_fn_inputs, rng, depth + 1)
        )
    if isinstance(value, dict):
        return mutate_dict(value, rng, depth)
    if isinstance(value, (list, tuple)):
        items = list(value)
        place = rng.randrange(len(items) + 1)
        action = rng.choice(["replace", "replace", "drop", "insert"])
        if action == "insert" or place == len(items):
            items.insert(place, junk(rng))
        elif action == "drop":
            del items[place]
        else:
            items[place] = mutate(items[place], rng, depth + 1)
        return type(value)(items) if type(value) in (list, tuple) else items
    if isinstance(value, torch.Tensor) and is_plain(value) and value.dtype == torch.float32 and value.numel():
        numbers = value.detach().clone().contiguous()
        numbers.view(-1)[rng.randrange(numbers.numel())] = rng.choice([math.nan, math.inf, -math.inf, 1.0, -1e30])
        return numbers.requires_grad_(value.requires_grad)
    return junk(rng)


def mutate_dict(value: dict[Any, Any], rng: Random, depth: int) -> dict[Any, Any]:
    changed = dict(value)
    name = rng.choice(list(changed)) if changed else "weights"
    action = rng.choice(["replace", "replace", "replace", "drop", "add"])
    if action == "drop" and depth:
        changed.pop(name, None)
    elif action == "add" and depth:
        changed[rng.choice(["weights", "mask", "logprobs", "advantages", "x", "target_tokens"])] = junk(rng)
    else:
        changed[name] = mutate(changed.get(name), rng, depth + 1)
    return changed


def malformed_call(seed: int) -> Call:
    """Return the malformed call of a seed: a right call with one to three values replaced."""
    rng = Random(seed)
    call = rng.choice(CALLS)(rng)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        call.arguments = mutate_dict(call.arguments, rng, 0)
    return call


# Fingerprints


def fingerprint(value: Any) -> Any:
    """Return something that is equal before and after if nothing in the value has changed."""
    if isinstance(value, torch.Tensor):
        state = (id(value), value.dtype, value.requires_grad, value._version)
        plain = value.layout == torch.strided and not (value.is_meta or value.is_nested or value.is_quantized)
        return (*state, repr(value.detach().tolist())) if plain else state
    if isinstance(value, np.ndarray):
        return id(value), value.dtype, value.shape, repr(value.tolist())
    if isinstance(value, dict):
        return [(repr(key), fingerprint(x)) for key, x in value.items()]
    if isinstance(value, (list, tuple)):
        return [type(value), *map(fingerprint, value)]
    if isinstance(value, (Datum, SimpleNamespace)):
        return fingerprint(getattr(value, "loss_fn_inputs", None))
    if isinstance(value, TensorData):
        return value.dtype, value.shape, fingerprint(value._values)
    return id(value)


def right_calls() -> Iterator[Call]:
    """Yield calls in which nothing is replaced: they must be right, or the mutations would show little."""
    for seed in range(200):
        rng = Random(seed)
        yield rng.choice(CALLS)(rng)
