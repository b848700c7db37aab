"""Golden vectors: the committed files are those that the tool writes; the library passes; flags, ids and the runner."""

import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lossfns
from lossfns import LossInputError
from lossfns.cli import main
from lossfns.testing.bugs import BUGS
from lossfns.testing.mutants import CLOSED_FORMS
from lossfns.testing.oracle import DATUM_WEIGHINGS, PAIR_WEIGHINGS, TOKEN_WEIGHINGS
from lossfns.testing.public import presets
from lossfns.testing.vectors import METHODS, Vector, load, mistake, run, subject_for
from lossfns.testing.vectors.flags import explains, wrong_answer
from lossfns.testing.vectors.library import reply_to
from lossfns.testing.vectors.runner import VectorReport, evaluate
from lossfns.testing.vectors.vector import ESTIMATORS, FOLDER, LEDGER, decode, encode, flatten
from lossfns.tokens import PAIRS, SEQUENCES
from tools.vectors.__main__ import main as tool
from tools.vectors.answers import correct_answer
from tools.vectors.cases import cases
from tools.vectors.write import (
    file_texts,
    fingerprint,
    identify,
    schema_violations,
    with_definitions,
    write,
)

ROOT = Path(__file__).parents[2]
NODE, DOCS = ROOT / "examples" / "vectors.mjs", ROOT / "docs" / "vectors.md"
VECTORS = load()
BY_TOKEN = {"reinforce_plus_plus_advantages", "optimal_token_advantages"}
"""The estimators of tokens, whose data would be rows."""
ANSWERED = [vector for vector in VECTORS if vector.error is None]
LOSSES = [vector for vector in ANSWERED if vector.loss not in ESTIMATORS]


