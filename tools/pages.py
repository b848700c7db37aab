"""A page for each loss, and their index: docs/losses, from the functions, the table of other frameworks and notes.toml.

python -m tools.pages write    write the pages and the pictures
python -m tools.pages check    say whether the pages are up to date

A docstring has the equation, the settings, the columns and the statistics. The code is that of the function and of the
equations it uses. The call, its gradient and the numbers at step zero are computed here. ``notes.toml`` has what no
function knows: when to use the loss, what it costs, and what went wrong with it elsewhere.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import textwrap
import tomllib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import lossfns
from lossfns import Loss
from lossfns.describe import families, makers, peers, presets
from lossfns.plot import curves
from lossfns.plot.family import named_in, parts, parts_of
from tools.docstrings import Doc, read_doc

DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "losses"
MARK = "<!-- Written by `python -m tools.pages write`. Do not edit. -->"

COLUMNS = {
    "weights": ("[B, T]", "your mask: 1 where a token is trained, 0 elsewhere"),
    "advantages": ("[B] or [B, T]", "rewards: [`group_advantages`](../advantages.md), `gae`, or your own"),
    "old_logprobs": ("[B, T]", "the trainer's policy before this update"),
    "ref_logprobs": ("[B, T]", "the frozen reference model"),
    "sampler_logprobs": ("[B, T]", "the inference engine that sampled"),
    "teacher_logprobs": ("[B, T] or [B, T, K]", "the teacher, at the same tokens"),
    "groups": ("[B]", "the prompt that a sequence answers, as a number"),
    "labels": ("[B]", "1 for a desirable answer, 0 for an undesirable one"),
    "rewards": ("[B]", "the score of each sequence"),
    "reference_point": ("[B]", "an estimate of KL(π‖ref): `kto_reference_point`, or 0"),
    "target_margin": ("[B]", "by how much the chosen side should win"),
    "returns": ("[B, T]", "`gae`, or discounted rewards"),
    "old_values": ("[B, T]", "the value head before this update"),
    "entropy": ("[B, T]", "the model, in the same pass: [entropy](../entropy.md)"),
    "sum_square_probs": ("[B, T]", "the model, in the same pass: [entropy](../entropy.md)"),
}
"""For each column its shape in the padded form, and who supplies it."""

TRUST = ("ppo", "dapo", "sapo")
"""Losses in the picture of trust regions, which the README shows."""


# The sections of a page


def page(name: str, notes: dict[str, Any]) -> str:
    """Return the page of a loss."""
    make = makers()[name]
    doc, note = read_doc(make), notes.get(name, {})
    loss = presets()[name]() if name in presets() else None
    sections = [
        f"# {name}\n\n{MARK}\n\n{linked(doc.summary)}",
        linked(rst_table(doc.body)),
        when(note),
        code(make),
        call(name, doc, loss),
        columns(doc, loss),
        picture(name, loss),
        step_zero(loss),
        statistics(doc),
        settings(make, doc),
        elsewhere(name),
        pitfalls(note),
        references(make),
    ]
    return "\n\n".join(section.strip() for section in sections if section.strip()) + "\n"


def linked(text: str) -> str:
    """Return prose with its papers as links, and code in the marks of Markdown."""
    text = text.replace("``", "`")
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def rst_table(text: str) -> str:
    """Return prose in which a simple table of reStructuredText is one of Markdown."""

    def converted(match: re.Match[str]) -> str:
        width = len(match[1])
        rows = [(line[:width].strip(), line[width:].strip()) for line in match[2].splitlines()]
        return table(("elsewhere", "here"), rows)

    return re.sub(r"^(=+ )=+\n(.*?)\n=+ =+$", converted, text, flags=re.DOTALL | re.MULTILINE)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def when(note: dict[str, Any]) -> str:
    rows = [f"**{title}** {linked(note[key])}" for key, title in WHEN.items() if key in note]
    return "\n\n".join(rows)


WHEN = {"use": "When to use it.", "avoid": "When not.", "cost": "Cost."}


def code(make: Callable[..., Any]) -> str:
    """Return the source of a loss, and of the equations that it names."""
    own = [make, *(x for x in named_in(inspect.unwrap(make)) if is_equation(x) or is_helper(x))]
    equations = [function for function in equations_of(make) if function not in own]
    blocks = [without_docstring(inspect.unwrap(f)) for f in [*dict.fromkeys(own), *equations]]
    return "## The code\n\n```python\n" + "\n\n\n".join(blocks) + "\n```"


def is_equation(x: Any) -> bool:
    return inspect.isfunction(x) and x.__module__ in ("lossfns.terms", "lossfns.regions") and id(x) in parts()


def is_helper(x: Any) -> bool:
    """Return whether a function is shared by the losses of a family and no public loss itself."""
    return inspect.isfunction(x) and x.__module__.startswith("lossfns.losses") and x.__name__ not in makers()


def equations_of(make: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Return the functions of ``terms`` and ``regions`` that a loss uses through others, in their order there."""
    names = parts_of(make)
    modules = (lossfns.terms, lossfns.regions)
    return [getattr(m, n) for m in modules for n in names if is_equation(getattr(m, n, None))]


