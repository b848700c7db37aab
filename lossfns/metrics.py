"""Metrics of a whole batch from the metrics of its chunks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from lossfns.checks import is_huge, is_real
from lossfns.errors import LossInputError, show
from lossfns.tokens import Rows

T = TypeVar("T")

ROW_COUNTS = tuple(dict.fromkeys(rows.unit for rows in Rows))
"""Metrics that count rows, by kind of row. A statistic is a mean over the rows that one of them counts."""
ADDITIVE = ("tokens", "sequences", "sequences_empty", *ROW_COUNTS[1:], "count")
"""Metrics that add over chunks, besides those whose name ends in ``:sum``."""
DIVIDED = ("loss", "grad_l1")
"""Metrics that have been divided by the denominator."""


def with_prefix(name: str, table: Mapping[str, T]) -> dict[str, T]:
    """Return a table whose names begin with the name of a part of a sum of losses."""
    return {f"{name}/{key}": x for key, x in table.items()}


def of_part(name: str, table: Mapping[str, T]) -> dict[str, T]:
    """Return the entries of one part of a sum, under the names that they have in a loss by itself."""
    return {key.removeprefix(f"{name}/"): x for key, x in table.items() if key.startswith(f"{name}/")}


def check_parts(parts: Any) -> None:
    """Refuse anything but dicts of numbers with the same names, such as a call of a loss returns."""
    if not isinstance(parts, (list, tuple)):
        raise LossInputError("parts", "a list of metrics, one for each chunk", show(parts), "Pass [metrics] for one.")
    if not parts:
        raise LossInputError("parts", "the metrics of at least one chunk", "none", "Merge after the first chunk.")
    for i, part in enumerate(parts):
        if not isinstance(part, Mapping):
            raise LossInputError(f"parts[{i}]", "a dict of metrics", show(part), "Pass what the loss returned.")
        is_sum = any(name.endswith("/coefficient") for name in parts[0] if isinstance(name, str))
        divided = not is_sum and any(name in parts[0] for name in DIVIDED)
        names = [*parts[0], "tokens", *(["denominator"] if divided else [])]
        for name in dict.fromkeys([*names, *part]):
            if name not in part or (name not in parts[0] and i):
                got = f"{name!r} only in some of them" if i else f"none of the name {name!r}"
                fix = "Merge the metrics of one loss, as its calls returned them."
                raise LossInputError(f"parts[{i}]", "the same metrics in every part", got, fix)
            if not isinstance(name, str) or not is_real(part[name]) or is_huge(part[name]):
                got, fix = show(part[name]), "Metrics are names with numbers."
                raise LossInputError(f"parts[{i}][{name!r}]", "a number", got, fix)


def merge_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Merge the metrics of chunks into the metrics of the whole batch, exactly.

    Counts add. A statistic is averaged, weighted by the number of rows. The loss (and ``grad_l1``) is
    Σ loss·denominator / Σ count, which is Σ loss for raw sums and for chunks with the whole batch's denominator. In a
    sum of losses this holds for each part, and the loss is Σ coefficient·loss over the parts.

    Args:
        parts: the metrics of each chunk, all from the same loss.

    Raises:
        LossInputError: if there are no parts, or if a part is not the metrics of a call of the loss; also for
            ``grad_l1`` of chunks of a sum of losses without the whole batch's denominators.

    >>> a = {"loss": 2.0, "denominator": 1.0, "count": 1.0, "tokens": 1.0, "nll": 2.0}
    >>> b = {"loss": 1.0, "denominator": 3.0, "count": 3.0, "tokens": 3.0, "nll": 1.0}
    >>> merged = merge_metrics([a, b])
    >>> merged["loss"], merged["tokens"], merged["nll"]
    (1.25, 4.0, 1.25)
    """
    check_parts(parts)
    names = [name.removesuffix("/coefficient") for name in parts[0] if name.endswith("/coefficient")]
    return merge_sum(parts, names) if names else merge_loss(parts)


def merge_sum(parts: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Merge the metrics of a sum of losses, whose parts have these names."""
    coefficients = {name: parts[0][f"{name}/coefficient"] for name in names}
    if any(part[f"{name}/coefficient"] != c for part in parts for name, c in coefficients.items()):
        fix = "Merge the metrics of one loss, and average those of several steps."
        raise LossInputError("parts", "one coefficient for each part of the sum", "several", fix)
    by_name = {
        name: merge_loss([of_part(name, part) for part in parts]) | {"coefficient": c}
        for name, c in coefficients.items()
    }
    whole = {name: sum(part[name] for part in parts) for name in parts[0] if "/" not in name}
    whole["loss"] = sum(own["coefficient"] * own["loss"] for own in by_name.values())
    if "grad_l1" in whole and any(
        not math.isclose(part[f"{name}/denominator"], own["denominator"], rel_tol=1e-6)
        for part in parts
        for name, own in by_name.items()
    ):
        fix = "Bind denominator= of the whole batch, or leave grad_l1 out."
        raise LossInputError("parts", "chunks with the denominators of the whole batch, for grad_l1", "others", fix)
    for name, own in by_name.items():
        whole |= with_prefix(name, own)
    return whole


def merge_loss(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Merge the metrics of one loss."""
    # Every loss has `tokens`, which is the first name; a loss over pairs or datums counts these as well.
    unit = next((name for name in reversed(ROW_COUNTS) if name in parts[0]), "tokens")
    added = [name for name in parts[0] if name in ADDITIVE or name.endswith(":sum")]
    sums = {name: sum(part[name] for part in parts) for name in added}
    rows = sums[unit] or 1.0
    denominator = sums.get("count", 1.0)
    divided = [name for name in DIVIDED if name in parts[0]]
    totals = {name: sum(part[name] * part["denominator"] for part in parts) / (denominator or 1.0) for name in divided}
    means = [name for name in parts[0] if name not in (*added, *divided, "denominator")]
    merged = {name: sum(part[name] * part[unit] for part in parts) / rows for name in means}
    return {**totals, **sums, "denominator": denominator, **merged}
