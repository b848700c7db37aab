"""The report of ``lossfns conformance``: the verdict of each check, as text, JSON and JUnit XML."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from lossfns.conformance.base import Result
from lossfns.conformance.bugs import ALL_BUGS
from lossfns.terminal import printable
from lossfns.version import __version__

MARKS = {
    "pass": "ok",
    "fail": "WRONG",
    "error": "ERROR",
    "inconclusive": "unsure",
    "unsupported": "–",
    "xfail": "xfail",
    "xpass": "XPASS",
}
"""Verdict → the word in the table."""

VERDICTS = {
    "pass": "The server does what the check says.",
    "fail": "It does something else.",
    "error": "There was no answer in time, or the server or the client died.",
    "inconclusive": "Nothing can be said: there is too much noise, or something that the check needs does not work.",
    "unsupported": "The server says that it does not have this.",
    "xfail": "The check does not hold, as expected.",
    "xpass": "The check holds, against what was expected.",
}
"""Verdict → its meaning."""

BROKEN = ("fail", "error")
"""The verdicts that make the server wrong."""


@dataclass(frozen=True)
class Report:
    """The results of a run.

    Attributes:
        server: the URL.
        sdk: the version of the SDK, and where it was if it was not the installed one.
        level: the level of the checks.
        base_model: the model that was trained.
        noise, rounding: the relative difference of identical experiments, and of ones that only round differently.
        results: a result for each check that was run, in order.
        stopped: why the run ended before its last check, or "".
        seconds: the time of the run.
        date: the day, in ISO form.
        strict: whether a check that is unsupported or inconclusive counts against the server.
        partial: whether only some checks of the level were chosen.
    """

    server: str
    sdk: str
    level: str
    base_model: str = ""
    noise: float = math.nan
    rounding: float = math.nan
    results: list[Result] = field(default_factory=list)
    stopped: str = ""
    seconds: float = 0.0
    date: str = ""
    strict: bool = False
    partial: bool = False

    @property
    def headline(self) -> str:
        """The verdict in words. Only a run of all checks of a level says that a server conforms."""
        if self.partial:
            return "The chosen checks hold" if self.ok else "The chosen checks do not all hold"
        return f"This training server {'conforms' if self.ok else 'does not conform'}, level {self.level}"

    @property
    def broken(self) -> list[Result]:
        """The checks that do not hold, in the order of diagnosis."""
        return [r for r in self.results if r.verdict in BROKEN]

    @property
    def counts(self) -> dict[str, int]:
        """Verdict → the number of checks with it."""
        counts = Counter(r.verdict for r in self.results)
        return {verdict: counts[verdict] for verdict in MARKS}

    @property
    def ok(self) -> bool:
        """Whether every check was run and none failed."""
        unclear = self.counts["unsupported"] + self.counts["inconclusive"] if self.strict else 0
        return not self.broken and not self.stopped and not unclear

    @property
    def bug(self) -> str:
        """The most likely bug, which the first check that does not hold names, or ""."""
        return self.broken[0].bug if self.broken else "no-answer" if self.stopped and not self.results else ""

    @property
    def title(self) -> str:
        """The server, the model, the SDK and the noise in one line."""
        model = f", {self.base_model}" if self.base_model else ""
        noise = "" if math.isnan(self.noise) else f", noise {self.noise:.1g}, rounding {self.rounding:.1g}"
        return printable(f"{self.server}{model}; tinker {self.sdk}, level {self.level}{noise}")

    @property
    def summary(self) -> str:
        """The verdict in one line, with the time that it took."""
        counted = {verdict: n for verdict, n in self.counts.items() if n and verdict != "pass"}
        others = "".join(f", {n} {verdict}" for verdict, n in counted.items())
        bug = f"; most likely {self.bug}: {ALL_BUGS[self.bug].description}" if self.broken else ""
        stopped = f"; stopped: {self.stopped}" if self.stopped else ""
        held = f"{self.counts['pass']} of {len(self.results)} checks hold" if self.results else "no check was run"
        return printable(f"{held}{others}{bug}{stopped} ({self.seconds:.1f} s)")

    def table(self) -> str:
        """Return the report as plain text: the broken checks, a line for each check, and the summary."""
        lines = [self.title, ""]
        for r in self.broken:
            lines += [f"{MARKS[r.verdict]}  {r.check}: {r.says}", *(f"  {k:6} {v}" for k, v in explanation(r)), ""]
        width = max((len(r.check) for r in self.results), default=0)
        numbers = max((len(measured(r)) for r in self.results), default=0)
        lines += [
            f"{MARKS[r.verdict]:6}  {r.check:{width}}  {measured(r):{numbers}}  {remark(r)}" for r in self.results
        ]
        return "\n".join([*lines, "", self.summary])

    def quiet(self) -> str:
        """Return the broken checks and the summary as plain text."""
        lines = [f"{MARKS[r.verdict]}  {r.check}: {r.seen}" for r in self.broken]
        return "\n".join([*lines, self.summary])

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values. A number that was not measured is null."""
        return {
            "suite": __version__,
            **{name: getattr(self, name) for name in
               ("server", "sdk", "level", "partial", "base_model", "date", "strict", "stopped", "ok", "bug",
                "counts")},
            "noise": number(self.noise),
            "rounding": number(self.rounding),
            "seconds": round(self.seconds, 3),
            "results": [
                {key: number(x) if isinstance(x, float) else x for key, x in vars(r).items()} for r in self.results
            ],
        }  # fmt: skip

    def junit(self) -> str:
        """Return the report as JUnit XML, with a test case for each check and the verdict as its property."""
        counts, stopped = self.counts, int(bool(self.stopped))
        skipped = counts["unsupported"] + counts["inconclusive"] + counts["xfail"]
        suite = ElementTree.Element("testsuite", name=printable(f"lossfns conformance {self.server}"),
            tests=str(len(self.results) + stopped), failures=str(counts["fail"]), errors=str(counts["error"] + stopped),
            skipped=str(skipped), time=f"{self.seconds:.3f}")  # fmt: skip
        properties = ElementTree.SubElement(suite, "properties")
        for name in ("sdk", "level", "base_model", "noise", "rounding", "stopped"):
            ElementTree.SubElement(properties, "property", name=name, value=printable(str(getattr(self, name))))
        for r in self.results:
            attributes = {"classname": f"lossfns.conformance.{r.level}", "name": r.check, "time": f"{r.seconds:.3f}"}
            case = ElementTree.SubElement(suite, "testcase", attributes)
            own = ElementTree.SubElement(case, "properties")
            ElementTree.SubElement(own, "property", name="verdict", value=r.verdict)
            tag = {"fail": "failure", "error": "error", "pass": "", "xpass": ""}.get(r.verdict, "skipped")
            if tag:
                element = ElementTree.SubElement(case, tag, message=printable(r.seen))
                if tag != "skipped":
                    element.set("type", r.bug)
                    element.text = "\n".join(f"{label}: {text}" for label, text in explanation(r))
        if self.stopped:
            case = ElementTree.SubElement(suite, "testcase", classname="lossfns.conformance", name="(stopped)")
            ElementTree.SubElement(case, "error", message=self.stopped)
        return ElementTree.tostring(suite, encoding="unicode")


