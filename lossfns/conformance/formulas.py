"""The services' built-in losses as data: the term and the gradient of one token, the fields, and the settings.

The expressions are Python, of numbers: ``lp`` is the token's logprob, ``q`` its old logprob (the field ``logprobs``),
``A`` its advantage, ``w`` its weight, ``r = exp(lp - q)``. ``s = exp(mean(lp - q))``, the mean over the tokens of the
datum whose ``sequence_ratio_mask`` is not 0. The loss is the sum of the terms over all tokens of all datums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lossfns.export.builtins import BUILTINS, CLIP


class Formula(NamedTuple):
    """The term of one token, and its derivative with respect to the token's logprob."""

    term: str
    gradient: str


FORMULAS = {
    "cross_entropy": Formula("-w * lp", "-w"),
    "importance_sampling": Formula("-r * A", "-r * A"),
    "ppo": Formula("-min(r * A, clip(r, low, high) * A)", "-r * A if r * A <= clip(r, low, high) * A else 0"),
    "cispo": Formula("-clip(r, low, high) * A * lp", "-clip(r, low, high) * A"),
    "dro": Formula("-(A * lp - beta / 2 * (lp - q) ** 2)", "-A + beta * (lp - q)"),
    "gspo": Formula("-min(s * A, clip(s, low, high) * A)", "-s * A if s * A <= clip(s, low, high) * A else 0"),
}
"""Name of the ``loss_fn`` → formula. [N, K] targets have a term for each target; only cross_entropy takes them."""


def fields(loss: str) -> tuple[str, ...]:
    """Return the fields that a datum of the loss has beside target_tokens."""
    return ("weights",) if loss == "cross_entropy" else BUILTINS[loss].required


def settings(loss: str) -> dict[str, Any]:
    """Return the keys of the ``loss_fn_config`` with their defaults; None where the services publish none."""
    knobs = BUILTINS[loss].preset().knobs
    if loss == "gspo":
        return dict.fromkeys(CLIP)
    clip = dict(zip(CLIP, knobs["clip"])) if "clip" in knobs else {}
    return clip | ({"beta": knobs["beta"]} if "beta" in knobs else {})


def as_data() -> dict[str, Any]:
    """Return the formulas as plain JSON values."""
    return {
        "reduction": "sum over all tokens of all datums; divided by nothing",
        "metric": "loss:sum",
        "losses": {
            name: {**formula._asdict(), "fields": list(fields(name)), "loss_fn_config": settings(name)}
            for name, formula in FORMULAS.items()
        },
    }


def table() -> str:
    """Return the formulas as a table in Markdown."""
    rows = ["| `loss_fn` | term of a token | ∂L/∂lp | fields | `loss_fn_config` |", "| --- | --- | --- | --- | --- |"]
    for name, formula in FORMULAS.items():
        given = ", ".join(f"`{key}` {'–' if x is None else f'{x:g}'}" for key, x in settings(name).items())
        keys = ", ".join(f"`{key}`" for key in fields(name))
        cells = (f"`{name}`", f"`{formula.term}`", f"`{formula.gradient}`", keys, given)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)
