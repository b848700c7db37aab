"""The list of laws and bugs, and the explanation of each.

A statement is the first line of a law, and its severity is that of the law. The texts are those of docs/testing.md,
which ``python -m tools.explanations write`` copies to ``explanations.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lossfns.errors import LossInputError, did_you_mean
from lossfns.testing.bugs import BUGS
from lossfns.testing.check import kind_named, severity, statement, why
from lossfns.testing.claims import CLAIMS
from lossfns.testing.laws import ADVANTAGES, ANY_KIND, COUPLED, LAWS_BY_KIND

FILE = Path(__file__).with_name("explanations.json")
LAWS: dict[str, Callable[..., None]] = {
    law.__name__: law for laws in (*LAWS_BY_KIND.values(), ADVANTAGES) for law in laws
}
"""Name → law, except for the laws of a claim, which are made for each claim."""


class Text(NamedTuple):
    """A paragraph of the guide: the laws that it explains, and the text, which names their bugs in backticks.

    A text without laws is about bugs that no law sees.
    """

    laws: list[str]
    text: str


def texts() -> list[Text]:
    """Return the paragraphs of the guide."""
    return [Text(**entry) for entry in json.loads(FILE.read_text(encoding="utf-8"))]


def listed(kind: str | None) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Yield the title and the rows of each list: the laws of every kind, of each kind, of a claim; then the bugs."""
    kinds = [kind_named(kind)] if kind else [*LAWS_BY_KIND, "advantages"]
    if kinds != ["advantages"]:
        yield "laws of every kind of loss", [row(law) for law in ANY_KIND]
    for name in kinds:
        laws = ADVANTAGES if name == "advantages" else LAWS_BY_KIND[name]
        own = [law for law in laws if law not in ANY_KIND]
        if own:
            yield f"laws of the kind {name}", [row(law) for law in own]
    yield "laws of a claim (--like)", [(name, claim.severity, claim.says) for name, claim in CLAIMS.items()]
    yield "bugs that the laws name", [(name, bug.description + ".") for name, bug in BUGS.items()]


def row(law: Callable[..., None]) -> tuple[str, ...]:
    """Return the name of a law, its severity, and what it says."""
    coupled = " Left out with --couples." if law in COUPLED else ""
    return law.__name__, severity(law), statement(law) + coupled


def explain(name: str) -> list[str]:
    """Return what is known about a law or a bug, as paragraphs.

    >>> explain("repeatable")[0]
    'repeatable, a law of every kind: The same call gives the same bits, whatever was called in between.'
    """
    for spelling in (name, name.replace("-", "_"), name.replace("_", "-")):
        if spelling in LAWS or spelling in CLAIMS:
            return explain_law(spelling)
        if spelling in BUGS:
            return explain_bug(spelling)
    hint = did_you_mean(name, [*LAWS, *CLAIMS, *BUGS])
    fix = "lossfns check --list has them all." if hint.startswith("Known") else hint
    raise LossInputError("name", "a law or a bug", repr(name), fix)


def explain_law(name: str) -> list[str]:
    """Return the statement of a law, its severity and why, and the text of the guide."""
    if name in CLAIMS:
        claim = CLAIMS[name]
        head = [
            f"{name}, a law of a claim: {claim.says}",
            f"A loss that breaks it is {claim.severity}: {claim.why}.",
        ]
    else:
        law = LAWS[name]
        head = [
            f"{name}, a law of {kinds_with(law)}: {statement(law)}",
            f"A loss that breaks it is {severity(law)}: {why(law)}.",
        ]
    return spaced(head + [text.text for text in texts() if name in text.laws])


def explain_bug(name: str) -> list[str]:
    """Return the description of a bug, where it has been seen, and the texts of the guide that name it."""
    bug = BUGS[name]
    head = [f"{name}, a bug: {bug.description}."]
    if bug.sources:
        head.append(f"It has been seen in {', '.join(bug.sources)}.")
    naming = [text for text in texts() if f"`{name}`" in text.text]
    return spaced(head + [f"{', '.join(text.laws) or 'No law sees'}: {text.text}" for text in naming])


def spaced(paragraphs: list[str]) -> list[str]:
    """Return the paragraphs with an empty line between them."""
    return [line for paragraph in paragraphs for line in (paragraph, "")][:-1]


def kinds_with(law: Callable[..., None]) -> str:
    """Return the kinds that have a law, as text."""
    kinds = [kind for kind, laws in [*LAWS_BY_KIND.items(), ("advantages", ADVANTAGES)] if law in laws]
    if len(kinds) >= len(LAWS_BY_KIND):
        return "every kind"
    return f"the kind{'s' if len(kinds) > 1 else ''} {', '.join(kinds)}"
