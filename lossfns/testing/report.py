"""The report of ``check``: the verdict of each law, as text, JSON and JUnit XML."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from lossfns.terminal import printable
from lossfns.testing.bugs import BUGS

MARKS = {"pass": "ok", "wrong": "WRONG", "fragile": "fragile", "unsure": "unsure", "n/a": "–", "skipped": "skipped"}
"""Verdict → the word in the table.

The verdict on a broken law is the severity of the law, wrong or fragile. It is unsure, and no reason to fail, if the
law belongs to a kind that was guessed. A law is skipped by name, with a reason; it is n/a if it has nothing to measure
on this loss.
"""
REASONS = {
    "wrong": "wrong, since {}",
    "fragile": "only fragile: {}",
    "unsure": "unsure, since the kind was guessed; else {}",
}
"""Verdict on a broken law → the text around the reason for the severity of the law."""
BROKEN = ("wrong", "unsure", "fragile")
"""The verdicts on a broken law, the most severe first."""


@dataclass(frozen=True)
class Verdict:
    """The verdict of one law.

    Attributes:
        law: the name of the law.
        says: the law in one sentence.
        verdict: a key of ``MARKS``.
        seconds: the time that the law took.
        bug: the bug that most likely breaks the law.
        seen: the observation that broke the law, or the reason why it does not apply or was skipped.
        example: the smallest batch that breaks the law.
        why: why a loss that breaks the law is wrong, or only fragile.
    """

    law: str
    says: str
    verdict: str
    seconds: float = 0.0
    bug: str = ""
    seen: str = ""
    example: str = ""
    why: str = ""

    @property
    def remark(self) -> str:
        """The text for one line of the table: the bug, the reason why the law does not apply, or the law itself."""
        return self.bug or self.seen or self.says

    @property
    def headline(self) -> str:
        """The law and what it says."""
        return f"{MARKS[self.verdict]}  {self.law}: {self.says}"

    @property
    def explanation(self) -> list[tuple[str, str]]:
        """The details of a broken law, each with its label."""
        bug = BUGS[self.bug]
        details = {
            "seen": self.seen,
            "bug": f"{self.bug}: {bug.description}.",
            "also in": ", ".join(bug.sources),
            "why": REASONS[self.verdict].format(self.why),
            "batch": self.example,
        }
        return [(label, text) for label, text in details.items() if text]


@dataclass(frozen=True)
class Report:
    """The verdicts of all laws on one subject, in the order of diagnosis.

    Attributes:
        subject: the name of the subject.
        kind: the kind whose laws were tested.
        guessed: whether the kind was guessed. The laws of a guessed kind are no reason to fail.
        couples: why the datums of a batch may affect one another; "" if they must not.
        like: the loss that the subject claims to be; "" if it claims nothing, or is a loss of this library itself.
        form: how the subject is called and what is done with its result; "" if it is a contract function.
        verdicts: the verdict of each law.
        stopped: why some laws were not tested: the process ended, or time was up; "" if all laws were tested.
        learns: where exact gradient steps lead in small problems, in words; advice, which changes no verdict.
    """

    subject: str
    kind: str
    guessed: bool = False
    couples: str = ""
    like: str = ""
    form: str = ""
    verdicts: list[Verdict] = field(default_factory=list)
    stopped: str = ""
    learns: list[str] = field(default_factory=list)

    @property
    def broken(self) -> list[Verdict]:
        """The broken laws, the most severe first, otherwise in the order of diagnosis."""
        return [v for verdict in BROKEN for v in self.verdicts if v.verdict == verdict]

    @property
    def failures(self) -> list[Verdict]:
        """The broken laws that make the loss wrong."""
        return [v for v in self.verdicts if v.verdict == "wrong"]

    @property
    def ok(self) -> bool:
        """Whether every law was tested and the loss is not wrong. It may be fragile."""
        return not self.failures and not self.stopped

    def exit_status(self, strict: bool = False) -> int:
        """Return the exit status of ``lossfns check``: 1 if the loss is wrong, 2 if time was up before that is known.

        With ``strict`` a fragile loss gives 1 too. An unsure verdict never fails.
        """
        if self.failures or (strict and self.counts["fragile"]):
            return 1
        return 2 if self.stopped else 0

    @property
    def bug(self) -> str:
        """The most likely bug, which the first of the most severe broken laws names, or "" if every law holds."""
        return self.broken[0].bug if self.broken else ""

    @property
    def counts(self) -> dict[str, int]:
        """Verdict → the number of laws with it."""
        counts = Counter(v.verdict for v in self.verdicts)
        return {verdict: counts[verdict] for verdict in MARKS}

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "subject": self.subject,
            "kind": self.kind,
            "guessed": self.guessed,
            "couples": self.couples,
            "like": self.like,
            "form": self.form,
            "stopped": self.stopped,
            "ok": self.ok,
            "bug": self.bug,
            "counts": self.counts,
            "verdicts": [vars(v) for v in self.verdicts],
            "learns": self.learns,
        }

    @property
    def title(self) -> str:
        """The subject with its kind, form and declarations. After a guessed kind, the option that replaces it."""
        kind = f"taken as {self.kind}; --kind for another" if self.guessed else self.kind
        claim = f"; claims to be {self.like}" if self.like else ""
        couples = f"; couples datums: {self.couples}" if self.couples else ""
        form = f", {self.form}" if self.form else ""
        return printable(f"{self.subject} ({kind}{claim}{couples}){form}")

    @property
    def summary(self) -> str:
        """The verdict in one line, with the time that it took."""
        tested = sum(n for verdict, n in self.counts.items() if verdict not in ("n/a", "skipped"))
        broken = [f"{self.counts[verdict]} {verdict}" for verdict in BROKEN if self.counts[verdict]]
        verdict = (
            f"{', '.join(broken)} of {tested} laws; most likely {self.bug}: {BUGS[self.bug].description}"
            if broken
            else f"{tested} laws hold"
        )
        warning = "warning, not wrong: " if broken and self.ok else ""
        stopped = f"; {self.stopped}" if self.stopped else ""
        return f"{warning}{verdict}{stopped} ({sum(v.seconds for v in self.verdicts):.1f} s)"

    def table(self) -> str:
        """Return the report as plain text: an explanation of each broken law, a line for each law, and the summary."""
        width = max((len(v.law) for v in self.verdicts), default=0)
        rows = [f"{MARKS[v.verdict]:7}  {v.law:{width}}  {v.remark}" for v in self.verdicts]
        learns = [f"learns: {line}" for line in self.learns]
        return "\n".join([*self.explanations, *rows, "", *learns, self.summary])

    def quiet(self) -> str:
        """Return the broken laws and the summary as plain text."""
        return "\n".join([*(self.explanations if self.broken else []), self.summary])

    @property
    def explanations(self) -> list[str]:
        """The title and an explanation of each broken law, the most severe first, as lines of text."""
        lines = [self.title, ""]
        for v in self.broken:
            lines.append(v.headline)
            lines += [f"  {label:8} {text}".replace("\n", "\n           ") for label, text in v.explanation]
            lines.append("")
        return lines

    def junit(self) -> str:
        """Return the report as JUnit XML, with a test case for each law and the verdict as its property ``verdict``.

        Only a law that makes the loss wrong is a failure. A check that was stopped is an error. The properties of the
        suite describe the subject and its declarations.
        """
        subject, stopped = printable(self.subject), int(bool(self.stopped))
        skipped = str(self.counts["n/a"] + self.counts["skipped"])
        suite = ElementTree.Element("testsuite", name=f"lossfns check {subject}",
            tests=str(len(self.verdicts) + stopped), failures=str(len(self.failures)), errors=str(stopped),
            skipped=skipped)  # fmt: skip
        suite_properties = ElementTree.SubElement(suite, "properties")
        for name in ("kind", "guessed", "like", "couples", "form", "stopped"):
            ElementTree.SubElement(suite_properties, "property", name=name, value=printable(str(getattr(self, name))))
        for v in self.verdicts:
            attributes = {"classname": subject, "name": v.law, "time": f"{v.seconds:.3f}"}
            case = ElementTree.SubElement(suite, "testcase", attributes)
            properties = ElementTree.SubElement(case, "properties")
            ElementTree.SubElement(properties, "property", name="verdict", value=v.verdict)
            text = f"{v.seen}\n{v.example}"
            if v.verdict == "wrong":
                ElementTree.SubElement(case, "failure", message=v.bug, type=v.verdict).text = text
            elif v.bug:
                ElementTree.SubElement(case, "system-out").text = f"{v.verdict}: {v.bug}\n{text}"
            elif v.seen:
                ElementTree.SubElement(case, "skipped", message=printable(v.seen))
        if self.stopped:
            case = ElementTree.SubElement(suite, "testcase", classname=subject, name="(stopped)")
            ElementTree.SubElement(case, "error", message=self.stopped)
        return ElementTree.tostring(suite, encoding="unicode")
