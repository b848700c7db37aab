"""``report.html`` of a run: curves, samples, a look at a batch, config, environment, and the command to repeat it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lossfns.train.charts import Line, smooth
from lossfns.train.config import CONFIG_TOML
from lossfns.train.options import to_toml, with_effect
from lossfns.train.page import facts, figure, key, page, table, text
from lossfns.train.record import EMPTY, Record, best, changing, rises, values_of
from lossfns.train.run import REPORT, replaced


def write_report(record: Record) -> str:
    """Write the report into the folder of the run, and return its path."""
    content = report(record)
    with replaced(record.folder, REPORT) as path:
        path.write_text(content, encoding="utf-8", errors="backslashreplace")
    return str(record.folder / REPORT)


def report(record: Record) -> str:
    """Return the report as the text of an HTML file."""
    options = record.config["options"]
    command = shlex.join(["lossfns", "train", "--config", str(record.folder.resolve() / CONFIG_TOML)])
    sections = [
        f"<h1>{text(title_of(record))}</h1>",
        f'<p class="dim"><code>{text(record.config.get("loss", ""))}</code></p>',
        headline(record),
        section("Curves", curves(record)),
        section("Samples on held-out prompts", samples(record.result.get("samples", []))),
        section("What the loss does to a batch", whole_batch(record.batch)),
        section("Options", f"<pre>{text(to_toml(with_effect(options)))}</pre>"),
        section("Environment", table(environment(record.config), numbers=False)),
        section("Repeat it", f"<pre>{text(command)}</pre>"),
    ]
    return page(title_of(record), "\n".join(filter(None, sections)))


def section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>\n{body}" if body else ""


def title_of(record: Record) -> str:
    options = record.config["options"]
    model = f"{options['model']}: " if options.get("model") else ""
    return f"{model}{options.get('loss')} on {options.get('data') or 'built-in data'}"


def headline(record: Record) -> str:
    """Return the main numbers: the held-out measure before and after, steps and time."""
    name, points = record.measure, record.held_out()
    pairs: list[tuple[str, object]] = []
    if name and len(points) > 1:
        before, after = points[0][1], points[-1][1]
        change = f"{before:.3f} → {after:.3f}"
        pairs = [(f"held-out {spoken(name)}, before → after", change), ("change", f"{after - before:+.3f}")]
    large = len(pairs)
    if len(points) > 2:
        step, value = best(record)
        pairs.append((f"best ({'highest' if rises(name or '') else 'lowest'})", f"{value:.3f} after {step} steps"))
    tokens = sum(row.get("tokens", 0) for row in record.history)
    pairs += [("state", record.state), ("steps", f"{len(record.history):,}"), ("time", duration(record.seconds))]
    pairs += [("tokens trained", f"{tokens:,.0f}")] if tokens else []
    return facts(pairs, large)


def spoken(name: str) -> str:
    """Return the name of a metric in words."""
    return name.replace("_", " ")


def duration(seconds: float) -> str:
    """Return a time in words.

    >>> duration(75.2), duration(4000)
    ('1 min 15 s', '1 h 6 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


# Curves


def curves(record: Record) -> str:
    """Return the charts: the held-out measure first, then each metric that is not constant, the last phase first."""
    held_out, name = record.held_out(), record.measure
    metrics = changing(record)
    figures = []
    if len(held_out) > 1 and name:
        same = (record.main_phase, name)
        lines = [*(trained(record, *same) if same in metrics else []), Line(held_out, "c1 dashed", marks=True)]
        figures.append(figure(f"held-out {spoken(name)}", f"{held_out[0][1]:.3f} → {held_out[-1][1]:.3f}", lines))
        metrics = [each for each in metrics if each != same]
    many = len(record.phases) > 1
    for phase, metric in metrics:
        lines = trained(record, phase, metric)
        means = [y for _, y in lines[-1].points]
        note = f"{means[0]:.3g} → {means[-1]:.3g}"
        figures.append(figure(f"{phase}: {metric}" if many else metric, note, lines))
    entries = [("c0", "training, running mean"), ("c0 faint", "training, each step"), ("c1 dashed", "held out")]
    return f'{key(entries)}<div class="grid">{"".join(figures)}</div>' if figures else ""


def trained(record: Record, phase: str, name: str) -> list[Line]:
    """Return two lines of a training metric: its values, and their running mean."""
    points = values_of(record.history, phase, name)
    return [Line(points, "c0 faint"), Line(smooth(points), "c0")]


# Samples


def samples(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the samples before and after training."""

    def part(name: str, content: str) -> str:
        shown = content or (" " if name == "prompt" else EMPTY)
        return f"<div><p>{text(name)}</p><pre>{text(shown)}</pre></div>"

    return "".join(f'<div class="sample">{"".join(part(*pair) for pair in row.items())}</div>' for row in rows)


# A batch


def whole_batch(content: Mapping[str, Any]) -> str:
    """Return the gradient report of a batch. Of a file that was changed by hand, only that it is damaged is said."""
    try:
        return batch(content)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return '<p class="dim">batch.json is damaged.</p>'


def batch(content: Mapping[str, Any]) -> str:
    """Return the gradient report of a batch, and its tokens coloured by their gradients."""
    if not content:
        return '<p class="dim">The batch is looked at after the first step, and when the run ends or is stopped.</p>'
    place = f"The batch of step {content['step']} of {content['phase']}"
    if "reason" in content:
        return f'<p class="dim">{text(place)} cannot be looked at: {text(content["reason"])}</p>'
    totals = [
        ("loss", f"{float(content['loss']):.4g}"),
        ("Σ|g|", f"{float(content['l1']):.4g}"),
        ("of Σ|g|, opposite signs cancel", f"{float(content['cancellation']):.0%}"),
    ]
    tokens, columns = content["tokens"], content["columns"]
    largest = max((abs(float(g)) for row in content["sequences"] for g in row["gradient"]), default=0.0)
    most = max((float(c) for row in content["sequences"] for c in row.get("coefficient", [])), default=0.0)
    looks = [("c0", "made more likely (g < 0)"), ("c1", "made less likely (g > 0)")]
    return (
        f"<p>{text(place)}, under the weights after it. g is the gradient of the loss with respect to the logprob of a "
        f"token. Opposite signs cancel in the sum over all tokens: 0% if all g have one sign, 100% if they add up to 0."
        f"</p>{facts(totals)}"
        f'<div class="grid"><div>{table(tokens[1:], head=tokens[0])}</div>'
        f"<div>{effects(columns[1:]) if columns[1:] else ''}</div></div>"
        f"<p>The stronger the colour of a token, the larger |g|. The bar below it is its coefficient, the factor of "
        f"its term in the loss: 1/N in a mean over N tokens. Masked tokens are grey, clipped ones are crossed out.</p>"
        f"{key(looks)}"
        f'<div class="grid">{"".join(strip(row, largest, most) for row in content["sequences"])}</div>'
    )


def effects(rows: Sequence[Sequence[object]]) -> str:
    """Return how much the gradients depend on each column of the loss."""
    return (
        f"{table(rows, head=('without', 'g changes by', 'of Σ|g|'))}"
        '<p class="dim">Without a column: advantages of 0, or old and reference logprobs that equal the present ones. '
        "Effects overlap, so they need not add up to 100%.</p>"
    )


def strip(row: Mapping[str, Any], largest: float, most: float) -> str:
    """Return a sequence of a batch: a line with its numbers, then its tokens with their colours and bars."""
    active = [i for i, on in enumerate(row["active"]) if on]
    side = f", {row['side']}" if row["side"] else ""
    notes = [f"datum {row['datum']}{side}", f"{float(row['share']):.1%} of Σ|g|"]
    for name, words in (("advantage", "advantage"), ("coefficient", "coefficient of a token")):
        values = sorted({float(f"{float(row[name][i]):.3g}") for i in active}) if name in row else []
        if values:
            notes.append(f"{words} {' to '.join(f'{x:g}' for x in (values[0], values[-1])[: len(values)])}")
    before = f"<span class=off>… {row['before']} tokens … </span>" if row["before"] else ""
    after = f"<span class=off> … {row['after']} tokens more</span>" if row["after"] else ""
    tokens = "".join(token(row, i, largest, most) for i in range(len(row["tokens"])))
    prompt = f"<span class=off>{mark(row['prompt'])}</span>" if row["prompt"] else ""
    return f'<div><p class="dim">{text(", ".join(notes))}</p><p class="strip">{before}{prompt}{tokens}{after}</p></div>'


def token(row: Mapping[str, Any], i: int, largest: float, most: float) -> str:
    """Return a token with its gradient as a colour, its coefficient as a bar, and its numbers to hover over."""
    shown = mark(row["tokens"][i])
    if not row["active"][i]:
        return f"<span class=off>{shown}</span>"
    g = float(row["gradient"][i])
    names = [name for name in ("logprob", "advantage", "coefficient", "gradient") if name in row]
    numbers = ", ".join(f"{name} {float(row[name][i]):.4g}" for name in names)
    looks = ("c0" if g < 0 else "c1") + (" clipped" if "clipped" in row and row["clipped"][i] else "")
    strength = round(50 * abs(g) / largest) if largest and math.isfinite(g) else 0
    bar = 3 * float(row["coefficient"][i]) / most if most and "coefficient" in row else 0
    style = f"--a:{strength}%;--u:{max(0.0, bar):.1f}px"
    return f'<span class="{looks}" style="{style}" title="{escape(numbers)}">{shown}</span>'


def mark(piece: str) -> str:
    """Return the text of a token, with a sign for a line break and for an empty text."""
    return text(piece).replace("\n", "↵\n") or "·"


# Config and environment


def environment(config: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Return the model, the machine and the versions by name."""
    rows = {**config["versions"], **config.get("machine", {})}
    model = {name: x for name, x in config["model"].items() if x not in (None, "") and not isinstance(x, dict)}
    rows |= {f"model: {spoken(name)}": x for name, x in model.items()}
    rows |= {f"SHA-256 of {name}": x for name, x in config["sha256"].items() if x}
    return list(rows.items())
