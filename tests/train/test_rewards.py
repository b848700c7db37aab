"""Rewards of ``--reward``: what counts as right, and what is refused with the sample that did it."""

import json
import re
import signal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from lossfns import LossInputError
from lossfns.train import rewards
from lossfns.train.examples import Problem
from lossfns.train.rewards import check_reward, default_reward, last_number, reward_of


def problem(answer: Any) -> Problem:
    return Problem([1], answer)


NUMBERS: dict[str, Fraction | int | None] = {
    "": None,
    "no number": None,
    "72": 72,
    "72.": 72,
    "The total is 72 km.": 72,
    "72km": 72,
    "50%": 50,
    "$1,234.50.": Fraction(12345, 10),
    "€ 5": 5,
    "-$6": -6,
    "$-6": -6,
    "−3": -3,
    "x = -0.50": Fraction(-1, 2),
    ".5": Fraction(1, 2),
    "5-3": 3,
    "(5)-3": 3,
    "5 - 3": 3,
    "5-3=2": 2,
    "1,234,567": 1234567,
    "1, 2": 2,
    "1,2345": 2345,
    "12,345 and 6,78": 78,
    "1.5e3": 1500,
    "2E-2 m": Fraction(1, 50),
    "3/4": Fraction(3, 4),
    "-3/4 cups": Fraction(-3, 4),
    "3/0": None,
    "8 m^2": 8,
    "8 m2": 8,
    "3 of x1": 3,
    "10:30": 30,
    "3 + 4 = <<3+4=7>>7\n#### 7\n": 7,
    "#### 1,024\nor 8?": 8,
    "12 #### none": None,
    "9" * 401: None,
    "9" * 399: int("9" * 399),
    "1e9999": 10**9999,
    "1e10000": None,
    "1/2/2024": 2024,
    "5 or 1/\u0660": None,
}
"""Text → its last number; none if it is longer than 400 characters or its exponent than 4."""


def test_the_last_number_of_a_text_is_read_exactly() -> None:
    found = {text: last_number(text) for text in NUMBERS}
    assert {text: x for text, x in found.items() if x != NUMBERS[text]} == {}


CASES = [
    ("exact", "4", {"4": 1, " 4\n": 1, "4.": 0, "44": 0, "": 0}),
    ("exact", " 4 ", {"4": 1}),
    ("number", "1,200 m", {"It is 1200.0 km": 1, "1,200 of 1,201": 0, "": 0, "twelve hundred": 0}),
    ("number", "2 + 2 = 4\n#### 4", {"#### 4": 1, "4": 1, "4 or 5": 0}),
    (r"regex:^<a>\d+</a>$", None, {"<a>12</a>": 1, "<a>x</a>": 0, "x <a>1</a>": 0}),
    ("regex:a:b", None, {"xa:by": 1, "ab": 0}),
]


def test_rewards_are_one_for_what_is_right_and_zero_for_all_else() -> None:
    for spec, answer, samples in CASES:
        reward = reward_of(spec)
        for text, expected in samples.items():
            assert reward(problem(answer), text) == expected, (spec, answer, text)


def test_a_schema_asks_for_json_that_is_whole_and_fits(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0}}, "required": ["n"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    reward = reward_of(f"json-schema:{tmp_path / 'schema.json'}")
    right = ['{"n": 3}', ' {"n": 0, "m": NULL}\n'.replace("NULL", "null")]
    wrong = ['{"n": -1}', "{}", "[]", "", "n", '{"n": 3', '{"n": 3} yes', "```json\n{}\n```", '{"n": NaN}', "[" * 9999]
    wrong += ['{"n": ' + "9" * 5000 + "}"]  # more digits than Python converts
    assert [reward(problem(None), text) for text in right + wrong] == [1.0] * len(right) + [0.0] * len(wrong)
    bad = {"no JSON": "{", "no schema": '{"type": "nothing"}', "a number": "3", "no draft": '{"$schema": 5}'}
    for name, content in bad.items():
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(LossInputError, match="--reward: expected a file with a JSON schema"):
            reward_of(f"json-schema:{tmp_path / 'bad.json'}")
            pytest.fail(name)


def test_a_sample_with_a_number_that_is_too_large_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"multipleOf": 0.5}')
    reward = reward_of(f"json-schema:{tmp_path / 'schema.json'}")
    assert [reward(problem(None), text) for text in ("1.5", "1.3", "1e400")] == [1, 0, 0]


