"""The frame of a page about runs: its style, tables and texts. It loads nothing, runs no script, and escapes texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from lossfns.train import charts

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --dim: #59636e; --line: #d8dee4; --box: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f1318; --ink: #e6edf3; --dim: #9aa5b1; --line: #30363d; --box: #171c22 }
}
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 72rem;
  margin: 0 auto; padding: 1.5rem 1rem 3rem }
h1 { font-size: 1.45rem; line-height: 1.25; margin: 0 0 .3rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
h1, p, td, dd, figcaption { overflow-wrap: anywhere } p { margin: .4rem 0 } .dim { color: var(--dim) }
dl.facts { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: 1rem 0 }
dl.facts dt { color: var(--dim); font-size: .85rem } dl.facts dd { margin: 0; font-variant-numeric: tabular-nums }
dl.facts .large dd { font-size: 1.5rem; line-height: 1.3; font-weight: 600 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1.2rem 1.6rem }
figure { margin: 0; min-width: 0 } figcaption { display: flex; justify-content: space-between; gap: 1rem }
figcaption b { font-weight: 600 } figcaption span { color: var(--dim); font-variant-numeric: tabular-nums }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .3rem 0; padding: 0; list-style: none }
.key i { display: inline-block; width: 1.4rem; border-top: 3px solid var(--c); margin-right: .4rem;
  vertical-align: middle }
.key i.dashed { border-top-style: dashed } .key i.faint { border-top-width: 1px }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { text-align: left; vertical-align: top; padding: .2rem 1.4rem .2rem 0; border-top: 1px solid var(--line) }
th { font-weight: 400; color: var(--dim) } td:not(.n) { min-width: 7rem }
td.n, th.n { text-align: right; white-space: nowrap }
pre, code { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere }
pre { white-space: pre-wrap; background: var(--box); border-radius: 6px; padding: .6rem .8rem; margin: .3rem 0 }
.sample { border-left: 3px solid var(--line); padding-left: .9rem; margin: 0 0 1.2rem; display: grid;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 0 1rem }
.sample p { color: var(--dim); font-size: .85rem; margin: .3rem 0 0 } .sample > div { min-width: 0 }
.strip { font: 13px/1.9 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; margin: .3rem 0 1rem }
.strip span { --a: 0; border-radius: 2px; background: color-mix(in srgb, var(--c, transparent) var(--a), transparent);
  box-shadow: inset 0 calc(-1 * var(--u, 0px)) var(--dim) }
.strip .off { color: var(--dim) } .strip .clipped { text-decoration: line-through }
""".strip()


def page(title: str, body: str) -> str:
    """Return a page as the text of an HTML file."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{text(title)}</title>\n<style>{STYLE}\n{charts.STYLE.strip()}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def text(content: object) -> str:
    """Return text for a page: escaped, and with what cannot be printed as an escape sequence.

    >>> text("<b>" + chr(27) + "[1m")
    '&lt;b&gt;\\\\x1b[1m'
    """
    return escape("".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in str(content)))


def facts(pairs: Iterable[tuple[str, object]], large: int = 0) -> str:
    """Return names with values side by side, the first ``large`` of them in large letters."""
    cells = [
        f"<div{' class=large' if i < large else ''}><dt>{text(name)}</dt><dd>{text(value)}</dd></div>"
        for i, (name, value) in enumerate(pairs)
    ]
    return f'<dl class="facts">{"".join(cells)}</dl>'


def table(rows: Sequence[Sequence[object]], head: Sequence[object] = (), numbers: bool = True) -> str:
    """Return a table. The cells of all columns but the first are numbers, aligned to the right, or texts."""
    side = ' class="n"' if numbers else ""

    def line(cells: Sequence[object], tag: str) -> str:
        rest = "".join(f"<{tag}{side}>{text(cell)}</{tag}>" for cell in cells[1:])
        return f"<tr><th>{text(cells[0])}</th>{rest}</tr>"

    lines = [*([line(head, "th")] if head else []), *(line(row, "td") for row in rows)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def figure(title: str, note: str, lines: Sequence[charts.Line]) -> str:
    """Return a chart with its title, and a note beside it."""
    caption = f"<figcaption><b>{text(title)}</b><span>{text(note)}</span></figcaption>"
    return f"<figure>{caption}{charts.svg(lines, f'{title}: {note}')}</figure>"


def key(entries: Iterable[tuple[str, str]]) -> str:
    """Return the key of a chart: for each line its look and its meaning."""
    items = "".join(f'<li><i class="{look}"></i>{text(meaning)}</li>' for look, meaning in entries)
    return f'<ul class="key">{items}</ul>'