def without_docstring(function: Callable[..., Any]) -> str:
    """Return the source of a function without its decorators and its docstring."""
    lines = textwrap.dedent(inspect.getsource(function)).splitlines()
    node = ast.parse("\n".join(lines)).body[0]
    assert isinstance(node, ast.FunctionDef)
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        del lines[first.lineno - 1 : first.end_lineno]
    return "\n".join(lines[node.lineno - 1 :]).strip().replace("\n\n\n", "\n\n").replace(":\n\n", ":\n", 1)


BATCH, MASK = "[[-1.2, -0.4, -2.0], [-0.7, -1.5, -0.9]]", "[[1, 1, 1], [1, 1, 0]]"
"""The logprobs and the mask of the call on a page: two sequences of three tokens, padded."""

EXAMPLES = {
    "advantages": "[1.0, -1.0]",
    "old_logprobs": "[[-1.3, -0.5, -1.7], [-0.8, -1.2, -0.9]]",
    "ref_logprobs": "[[-1.4, -0.6, -1.9], [-0.6, -1.3, -1.1]]",
    "sampler_logprobs": "[[-1.25, -0.45, -1.8], [-0.75, -1.3, -0.95]]",
    "teacher_logprobs": "[[-0.8, -0.3, -1.0], [-0.9, -1.1, -1.4]]",
    "groups": "[0, 0]",
    "labels": "[1.0, 0.0]",
    "rewards": "[1.0, 0.0]",
    "reference_point": "[0.05, 0.05]",
    "target_margin": "[0.5, 0.5]",
    "returns": "[[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]",
    "old_values": "[[-1.0, -0.5, -1.5], [-0.5, -1.0, -1.0]]",
    "entropy": "[[1.1, 0.4, 2.2], [0.6, 1.9, 0.8]]",
    "sum_square_probs": "[[0.4, 0.7, 0.2], [0.6, 0.3, 0.5]]",
}
"""The columns of the call on a page."""


def call(name: str, doc: Doc, loss: Loss | None) -> str:
    """Return a call that prints the loss and its gradient; the docstring's own example for a loss of another shape."""
    if loss is None or loss.rows == "targets" or not set(loss.reads) <= set(EXAMPLES):
        imports = f">>> from lossfns import {', '.join(public_names(doc.example, name))}\n"
        return f"## A call\n\n```python\n{imports}{doc.example.strip()}\n\n```" if doc.example else ""
    columns = {c: EXAMPLES[c] for c in loss.reads}
    names = [f"{c}=torch.tensor({text})" for c, text in columns.items()]
    kind = "outputs of the head" if loss.output == "scores" else "logprobs of the targets"
    lines = [
        ">>> import torch",
        f">>> from lossfns import {name}",
        f">>> logprobs = torch.tensor({BATCH}, requires_grad=True)  # {kind}, [B, T]",
        f">>> mask = torch.tensor({MASK})  # 0: a token that is not trained",
    ]
    if names:
        lines.append(f">>> loss, metrics = {name}().padded(logprobs, mask,")
        lines += [f"...     {text}," for text in names[:-1]] + [f"...     {names[-1]})"]
    else:
        lines.append(f">>> loss, metrics = {name}().padded(logprobs, mask)")
    logprobs, total, _ = evaluate(loss, {c: ast.literal_eval(text) for c, text in columns.items()})
    total.backward()
    lines += [">>> loss.backward()", ">>> round(loss.item(), 4)", repr(round(total.item(), 4)), ">>> logprobs.grad"]
    lines += repr(logprobs.grad).splitlines()
    pairs = " Row 0 is the chosen side, row 1 the rejected one." if loss.rows == "pairs" else ""
    forms = "The same object takes datums and packed tensors, and compiles to one kernel: [loop](../loop.md)."
    return "## A call\n\n```python\n" + "\n".join(lines) + f"\n\n```\n\n{forms}{pairs}"


