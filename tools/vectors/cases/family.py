"""Cases of the losses whose settings have the names and the defaults of their presets.

Each is given the situations of its kind. A column that a situation lacks is filled with a few numbers in turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any

from lossfns.loss import Loss
from lossfns.testing.public import presets
from lossfns.testing.settings import knobs, setting_elements, variants
from lossfns.testing.vectors.vector import flatten
from lossfns.tokens import DATUM_COLUMNS, PAIRS, SEQUENCES, TARGETS
from lossfns.weigh import fixed_length
from tools.vectors.answers import correct_answer
from tools.vectors.cases import policy, preference, supervised
from tools.vectors.cases.form import DEFAULTS, WEIGHINGS, Case, Data, Situation

SMALLEST_FLOAT32 = 2.0**-126
"""The smallest normal number of float32."""

SETTINGS: dict[str, dict[str, Any]] = {
    # Of a few tokens, the smallest share is none, and no covariance is above 1.
    "clip_cov": {"fraction": 0.25, "cov_bounds": (0.05, 5.0)},
    "kl_cov": {"fraction": 0.25},
    "m2po": {"threshold": 0.1},
    # Of one candidate, the renormalised probability is 1.
    **{
        name: {"support": "tail_support"}
        for name in ("top_k_forward_kl", "top_k_reverse_kl", "top_k_mixed_kl", "top_k_jsd")
    },
    "dr_grpo": {"weigh": fixed_length(8)},  # the default makes all numbers small
    "luspo": {"clip": (0.8, 1.25)},  # the default leaves almost every ratio outside
    "kimi15": {"tau": 0.5},
    "rollout_is": {"clip": (0.5, 2.0)},
}
"""Settings of a loss for its vectors, where those of the preset would hide a mistake."""

BY_TOKEN: dict[str, tuple[float, ...]] = {
    "advantages": (1.0, -0.5, 0.25, 0.0, -2.0),
    "old_logprobs": (-1.125, -0.625, -2.25),
    "ref_logprobs": (-0.75, -1.5, -2.0),
    "sampler_logprobs": (-1.25, -0.5, -1.875),
    "teacher_logprobs": (-0.5, -1.75, -1.0, -2.5),
    "entropy": (0.5, 1.25, 2.0, 0.125, 0.75),
    "sum_square_probs": (0.5, 0.25, 0.875, 0.125),
    "values": (0.5, -0.25, 1.0),
    "old_values": (0.25, 0.0, 1.5, -0.5),
    "returns": (1.0, -0.5, 0.75, 0.25),
}
BY_DATUM: dict[str, tuple[float, ...]] = {
    "groups": (0.0, 0.0, 1.0),
    "labels": (1.0, 0.0, 0.0, 1.0),
    "rewards": (1.0, -0.5, 0.25, 2.0),
    "reference_point": (0.25, 0.5, 0.0),
    "target_margin": (0.5, 1.0, 0.25),
}
"""The numbers of the columns. The second table has those with one number for each datum, or for each pair."""

KINDS = {
    TARGETS: supervised.K_TARGETS,
    PAIRS: [*preference.COMMON, preference.UNEQUAL_LENGTHS, *preference.MARGINS],
    SEQUENCES: [*policy.COMMON, *policy.SEQUENCE_MEANS],
}
POLICY = [*policy.COMMON, *policy.OUT_OF_BOUNDS, *policy.SEQUENCE_MEANS, policy.NEAR_SAMPLER]


def family_losses() -> list[str]:
    """Return the names of the losses that ``DEFAULTS`` does not name."""
    return [name for name in presets() if name not in DEFAULTS]


def family() -> Iterator[Case]:
    """Yield the cases of these losses. Situations that differ in no column of the loss are one case."""
    for name in family_losses():
        seen = []
        for case in cases_of(presets()[name](**SETTINGS.get(name, {}))):
            inputs = case.config, case.data, case.denominator
            if inputs not in seen:
                seen.append(inputs)
                yield case


def cases_of(loss: Loss) -> Iterator[Case]:
    """Yield the cases of one loss: its situations, each setting changed in two of them, and other weighings."""
    situations = [s for s in situations_for(loss) if is_representable(case_of(loss, s))]
    for situation in situations:
        yield case_of(loss, situation)
    for name, element, other in changed_settings(loss):
        place = name if element is None else f"{name}[{element}]"
        for situation in situations[:2]:
            yield case_of(other, situation, f"{place} changed")
    for settings in other_weighings(loss):
        yield case_of(loss, situations[0], settings["weigh"], settings)


def is_representable(case: Case) -> bool:
    """Return whether float32 can hold the answer: its largest gradient does not vanish in float32.

    A gradient of exactly 0 may be the right answer. It is none to show where a factor such as the weight of ``wpo``
    has vanished, since then every mistake gives 0, too.
    """
    gradients = correct_answer(case.loss, case.config, case.data, case.denominator)["grad"]
    largest = max((abs(g) for g in flatten(gradients)), default=0.0)
    has_vanished = "sum_square_probs" in case.data[0] and any(any(datum["weights"]) for datum in case.data)
    return largest >= SMALLEST_FLOAT32 or (largest == 0 and not has_vanished)


def situations_for(loss: Loss) -> list[Situation]:
    """Return the situations of the loss's kind of row, and of the columns that it reads."""
    capped = policy.BEYOND_CAP if "log_ratio_cap" in loss.knobs else []
    of_tokens = [*POLICY, *capped] if "advantages" in loss.reads else supervised.ONE_TARGET
    return [s for s in KINDS.get(loss.rows, of_tokens) if loss.signed or is_positive(s)]


