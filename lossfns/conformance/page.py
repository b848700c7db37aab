"""The report of ``lossfns conformance`` as one HTML page, without scripts or anything else to load."""

from __future__ import annotations

from html import escape

from lossfns.conformance.base import Result
from lossfns.conformance.report import MARKS, VERDICTS, Report, explanation, measured, remark
from lossfns.version import __version__

STYLE = """
:root { color-scheme: light dark; --line: #8884; --ok: #1a7f37; --bad: #cf222e; --unsure: #9a6700; --dim: #6e7781 }
@media (prefers-color-scheme: dark) { :root { --ok: #3fb950; --bad: #ff7b72; --unsure: #d29922; --dim: #8b949e } }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; margin-bottom: 0.2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: 0.25rem 0.6rem }
tr { border-top: 1px solid var(--line) } th { font-weight: 600 }
.n { white-space: nowrap; font-variant-numeric: tabular-nums }
h1, p, td:last-child, code { overflow-wrap: anywhere }
code { font: 0.92em ui-monospace, monospace } .dim { color: var(--dim) }
.pass { color: var(--ok) } .fail, .error { color: var(--bad); font-weight: 600 }
.inconclusive, .xfail, .xpass { color: var(--unsure) } .unsupported { color: var(--dim) }
.sum { display: flex; flex-wrap: wrap; gap: 0.4rem 1.6rem; margin: 1rem 0; padding: 0 } .sum li { list-style: none }
.sum b { font-size: 1.3rem } .box { border-left: 3px solid var(--bad); padding: 0.1rem 0 0.1rem 0.9rem; margin: 1rem 0 }
.box p { margin: 0.25rem 0 } .stop { border-color: var(--unsure) }
@media (max-width: 44rem) {
  .checks td, .checks th { display: inline-block; padding: 0.1rem 0.4rem 0.1rem 0; white-space: normal }
  .checks tr { display: block; padding: 0.3rem 0 } .checks td:last-child { display: block }
  .checks :is(td, th):empty, .checks th:first-child { display: none }
}
""".strip()


def page(report: Report) -> str:
    """Return the report as the text of an HTML file."""
    counts = "".join(
        f'<li><b class="{verdict}">{n}</b> {verdict}</li>' for verdict, n in report.counts.items() if n
    )  # fmt: skip
    stopped = (
        f'<div class="box stop"><p>The run was stopped: {escape(report.stopped)}.</p></div>' if report.stopped else ""
    )
    broken = "".join(box(r) for r in report.broken)
    rows = "".join(line(r) for r in report.results)
    meanings = "".join(
        f'<tr><td class="{v}">{MARKS[v]}</td><td>{escape(words)}</td></tr>'
        for v, words in VERDICTS.items() if report.counts[v]
    )  # fmt: skip
    facts = {
        "server": report.server, "model": report.base_model, "SDK": f"tinker {report.sdk}", "level": report.level,
        "suite": f"lossfns {__version__}", "date": report.date, "time": f"{report.seconds:.0f} s",
        "noise": f"{report.noise:.1g} between identical experiments, {report.rounding:.1g} between roundings",
    }  # fmt: skip
    about = "".join(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>" for name, text in facts.items() if text)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Conformance of {escape(report.server)}</title><style>{STYLE}</style></head><body>
<h1>{escape(report.headline)}</h1>
<p class="dim">A black-box test of <code>{escape(report.server)}</code> through the SDK <code>tinker</code>
{escape(report.sdk)}, by <code>lossfns conformance</code>{f", {report.date}" if report.date else ""}.</p>
<ul class="sum">{counts}</ul>
{stopped}{f"<h2>What does not hold</h2>{broken}" if broken else ""}
<h2>Every check</h2>
<table class="checks"><tr><th></th><th>check</th><th>deviation</th><th></th></tr>{rows}</table>
<h2>The run</h2>
<table>{about}</table>
<h2>Words</h2>
<table>{meanings}</table>
<p class="dim">A deviation is relative, unless the line says otherwise; beside it stands the largest one that passes.
Effects of gradients are compared by the change of logprobs that they make. A constant factor of all gradients shows
only where the server reports grad_norm.</p>
</body></html>
"""


def box(r: Result) -> str:
    """Return a check that does not hold, with what was seen and the bug that it means."""
    details = "".join(f'<p><span class="dim">{label}</span> {escape(text)}</p>' for label, text in explanation(r))
    return (
        f'<div class="box"><p><span class="{r.verdict}">{MARKS[r.verdict]}</span> <code>{r.check}</code>: '
        f"{escape(r.says)}</p>{details}</div>"
    )


def line(r: Result) -> str:
    """Return the row of a check."""
    says = escape(r.says if r.verdict in ("pass", "xpass", "fail", "error") else f"{r.says} {remark(r)}")
    return (
        f'<tr><td class="{r.verdict}">{MARKS[r.verdict]}</td><td class="n"><code>{r.check}</code></td>'
        f'<td class="n">{escape(measured(r))}</td><td>{says}</td></tr>\n'
    )
