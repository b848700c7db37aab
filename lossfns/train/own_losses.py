"""Losses of the user, by ``module:function`` or ``file.py:function``, in any form that ``lossfns check`` takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lossfns.errors import LossInputError
from lossfns.loading import described, load
from lossfns.loss import BoundLoss, Loss
from lossfns.testing.factories import FactoryLoss
from lossfns.testing.forms import PaddedLoss
from lossfns.testing.kinds import detect_fields_read, detect_kind
from lossfns.testing.laws.base import ALL_FIELDS
from lossfns.testing.laws.settings import underlying_function
from lossfns.testing.settings import defaults_of
from lossfns.testing.subject import adapt
from lossfns.train.losses import SAMPLED, AnyLoss, OwnLoss, check_settings, value_of


def own_loss(text: str, settings: Mapping[str, Any]) -> AnyLoss:
    """Import a loss of any form that ``lossfns check`` takes, and find out what it reads."""
    subject = load(text, "--loss")
    if isinstance(subject, (Loss, BoundLoss)):
        check_settings(text, {}, settings)
        return unbound(subject)
    name, place = text.rpartition(":")[2], defined_at(subject)
    if settings and callable(subject):
        known = defaults_of(subject)
        check_settings(text, known, settings)
        subject = functools.partial(subject, **{n: value_of(value, known[n]) for n, value in settings.items()})
    try:
        function: Any = adapt(subject)
        if isinstance(function, (Loss, BoundLoss)):
            return unbound(function)
        kind, _ = detect_kind(function)
    except LossInputError as error:
        raise LossInputError("--loss", error.expected, error.got, error.fix) from None
    except SystemExit as error:
        raise LossInputError("--loss", "a loss of its columns", described(error), "Correct it there.") from error
    columns = function.columns if isinstance(function, (FactoryLoss, PaddedLoss)) else detect_fields_read(function)
    names = {column.rpartition(" ")[2] for column in columns} - {ALL_FIELDS, *DATUM_FIELDS}
    by_columns = "policy" if SAMPLED & names else "supervised"
    shown = tuple((n, value if isinstance(value, str) else repr(value_of(value))) for n, value in settings.items())
    return OwnLoss(name, function, tuple(sorted(names)), METHOD_OF_KIND.get(kind, by_columns), shown, place)


def defined_at(subject: Any) -> str:
    """Return the file and line of the function of a loss, or of its class; an empty text if they are not known."""
    for each in (inspect.unwrap(underlying_function(subject)), subject):
        with suppress(OSError, TypeError):
            return f"{inspect.getfile(each)}:{inspect.getsourcelines(each)[1]}"
    return ""


def unbound(loss: Loss | BoundLoss) -> Loss:
    """Return a loss without its bound columns: a run makes its own."""
    return loss.loss if isinstance(loss, BoundLoss) else loss


DATUM_FIELDS = ("logprobs", "weights", "mask", "ids", "lengths", "target_tokens")
"""Columns that every datum has, or that follow from it."""

METHOD_OF_KIND = {
    "policy": "policy",
    "likelihood": "supervised",
    "reweighted": "supervised",
    "preference": "preference",
    "unpaired": "unpaired",
    "distillation": "distillation",
}
"""The method for each kind of loss that ``lossfns check`` knows. ``any`` is left to the columns."""