def blocks() -> list[dict[str, Any]]:
    """Return the JSON examples of the documentation."""
    return [json.loads(text) for text in re.findall(r"```json\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)]


def each(x: Any, change: Callable[[float], float]) -> Any:
    """Apply a function to every number of a nested list."""
    return [each(part, change) for part in x] if isinstance(x, list) else change(x)


# The files


@pytest.mark.long
def test_the_tool_finds_the_files_in_order_and_has_nothing_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files are equal byte for byte, including ids and flags, so every flag is checked here.

    They follow the schema, too. Both actions compute the same texts, which takes most of their time.
    """
    assert main(["vectors", "export", str(tmp_path / "vendored")]) == 0
    ledgers: list[Any] = []
    texts: list[dict[str, str]] = []

    def computed_once(ledger: dict[str, str]) -> dict[str, str]:
        ledgers.append(dict(ledger))
        if not texts:
            texts.append(file_texts(ledger))
        return texts[0]

    monkeypatch.setattr("tools.vectors.write.file_texts", computed_once)
    assert tool(["check"]) == 0, capsys.readouterr().out
    assert tool(["write", "--out", str(tmp_path / "vendored")]) == 0
    assert capsys.readouterr().out.endswith("nothing to write: every file is up to date\n")
    assert len(ledgers) == 2 and ledgers[0] == ledgers[1]


@pytest.mark.exhaustive
def test_writing_twice_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "dpo", "kto", "top_k_jsd", "group_advantages")
    assert len(write(tmp_path)) == 4 + 1
    assert write(tmp_path) == []


def only(monkeypatch: pytest.MonkeyPatch, *losses: str) -> None:
    """Let the tool write the files of these methods alone."""
    some = [case for case in cases() if case.loss in losses]
    monkeypatch.setattr("tools.vectors.write.cases", lambda: some)


def test_what_breaks_the_schema_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.vectors.write.METHODS", ("dpo",))
    for name in ("dpo.json", "schema.json"):
        shutil.copy(FOLDER / name, tmp_path)
    path = tmp_path / "dpo.json"
    path.write_text(path.read_text().replace('"loss": 0.', '"los": 0.', 1))
    assert schema_violations(tmp_path)[0].startswith("dpo.json, $.groups[0].tests[0]")


def test_requests_and_replies_follow_the_schema() -> None:
    from jsonschema import Draft202012Validator

    schema = json.loads((FOLDER / "schema.json").read_text())
    for name, lines in (
        ("request", [vector.request for vector in VECTORS[::4]]),
        ("reply", [encode({"id": vector.id, **vector.answer}) for vector in VECTORS[1::4]]),
    ):
        validator = Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": schema["$defs"]})
        assert [error.message for line in lines for error in validator.iter_errors(line)] == []


def test_the_documented_examples_are_true() -> None:
    example, request, reply = blocks()
    vector = next(v for v in VECTORS if v.id == request["id"])
    assert request == vector.request
    assert mistake(vector, reply) == ""
    shown = dict(example["groups"][0]["tests"][0])
    kept = json.loads((FOLDER / "dpo.json").read_text())
    (test,) = (test for group in kept["groups"] for test in group["tests"] if test["id"] == vector.id)
    assert set(shown.pop("flags")) <= set(vector.flags)
    assert shown.items() <= test.items()
    assert {name: example[name] for name in ("schema", "suite", "loss", "generator")}.items() <= kept.items()


def test_the_documentation_names_every_code_setting_and_loss() -> None:
    words = DOCS.read_text(encoding="utf-8")
    codes = {v.error["code"] for v in VECTORS if v.error is not None}
    settings = {name for v in VECTORS if v.loss in CLOSED_FORMS for name in v.config}
    assert [name for name in codes | settings | set(METHODS) if f"`{name}`" not in words] == []


def test_the_page_defines_every_loss() -> None:
    page = DOCS.read_text(encoding="utf-8")
    assert with_definitions(page) == page, "python -m tools.vectors write"


def test_every_loss_of_the_library_has_vectors() -> None:
    assert set(METHODS) == {*presets(), *ESTIMATORS}
    assert set(ESTIMATORS) == {name for name in lossfns.__all__ if name.endswith("_advantages")} - BY_TOKEN


def test_they_are_many_and_small() -> None:
    assert len(VECTORS) >= 400
    assert sum(path.stat().st_size for path in FOLDER.glob("*.json")) < 4_000_000
    assert {vector.loss for vector in VECTORS} == set(METHODS)
    assert {vector.kind for vector in VECTORS} == {"valid", "edge", "kink", "must-reject"}


def test_every_comment_is_one_line_and_no_two_vectors_of_a_loss_share_one() -> None:
    shared = Counter((v.loss, v.comment, json.dumps(v.config, sort_keys=True)) for v in VECTORS)
    assert [key for key, count in shared.items() if count > 1] == []
    assert [v.id for v in VECTORS if "\n" in v.comment or len(v.comment) > 160] == []


def test_all_data_are_exact_in_float32() -> None:
    """An implementation in float32 reads the same numbers."""
    for vector in LOSSES:
        values = np.array(flatten([list(row.values()) for row in vector.data]), dtype=np.float64)
        single = values.astype(np.float32).astype(np.float64)
        assert np.array_equal(values, single, equal_nan=True), vector.id


def settings(loss: str, name: str) -> set[Any]:
    return {v.config.get(name) if not isinstance(v.config.get(name), list) else tuple(v.config[name])
            for v in load(loss) if v.error is None}  # fmt: skip


@pytest.mark.parametrize("loss", [m for m in METHODS if m not in ESTIMATORS])
def test_every_weighing_and_every_knob_appears(loss: str) -> None:
    """Each knob in at least two settings, and a bound denominator."""
    rows = presets()[loss]().rows
    weighings = {PAIRS: PAIR_WEIGHINGS, SEQUENCES: DATUM_WEIGHINGS}.get(rows, TOKEN_WEIGHINGS)
    assert {str(weigh).partition("(")[0] for weigh in settings(loss, "weigh")} == set(weighings)
    for name in load(loss)[0].config:
        assert len(settings(loss, name)) >= 2, name
    assert any(v.denominator is not None for v in load(loss) if v.error is None)
    if "tis_cap" in load(loss)[0].config:
        assert settings(loss, "tis_level") == {"token", "sequence", "geometric"}
        assert None in settings(loss, "log_ratio_cap")


def test_every_estimator_and_scale_appears() -> None:
    assert settings("grpo", "kl") == {"k1", "k2", "k3"}
    assert settings("group_advantages", "scale") == {"std", "none"}
    for name in ESTIMATORS:
        assert [setting for setting in load(name)[0].config if len(settings(name, setting)) < 2] == [], name


@pytest.mark.parametrize("factor", [1 - 2e-5, 1 + 2e-5])
def test_no_ratio_is_near_a_bound_but_at_a_kink(factor: float) -> None:
    """Slightly shifted bounds give the same gradient, so no answer depends on the rounding of float32."""
    for v in (v for v in LOSSES if v.kind != "kink" and "log_ratio_cap" in v.config):
        bounds = {name: v.config.get(name) for name in ("clip", "dual_clip", "log_ratio_cap")}
        moved = {name: each(x, lambda bound: bound * factor) for name, x in bounds.items() if x is not None}
        answer = correct_answer(v.loss, {**v.config, **moved}, v.data, v.denominator)
        gaps = [abs(x - y) for x, y in zip(flatten(answer["grad"]), flatten(v.grad))]
        assert max(gaps) <= 1e-3 * max(map(abs, flatten(v.grad))), v.id


# Ours


@pytest.mark.parametrize("loss", METHODS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_ours_meet_every_vector(loss: str, dtype: str) -> None:
    wrong_answer = {v.id: mistake(v, reply_to(v, dtype), dtype) for v in load(loss) if v.error is None}
    assert {name: words for name, words in wrong_answer.items() if words} == {}


def test_ours_refuse_what_must_be_refused() -> None:
    """The LossInputError names the field, and the datum if there is one."""
    for v in (v for v in VECTORS if v.error is not None):
        said = reply_to(v).get("error", {})
        assert (said.get("field"), said.get("datum")) == (v.error["field"], v.error.get("datum")), v.id


@pytest.mark.parametrize("loss", [m for m in METHODS if m not in ESTIMATORS])
@pytest.mark.filterwarnings("ignore::lossfns.LossWarning")
def test_the_batch_of_a_vector_carries_its_columns(loss: str) -> None:
    """The datums of the kit give the same answers."""
    for vector in [v for v in load(loss) if v.kind == "valid"][:12]:
        logprobs = vector.batch.tensors()
        value, _ = subject_for(vector)(vector.batch.data(), logprobs)
        value.backward()
        assert mistake(vector, {"loss": value.item(), "grad": [lp.grad.tolist() for lp in logprobs]}) == ""


def test_one_loss_is_loaded_by_name() -> None:
    assert {vector.loss for vector in load("gspo_token")} == {"gspo_token"}
    with pytest.raises(LossInputError, match=r"expected a loss that has vectors, got 'gspo-token'. Did you mean"):
        load("gspo-token")


def test_decode_and_encode_are_inverse() -> None:
    line = {"comment": "nan", "data": [{"logprobs": ["nan", -1.0, "-inf"], "group": "inf"}]}
    assert encode(decode(line)) == line
    assert np.isnan(decode(line)["data"][0]["logprobs"][0])


# What a mistake is


EXAMPLE = next(v for v in load("cross_entropy") if v.kind == "valid")
KINK = next(v for v in load("ppo") if v.kind == "kink" and "on-policy with a lower" in v.comment)


def reply(**changes: Any) -> dict[str, Any]:
    return {"loss": EXAMPLE.expected, "grad": EXAMPLE.grad} | changes


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (reply(loss=EXAMPLE.expected + 1e-6), "loss is "),
        (reply(loss="nan"), "loss is 'nan', not"),
        (reply(loss=None), "loss is missing"),
        (reply(loss=True), "loss is True"),
        (reply(grad=None), "grad is missing, not a list of 2"),
        (reply(grad=EXAMPLE.grad[:1]), "grad has 1 entries, not 2"),
        (reply(grad=[EXAMPLE.grad[0], [0.0]]), "grad[1] has 1 entries, not 2"),
        (reply(grad=[EXAMPLE.grad[0], [0.0, [1.0]]]), "grad[1][1] is [1.0]"),
        (reply(grad=[EXAMPLE.grad[0], [1e-9, EXAMPLE.grad[1][1]]]), "grad[1][0] is 1e-09, not 0: off by 1e-09"),
        (reply(metrics={"denominator": 2.0}), "denominator is 2, not 4"),
        ({"error": {"message": "no"}}, "refused: "),
    ],
)
def test_a_mistake_says_what_is_off_by_how_much(said: dict[str, Any], words: str) -> None:
    assert words in mistake(EXAMPLE, said)


def test_what_is_within_the_tolerance_is_no_mistake() -> None:
    assert mistake(EXAMPLE, reply(loss=EXAMPLE.expected + 1e-6), "float32") == ""
    assert mistake(EXAMPLE, reply(metrics={"tokens": 4, "mine": "x"})) == ""


def test_at_a_kink_both_sides_and_what_lies_between_are_right() -> None:
    ours, other = KINK.grad, KINK.grad_alternatives[0]
    half = [[(x + y) / 2 for x, y in zip(*rows)] for rows in zip(ours, other)]
    assert other != ours
    for grad in (ours, other, half):
        assert mistake(KINK, {"loss": KINK.expected, "grad": grad}) == ""
    beyond = [[2 * x - y for x, y in zip(*rows)] for rows in zip(ours, other)]
    assert "not between" in mistake(KINK, {"loss": KINK.expected, "grad": beyond})
    assert "grad has 0 entries" in mistake(KINK, {"loss": KINK.expected, "grad": []})


def test_a_value_where_an_error_must_be_is_a_mistake() -> None:
    vector = next(v for v in VECTORS if v.error and v.error["code"] == "odd_pairs")
    assert mistake(vector, {"error": "three"}) == ""
    assert mistake(vector, {"loss": 0.0, "grad": []}) == "accepted what must be refused (odd_pairs)"


# Flags


UNSEEN = {
    "not-the-contract",
    "inputs-mutated",
    "state-between-calls",
    "host-sync-per-datum",
    "branch-on-values",
    "no-grad-for-detach",
    "mask-by-token-id",
    "world-size-factor",
    "metric-not-mergeable",
    "metric-scaled-twice",
    "metric-counts-nonbinding",
    "metric-miscounts",
    "metric-not-a-float",
    "metric-sign",
    "metric-unmasked",
    "metric-wrong",
    "global-state-changed",
    "another-loss",
    # Settings and losses that no vector has
    "beta-misplaced",
    "class-weights-swapped",
    "entropy-constant",
    "entropy-sign",
    "factor-unbounded",
    "focal-factor",
    "label-ignored",
    "margin-clamped",
    "one-side-normalised",
    "reference-point-negative",
    "rejected-raised",
    "saturation-reversed",
    "smoothing-misapplied",
    "target-margin",
}
"""Bugs that one answer cannot show: of repeated calls, traces, metrics, token ids, ranks, claims, other losses."""


def test_every_bug_has_vectors() -> None:
    hunted = Counter(flag for vector in VECTORS for flag in vector.flags)
    assert set(hunted) == set(BUGS) - UNSEEN
    assert [flag for flag, count in hunted.items() if count < 2] == []


def test_every_vector_with_an_answer_hunts_something() -> None:
    assert [v.id for v in ANSWERED if not v.flags and v.kind != "kink"] == []


def row_edit(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Vector], Vector]:
    return lambda v: replace(v, data=[{**row, **change(row)} for row in v.data])


def config_edit(**settings: Any) -> Callable[[Vector], Vector]:
    return lambda v: replace(v, config={**v.config, **settings})


def divided_by(count: Callable[[Vector], float]) -> Callable[[Vector], Vector]:
    return lambda v: replace(v, denominator=count(v))


def alive(v: Vector) -> int:
    return sum(1 for row in v.data if any(flatten(row["weights"])))


SLIPS: dict[str, Callable[[Vector], Vector]] = {
    "advantage-inert": row_edit(lambda row: {"advantages": [1.0] * len(row["advantages"])}),
    "advantage-sign-lost": row_edit(lambda row: {"advantages": each(row["advantages"], abs)}),
    "old-logprobs-inert": row_edit(lambda row: {"old_logprobs": row["logprobs"]}),
    "ref-inert": row_edit(lambda row: {"ref_logprobs": row["logprobs"]}),
    "weights-binarised": row_edit(lambda row: {"weights": each(row["weights"], lambda w: float(w != 0))}),
    "clip-inert": config_edit(clip=[0.0, 1e30]),
    "k1-in-loss": config_edit(kl="k1"),
    "kl-detached": config_edit(kl_beta=0.0),
    "tis-inert": config_edit(tis_cap=None),
    "tis-uncapped": config_edit(tis_cap=1e30),
    "tis-inverted": lambda v: replace(v, data=[{**row, "sampler_logprobs": mirrored(row)} for row in v.data]),
    "epsilon-in-denominator": divided_by(lambda v: v.metrics["denominator"] + 1),
    "pairs-miscounted": divided_by(lambda v: v.metrics["denominator"] * 2),
    "empty-sequence-counted": divided_by(lambda v: v.metrics["denominator"] / alive(v) * len(v.data)),
    "groups-ignored": row_edit(lambda row: {"group": "all"}),
    "frame-shift": row_edit(lambda row: shifted(row)),
}
"""Changes of the inputs of the torch losses that have the effect of a bug, independent of the oracle's variants."""


def mirrored(row: dict[str, Any]) -> list[float]:
    """Mirror the sampler logprobs at the old ones."""
    return [min(2 * old - sampler, 0.0) for old, sampler in zip(row["old_logprobs"], row["sampler_logprobs"])]


def shifted(row: dict[str, Any]) -> dict[str, Any]:
    name = next(n for n in ("old_logprobs", "ref_logprobs", "advantages", "weights") if n in row)
    return {name: row[name][-1:] + row[name][:-1]}


@pytest.mark.parametrize("flag", SLIPS)
def test_a_flag_tells_a_loss_with_this_bug_from_a_right_one(flag: str) -> None:
    hunting = [v for v in ANSWERED if flag in v.flags]
    blind = [v.id for v in hunting if not mistake(v, reply_to(SLIPS[flag](v)), "float32")]
    assert hunting
    assert blind == []


def test_a_reply_that_is_a_wrong_answer_names_its_bug() -> None:
    vector = next(v for v in VECTORS if "kl-sign" in v.flags)
    assert explains("kl-sign", vector, wrong_answer("kl-sign", vector), "float64")
    assert not explains("kl-detached", vector, wrong_answer("kl-sign", vector), "float64")
    assert not explains("kl-sign", vector, vector.answer, "float64")


# Ids


def test_every_id_stands_for_what_the_ledger_says() -> None:
    """Inputs that were edited in a file under their old id fail here; edits of the cases get a new id."""
    book = json.loads((FOLDER / LEDGER).read_text())
    seen = []
    for loss in METHODS:
        parsed = json.loads((FOLDER / f"{loss}.json").read_text())
        for group in parsed["groups"]:
            for test in group["tests"]:
                seen.append(test["id"])
                assert book["ids"][test["id"]] == fingerprint(loss, group["config"], test), test["id"]
    assert len(set(seen)) == len(seen)
    assert set(book["ids"]) == set(seen) | set(book["withdrawn"])
    assert not set(seen) & set(book["withdrawn"])
    assert len(set(book["ids"].values())) == len(book["ids"])


def test_an_id_is_never_given_twice() -> None:
    ledger = {"dpo-0001": "aaa", "dpo-0002": "bbb", "ppo-0001": "ccc"}
    names = identify("dpo", ["bbb", "ddd", "aaa", "eee"], ledger)
    assert [names[p] for p in ("aaa", "bbb", "ddd", "eee")] == ["dpo-0001", "dpo-0002", "dpo-0003", "dpo-0004"]
    assert ledger["dpo-0003"] == "ddd"
    assert identify("dpo", ["fff"], ledger)["fff"] == "dpo-0005"


def test_a_vector_that_is_gone_is_withdrawn_and_its_id_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "dpo")
    ledger = {"dpo-0001": "no longer asked"}
    book = json.loads(file_texts(ledger)[LEDGER])
    assert book["withdrawn"] == ["dpo-0001"]
    assert book["ids"]["dpo-0002"] != "no longer asked"


# The runner, on the Node example


def node(tmp_path: Path, constant: str = "", value: str = "") -> str:
    """Return the command of the example, with one constant changed."""
    if shutil.which("node") is None and not os.environ.get("LOSSFNS_WITHOUT_NODE"):
        pytest.fail("node is not installed; set LOSSFNS_WITHOUT_NODE=1 to skip the tests that need it")
    if shutil.which("node") is None:
        pytest.skip("LOSSFNS_WITHOUT_NODE is set, and node is not installed")
    if not constant:
        return f"node '{NODE}'"
    text, count = re.subn(rf"^const {constant} = \S+", f"const {constant} = {value}", NODE.read_text(), flags=re.M)
    assert count == 1
    path = tmp_path / "changed.mjs"
    path.write_text(text)
    return f"node '{path}'"


def test_the_example_passes(tmp_path: Path) -> None:
    report = run(node(tmp_path))
    assert report.ok, report.table()
    known = [v for v in VECTORS if v.loss in CLOSED_FORMS]
    assert (report.count("pass"), report.count("skip")) == (len(known), len(VECTORS) - len(known))
    assert report.complaint == ""
    for page in (ROOT / "README.md", DOCS):
        assert f"ts {len(known)} vectors pass, and the rest are skipped" in page.read_text(encoding="utf-8")


def test_the_example_is_short() -> None:
    assert len(NODE.read_text().splitlines()) <= 262


@pytest.mark.parametrize(
    ("constant", "value", "loss", "flag"),
    [
        ("RATIO_SIGN", "-1", "ppo", "ratio-inverted"),
        ("KL_SIGN", "-1", "grpo", "kl-sign"),
        ("DDOF", "0", "group_advantages", "std-over-n"),
        ("ONE", "1.0001", "orpo", "log-odds-biased"),
        ("CHOSEN", "1", "dpo", "sides-swapped"),
        ("DENOMINATOR_EPS", "1", "cross_entropy", "epsilon-in-denominator"),
        ("EMPTY_COUNTS", "1", "gspo", "empty-sequence-counted"),
    ],
)
def test_a_changed_constant_fails_and_names_its_bug(
    tmp_path: Path, constant: str, value: str, loss: str, flag: str
) -> None:
    report = run(node(tmp_path, constant, value), loss=loss)
    first = report.likely()[0]
    assert not report.ok
    assert (first.flag, first.failed, first.explained) == (flag, first.vectors, first.vectors)
    assert f"  {flag}: {BUGS[flag].description}" in report.table()


def test_bounds_that_are_not_checked_are_no_sign_of_epsilons() -> None:
    """Bounds (0.2, 0.28) must be refused. Read as epsilons they are (0.8, 1.28), and no ratio e^−¹⁄₁₆ or e^⅛ is cut.

    The gradients are then ∓r / 4, and the values cancel. With the bounds as they are, good tokens have the value 0.28.
    """
    refused = next(v for v in load("ppo") if [*v.flags] == ["clip-as-epsilon"] and v.error)
    assert refused.config["clip"] == [0.2, 0.28]
    low, high = math.exp(-1 / 16) / 4, math.exp(1 / 8) / 4
    as_epsilons = {"loss": 0.0, "grad": [[0.0, -low, -high], [high, low]]}
    as_bounds = {"loss": (2 * high + 2 * low - 0.28) / 2, "grad": [[0.0, 0.0, 0.0], [high, low]]}
    results = [evaluate(refused, reply, "float64", ()) for reply in (as_epsilons, as_bounds)]
    assert [(r.verdict, r.explained) for r in results] == [("fail", ("clip-as-epsilon",)), ("fail", ())]
    odd = next(v for v in load("dpo") if "odd-datum-dropped" in v.flags)
    assert evaluate(odd, as_bounds, "float64", ()).explained == ("odd-datum-dropped",)


# The runner, on programs that do not play along


def program(tmp_path: Path, text: str) -> str:
    path = tmp_path / "program.py"
    path.write_text("import json, sys, time\n" + text)
    return f"'{sys.executable}' -S '{path}'"


def only_failures(report: VectorReport, count: int = len(load("dpo"))) -> str:
    assert report.count("fail") == count
    return report.complaint


def test_a_program_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    said = only_failures(run(program(tmp_path, "sys.exit('no licence')"), loss="dpo"))
    assert said == "it ended with exit status 1\n  no licence"


def test_a_program_that_writes_garbage_is_quoted(tmp_path: Path) -> None:
    said = only_failures(
        run(program(tmp_path, "print('hello'); print('[1, 2]'); print('{\"id\": \"x\"}')"), loss="dpo")
    )
    assert said == "it wrote a line that is no reply to any open request: 'hello'"


def test_a_program_that_never_stops_writing_garbage_is_stopped(tmp_path: Path) -> None:
    said = only_failures(run(program(tmp_path, "while True: print('y' * 1000)"), loss="dpo"))
    assert said.startswith("1000 lines were no reply; it wrote a line that is no reply to any open request: 'yyy")


def test_an_answer_that_is_repeated_for_ever_is_no_progress(tmp_path: Path) -> None:
    text = "while True: print(json.dumps({'id': 'dpo-0001', 'error': 'no'}))"
    report = run(program(tmp_path, text), loss="dpo")
    assert report.complaint.startswith("1000 lines were no reply")
    assert report.results[0].wrong == "refused: no"


def test_a_program_that_hangs_is_given_up_on(tmp_path: Path) -> None:
    said = only_failures(run(program(tmp_path, "time.sleep(60)"), loss="dpo", timeout=0.3))
    assert said == "it gave no reply for 0.3 s"


def test_a_program_that_reads_everything_first_does_not_block(tmp_path: Path) -> None:
    """Requests and replies exceed the size of the pipes."""
    echo = "for line in sys.stdin.readlines(): print(json.dumps({'id': json.loads(line)['id'], 'error': 'x' * 4000}))"
    report = run(program(tmp_path, echo))
    assert report.count("pass") == len(VECTORS) - len(ANSWERED)
    assert report.complaint == ""


def test_replies_may_come_in_any_order(tmp_path: Path) -> None:
    answers = {v.id: encode({"id": v.id, **v.answer}) for v in load("orpo")}
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    text = f"answers = json.load(open({str(tmp_path / 'answers.json')!r}))\n"
    text += "for line in reversed(sys.stdin.readlines()): print(json.dumps(answers[json.loads(line)['id']]))"
    assert run(program(tmp_path, text), loss="orpo").ok


def test_a_command_that_cannot_start_is_refused() -> None:
    for command in ("/no/such/program", "", "'"):
        with pytest.raises(LossInputError, match="--cmd: expected a command that starts"):
            run(command)


# The command line


def test_run_reports_as_json_and_honours_xfail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse_all = "for line in sys.stdin: print(json.dumps({'id': json.loads(line)['id'], 'error': 'no'}), flush=True)"
    command, expected, out = program(tmp_path, refuse_all), tmp_path / "xfail.txt", tmp_path / "report.json"
    assert main(["vectors", "run", "--cmd", command, "--loss", "dpo", "--json", str(out)]) == 1
    report = json.loads(out.read_text())
    assert report["counts"]["fail"] == len(report["failures"]) == sum(v.loss == "dpo" for v in ANSWERED)
    assert report["failures"][0] == {
        "id": "dpo-0001",
        "kind": "valid",
        "comment": load("dpo")[0].comment,
        "flags": list(load("dpo")[0].flags),
        "wrong": "refused: no",
    }
    table = capsys.readouterr().out
    assert "dpo-0001 (valid) one pair of unequal lengths behind masked prompts\n    refused: no\n" in table
    assert "--json FILE has all" in table
    expected.write_text("dpo-*  # not written yet\n\n# nothing else\n")
    assert main(["vectors", "run", "--cmd", command, "--loss", "dpo", "--xfail", str(expected)]) == 0
    assert "xfail" in capsys.readouterr().out


def test_a_command_or_a_file_that_is_not_there_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["vectors", "run", "--cmd", "/no/such/program"]) == 2
    assert main(["vectors", "run", "--cmd", "true", "--xfail", str(tmp_path / "none")]) == 2
    assert main(["vectors", "run", "--cmd", "true", "--loss", "dro", "--json", str(tmp_path / "none" / "x")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 3


def test_export_copies_every_file(tmp_path: Path) -> None:
    assert main(["vectors", "export", str(tmp_path / "vendored")]) == 0
    assert {p.name for p in FOLDER.glob("*.json")} == {p.name for p in (tmp_path / "vendored").iterdir()}
