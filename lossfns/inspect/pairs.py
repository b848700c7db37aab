"""Inspect preference pairs: the tokens that the two sides share, their masks, their partners, their references.

Datum 2i is the chosen side of a pair, datum 2i + 1 the rejected side. Certain mistakes are errors. Suspicions, which
unusual but correct pairs may also raise, are warnings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lossfns.errors import LossInputError
from lossfns.inspect.batch import MIN_SHIFT_TOKENS, Array, BatchView, Numbers
from lossfns.inspect.findings import Findings
from lossfns.inspect.probe import ALIASES, split_by_datum
from lossfns.pack import as_row
from lossfns.tokens import DATUM_FIELDS, LOGPROB_COLUMNS

MIN_UNMASKED = 4
"""The number of tokens that the sides of a pair, or of a few pairs, share if they are a prompt that is not masked."""

MAX_OPENING = 3
"""The number of tokens with which all responses may begin alike, such as a tag of the template."""

SAME_TOKEN_GAP = 0.1
"""The mean difference, in nats, above which two rows cannot be the reference's logprobs of the same tokens."""


@dataclass(frozen=True)
class Side:
    """One datum of a batch of pairs.

    Attributes:
        index: the index of the datum.
        tokens: the first input token and the targets, up to the last trained one. Target j is ``tokens[j + 1]``.
        weights: the weights of the targets, ``[N]``.
        start: the first trained target. The tokens up to it are the prompt.
        trained: whether any target is trained.
    """

    index: int
    tokens: Array
    weights: Array
    start: int
    trained: bool

    @property
    def prompt(self) -> bytes:
        return self.tokens[: self.start + 1].tobytes()