def public_names(example: str, name: str) -> list[str]:
    """Return the names of the library that an example uses and does not import itself."""
    imported = re.findall(r"import (.*)", example)
    used = [word for word in dict.fromkeys(re.findall(r"\w+", example)) if inspect.isfunction(vars(lossfns).get(word))]
    return sorted({name, *used} - {each.strip() for line in imported for each in line.split(",")})


def evaluate(loss: Loss, columns: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Return the logprobs of the batch, and the loss and the metrics with these columns."""
    logprobs = torch.tensor(ast.literal_eval(BATCH), requires_grad=True)
    tensors = {name: torch.tensor(x) for name, x in columns.items()}
    return logprobs, *loss.padded(logprobs, torch.tensor(ast.literal_eval(MASK)), **tensors)


def columns(doc: Doc, loss: Loss | None) -> str:
    if loss is None:
        return f"## What it reads\n\n{linked(doc.reads)}" if doc.reads else ""
    rows = [(f"`{c}`", *COLUMNS[c]) for c in ("weights", *loss.reads)]
    text = table(("column", "shape, padded", "who supplies it"), rows)
    unit = {"pairs": "Rows 2i and 2i + 1 are the chosen and the rejected side of a pair.",
            "sequences": "Its rows are sequences: one term for each.",
            "targets": "Each position has K candidate targets."}.get(str(loss.rows), "")  # fmt: skip
    return f"## What it reads\n\n{text}\n\nNone of them has a default. {unit}".rstrip()


def picture(name: str, loss: Loss | None) -> str:
    if loss is None or kind_of(loss) is None:
        return ""
    weigh = str(loss.knobs.get("weigh", ""))
    lines = [f"## Pictures\n\n![Value and slope of {name}](pictures/{name}.svg)"]
    if kind_of(loss) in (curves.is_policy, curves.is_supervised):
        lines.append(
            "The coefficient of a token against the length of its sequence, for each weighing "
            f"(the default here is `{name_of(loss.knobs.get('weigh')) or weigh}`):\n\n"
            "![Coefficient of a token by weighing](pictures/weighings.svg)"
        )
    return "\n\n".join([*lines, f"`lossfns plot {name} NAME ...` draws it beside other losses."])


def name_of(x: Any) -> str:
    return getattr(x, "name", "")


def kind_of(loss: Loss) -> Callable[[Loss], bool] | None:
    kinds = (curves.is_policy, curves.is_preference, curves.is_unpaired, curves.is_supervised)
    return next((kind for kind in kinds if kind(loss)), None)


def step_zero(loss: Loss | None) -> str:
    """Return the numbers of the batch with all policies equal."""
    if loss is None or loss.rows == "targets" or loss.output != "logprobs" or not set(loss.reads) <= set(EXAMPLES):
        return ""
    policies = [c for c in loss.reads if c.endswith("_logprobs")]
    if not policies:
        return ""
    columns = {c: ast.literal_eval(BATCH if c in policies else EXAMPLES[c]) for c in loss.reads}
    if "reference_point" in columns:
        columns["reference_point"] = [0.0, 0.0]
    _, total, metrics = evaluate(loss, columns)
    shown = {"loss": total.item()} | {k: v for k, v in metrics.items() if k not in COUNTS}
    rows = [(f"`{k}`", f"{v:.4g}") for k, v in shown.items()]
    return (
        "## At step zero\n\nThese are the numbers of the batch of the call, with all policies equal to the current "
        "one. The loss depends on the batch. Ratios, log-ratios and KLs do not: if they have other values in your "
        "first step, two policies differ, in temperature, template, mask or frame.\n\n"
        + table(("metric", "value"), rows)
    )


COUNTS = ("count", "tokens", "sequences", "sequences_empty", "denominator", "pairs", "datums", "loss")
"""The metrics that are not shown at step zero: counts, and the loss itself."""


def statistics(doc: Doc) -> str:
    if not doc.statistics:
        return ""
    rows = [(f"`{name}`", linked(text)) for name, text in doc.statistics.items()]
    return f"## Metrics\n\n{table(('metric', 'meaning'), rows)}"


def settings(make: Callable[..., Any], doc: Doc) -> str:
    if not doc.settings:
        return ""
    parameters = inspect.signature(make).parameters
    rows = []
    for names, text in doc.settings.items():
        defaults = [parameters[n].default for n in names.split(", ") if n in parameters]
        default = ", ".join(f"`{shown(x)}`" for x in defaults if x is not inspect.Parameter.empty) or "needed"
        rows.append((f"`{names}`", default, linked(text)))
    return f"## Settings\n\n{table(('setting', 'default', 'meaning'), rows)}"


def shown(x: Any) -> str:
    return x.name if hasattr(x, "name") else x.__name__ if hasattr(x, "__name__") else repr(x)


def elsewhere(name: str) -> str:
    rows = [row for row in peers() if name in re.findall(r"\w+", row["call"])]
    if not rows:
        return ""
    cells = [
        (row["framework"], row["setting"], f"`{row['call']}`", verdict(row), f"{row['ours']:.6g}, {row['peer']:.6g}")
        for row in rows
    ]
    head = ("framework", "setting", "here", "verdict", "loss here, there")
    return f"## In other frameworks\n\n{table(head, cells)}\n\nThe inputs of the numbers: [rosetta](../rosetta.md)."


def verdict(row: Any) -> str:
    """Return the verdict of a row of the table of frameworks, with its reason."""
    return row["verdict"] + (f": {row['why']}" if row["why"] else "")


def pitfalls(note: dict[str, Any]) -> str:
    items = [f"- {linked(p['text'])} ([{p['where']}]({p['link']}))" for p in note.get("pitfalls", [])]
    return "## What went wrong elsewhere\n\n" + "\n".join(items) if items else ""


def references(make: Callable[..., Any]) -> str:
    papers = dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{5})", inspect.getdoc(make) or ""))
    lines = [f"- [arXiv:{paper}](https://arxiv.org/abs/{paper})" for paper in papers]
    module = make.__module__.replace(".", "/")
    return "## References\n\n" + "\n".join([*lines, f"- The code: `{module}.py`"])


# The index and the files


def index() -> str:
    lines = [
        "# Losses",
        MARK,
        "Each loss has a page. `lossfns list` prints this list, and `lossfns describe NAME` prints a page.",
    ]
    for family, members in families().items():
        rows = [(f"[`{name}`]({name}.md)", linked(read_doc(makers()[name]).summary)) for name in members]
        about = (sys.modules[makers()[members[0]].__module__].__doc__ or "").partition("\n\n")[0]
        heading = f"## {family.replace('_', ' ').capitalize()}"
        lines += [heading, linked(about), table(("loss", "equation"), rows)]
        if any(parts_of(makers()[name]) for name in members):
            lines.append(f"![Parts of these losses](pictures/family_{family}.svg)")
    return "\n\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Return the text of each file by its name."""
    notes = tomllib.loads((FOLDER / "notes.toml").read_text(encoding="utf-8"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"index.md": index(), **{f"{name}.md": page(name, notes) for name in makers()}}


def write_pictures() -> None:
    from lossfns.plot import family, figures

    folder = FOLDER / "pictures"
    folder.mkdir(exist_ok=True)
    drawn = {"kl": figures.plot_kl, "weighings": figures.plot_weighings, "advantages": figures.plot_advantages}
    drawn["trust"] = lambda: figures.plot_losses([presets()[name]() for name in TRUST])
    for name, make in presets().items():
        if kind_of(make()) is not None:
            drawn[name] = lambda make=make: figures.plot_losses([make()])
    for each, members in families().items():
        if any(parts_of(makers()[name]) for name in members):
            drawn[f"family_{each}"] = lambda each=each: family.plot_family(each)
    for name, plot in drawn.items():
        figures.save(plot(), folder / f"{name}.svg")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m tools.pages``. Return 1 if ``check`` finds a page that is out of date."""
    p = argparse.ArgumentParser(prog="python -m tools.pages", description=__doc__.splitlines()[0])
    p.add_argument("action", choices=("write", "check"))
    args = p.parse_args(argv)
    texts = pages()
    stale = [name for name, text in texts.items() if not same(FOLDER / name, text)]
    if args.action == "check":
        print("\n".join(f"out of date: docs/losses/{name}" for name in stale) or "up to date")
        return 1 if stale else 0
    for name, text in texts.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    write_pictures()
    return 0


def same(file: Path, text: str) -> bool:
    """Return whether a file exists and has this text."""
    return file.exists() and file.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
