"""Malformed calls, by the thousand: each is answered by its value or by a named error, and changes nothing."""

import warnings

import pytest
from malformed import fingerprint, malformed_call, right_calls

import lossfns
from lossfns import LossInputError, LossWarning


def answer(seed: int) -> str:
    """Make the malformed call of a seed, and say what is wrong with its answer; "" if nothing is."""
    call = malformed_call(seed)
    before = fingerprint(call.arguments)
    problem = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", LossWarning)
            call.function(**call.arguments)
    except LossInputError as error:
        parts = (error.field, error.expected, error.got, error.fix)
        problem = "" if all(isinstance(part, str) and part for part in parts) else f"an error without a part: {parts}"
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error)[:200]}"
    if fingerprint(call.arguments) != before:
        problem += " and its arguments have changed"
    return problem and f"seed {seed}, {call.what}: {problem}"


def test_calls_that_nothing_was_done_to_are_right() -> None:
    """Else the malformed ones would all fail at the same first check. A few exports refuse their loss, by name."""
    refused = 0
    for call in right_calls():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LossWarning)
                call.function(**call.arguments)
        except LossInputError:
            refused += 1
    assert refused < 20


def test_malformed_calls_are_answered_by_named_errors_and_change_nothing() -> None:
    assert list(filter(None, map(answer, range(1_500)))) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("start", range(0, 20_000, 2_500))
def test_20_000_malformed_calls_are_answered_by_named_errors_and_change_nothing(start: int) -> None:
    assert list(filter(None, map(answer, range(start, start + 2_500)))) == []


def test_malformed_calls_reach_beyond_the_first_check() -> None:
    """They are refused at many places, for many reasons."""
    fields, kinds = set(), set()
    for seed in range(1_500):
        call = malformed_call(seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call.function(**call.arguments)
        except LossInputError as error:
            fields.add(error.field)
            kinds.add((error.field, error.expected))
    assert len(fields) > 60 and len(kinds) > 100


def test_a_wrong_python_signature_is_a_type_error() -> None:
    for call in (lambda: lossfns.ppo(nonsense=1), lambda: lossfns.ppo(1, 2, 3, 4, 5), lambda: lossfns.pack()):
        with pytest.raises(TypeError):
            call()  # type: ignore[no-untyped-call]
