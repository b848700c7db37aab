"""preflight looks inside preference pairs: it names their mistakes, and accuses no correct pairs."""

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from lossfns import Datum, Loss, datum_from_tokens, dpo, orpo
from lossfns.inspect import Finding, Preflight, preflight
from lossfns.preset import make_loss, preset
from lossfns.segments import sequence_value, weighted_sum
from lossfns.tokens import Rows
from lossfns.weigh import datum_mean

EOS = 2
Texts = list[tuple[list[int], list[float]]]
"""The tokens of each datum, and the weights of its targets."""


def text(prompt: list[int], answer: list[int], masked: int | None = None) -> tuple[list[int], list[float]]:
    """Return the tokens of a conversation and the weights of its targets; ``masked`` is the length of the prompt."""
    tokens = [*prompt, *answer]
    n = len(prompt) if masked is None else masked
    return tokens, [float(j + 1 >= n) for j in range(len(tokens) - 1)]


def answers(rng: Random, size: int = 6) -> list[int]:
    return [*rng.choices(range(100, 200), k=rng.randint(2, size)), EOS]


def prompts(rng: Random, count: int) -> list[list[int]]:
    """Return different prompts that begin and end with the template."""
    return [[1, 3, 4, *rng.choices(range(10, 90), k=rng.randint(4, 9)), 5, 6] for _ in range(count)]


def pairs(seed: int = 0, count: int = 4) -> Texts:
    rng = Random(seed)
    return [text(prompt, answers(rng)) for prompt in prompts(rng, count) for _ in range(2)]


def reference(tokens: list[int]) -> list[float]:
    """Return logprobs that depend on the tokens up to the target, as those of a model do."""
    rows = []
    for j in range(1, len(tokens)):
        rows.append(-0.05 - 4 * Random(str(tokens[: j + 1])).random() ** 2)
    return rows


def data_of(texts: Texts, ref: list[list[float]] | None = None) -> list[Datum]:
    rows = [reference(tokens) for tokens, _ in texts] if ref is None else ref
    return [datum_from_tokens(tokens, [0.0, *weights], ref_logprobs=row) for (tokens, weights), row in zip(texts, rows)]


def fly(texts: Texts, loss: Loss | None = None, **options: Any) -> Preflight:
    return preflight(dpo() if loss is None else loss, data_of(texts), **options)


def accusations(flight: Preflight) -> list[Finding]:
    return [finding for finding in flight.findings if finding.level != "note"]


def only(flight: Preflight) -> Finding:
    """Return the only accusation. It names the datum and the token, and the batch is not ready."""
    [finding] = accusations(flight)
    assert finding.datum is not None and ("[" in finding.field or finding.field == "ref_logprobs")
    assert flight.verdict != "ready" and not str(flight).startswith("ready")
    assert flight.ok == (finding.level != "error")
    return finding


# The faults


def one_side_unmasked(texts: Texts) -> Texts:
    tokens, weights = texts[3]
    return [*texts[:3], (tokens, [1.0] * len(weights)), *texts[4:]]


def test_a_prompt_masked_on_one_side_only_is_an_error() -> None:
    texts = pairs()
    found = only(fly(one_side_unmasked(texts)))
    assert str(found).startswith("error: datum[3].weights[0]: trained here, but masked in datum[2], although both")
    prompt = sum(weight == 0 for weight in texts[2][1])
    assert f"{prompt} of these count on one side only. Mask the prompt alike on both sides." in found.message


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_prompt_masked_differently_on_the_sides_is_an_error(cut: int) -> None:
    """One side masks some tokens of the prompt too few."""
    texts = pairs()
    tokens, weights = texts[4]
    first = weights.index(1.0) - cut
    texts[4] = (tokens, [float(j >= first) for j in range(len(weights))])
    found = only(fly(texts))
    assert (found.level, found.datum, found.field) == ("error", 4, f"weights[{first}]")


