"""preflight: its findings on bad batches and broken losses, and its numbers on good ones."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches import sdks

from lossfns import (
    ON_POLICY,
    Datum,
    Loss,
    ModelInput,
    TensorData,
    cross_entropy,
    datum_from_tokens,
    dpo,
    grpo,
    multi_target_cross_entropy,
    orpo,
    pair_sum,
    ppo,
    sequence_mean,
    with_tis,
)
from lossfns.inspect import Preflight, preflight
from lossfns.testing.batch import Batch

EOS = 2
SFT = [[5, 6, 7, 8, EOS], [5, 6, 9, EOS]]


def sft(**options: Any) -> list[Datum]:
    return [datum_from_tokens(tokens, prompt_length=2, **options) for tokens in SFT]


def rl(advantages: tuple[float, ...] = (1.0, -1.0), **columns: Any) -> list[Datum]:
    """Two responses of 3 and 2 tokens after a prompt of 2; old = ref, unless a column is given."""
    old = [[-9.0, -1.0, -0.5, -2.0], [-9.0, -0.25, -1.5]]
    rows = {"old_logprobs": old, "ref_logprobs": old, "advantages": [[a] * len(x) for a, x in zip(advantages, old)]}
    rows |= columns
    data = []
    for i, tokens in enumerate(SFT):
        fields = {name: x[i] for name, x in rows.items() if x is not None}
        data.append(datum_from_tokens(tokens, prompt_length=2, **fields))
    return data


def pairs(ref: float = -1.0) -> list[Datum]:
    tokens = [[5, 6, 7, EOS], [5, 6, 8, 9, EOS], [5, 4, EOS], [5, 3, 3, EOS]]
    return [datum_from_tokens(t, prompt_length=2, ref_logprobs=[ref] * (len(t) - 1)) for t in tokens]


def column(datum: Any, name: str) -> torch.Tensor:
    return torch.from_numpy(datum.loss_fn_inputs[name].to_numpy().copy())


def levels(flight: Preflight, field: str) -> list[str]:
    return [finding.level for finding in flight.findings if finding.field.partition("[")[0] == field]


def message(flight: Preflight, field: str) -> str:
    return next(str(finding) for finding in flight.findings if finding.field.partition("[")[0] == field)


# Good batches


def test_a_good_supervised_batch() -> None:
    """Five response tokens of seven targets, both responses end with EOS; uniform over 16 ids: the loss is ln 16."""
    flight = preflight(cross_entropy(), sft(), eos_id=EOS, vocab_size=16)
    assert flight.ok and flight.findings == []
    assert flight.numbers["data"] == {"datums": 2, "targets": 7, "shortest": 3, "longest": 4}
    assert flight.numbers["weights"]["active"] == 5 and flight.numbers["weights"]["fewest"] == 2
    assert flight.numbers["responses"] == {"responses": 2, "trained to the last target": 2, "end with EOS": 2}
    assert flight.numbers["denominators"] == {"its own": 5.0, "tokens": 5, "Σw": 5.0, "sequences": 2}
    assert flight.numbers["step zero"] == {"loss": pytest.approx(math.log(16)), "Σ|g|": pytest.approx(1.0)}
    assert preflight(cross_entropy(weigh=sequence_mean), sft()).numbers["denominators"]["its own"] == 2.0


def test_a_good_policy_batch() -> None:
    """At ratio 1 and KL 0 the loss is −ΣA·w / Σw = −(3·1 − 2·1)/5, and Σ|g| = 1."""
    flight = preflight(grpo(kl_beta=0.1), rl(), eos_id=EOS)
    assert flight.ok and [finding.level for finding in flight.findings] == ["note"]  # Fireworks and other fields
    zero = flight.numbers["step zero"]
    assert zero["loss"] == pytest.approx(-0.2) and zero["Σ|g|"] == pytest.approx(1.0)
    assert (zero["ratio"], zero["kl_ref"], zero["clip_low"], zero["clip_high"]) == (1.0, 0.0, 0.0, 0.0)
    advantages = flight.numbers["advantages"]
    assert advantages["mean"] == pytest.approx(0.2) and advantages["zero"] == 0.0 and advantages["positive"] == 0.6
    assert flight.numbers["mean gaps"] == {"|old - ref|": 0.0}


@pytest.mark.parametrize("loss, expected", [(dpo(), math.log(2)), (dpo(weigh=pair_sum), 2 * math.log(2))])
def test_dpo_begins_at_ln_2(loss: Loss, expected: float) -> None:
    flight = preflight(loss, pairs())
    zero = flight.numbers["step zero"]
    assert flight.ok and zero["loss"] == pytest.approx(expected) and zero["expected"] == pytest.approx(expected)
    assert (zero["margin"], zero["accuracy"]) == (0.0, 0.5)
    assert flight.numbers["denominators"]["pairs"] == 2


def test_a_bound_loss_is_read_from_its_binding_and_the_service_gets_bare_datums() -> None:
    data, old = sft(), [[-9.0, -1.0, -0.5, -2.0], [-9.0, -0.25, -1.5]]
    bound = grpo(kl_beta=0.1).bind(advantages=[1.0, -1.0], old_logprobs=old, ref_logprobs=old)
    flight = preflight(bound, data, eos_id=EOS)
    assert flight.findings == [] and flight.numbers["step zero"]["loss"] == pytest.approx(-0.2)
    assert preflight(ppo().bind(advantages=[1.0, -1.0], old_logprobs=ON_POLICY), data).ok
    half = dpo().bind(denominator=4.0)  # of a batch twice as large: ln 2 · 2/4
    assert preflight(half, pairs()).numbers["step zero"]["expected"] == pytest.approx(math.log(2) / 2)


def test_other_losses_pass() -> None:
    assert preflight(orpo(), pairs()).ok
    many = Batch([[-1.0, -2.0, -3.0, -1.0]], [[0.5, 0.5, 0.0, 1.0]], {}, targets=2)
    assert preflight(multi_target_cross_entropy(), many.data()).ok
    sampled = rl(sampler_logprobs=[[-9.0, -1.1, -0.5, -2.0], [-9.0, -0.25, -1.5]])
    flight = preflight(with_tis(ppo()), sampled)
    assert flight.ok and flight.numbers["step zero"]["tis_weight"] == 1.0


@pytest.mark.parametrize("sdk", sdks())
def test_the_objects_of_the_sdk(sdk: Any) -> None:
    data = [
        sdk.Datum(
            sdk.ModelInput.from_ints(tokens[:-1]),
            {"target_tokens": tokens[1:], "weights": [0.0] + [1.0] * (len(tokens) - 2)},
        )
        for tokens in SFT
    ]
    assert (
        preflight(cross_entropy(), data, eos_id=EOS, vocab_size=16).as_dict()
        == preflight(cross_entropy(), sft(), eos_id=EOS, vocab_size=16).as_dict()
    )


def test_given_logprobs_stand_for_the_policy() -> None:
    """CE of logprobs −2 everywhere is 2."""
    flight = preflight(cross_entropy(), sft(), logprobs=[torch.full((4,), -2.0), torch.full((3,), -2.0)])
    assert flight.numbers["step zero"]["loss"] == pytest.approx(2.0)
    assert "one tensor per datum" in message(preflight(cross_entropy(), sft(), logprobs=[]), "logprobs_list")


# Frames


def replaced(field: str, values: list[float], datum: int = 1) -> list[Datum]:
    data = sft()
    data[datum].loss_fn_inputs[field] = TensorData(values, "float32")
    return data


@pytest.mark.parametrize(
    "data, where, words",
    [
        (replaced("weights", [0.0, 1.0, 1.0, 1.0]), "datum[1].weights", "(the length of target_tokens), got 4. It has"),
        (replaced("weights", [1.0, 1.0]), "datum[1].weights", "got 2. It looks shifted twice"),
        (replaced("advantages", [1.0]), "datum[1].advantages", "expected 3 values"),
        ([Datum(ModelInput.from_ints([5, 6, 7]), {"target_tokens": [6, 7], "weights": [1.0, 1.0]})],
         "datum[0].model_input", "got 3. Its last token predicts nothing"),
        ([Datum(ModelInput.from_ints([5, 6]), {"target_tokens": [5, 6, 7], "weights": [1.0] * 3})],
         "datum[0].model_input", "got 2. A token short: were targets not shifted?"),
        ([Datum(ModelInput.from_ints([5, 6, 7]), {"target_tokens": [5, 6, 7], "weights": [1.0] * 3})],
         "datum[0].target_tokens", "the model_input itself, not shifted"),
        ([Datum(ModelInput.from_ints([5, 6, 7, 8]), {"target_tokens": [7, 8, 9, 4], "weights": [1.0] * 4})],
         "datum[0].target_tokens", "shifted twice"),
        ([Datum(ModelInput.from_ints([5]), {"weights": [1.0]})], "datum[0].target_tokens", "got nothing"),
        ([Datum(ModelInput.from_ints([]), {"target_tokens": [], "weights": []})], "datum[0].target_tokens", "Drop"),
        ([datum_from_tokens([5, 6, 70], prompt_length=1)], "datum[0].target_tokens", "integers in [0, 50)"),
        ([3], "datum[0].loss_fn_inputs", "expected a Datum"),
        ([], "data", "data is empty"),
        ("datums", "data", "a list of datums"),
    ],
)  # fmt: skip
def test_frames_that_do_not_fit(data: Any, where: str, words: str) -> None:
    flight = preflight(cross_entropy(), data, vocab_size=50)
    assert not flight.ok and flight.step_zero is None
    [error] = [finding for finding in flight.findings if finding.level == "error"]
    assert str(error).startswith(f"error: {where}: ") and words in error.message
    assert "not measured" in message(flight, "step zero")


def test_a_binding_that_does_not_fit() -> None:
    assert "expected 2 entries" in message(preflight(ppo().bind(advantages=[1.0]), rl()), "advantages")
    short = ppo().bind(old_logprobs=[[-1.0] * 4, [-1.0] * 2])
    assert message(preflight(short, rl()), "old_logprobs").startswith("error: datum[1].old_logprobs: expected 3 values")


def test_every_bad_datum_is_found_and_a_terminal_shows_a_few() -> None:
    data = [datum_from_tokens([5, 6, 7], prompt_length=1) for _ in range(9)]
    for datum in data:
        datum.loss_fn_inputs["weights"] = TensorData([1.0], "float32")
    flight = preflight(cross_entropy(), data)
    assert [finding.datum for finding in flight.findings if finding.level == "error"] == list(range(9))
    lines = flight.table().splitlines()
    assert sum(line.startswith("error") for line in lines) == 3 and "  ... and 6 more about weights" in lines


# Weights, ends, advantages, columns


def weighted(*rows: list[float]) -> list[Datum]:
    return [datum_from_tokens(list(range(4, 5 + len(row))), [0.0, *row]) for row in rows]


@pytest.mark.parametrize(
    "loss, rows, finding",
    [
        (cross_entropy(), ([0.0, 0.0], [0.0]), "error: datum[0].weights: 0 everywhere"),
        (cross_entropy(), ([0.0, 1.0], [0.0]), "warning: datum[1].weights: no active token in datum 1"),
        (cross_entropy(), ([0.0, 1.0], [math.nan]), "error: datum[1].weights: not finite in datum 1"),
        (cross_entropy(), ([1.0, 1.0], [1.0]), "note: weights: no target is masked in any datum"),
        (orpo(), ([0.0, 1.0], [0.0, -1.0]), "error: datum[1].weights: negative in datum 1"),
        (orpo(), ([0.0, 0.0], [0.0, 1.0]), "error: datum[0].weights: one side of a pair has no active token: datum 0."),
    ],
)
def test_weights(loss: Loss, rows: tuple[list[float], ...], finding: str) -> None:
    assert message(preflight(loss, weighted(*rows)), "weights").startswith(finding)


def test_negative_weights_belong_to_likelihood() -> None:
    """−Σ w·lp at lp = −1, w = 1, 1, −½ over Σw = 1½: the loss is 1 and the gradient −w / 1½."""
    flight = preflight(cross_entropy(), weighted([1.0, 1.0], [0.0, -0.5]))
    assert flight.ok and levels(flight, "weights") == []
    assert flight.numbers["weights"]["negative"] == 1 and flight.numbers["weights"]["fractional"] == 1
    assert flight.step_zero is not None and flight.step_zero.gradients[1].tolist() == pytest.approx([0.0, 1 / 3])


def test_ends_of_responses() -> None:
    cut = preflight(cross_entropy(), sft(max_length=4), eos_id=EOS)  # the first loses its EOS, the second keeps it
    assert message(cut, "target_tokens").startswith("note: target_tokens: 1 of 2 responses are not trained to end")
    padded = [datum_from_tokens([5, 6, 7, EOS, EOS], [0, 0, 1, 0, 0]) for _ in range(2)]
    flight = preflight(cross_entropy(), padded, eos_id=EOS)
    assert levels(flight, "target_tokens") == ["warning", "warning"]
    text = str(flight)
    assert "the last target is masked in every datum" in text and "is pad = eos masked?" in text
    assert preflight(cross_entropy(), padded).numbers["responses"] == {
        "responses": 2, "trained to the last target": 0, "most often end with": 7, "times": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    "advantages, finding",
    [
        ((0.0, 0.0), "error: advantages: 0 at every active token"),
        ((1.0, 1.0), "warning: advantages: one number for all tokens"),
        ((1.0, 0.5), "warning: advantages: none is negative: are these rewards?"),
        ((math.nan, 1.0), "error: datum[0].advantages: not finite in datum 0"),
        ((0.0, -1.0), "note: datum[0].advantages: 0 throughout datum 0"),
    ],
)
def test_advantages(advantages: tuple[float, ...], finding: str) -> None:
    assert message(preflight(ppo(), rl(advantages)), "advantages").startswith(finding)


def test_logprob_columns() -> None:
    tokens = list(range(4, 24))
    old = np.linspace(-4, -0.5, 19)[np.random.default_rng(0).permutation(19)]
    rows = {"late": np.roll(old, 1), "far": old - 6, "zero": 0 * old, "odds": -old}
    expected = {
        "late": "warning: ref_logprobs: fits old_logprobs better by one token",
        "far": "warning: ref_logprobs: 6 nats from old_logprobs on average",
        "zero": "warning: ref_logprobs: 0 at every active token",
        "odds": "error: datum[0].ref_logprobs: nan, infinite or above 0",
    }
    for name, ref in rows.items():
        columns = {"old_logprobs": old.tolist(), "ref_logprobs": ref.tolist(), "advantages": [1.0] * 9 + [-1.0] * 10}
        flight = preflight(grpo(), [datum_from_tokens(tokens, prompt_length=1, **columns)])
        assert message(flight, "ref_logprobs").startswith(expected[name])


# Losses


def plain(surrogate: Callable[[Any, Any, Any], Any], *, masked: bool = True) -> Callable[[Any, Any], Any]:
    """A policy loss as one would write it, with one expression open."""

    def loss_fn(data: list[Any], logprobs: list[torch.Tensor]) -> Any:
        terms = []
        for datum, lp in zip(data, logprobs):
            w, a, old = (column(datum, name) for name in ("weights", "advantages", "old_logprobs"))
            terms.append((w * surrogate(lp, old, a) if masked else surrogate(lp, old, a)).sum())
        return torch.stack(terms).sum(), {}

    return loss_fn


def ratio(lp: Any, old: Any) -> Any:
    return (lp - old).exp()


GOOD = plain(lambda lp, old, a: -ratio(lp, old) * a)


def test_a_good_function_is_ready() -> None:
    flight = preflight(GOOD, rl(ref_logprobs=None))
    assert flight.ok and "warning" not in [finding.level for finding in flight.findings]
    assert "its own" not in flight.numbers["denominators"]


@pytest.mark.parametrize(
    "loss_fn, finding",
    [
        (plain(lambda lp, old, a: ratio(lp, old) * a), "error: datum[0].gradient: pushes every token the wrong way"),
        (plain(lambda lp, old, a: -ratio(lp, old) * a.abs()), "warning: datum[1].gradient: pushes 2 tokens the wrong"),
        (plain(lambda lp, old, a: -torch.minimum(ratio(lp, old) * a, ratio(lp, old).clamp(0.2, 0.28) * a)),
         "error: datum[0].gradient: 0 at every token of datum 0, which should learn. Left out of the loss, or clipped"),
        (plain(lambda lp, old, a: -ratio(lp, old) * a * (torch.arange(len(a)) != 2)),
         "warning: datum[0].gradient: 0 at 2 tokens that should learn."),
        (plain(lambda lp, old, a: -ratio(lp, old) * a, masked=False),
         "error: datum[0].gradient: not 0 at masked tokens, in datums 0, 1."),
        (plain(lambda lp, old, a: -lp * a), "warning: old_logprobs: is there, but changes nothing"),
        (plain(lambda lp, old, a: -ratio(lp, old)), "warning: advantages: is there, but changes nothing"),
        (plain(lambda lp, old, a: (lp - old).sqrt() * a), "error: datum[0].gradient: not finite, in datums 0, 1."),
        (lambda data, lps: (GOOD(data, lps)[0], {"ratio:mean": 1.1}), "warning: metrics['ratio:mean']: 1.1 where all"),
        (lambda data, lps: (GOOD(data, lps)[0], {"x": math.nan}), "error: metrics['x']: is nan."),
        (lambda data, lps: (GOOD(data, lps)[0].item(), {}), "error: loss_fn: expected loss_fn to return (0-dim tensor"),
        (lambda data, lps: (lps[0].sum(), {}), "error: logprobs_list[1]: expected a gradient, got no gradient."),
        (lambda data, lps: 1 / 0, "error: loss_fn: ZeroDivisionError: division by zero"),
        (ppo, "error: clip: expected ratio bounds (low, high) with 0 <= low <= 1 <= high, got [Datum("),
        (None, "error: loss_fn: TypeError: 'NoneType' object is not callable"),
        (ppo().bind(align="truncate"), "error: align: expected a loss bound with align='strict'"),
    ],
)  # fmt: skip
def test_losses_with_something_wrong(loss_fn: Any, finding: str) -> None:
    flight = preflight(loss_fn, rl(ref_logprobs=None))
    assert any(str(found).startswith(finding) for found in flight.findings), str(flight)


def test_a_function_that_brings_its_own_advantages_is_given_the_benefit_of_the_doubt() -> None:
    advantages = [-1.0, 1.0]
    own = lambda data, lps: (-torch.stack([a * lp[1:].sum() for a, lp in zip(advantages, lps)]).sum(), {})  # noqa: E731
    flight = preflight(own, sft())
    assert flight.ok and "Unless it has advantages of its own" in message(flight, "gradient")


def preference(data: list[Any], logprobs: list[torch.Tensor], loss: Callable[[Any], Any]) -> Any:
    h = [(column(d, "weights") * (lp - column(d, "ref_logprobs"))).sum() for d, lp in zip(data, logprobs)]
    return loss(torch.stack(h[0::2]) - torch.stack(h[1::2])), {}


def test_preference_functions() -> None:
    right = lambda data, lps: preference(data, lps, lambda m: -F.logsigmoid(0.1 * m).mean())  # noqa: E731
    hinge = lambda data, lps: preference(data, lps, lambda m: (1 - m).clamp(min=0).mean())  # noqa: E731
    swapped = lambda data, lps: preference(data, lps, lambda m: -F.logsigmoid(-0.1 * m).mean())  # noqa: E731
    assert preflight(right, pairs(), pairs=True).numbers["step zero"]["expected"] == pytest.approx(math.log(2))
    assert levels(preflight(right, pairs(), pairs=True), "loss") == []
    assert "DPO has ln 2 a pair" in message(preflight(hinge, pairs(), pairs=True), "loss")
    assert "the wrong way" in message(preflight(swapped, pairs(), pairs=True), "gradient")
    assert "Say pairs=True" in message(preflight(right, pairs()), "gradient")
    assert "an odd number" in message(preflight(dpo(), pairs()[:3]), "data")


# The form


def test_errors_come_first_and_as_dict_is_json() -> None:
    flight = preflight(GOOD, rl((1.0, 0.5)))
    order = [("error", "warning", "note").index(finding.level) for finding in flight.findings]
    assert order == sorted(order)
    found = json.loads(json.dumps(flight.as_dict(), allow_nan=False))
    assert found["ok"] is True and found["step_zero"]["l1"] == flight.numbers["step zero"]["Σ|g|"]
    assert found["findings"][0] == {
        "level": "warning", "field": "advantages", "datum": None,
        "message": "none is negative: are these rewards? See group_advantages.",
    }  # fmt: skip


def test_the_table_begins_with_the_verdict() -> None:
    ready, not_ready = str(preflight(grpo(), rl())), str(preflight(grpo(), rl((0.0, 0.0))))
    assert ready.startswith("ready (0 errors, 0 warnings, 1 note)   grpo(")
    assert not_ready.startswith("NOT READY (1 error, 0 warnings, 2 notes)   grpo(")
    assert all(len(line) <= 110 for line in ready.splitlines()[1:] if not line.startswith(("note", "warning")))
