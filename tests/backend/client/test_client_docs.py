"""The tables of ``docs/client.md``, computed again. Its code is a doctest."""

import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import sdks
from torch import Tensor

import lossfns
from lossfns import LossInputError, TensorData
from lossfns.backend import AdamParams, Decoder, LocalServiceClient, LocalTrainingClient
from lossfns.backend.engine.optimizer import NORMALIZATIONS
from lossfns.export.builtins import BUILTINS, Builtin

PAGE = (Path(__file__).parents[3] / "docs" / "client.md").read_text()
SHAPE: dict[str, Any] = {"vocab_size": 257, "dim": 16, "layers": 1, "heads": 2, "kv_heads": 1, "hidden": 16}


def table(header: str) -> list[list[str]]:
    """Return the cells of the table with this header."""
    lines = PAGE[PAGE.index(header) :].splitlines()[2:]
    rows = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


# Custom losses

BROKEN = table("| the loss returns |")


def loss_of(expression: str) -> Callable[[Any, list[Tensor]], Any]:
    """Make the loss that returns an expression of the page, in ``lps`` and their sum ``total``."""

    def loss_fn(data: Any, logprobs_list: list[Tensor]) -> Any:
        names = {"lps": logprobs_list, "total": torch.cat(logprobs_list).sum(), "torch": torch, "math": math}
        return eval(expression.strip("`"), names)

    return loss_fn


def client() -> LocalTrainingClient:
    return LocalTrainingClient(Decoder(**SHAPE), device="cpu")


def three(sdk: Any = lossfns) -> list[Any]:
    fields = {"target_tokens": [105, 33], "weights": [0.0, 1.0]}
    return [sdk.Datum(sdk.ModelInput.from_ints([72, 105]), dict(fields)) for _ in range(3)]


@pytest.mark.parametrize(("expression", "error"), [(row[0], row[2]) for row in BROKEN])
def test_a_loss_that_breaks_the_contract_gets_the_error_on_the_page(expression: str, error: str) -> None:
    c = client()
    with pytest.raises(LossInputError) as caught:
        c.forward_backward_custom(three(), loss_of(expression)).result()
    assert error == f"`{caught.value}`"
    assert all(p.grad is None for p in c.model.parameters())


def test_the_page_has_every_way_to_break_it() -> None:
    expressions = [row[0] for row in BROKEN]
    assert len(set(expressions)) == 12
    kept = client().forward_backward_custom(three(), loss_of("total, {}")).result()
    assert kept.metrics.keys() == {"loss:sum", "surrogate_loss:sum", "passes", "micro_batches", "peak_memory"}


@pytest.mark.parametrize(("expression", "outcome"), [(row[0], row[1]) for row in BROKEN])
def test_what_the_sdk_does_with_it(expression: str, outcome: str) -> None:
    """The SDK, if it is installed, raises the error whose beginning the page quotes, or sends what the page says."""
    for sdk in sdks()[1:]:
        assert answer(sdk, expression).startswith(outcome.strip("`"))


def answer(sdk: Any, expression: str) -> str:
    """Run the SDK's own code on the loss, with our logprobs: its error, or the weights that it sends."""
    data = three(sdk)
    forward = client().forward(data, "cross_entropy").result()
    try:
        made = sdk.TrainingClient._compute_custom_loss(data, loss_of(expression), forward)
        {}.update(made.metrics)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    sent = {float(x) for datum in made.data for x in datum.loss_fn_inputs["weights"].data}
    return "takes it" if all(map(math.isfinite, sent)) else f"sends weights of {sent.pop()}"


# Built-ins


def listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names) or "–"


def default(own: Builtin, key: str) -> str:
    """Return the default of a config key: that of the preset, except that no ratio is capped."""
    knob = own.config[key]
    if knob == "log_ratio_cap":
        return "None"
    value = own.preset().knobs[knob]
    value = value[key == "clip_high_threshold"] if knob == "clip" else value
    return "None" if value is None else f"{value:g}"


def test_the_built_ins_are_those_of_the_page() -> None:
    expected = [
        [
            f"`{name}`",
            f"`{own.preset.__name__}`",
            listed(own.required),
            listed(own.optional),
            ", ".join(f"`{key}` {default(own, key)}" for key in own.config) or "–",
        ]
        for name, own in BUILTINS.items()
    ]
    assert table("| name | public loss |") == expected


@pytest.mark.parametrize("name", BUILTINS)
def test_a_default_of_the_page_is_a_default(name: str) -> None:
    """Passing the page's defaults changes nothing, although the ratios lie far outside of every bound."""
    own, n = BUILTINS[name], 4
    rows = {"logprobs": [-9.0, -2.0, -5.5, -4.5], "ref_logprobs": [-6.0] * n, "advantages": [1.0, -1.0, 1.0, -1.0]}
    rows |= {"sequence_ratio_mask": [1.0] * n}
    fields: dict[str, Any] = {"target_tokens": [7] * n}
    fields |= {key: TensorData(rows[key], "float32") for key in (*own.required, *own.optional) if key in rows}
    data = [lossfns.Datum(lossfns.ModelInput.from_ints([5] * n), fields)]
    (cells,) = (row for row in table("| name | public loss |") if row[0] == f"`{name}`")
    pairs = [pair.split() for pair in cells[4].split(", ") if pair != "–"]
    config = {key.strip("`"): None if value == "None" else float(value) for key, value in pairs}
    c = client()
    plain = c.forward(data, name).result().metrics
    assert c.forward(data, name, config).result().metrics == pytest.approx(plain)


# The rest


def test_the_modes_and_defaults_of_a_step_are_those_of_the_page() -> None:
    cells = [row[0] for row in table("| `grad_accumulation_normalization` |")]
    named = {name.strip('`"') for cell in cells for name in cell.split(", ")}
    assert named == {"None", *NORMALIZATIONS}
    adam = AdamParams()
    assert (adam.learning_rate, adam.beta1, adam.beta2, adam.eps) == (1e-4, 0.9, 0.95, 1e-12)
    assert adam.weight_decay == adam.grad_clip_norm == 0
    assert "rate 1e-4, β 0.9 and 0.95, ε 1e-12, no decay, no clipping" in PAGE


@pytest.mark.parametrize("kind", [LocalTrainingClient, LocalServiceClient])
def test_every_call_is_on_the_page(kind: type) -> None:
    """Except for the ``_async`` methods, and ``result``, which returns the client itself."""
    names = [name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")]
    calls = [name for name in names if not name.endswith("_async") and name != "result"]
    assert len(calls) > 5 and [name for name in calls if name not in PAGE] == []


def test_the_first_example_is_a_program_that_ends_in_silence(tmp_path: Path) -> None:
    """Also if the client outlives the modules, as it does after an ``import *``."""
    first = PAGE.split("```")[1].splitlines()[1:]
    code = [line[4:] for line in first if line.startswith((">>>", "..."))]
    program = "\n".join(["from lossfns.backend import *", *code])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