def test_a_mask_that_ends_too_late_on_one_side_is_doubtful() -> None:
    """The answers have their first token in common. It might be a turn of the prompt, so it is a suspicion."""
    prompt, start = [1, 20, 21, 22], [7]
    texts = [text(prompt, [*start, 8, 9, EOS], masked=6), text(prompt, [*start, 18, EOS])]
    found = only(fly(texts))
    assert (found.level, found.datum, found.field) == ("warning", 1, "weights[3]")


def test_a_mask_that_is_inverted_on_one_side_is_an_error() -> None:
    texts = pairs()
    tokens, weights = texts[0]
    texts[0] = (tokens, [1 - w for w in weights])
    assert ("error", 0, "weights[0]") in [(f.level, f.datum, f.field) for f in accusations(fly(texts))]


def test_a_shared_token_with_two_weights_is_doubtful_and_sides_normalised_by_length_are_not() -> None:
    prompt = [1, 20, 21]
    texts = [text(prompt, [7, 8, EOS]), text(prompt, [7, 9, 9, EOS])]
    by_length = [(tokens, [w / sum(weights) for w in weights]) for tokens, weights in texts]
    assert accusations(fly(by_length)) == []
    tokens, weights = texts[1]
    found = only(fly([texts[0], (tokens, [*weights[:2], 0.5, *weights[3:]])]))
    assert str(found).startswith("warning: datum[1].weights[2]: 0.5 here and 1 in datum[0]")