def is_positive(situation: Situation) -> bool:
    """Return whether no weight is negative. Only a plain likelihood takes negative ones."""
    return all(w >= 0 for datum in situation.data for w in flatten(datum["weights"]))


def changed_settings(loss: Loss) -> Iterator[tuple[str, int | None, Loss]]:
    """Yield the loss with another value of each setting, or of each element of one."""
    for name, value in knobs(loss).items():
        for element in setting_elements(value):
            for other in variants(loss, name, element) if name != "weigh" else ():
                if other.reads == loss.reads:
                    yield name, element, other
                    break


def other_weighings(loss: Loss) -> list[dict[str, Any]]:
    """Return the settings of the weighings of the loss's rows, without its own."""
    by_row = {PAIRS: [{"weigh": "pair_sum"}], SEQUENCES: [{"weigh": "datum_sum"}]}
    every = by_row.get(loss.rows, [{"weigh": "token_mean"}, *WEIGHINGS])
    return [settings for settings in every if settings["weigh"] != config_of(loss)["weigh"]]


def case_of(loss: Loss, situation: Situation, suffix: str = "", settings: Mapping[str, Any] | None = None) -> Case:
    """Return the case of a loss on a situation."""
    comment = f"{situation.comment}; {suffix}" if suffix else situation.comment
    own = {name: x for name, x in config_of(loss).items() if not (settings and name in ("weigh", "length"))}
    config = own | dict(settings or {})
    return Case(loss.name, situation.kind, comment, config, columns_for(loss, situation.data), situation.denominator)


def config_of(loss: Loss) -> dict[str, Any]:
    """Return the settings of a loss in the form of the file: functions by name, tuples as lists."""
    config = {name: getattr(x, "__name__", x) for name, x in loss.knobs.items()}
    weigh, _, length = repr(config.pop("weigh")).partition("(")
    settings = {"weigh": weigh} | ({"length": float(length.removesuffix(")"))} if length else {})
    return {name: list(x) if isinstance(x, tuple) else x for name, x in config.items()} | settings


def filled_like(row: list[Any], numbers: Iterator[float]) -> list[Any]:
    """Return a row of the same shape, filled with the next numbers."""
    return [filled_like(x, numbers) if isinstance(x, list) else next(numbers) for x in row]


def columns_for(loss: Loss, data: Data) -> Data:
    """Return the data with the columns that the loss reads."""
    size = loss.rows.datums
    filled = []
    turns = {name: cycle(numbers) for name, numbers in BY_TOKEN.items()}
    for i, row in enumerate(data):
        columns = {name: row[name] for name in ("logprobs", "weights")}
        for name in loss.reads:
            if name in DATUM_COLUMNS:
                number = BY_DATUM[name][i // size % len(BY_DATUM[name])]
                columns[name] = [number] * len(row["logprobs"])
            else:
                columns[name] = row.get(name) or filled_like(row["logprobs"], turns[name])
        filled.append(columns)
    return filled
