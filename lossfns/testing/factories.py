"""Factories of contract functions as contract functions: the columns are the arguments of the factory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lossfns.errors import LossInputError
from lossfns.loading import described
from lossfns.testing.forms import (
    FORMS,
    PROBE,
    Adapted,
    datum_advantage,
    gradients_of,
    parameter_rows,
    refuse_foreign,
)
from lossfns.testing.laws.base import NotApplicable
from lossfns.testing.names import column_of
from lossfns.testing.settings import Target


class FactoryLoss(Adapted):
    """A contract function that passes the batch's columns to a factory, and calls the loss that the factory returns.

    A factory may take a column as a list of tensors, as a list of lists, as one number for each datum (advantages and
    labels), as the list of the only pair, or as a list of sums. The first form that gives a loss is kept.
    """

    FORMS: Mapping[str, Callable[[list[Tensor], list[Tensor]], Any]] = {
        "rows": lambda rows, weights: rows,
        "lists": lambda rows, weights: [row.tolist() for row in rows],
        "numbers": lambda rows, weights: list(map(datum_advantage, rows, weights)),
        "row": lambda rows, weights: rows[0].tolist(),
        "sums": lambda rows, weights: [float((w * torch.where(w != 0, x, 0)).sum()) for x, w in zip(rows, weights)],
        "sum tensor": lambda rows, weights: torch.stack([(w * torch.where(w != 0, x, 0)).sum()
            for x, w in zip(rows, weights)]),
        "number tensor": lambda rows, weights: torch.tensor(list(map(datum_advantage, rows, weights))),
        "signs": lambda rows, weights: [2 * datum_advantage(row, w, "label") - 1 for row, w in zip(rows, weights)],
        "padded": lambda rows, weights: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
    }  # fmt: skip

    def __init__(self, factory: Any, required: Sequence[str], optional: Sequence[str] = ()) -> None:
        super().__init__(Target(factory))
        self.required, self.optional = (*required, *optional), tuple(optional)
        self.forms: tuple[str, ...] | None = None
        self.max_datums: int | None = None

    @property
    def description(self) -> str:
        """The form in which each column is passed."""
        forms = zip(self.required, self.forms or ())
        return "called with " + ", ".join(f"{name} as {form}" for name, form in forms if name not in self.unused)

    @property
    def columns(self) -> set[str]:
        """The columns that it is given."""
        return {column_of(name) or "" for name in self.required if name not in self.unused}

    @property
    def takes_datum_advantages(self) -> bool:
        """Whether it takes one advantage for each datum."""
        self.forms = self.forms or self.find_forms()
        return bool({"numbers", "number tensor"} & set(self.forms))

    @property
    def takes_one_pair(self) -> bool:
        """Whether it takes the list of the only pair, and so has no place for another pair."""
        self.forms = self.forms or self.find_forms()
        return "row" in self.forms

    def __call__(self, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Any:
        self.forms = self.forms or self.find_forms()
        if self.max_datums is not None and len(data) > self.max_datums:
            raise NotApplicable("it takes one pair")
        return self.build(data, self.forms)(data, logprobs_list)

    def build(self, data: Sequence[Any], forms: Sequence[str]) -> Any:
        """Call the factory with the columns in these forms."""
        arguments = {}
        for name, form in zip(self.required, forms):
            if name in self.unused:
                continue
            side = (column_of(name) or "").rpartition(" ")[0]
            rows = parameter_rows(data, name)
            weights = parameter_rows(data, "weights", f"{side} weights".strip())
            arguments[name] = self.FORMS[form](rows, weights)
        return self.target.fn(**arguments)

    def find_forms(self) -> tuple[str, ...]:
        """Return the first candidate forms with which a call returns a 0-d loss.

        For a loss with labels, a form in which desirable and undesirable datums both get a gradient is preferred.
        """
        errors, running = [], None
        for forms in self.candidate_forms():
            tried = copy.copy(self)
            tried.forms = forms
            try:
                loss = tried(PROBE.data(), PROBE.tensors(torch.float32))[0]
            except NotApplicable:
                raise
            except Exception as error:
                errors.append(f"{', '.join(forms)}: {described(error)}")
                continue
            refuse_foreign(loss)
            if loss.ndim:
                errors.append(f"{', '.join(forms)}: a loss of shape {tuple(loss.shape)}")
                continue
            if "labels" not in self.columns:
                return forms
            running = running or forms
            gradients = zip(gradients_of(tried, PROBE), PROBE.columns["labels"])
            if len({row[0] for g, row in gradients if any(g)}) == 2:
                return forms
        if running is not None:
            return running
        fix = "The factory is called with the columns, and its result with (data, logprobs_list). " + FORMS
        raise LossInputError("subject", "a factory that makes a loss", "; ".join(errors[:4]), fix)

    def candidate_forms(self) -> Iterator[tuple[str, ...]]:
        """Yield the combinations of forms to try, one form for each required parameter."""
        columns = [column_of(name) or "" for name in self.required]
        if "labels" in columns:
            for number in ("numbers", "number tensor", "signs"):
                for form in ("rows", "lists", "padded"):
                    yield tuple(number if column == "labels" else form for column in columns)
        for form in ("rows", "lists"):
            yield (form,) * len(columns)
        for number in ("numbers", "number tensor"):
            for form in ("rows", "lists", "padded"):
                yield tuple(number if column == "advantages" else form for column in columns)
        for form in ("row", "sums", "sum tensor"):
            yield tuple(form if " " in column else "rows" for column in columns)
        yield ("padded",) * len(columns)