def inspect_pairs(
    data: Sequence[Any], view: BatchView, reads: Sequence[str], policy: Sequence[Tensor] | None, findings: Findings
) -> Numbers:
    """Compare the two sides of each pair, and each side with its neighbours.

    Args:
        policy: logprobs that the caller gave for the policy; None if there are none.
    """
    if not all(is_text(datum) for datum in data) or view.targets[0].ndim == 2:
        return {}
    weights = [row.numpy() for row in split_by_datum(view.columns["weights"], view.shapes)]
    sides = [side_of(i, datum, t, w) for i, (datum, t, w) in enumerate(zip(data, view.targets, weights))]
    pairs = [(a, b) for a, b in zip(sides[::2], sides[1::2]) if a.trained and b.trained]
    for a, b in pairs:
        check_tokens(a, b, findings)
        check_masks(a, b, findings)
    check_unmasked_prompts(pairs, findings)
    together = check_partners(sides, findings)
    if "ref_logprobs" in reads and "ref_logprobs" in view.columns:
        references = [row.numpy() for row in split_by_datum(view.columns["ref_logprobs"], view.shapes)]
        for a, b in pairs:
            check_copied_reference(a, b, sides, references, findings)
            check_shared_reference(a, b, sides, references, findings)
            check_exchanged_reference(a, b, references, comparable_logprobs(view, reads, policy), findings)
    return {"pairs": len(sides) // 2, "with one prompt": together}


def is_text(datum: Any) -> bool:
    return all(hasattr(chunk, "tokens") for chunk in getattr(datum.model_input, "chunks", ()))


def side_of(index: int, datum: Any, targets: Array, weights: Array) -> Side:
    """Return a datum with its tokens up to the last trained one."""
    trained = np.flatnonzero(weights)
    tokens = np.concatenate([np.asarray(datum.model_input.to_ints()[:1], np.int64), targets.astype(np.int64)])
    if not trained.size:
        return Side(index, tokens, weights, len(targets), False)
    return Side(index, tokens[: trained[-1] + 2], weights, int(trained[0]), True)


def shared_tokens(a: Side, b: Side) -> int:
    """Return the length of the common prefix of two sides, the first input token included."""
    n = min(len(a.tokens), len(b.tokens))
    differ = np.flatnonzero(a.tokens[:n] != b.tokens[:n])
    return int(differ[0]) if differ.size else n


def shared_targets(a: Side, b: Side) -> int:
    """Return the number of targets in the common prefix of two sides."""
    return max(shared_tokens(a, b) - 1, 0)


def token_name(position: int) -> str:
    """Name an entry of ``Side.tokens`` by the field and the index at which it stands in the datum."""
    return f"target_tokens[{position - 1}]" if position else "model_input[0]"


# One pair


def check_tokens(a: Side, b: Side, findings: Findings) -> None:
    """Refuse two sides that train the same tokens."""
    if np.array_equal(a.tokens, b.tokens):
        message = (
            f"the tokens are those of datum[{a.index}] up to the last trained one, target {len(b.tokens) - 2}: "
            "neither side can be preferred. Drop the pair, or find out whether one text was written to both sides."
        )
        findings.add("error", token_name(b.start + 1), message, b.index)


def check_masks(a: Side, b: Side, findings: Findings) -> None:
    """Check that the targets which both sides share are trained on both sides or on neither.

    The logprob of a shared token is the same on both sides, so it cancels only if its weight is the same.
    """
    n = shared_targets(a, b)
    on_a, on_b = a.weights[:n] != 0, b.weights[:n] != 0
    differ = np.flatnonzero(on_a != on_b)
    if differ.size:
        first = int(differ[0])
        trains, masks = (a, b) if on_a[first] else (b, a)
        # A side whose mask ends after the shared tokens may have more turns of prompt than the other.
        certain = max(a.start, b.start) <= n
        message = (
            f"trained here, but masked in datum[{masks.index}], although both sides have the same tokens up to target "
            f"{n - 1}. {differ.size} of these count on one side only. Mask the prompt alike on both sides."
        )
        findings.add("error" if certain else "warning", f"weights[{first}]", message, trains.index)
        return
    unequal = np.flatnonzero(a.weights[:n] != b.weights[:n])
    uniform = all(len(np.unique(side.weights[side.weights != 0])) == 1 for side in (a, b))
    if unequal.size and not uniform:
        first = int(unequal[0])
        message = (
            f"{b.weights[first]:g} here and {a.weights[first]:g} in datum[{a.index}], although both sides have the "
            f"same tokens up to target {n - 1}: it does not cancel. Give a shared token one weight."
        )
        findings.add("warning", f"weights[{first}]", message, b.index)


# All pairs


def check_unmasked_prompts(pairs: Sequence[tuple[Side, Side]], findings: Findings) -> None:
    """Warn if the sides of pairs begin with the same tokens and train them: the prompt is probably not masked."""
    unmasked = [(a, b) for a, b in pairs if a.start == b.start == 0 and not np.array_equal(a.tokens, b.tokens)]
    if not unmasked:
        return
    shared = [shared_targets(a, b) for a, b in unmasked]
    opening = min(shared_targets(unmasked[0][0], side) for pair in unmasked for side in pair)
    own = [n - min(opening, MAX_OPENING) for n in shared] if len(unmasked) > 1 else shared
    if min(own) > 1 and sum(own) >= MIN_UNMASKED:
        a, b = unmasked[0]
        message = (
            f"the first {shared[0]} targets are trained, and are those of datum[{b.index}]. {len(unmasked)} of "
            f"{len(pairs)} pairs are like this: is the prompt not masked? A mean over tokens or a likelihood term then "
            "trains it. Give it weight 0 on both sides."
        )
        findings.add("warning", "weights[0]", message, a.index)


def check_partners(sides: Sequence[Side], findings: Findings) -> int:
    """Check that a side has the prompt of its partner if another datum has it. Return the pairs with one prompt."""
    starts, masked = [side.start for side in sides], any(side.start for side in sides)
    if not masked:  # take what a datum shares with a neighbour for its prompt
        with_next = [shared_targets(a, b) for a, b in zip(sides, [*sides[1:], sides[0]])]
        starts = [max(before, after) for before, after in zip([with_next[-1], *with_next], with_next)]

    def agree(i: int, j: int) -> bool:
        """Return whether two datums may have one prompt. A datum without trained tokens may have any prompt."""
        a, b = sides[i], sides[j]
        return not (a.trained and b.trained) or shared_tokens(a, b) > max(starts[i], starts[j])

    def linked(i: int, j: int) -> bool:
        """Return whether two datums of different pairs have one prompt, and not only the opening of a template."""
        longest = max(starts[i], starts[j])
        both = sides[i].trained and sides[j].trained
        return i // 2 != j // 2 and both and agree(i, j) and longest >= (1 if masked else MIN_UNMASKED)

    count, pairs = len(sides), len(sides) // 2
    apart = [i for i in range(pairs) if not agree(2 * i, 2 * i + 1)]
    if not apart:
        return pairs
    before = {i: linked(2 * i - 1, 2 * i) if i else linked(count - 1, 0) for i in apart}
    after = {i: linked(2 * i + 1, (2 * i + 2) % count) for i in apart}
    explained = [i for i in apart if before[i] or after[i]]
    links = len({2 * i for i in apart if before[i]} | {(2 * i + 2) % count for i in apart if after[i]})
    prompts = {side.prompt for side in sides}
    several = masked and len(prompts) > 2
    halves = all(linked(i, i + pairs) for i in range(pairs)) if pairs > 1 else False
    first = explained[0] if len(explained) == len(apart) or links > 1 else apart[0]
    a, b = sides[2 * first], sides[2 * first + 1]
    where = token_name(shared_tokens(a, b))
    if halves and (several or pairs == 2):
        message = (
            f"the prompt is not that of datum[{a.index}], but datums i and i + {pairs} have one prompt each: is the "
            "chosen half followed by the rejected half? Interleave them: datum 2i chosen, datum 2i + 1 rejected."
        )
        findings.add("error" if several else "warning", where, message, b.index)
    elif len(explained) == len(apart) or links > 1:
        own, other = (b.index, (b.index + 1) % count) if after.get(first) else (a.index, (a.index - 1) % count)
        message = (
            f"the prompt is not that of datum[{a.index}], but datum[{own}] has the prompt of datum[{other}]. "
            f"{len(explained)} of {pairs} pairs seem shifted by one datum: look for a missing or an additional one at "
            f"datum[{a.index}] or before. Datum 2i is chosen, datum 2i + 1 rejected."
        )
        certain = several and links > 1 and len(explained) == len(apart)
        findings.add("error" if certain else "warning", where, message, b.index)
    elif (partner := partner_elsewhere(sides, apart)) is not None:
        message = (
            f"the prompt is not that of datum[{a.index}], but that of datum[{partner}], and the other pairs whose "
            "prompts differ have such datums, too: was the order changed? Put the sides of a pair side by side."
        )
        findings.add("warning", where, message, b.index)
    elif pairs - len(apart) > len(apart):
        message = f"the prompt is not that of datum[{a.index}]; so it is in {len(apart)} of {pairs} pairs."
        findings.add("note", where, message, b.index)
    return pairs - len(apart)


def partner_elsewhere(sides: Sequence[Side], apart: Sequence[int]) -> int | None:
    """Return a datum with the prompt of the first rejected side of ``apart`` if all these sides have such a datum.

    Return None also if no prompt stands on both sides: pairs whose two prompts differ on purpose are like this.
    """
    indices = [j for i in apart for j in (2 * i, 2 * i + 1)]
    with_prompt: dict[bytes, list[int]] = {}
    for j in indices:
        with_prompt.setdefault(sides[j].prompt, []).append(j)
    groups = list(with_prompt.values())
    mixed = any({j % 2 for j in group} == {0, 1} for group in groups)
    if not mixed or any(len(group) < 2 for group in groups) or not any(sides[j].start for j in indices):
        return None
    rejected = indices[1]
    return next(j for j in with_prompt[sides[rejected].prompt] if j != rejected)


# Reference logprobs


def check_copied_reference(
    a: Side, b: Side, sides: Sequence[Side], references: Sequence[Array], findings: Findings
) -> None:
    """Warn if the two sides have the same reference logprobs at different tokens."""
    at = differing_targets(a, b)
    x, y = references[a.index][at], references[b.index][at]
    if len(at) < 3 or not np.array_equal(x, y) or len(np.unique(x)) < 2:
        return

    def repeats_values(side: Side) -> bool:
        """Return whether a side of another pair has the same values at these targets."""
        row = references[side.index]
        inside = at < len(row)
        return side.index // 2 != a.index // 2 and inside.sum() >= 3 and np.array_equal(row[at[inside]], x[inside])

    if not any(repeats_values(side) for side in sides):  # made-up numbers stand in other pairs, too
        message = (
            f"the values are those of datum[{a.index}] from target {at[0]} on, where the tokens differ: was one side's "
            "row written to both? Compute the reference's logprobs of each side."
        )
        findings.add("warning", f"ref_logprobs[{at[0]}]", message, b.index)


def check_shared_reference(
    a: Side, b: Side, sides: Sequence[Side], references: Sequence[Array], findings: Findings
) -> None:
    """Warn if references differ where both sides have the same tokens, and agree with those of a neighbouring datum.

    Reference logprobs of masked tokens count if they are there.
    """
    n = shared_targets(a, b)
    for side, other in ((a, b), (b, a)):
        row = references[side.index]
        at = np.flatnonzero(np.isfinite(row[:n]) & (row[:n] != 0) & (references[other.index][:n] != 0))
        if len(at) < 3 or not gap(row[at], references[other.index][at]) > SAME_TOKEN_GAP:
            continue
        for k in (side.index - 1, side.index + 1, side.index - 2, side.index + 2):
            near = sides[k % len(sides)]
            values = references[near.index]
            strange = near.index not in (a.index, b.index) and shared_targets(near, side) <= at[-1]
            if strange and len(values) > at[-1] and gap(row[at], values[at]) < SAME_TOKEN_GAP / 10:
                message = (
                    f"the values are not those of datum[{other.index}], which has the same tokens up to target "
                    f"{n - 1}, but those of datum[{near.index}], which has not: were the rows moved to other datums?"
                )
                findings.add("warning", f"ref_logprobs[{at[0]}]", message, side.index)
                return


def check_exchanged_reference(
    a: Side, b: Side, references: Sequence[Array], others: Sequence[Array] | None, findings: Findings
) -> None:
    """Warn if other logprobs of the same tokens fit the reference of the other side better."""
    at = differing_targets(a, b)
    if others is None or 2 * len(at) < MIN_SHIFT_TOKENS:
        return
    x, y = references[a.index][at], references[b.index][at]
    p, q = others[a.index][at], others[b.index][at]
    own, crossed = gap(p, x) + gap(q, y), gap(p, y) + gap(q, x)
    if own > SAME_TOKEN_GAP and crossed < own / 2:
        message = (
            f"the values fit datum[{b.index}] better, and the other way round ({crossed / 2:.3g} nats from the "
            f"policy's instead of {own / 2:.3g}): were the two sides' rows exchanged?"
        )
        findings.add("warning", f"ref_logprobs[{at[0]}]", message, a.index)


def differing_targets(a: Side, b: Side) -> Array:
    """Return the targets after the shared ones that are trained on both sides and have different tokens."""
    n = min(len(a.tokens), len(b.tokens)) - 1
    both = (a.weights[:n] != 0) & (b.weights[:n] != 0) & (a.tokens[1 : n + 1] != b.tokens[1 : n + 1])
    return np.flatnonzero(both)


def gap(x: Array, y: Array) -> float:
    """Return the mean |x − y|, in nats."""
    return float(np.abs(x - y).mean())


def comparable_logprobs(view: BatchView, reads: Sequence[str], policy: Sequence[Tensor] | None) -> list[Array] | None:
    """Return the logprobs that are close to the reference's at the start of training: the policy's, or the old ones."""
    if policy is not None:
        fit = len(policy) == len(view.shapes) and all(tuple(x.shape) == tuple(y) for x, y in zip(policy, view.shapes))
        return [row.detach().double().cpu().numpy() for row in policy] if fit else None
    names = [name for name in LOGPROB_COLUMNS if name in reads and name in view.columns and name != "ref_logprobs"]
    return [row.numpy() for row in split_by_datum(view.columns[names[0]], view.shapes)] if names else None


def check_exchanged_lengths(
    data: Sequence[Any], bound: Mapping[str, Any], targets: Sequence[Array], findings: Findings
) -> None:
    """Name rows of logprobs that do not fit their own datum, but fit the other side of the pair."""
    for name in LOGPROB_COLUMNS:
        lengths = [length_of(name, datum, i, bound) for i, datum in enumerate(data)]
        for i in range(0, len(data) - 1, 2):
            own, got = [len(row) for row in targets[i : i + 2]], lengths[i : i + 2]
            if own[0] != own[1] and got == own[::-1]:
                message = (
                    f"{got[0]} values, the number of targets of datum[{i + 1}], and the other way round: were the two "
                    "sides' rows exchanged?"
                )
                findings.add("error", name, message, i)


def length_of(name: str, datum: Any, index: int, bound: Mapping[str, Any]) -> int | None:
    """Return the length of a datum's row in a column; None if there is none."""
    inputs = datum.loss_fn_inputs
    fields = [field for field in (*DATUM_FIELDS.get(name, (name,)), ALIASES.get(name, name)) if field in inputs]
    with suppress(LossInputError, TypeError, IndexError, KeyError):  # other findings tell what is wrong with it
        if name in bound or fields:
            return len(as_row(bound[name][index] if name in bound else inputs[fields[0]], name, index))
    return None


# Labels instead of pairs


def inspect_labels(data: Sequence[Any], view: BatchView, bound: Mapping[str, Any], findings: Findings) -> Numbers:
    """Look at the labels of unpaired preference: one number for each datum, under the name ``label``."""
    try:
        values = bound["label"] if "label" in bound else [datum.loss_fn_inputs["label"] for datum in data]
        rows = [np.atleast_1d(as_row(value, "label", i)) for i, value in enumerate(values)]
        labels = [float(row[0]) for row in rows if len(np.unique(row)) == 1]
    except (LossInputError, KeyError, TypeError, IndexError):
        return {}
    if len(labels) != len(data):
        return {}
    counts = {f"label {label:g}": labels.count(label) for label in sorted(set(labels))}
    if len(counts) == 1 and len(data) > 1:
        message = f"{labels[0]:g} for every datum: nothing is told apart. Mix good and bad answers in a batch."
        findings.add("warning", "label", message, 0)
    if all(is_text(datum) for datum in data) and view.targets[0].ndim == 1:
        weights = split_by_datum(view.columns["weights"], view.shapes)
        sides = [side_of(i, d, t, w.numpy()) for i, (d, t, w) in enumerate(zip(data, view.targets, weights))]
        seen: dict[bytes, int] = {}
        for side in sides:
            first = seen.setdefault(side.tokens.tobytes(), side.index)
            if labels[first] != labels[side.index]:
                message = (
                    f"the tokens are those of datum[{first}], whose label is {labels[first]:g} and not "
                    f"{labels[side.index]:g}. Drop both, or correct one label."
                )
                findings.add("warning", token_name(min(side.start + 1, len(side.tokens) - 1)), message, side.index)
    return counts