def number(x: float) -> float | str | None:
    """Return a float as JSON has it: null for what was not measured, text for infinity."""
    return None if math.isnan(x) else str(x) if math.isinf(x) else x


def measured(r: Result) -> str:
    """Return the deviation of a check beside its tolerance, or "" if it has no number."""
    if math.isnan(r.tolerance):
        return ""
    error = "0" if r.error == 0 else f"{r.error:.1e}"
    return f"{error} {'≤' if r.error <= r.tolerance else '>'} {r.tolerance:g}"


def remark(r: Result) -> str:
    """Return the text for one line of the table: what a check says if it holds, else what was seen."""
    return r.says if r.verdict in ("pass", "xpass") else printable(r.seen)


def explanation(r: Result) -> list[tuple[str, str]]:
    """Return the details of a check that does not hold, each with its label."""
    noise = "" if math.isnan(r.noise) or not r.noise else f", noise {r.noise:.1e}"
    bug = ALL_BUGS.get(r.bug)
    details = {
        "seen": r.seen,
        "number": f"{measured(r)}{noise}" if measured(r) else "",
        "bug": f"{r.bug}: {bug.description}." if bug else "",
        "as in": ", ".join(bug.sources) if bug else "",
    }
    return [(label, printable(text)) for label, text in details.items() if text]