@pytest.mark.parametrize("loss", [dpo(), orpo()])
def test_prompts_that_are_trained_on_both_sides_are_doubtful(loss: Loss) -> None:
    texts = [(tokens, [1.0] * len(weights)) for tokens, weights in pairs()]
    found = only(fly(texts, loss))
    assert str(found).startswith("warning: datum[0].weights[0]: the first ") and "is the prompt not masked?" in str(
        found
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "shift",
    [
        lambda texts: texts[1:-1],
        lambda texts: [*texts[1:], texts[0]],
        lambda texts: [texts[-1], *texts[:-1]],
        lambda texts: [texts[0], *texts],
        lambda texts: [*texts[:4], *texts[5:]],
    ],
)
def test_pairs_shifted_by_one_are_an_error(shift: Callable[[Texts], Texts], seed: int) -> None:
    right = pairs(seed, 6)
    texts = shift(right)
    flight = fly(texts[: len(texts) // 2 * 2])
    found = accusations(flight)[-1]  # the doubled datum is a pair of identical sides, too
    doubled = texts[:1] == texts[1:2]
    assert len(accusations(flight)) == 1 + doubled and not flight.ok
    assert found.level == "error" and "shifted by one datum" in found.message
    assert found.datum == (3 if doubled else 5 if texts[:4] == right[:4] else 1)


def test_the_finding_of_a_shift_names_the_token_and_the_true_partner() -> None:
    texts = pairs(1, 4)[1:-1]
    found = only(fly(texts))
    a, b = texts[0][0], texts[1][0]
    first = next(j for j, (x, y) in enumerate(zip(a, b)) if x != y)
    assert (found.datum, found.field) == (1, f"target_tokens[{first - 1}]")
    assert "datum[1] has the prompt of datum[2]. 3 of 3 pairs seem shifted" in found.message


def test_two_pairs_shifted_by_one_are_doubtful() -> None:
    """Two prompts that are exchanged between the sides could be a comparison of both orders."""
    texts = pairs(0, 2)
    assert only(fly([*texts[1:], texts[0]])).level == "warning"
    assert only(fly(pairs(0, 3)[1:-1])).level == "warning"


def test_a_shift_is_seen_without_masks() -> None:
    texts = [(tokens, [1.0] * len(weights)) for tokens, weights in pairs(3, 5)[1:-1]]
    assert "shifted by one datum" in only(fly(texts)).message


def test_sides_that_are_identical_are_an_error() -> None:
    texts = pairs()
    texts[5] = texts[4]
    found = only(fly(texts))
    assert (found.level, found.datum) == ("error", 5)
    assert found.message.startswith("the tokens are those of datum[4] up to the last trained one, target ")


def test_sides_that_differ_in_masked_padding_only_are_identical() -> None:
    tokens, weights = text([1, 20, 21], [7, 8, EOS])
    padded = ([*tokens, 0, 0], [*weights, 0.0, 0.0])
    assert only(fly([(tokens, weights), padded])).level == "error"


@pytest.mark.parametrize(("count", "level"), [(2, "warning"), (3, "error"), (4, "error"), (7, "error")])
def test_halves_instead_of_interleaved_sides(count: int, level: str) -> None:
    texts = pairs(count, count)
    found = only(fly([*texts[::2], *texts[1::2]]))
    assert found.level == level and f"datums i and i + {count} have one prompt each" in found.message


def test_sides_in_any_other_order_are_doubtful() -> None:
    texts = pairs(0, 6)
    order = [0, 5, 8, 3, 10, 1, 4, 11, 2, 7, 6, 9]
    found = only(fly([texts[i] for i in order]))
    assert found.level == "warning" and "was the order changed?" in found.message
    assert found.datum == 1 and "that of datum[6]" in found.message


def test_one_pair_among_others_whose_prompts_differ_is_noted() -> None:
    texts = pairs(0, 4)
    texts[3] = text([1, 60, 61, 62], [7, EOS])
    flight = fly(texts)
    assert accusations(flight) == []
    assert "so it is in 1 of 4 pairs" in next(f.message for f in flight.findings if f.datum == 3)


def test_a_side_without_trained_tokens_is_an_error() -> None:
    texts = pairs()
    texts[1] = (texts[1][0], [0.0] * len(texts[1][1]))
    [found] = accusations(fly(texts))
    assert str(found).startswith("error: datum[1].weights: one side of a pair has no active token: datum 1.")


# References


def long_pairs(seed: int = 0, count: int = 4, same_length: bool = False) -> Texts:
    rng = Random(seed)
    return [
        text(prompt, [*rng.choices(range(100, 200), k=12 if same_length else rng.randint(9, 14)), EOS])
        for prompt in prompts(rng, count)
        for _ in range(2)
    ]


def test_reference_rows_exchanged_between_sides_of_different_lengths_are_an_error() -> None:
    texts = [text([1, 20], [7, 8, EOS]), text([1, 20], [7, 9, 9, 9, EOS])]
    rows = [reference(tokens) for tokens, _ in texts]
    data = [datum_from_tokens(tokens, [0.0, *weights]) for tokens, weights in texts]
    for flight in (
        preflight(dpo().bind(ref_logprobs=rows[::-1]), data),
        preflight(
            dpo(), [Datum(d.model_input, d.loss_fn_inputs | {"ref_logprobs": r}) for d, r in zip(data, rows[::-1])]
        ),
    ):
        messages = [str(found) for found in flight.findings]
        assert not flight.ok
        assert any(
            m.startswith("error: datum[0].ref_logprobs: 6 values, the number of targets of datum[1], and the")
            for m in messages
        )


def test_a_reference_row_written_to_both_sides_is_doubtful() -> None:
    texts = long_pairs(same_length=True)
    rows = [reference(tokens) for tokens, _ in texts]
    rows[3] = rows[2]
    found = only(preflight(dpo(), data_of(texts, rows)))
    assert found.datum == 3 and found.message.startswith("the values are those of datum[2] from target ")


def test_reference_rows_moved_by_one_datum_are_doubtful() -> None:
    """The reference's logprobs of the prompt are there, as most trainers compute them."""
    rng = Random(5)
    texts = [text([1, *prompt], [*rng.choices(range(100, 200), k=9), EOS]) for prompt in
             [rng.choices(range(10, 90), k=8) for _ in range(4)] for _ in range(2)]  # fmt: skip
    rows = [reference(tokens) for tokens, _ in texts]
    flight = preflight(dpo(), data_of(texts, [rows[-1], *rows[:-1]]))
    found = accusations(flight)
    assert found and {f.level for f in found} == {"warning"}
    assert all(
        "were the rows moved to other datums?" in f.message and f.field.startswith("ref_logprobs[") for f in found
    )


def test_exchanged_reference_rows_are_doubtful_where_the_policy_is_known() -> None:
    texts = long_pairs(same_length=True)
    rows = [reference(tokens) for tokens, _ in texts]
    policy = [torch.tensor(row) - 0.01 for row in rows]
    rows[4], rows[5] = rows[5], rows[4]
    found = only(preflight(dpo(), data_of(texts, rows), logprobs=policy))
    assert found.datum == 4 and found.message.startswith("the values fit datum[5] better, and the other way round")
    assert accusations(preflight(dpo(), data_of(texts), logprobs=policy)) == []


# Correct pairs


def multi_turn(rng: Random, last_only: bool) -> Texts:
    """Two turns. All assistant turns are trained, or the last alone; the first turn is common to both sides."""
    user, reply, second = ([*rng.choices(range(10, 90), k=5), 5] for _ in range(3))
    texts = []
    for _ in range(2):
        tokens = [1, *user, *reply, *second, *(last := answers(rng))]
        trained = [0.0] * len(user) + [float(not last_only)] * len(reply) + [0.0] * len(second) + [1.0] * len(last)
        texts.append((tokens, trained))
    return texts


def unequal_turns(rng: Random) -> Texts:
    """The chosen side asks once more. All assistant turns are trained."""
    user, second = rng.choices(range(10, 90), k=5), rng.choices(range(10, 90), k=4)
    first, last = answers(rng), answers(rng)
    chosen = (
        [1, *user, 7, *first, *second, *last],
        [0.0] * 5 + [1.0] * (1 + len(first)) + [0.0] * 4 + [1.0] * len(last),
    )
    return [chosen, text([1, *user], [7, *answers(rng)])]


def system_prompts(rng: Random) -> Texts:
    """The sides of a pair have different system prompts and one question."""
    question = rng.choices(range(10, 90), k=5)
    return [text([1, 3, *system, *question, 5], answers(rng)) for system in ([91, 92], [93, 94, 95])]


def alternating_systems(rng: Random) -> Texts:
    a, b = system_prompts(rng), system_prompts(rng)
    return [*a, b[1], b[0]]


def one_question(rng: Random) -> Texts:
    """Several pairs of one question, each with the same two system prompts."""
    return [text([1, 3, *system, 40, 41, 5], answers(rng)) for _ in range(4) for system in ([91, 92], [93, 94, 95])]


def nothing_shared(rng: Random) -> Texts:
    return [text([rng.randint(3, 9), *rng.choices(range(10, 90), k=4)], answers(rng)) for _ in range(2)]


def empty_prompts(rng: Random) -> Texts:
    return [text([1], answers(rng)) for _ in range(2)]


def same_prompt(rng: Random) -> Texts:
    return [text([1, 20, 21, 22], answers(rng)) for _ in range(2)]


def answers_that_begin_alike(rng: Random) -> Texts:
    """A prompt for several pairs, and answers with a common start."""
    prompt, start = [1, *rng.choices(range(10, 90), k=4)], rng.choices(range(100, 200), k=6)
    return [text(prompt, [*start, *answers(rng)]) for _ in range(4)]


def one_answer_continues_the_other(rng: Random) -> Texts:
    prompt, start = [1, *rng.choices(range(10, 90), k=4)], answers(rng)
    return [text(prompt, start[:-1]), text(prompt, [*start[:-1], *answers(rng)])]


def padded(rng: Random) -> Texts:
    """All datums have one length; the padding token is that of the end."""
    texts = pairs(rng.randint(0, 99), 2)
    longest = max(len(tokens) for tokens, _ in texts)
    return [
        (tokens + [EOS] * (longest - len(tokens)), weights + [0.0] * (longest - len(tokens)))
        for tokens, weights in texts
    ]


def tagged_empty_prompts(rng: Random) -> Texts:
    """Without a prompt, every answer begins with the same two tokens."""
    return [text([1], [98, 99, *answers(rng)]) for _ in range(2)]


CORRECT = [
    lambda rng: pairs(rng.randint(0, 99), 1),
    lambda rng: multi_turn(rng, last_only=True),
    lambda rng: multi_turn(rng, last_only=False),
    unequal_turns,
    system_prompts,
    alternating_systems,
    one_question,
    nothing_shared,
    empty_prompts,
    same_prompt,
    answers_that_begin_alike,
    one_answer_continues_the_other,
    padded,
    tagged_empty_prompts,
]
NAMES = ["plain", "last turn", "all turns", "unequal turns", "system prompts", "alternating", "one question",
         "nothing shared", "empty prompts", "same prompt", "same start", "continued", "padded", "tagged"]  # fmt: skip


@pytest.mark.parametrize("make", CORRECT, ids=NAMES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_correct_pairs_are_not_accused(make: Callable[[Random], Texts], count: int) -> None:
    for seed in range(4):
        rng = Random(seed)
        texts = [datum for _ in range(count) for datum in make(rng)]
        for loss in (dpo(), orpo()):
            flight = fly(texts, loss)
            assert accusations(flight) == [], (seed, str(flight))
            assert str(flight).startswith("ready")


def test_batches_of_several_kinds_are_not_accused() -> None:
    for seed in range(20):
        rng = Random(seed)
        texts = [datum for _ in range(rng.randint(1, 8)) for datum in rng.choice(CORRECT)(rng)]
        assert accusations(fly(texts)) == [], (seed, str(fly(texts)))


@pytest.mark.exhaustive
def test_hundreds_of_correct_batches_are_not_accused() -> None:
    for seed in range(20, 500):
        rng = Random(seed)
        texts = [datum for _ in range(rng.randint(1, 8)) for datum in rng.choice(CORRECT)(rng)]
        assert accusations(fly(texts)) == [], (seed, str(fly(texts)))


def test_made_up_references_are_not_accused() -> None:
    """One number everywhere, numbers by position, and random numbers."""
    rng = np.random.default_rng(0)
    texts = long_pairs(1, same_length=True)
    makes: list[Callable[[int], Any]] = [
        lambda n: [-1.0] * n,
        lambda n: (-np.arange(1, n + 1) / 10).tolist(),
        lambda n: (-rng.exponential(size=n)).tolist(),
    ]
    for make in makes:
        flight = preflight(dpo(), data_of(texts, [make(len(weights)) for _, weights in texts]))
        assert accusations(flight) == [], str(flight)


def test_a_function_that_says_its_kind_is_given_pairs() -> None:
    def mine(data: list[Any], logprobs: list[torch.Tensor]) -> Any:
        return sum((-1) ** i * lp[-1] for i, lp in enumerate(logprobs)) * -1.0, {}

    mine.kind = "preference"  # type: ignore[attr-defined]
    flight = fly(one_side_unmasked(pairs()), mine)  # type: ignore[arg-type]
    assert not flight.ok and flight.numbers["pairs"] == {"pairs": 4, "with one prompt": 4}


# Labels


@preset
def unpaired() -> Loss:
    """σ(−y·m) of each datum."""

    def terms(t: Any) -> Any:
        return torch.sigmoid(-sequence_value(t, t.label) * weighted_sum(t, t.logprobs - t.ref_logprobs)), {}

    return make_loss(terms, ("ref_logprobs", "label"), datum_mean, rows=Rows.SEQUENCES)


def test_labels_that_tell_nothing_apart_are_doubtful() -> None:
    texts = pairs()
    good = preflight(unpaired().bind(label=[1.0, -1.0] * 4), data_of(texts))
    assert good.numbers["labels"] == {"label -1": 4, "label 1": 4}
    assert not [f for f in accusations(good) if f.field == "label"]
    one = preflight(unpaired().bind(label=[1.0] * 8), data_of(texts))
    assert [f.level for f in accusations(one) if f.field == "label"] == ["warning"]
    texts[5] = texts[4]
    twice = preflight(unpaired().bind(label=[1.0, -1.0] * 4), data_of(texts))
    [found] = [f for f in accusations(twice) if f.field.startswith("target_tokens[")]
    assert found.datum == 5 and found.message.startswith(
        "the tokens are those of datum[4], whose label is 1 and not -1"
    )