ELSEWHERE = "a schema with references within itself, got .* with a reference to "
CIRCLE = "a schema whose check of a value ends, got .* with a circle of references to "
REFERENCES = {
    '{"$ref": "http://127.0.0.1:9/schema.json"}': f"{ELSEWHERE}'http://127.0.0.1:9/schema.json'",
    '{"properties": {"a": {"items": {"$ref": "other.json"}}}}': f"{ELSEWHERE}'other.json'",
    '{"$ref": "#/$defs/none"}': f"{ELSEWHERE}'/\\$defs/none'",
    '{"$ref": "#"}': f"{CIRCLE}'#'",
    '{"$schema": "http://json-schema.org/draft-07/schema#", "not": {"$ref": "#"}}': f"{CIRCLE}'#'",
    '{"$schema": "http://json-schema.org/draft-07/schema#", "dependencies": {"a": {"$ref": "#"}, "b": ["a"]}}':
        f"{CIRCLE}'#'",
    '{"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [true, {"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}}':
        f"{CIRCLE}'#/\\$defs/.', '#/\\$defs/.'",
}  # fmt: skip
TREE = '{"type": "object", "properties": {"a": {"$ref": "#"}, "$ref": {"const": {"$ref": "none"}}}}'


def test_references_of_a_schema_stay_in_it_and_end(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    for schema, says in REFERENCES.items():
        file.write_text(schema)
        with pytest.raises(LossInputError, match=says):
            reward_of(f"json-schema:{file}")
    file.write_text(TREE)
    samples = ('{"a": {"a": {}}}', '{"a": {"a": 1}}')
    assert [reward_of(f"json-schema:{file}")(problem(None), text) for text in samples] == [1, 0]
    file.write_text('{"$schema": "http://json-schema.org/draft-07/schema#", "dependencies": {"a": ["b"], "b": true}}')
    assert [reward_of(f"json-schema:{file}")(problem(None), text) for text in ('{"a": 1}', '{"b": 1}')] == [0, 1]
    file.write_text('{"$ref": "https://json-schema.org/draft/2020-12/schema"}')  # a draft, which the package has
    assert [reward_of(f"json-schema:{file}")(problem(None), text) for text in ("{}", '{"type": 3}')] == [1, 0]


def test_a_pattern_that_takes_too_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one in a schema. Each would take hours."""
    monkeypatch.setattr(rewards, "TIME_LIMIT", 0.05)
    (tmp_path / "schema.json").write_text('{"pattern": "^(a+)+$"}')
    text = "a" * 40 + "!"
    for spec, sample in {"regex:^(a+)+$": text, f"json-schema:{tmp_path}/schema.json": f'"{text}"'}.items():
        says = (
            f"--reward {spec}: expected at most 0.05 s for each sample, got more for a text of {len(sample)} characters"
        )
        with pytest.raises(LossInputError, match=re.escape(says)):
            reward_of(spec)(problem(None), sample)
        assert reward_of(spec)(problem(None), sample.replace("!", "")) == 1
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


FUNCTIONS = """
import numpy, torch
def length(problem, text): return len(text) / 10
def right(problem, text): return text == problem.answer
def tensor(problem, text): return torch.tensor(0.5)
def array(problem, text): return numpy.float32(0.25)
def nothing(problem, text): pass
def nan(problem, text): return float("nan")
def large(problem, text): return 10**400
def words(problem, text): return "1.0"
def fails(problem, text): return 1 / 0
def leaves(problem, text): raise SystemExit(3)
def one(text): return 1.0
async def later(problem, text): return 1.0
class Later:
    async def __call__(self, problem, text): return 1.0
object_of_later = Later()
def returns_later(problem, text): return later(problem, text)
def changes(problem, text):
    problem.prompt.append(2)
    problem.fields["a"].append(3)
    problem.fields["b"] = 4
    return 1.0
four = 4
"""


def test_a_reward_may_be_any_function(tmp_path: Path) -> None:
    file = tmp_path / "own_rewards.py"
    file.write_text(FUNCTIONS)
    for name, expected in {"length": 0.4, "right": 1.0, "tensor": 0.5, "array": 0.25}.items():
        value = reward_of(f"{file}:{name}")(problem("four"), "four")
        assert (type(value), value) == (float, expected), name
    assert reward_of("own_rewards:length")(problem(None), "") == 0.0  # the folder is on the path by now
    says = {
        "nothing": "got None for the sample",
        "nan": "got nan",
        "large": "got 1000",
        "words": "got '1.0'",
        "fails": rf"got ZeroDivisionError: division by zero \({file}:11\) for",
        "returns_later": "got <coroutine object later",
        "leaves": rf"got SystemExit: 3 \({file}:12\)",
    }
    with pytest.raises(LossInputError, match=r"one\(text\)\. It must take \(problem, text\)"):
        reward_of(f"{file}:one")
    for name in ("later", "object_of_later"):
        with pytest.raises(LossInputError, match=f"{name}, an async function. It is not awaited"):
            reward_of(f"{file}:{name}")
    whole = Problem([1], None, {"a": [1]})
    assert reward_of(f"{file}:changes")(whole, "") == 1.0 and whole == Problem([1], None, {"a": [1]})
    for name, text in says.items():
        reward = reward_of(f"{file}:{name}")
        with pytest.raises(LossInputError, match=f"{name}: expected a finite number for each sample, {text}") as error:
            reward(problem("right"), "fo\nur")
        assert "'fo\\nur' to a problem with the answer 'right'" in str(error.value), name
        assert ("Return 0.0 for a bad sample" in str(error.value)) == (name not in ("fails", "leaves")), name


def test_a_reward_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    (tmp_path / "some_rewards.py").write_text(FUNCTIONS)
    for spec, says in {
        "exakt": "expected exact, number, regex:PATTERN, json-schema:FILE, module:function or file.py:function",
        "regex:": "expected exact, number",
        "regex:(": "expected a regular expression, got '\\('",
        f"json-schema:{tmp_path}/none.json": "expected a file with a JSON schema",
        "no_such_module:f": "expected that no_such_module can be imported",
        f"{tmp_path}/some_rewards.py:lenght": "expected a name in .*Did you mean 'length'",
        f"{tmp_path}/some_rewards.py:four": r"expected a function \(problem, text\)",
    }.items():
        with pytest.raises(LossInputError, match=f"--reward: {says}"):
            reward_of(spec)


def test_answers_that_a_reward_cannot_use_are_found_before_training() -> None:
    with pytest.raises(LossInputError, match=r"--reward number: expected a number in each answer, got 'none'"):
        check_reward("number", [problem("1"), problem("none")])
    with pytest.raises(
        LossInputError, match=r"--reward exact: .*rows that have no answer. Pass a --reward that needs none: regex"
    ):
        check_reward("exact", [problem(None)])
    assert check_reward("number", [problem("1")])(problem("1"), "1.0") == 1.0


def test_the_data_tell_the_default_reward() -> None:
    """One row with ``####`` is enough, in any place: the rows without a number are then refused."""
    plain = Problem([1], "4", {"answer": "4"})
    gsm8k = Problem([1], "72", {"question": "?", "answer": "6*12=72\n#### 72"})
    assert default_reward([problem("4")]) == default_reward([plain]) == "exact"
    assert default_reward([gsm8k]) == default_reward([plain, gsm8k]) == default_reward([gsm8k, plain]) == "number"
