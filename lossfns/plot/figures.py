"""Figures of losses, as small multiples that are readable in print, on a dark page and without colours (extra ``viz``).

A figure has no background. Text and axes have a grey that is readable on black and on white, and each line has a dash
of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from lossfns.advantages import group_advantages
from lossfns.errors import LossInputError
from lossfns.loss import Loss
from lossfns.plot import curves
from lossfns.plot.curves import Curve, linspace
from lossfns.terms import k1, k2, k3
from lossfns.weigh import Weighing, fixed_length, sequence_mean, sequence_sum_mean, token_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3f8fd2", "#e08a1e", "#1f9e77", "#d1495b", "#b07cc6", "#8c8c2e", "#5bb5c5", "#a0705a")
DASHES = ("-", "--", "-.", ":", (0, (7, 2, 1, 2, 1, 2)), (0, (1, 1)), (0, (5, 5)), (0, (3, 1, 1, 1, 1, 1)))
GREY = "#7d8590"
STYLE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.color": GREY,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "grid.color": GREY,
    "grid.alpha": 0.2,
    "axes.grid": True,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "lossfns",
}


def style() -> AbstractContextManager[None]:
    """Return the style of all figures, for a ``with`` block."""
    from matplotlib import rc_context

    return rc_context(STYLE)


def panels(columns: int, rows: int = 1, width: float = 3.4, height: float = 2.5) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw(axes: Axes, by_name: dict[str, Curve], attribute: str, *, bounds: Sequence[float] = ()) -> None:
    """Draw the values or the slopes of several curves, each by its name."""
    for i, (name, curve) in enumerate(by_name.items()):
        y = getattr(curve, attribute)
        axes.plot(curve.x, y, label=name, color=COLOURS[i % len(COLOURS)], linestyle=DASHES[i % len(DASHES)])
    for x in bounds:
        axes.axvline(x, color=GREY, linewidth=0.9, linestyle=(0, (2, 3)))
    axes.axhline(0, color=GREY, linewidth=0.7)


def finish(figure: Figure, axes: Axes, count: int, columns: int = 4) -> Figure:
    """Put the names of the curves above the panels if there are several."""
    if count > 1:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(count, columns))
    return figure


# Losses


def plot_losses(losses: Sequence[Loss]) -> Figure:
    """Draw losses of one kind on the same axes: their values and their derivatives.

    Args:
        losses: policy losses, over the ratio; preference losses, over the margin; losses of labelled answers, over the
            log-ratio; or supervised losses, over the probability of the token.

    Raises:
        LossInputError: for a loss of another kind, and for losses of different kinds.
    """
    for is_kind, plot in KINDS:
        if is_kind(losses[0]):
            for loss in losses:
                if not is_kind(loss):
                    got, fix = f"{losses[0].name} and {loss.name}", "Draw them apart."
                    raise LossInputError("losses", "losses of one kind", got, fix)
            with style():
                return plot(losses)
    raise curves.no_picture(losses[0])


def names(losses: Sequence[Loss]) -> list[str]:
    """Return the names of losses, with their settings where two losses have one name."""
    plain = [loss.name for loss in losses]
    return [loss.name if plain.count(loss.name) == 1 else repr(loss) for loss in losses]


def plot_policy(losses: Sequence[Loss]) -> Figure:
    figure, axes = panels(2, 2)
    ratios = linspace(0.02, 2.5, 125)
    bounds = losses[0].knobs.get("clip") or () if len(losses) == 1 else ()
    inside = [x for x in bounds if ratios[0] < x < ratios[-1]]
    for column, (advantage, sign) in enumerate(((1.0, "A = 1"), (-1.0, "A = −1"))):
        by_name = {n: curves.ratio_curve(x, advantage, ratios) for n, x in zip(names(losses), losses, strict=True)}
        draw(axes[0][column], by_name, "value", bounds=inside)
        draw(axes[1][column], by_name, "slope", bounds=inside)
        axes[0][column].set_title(sign)
        axes[1][column].set_xlabel("ratio π / π_old")
    axes[0][0].set_ylabel("loss of a token")
    axes[1][0].set_ylabel("∂ loss / ∂ logprob")
    return finish(figure, axes[0][0], len(losses))


def plot_preference(losses: Sequence[Loss]) -> Figure:
    margins = linspace(-8.0, 8.0, 81)
    by_name = {n: curves.margin_curve(x, margins).from_zero() for n, x in zip(names(losses), losses, strict=True)}
    if len(losses) == 1:
        return two_panels(by_name, "margin, nats", "loss, less that at 0", "∂ loss / ∂ margin")
    by_name = {name: curve.by_slope_at_zero() for name, curve in by_name.items()}
    figure = two_panels(by_name, "margin, nats", "loss, by its slope at 0", "slope, by that at 0")
    for axes, (low, high) in zip(figure.axes, ((-9.0, 9.0), (-3.0, 3.0)), strict=True):
        axes.set_ylim(max(low, axes.get_ylim()[0]), min(high, axes.get_ylim()[1]))
    return figure


def plot_unpaired(losses: Sequence[Loss]) -> Figure:
    x = linspace(-30.0, 30.0, 81)
    by_name = {
        f"{n}, {kind}": curves.log_ratio_curve(loss, label, x)
        for n, loss in zip(names(losses), losses, strict=True)
        for kind, label in (("desirable", 1.0), ("undesirable", 0.0))
    }
    return two_panels(by_name, "log-ratio of the answer, nats", "loss of an answer", "∂ loss / ∂ log-ratio")


def plot_supervised(losses: Sequence[Loss]) -> Figure:
    p = linspace(0.005, 0.995, 100)
    by_name = {n: curves.probability_curve(x, p) for n, x in zip(names(losses), losses, strict=True)}
    figure = two_panels(by_name, "probability of the token", "loss of a token", "∂ loss / ∂ logprob")
    for axes in figure.axes:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -6.0), min(high, 6.0))
    return figure


def two_panels(by_name: dict[str, Curve], x: str, value: str, slope: str) -> Figure:
    figure, axes = panels(2)
    for panel, attribute, label in zip(axes[0], ("value", "slope"), (value, slope), strict=True):
        draw(panel, by_name, attribute)
        panel.set_xlabel(x)
        panel.set_ylabel(label)
    return finish(figure, axes[0][0], len(by_name))


KINDS: tuple[tuple[Callable[[Loss], bool], Callable[[Sequence[Loss]], Figure]], ...] = (
    (curves.is_policy, plot_policy),
    (curves.is_preference, plot_preference),
    (curves.is_unpaired, plot_unpaired),
    (curves.is_supervised, plot_supervised),
)


# KL estimators, weighings, advantages


def plot_kl() -> Figure:
    """Draw k1, k2 and k3 of two Bernoulli distributions: one sample, the exact expected gradient, the variance.

    The policy gives a token the probability p = σ(θ), the reference gives it 1/2. Expectations are sums over both
    tokens, with the samples drawn from the policy.
    """
    with style():
        figure, axes = panels(3)
        log_ratios, thetas = linspace(-2.5, 2.5), linspace(-3.0, 3.0)
        for i, (name, estimate) in enumerate((("k1", k1), ("k2", k2), ("k3", k3))):
            look = {"color": COLOURS[i], "linestyle": DASHES[i], "label": name}
            x = torch.tensor(log_ratios, dtype=torch.float64)
            axes[0][0].plot(log_ratios, estimate(x - 3, torch.full_like(x, -3.0)), **look)  # logprobs below 0
            exact = [expectations(estimate, theta) for theta in thetas]
            axes[0][1].plot(thetas, [gradient for gradient, _ in exact], **look)
            axes[0][2].plot(thetas, [deviation for _, deviation in exact], **look)
        reverse, forward = zip(*map(true_gradients, thetas), strict=True)
        axes[0][1].plot(thetas, reverse, color=GREY, linewidth=4, alpha=0.35, label="of KL(π‖ref)")
        axes[0][1].plot(thetas, forward, color=GREY, linewidth=1, label="of KL(ref‖π)")
        titles = ("estimate from one sample", "expected gradient by θ", "standard deviation")
        for panel, title, x_label in zip(axes[0], titles, ("log π/ref", "θ", "θ"), strict=True):
            panel.set_title(title)
            panel.set_xlabel(x_label)
        return finish(figure, axes[0][1], 5, columns=5)


def expectations(estimate: Callable[..., Any], theta: float) -> tuple[float, float]:
    """Return the expected gradient of an estimator of KL by θ, and its standard deviation, for samples of π."""
    t = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    logprobs = torch.stack([torch.nn.functional.logsigmoid(t), torch.nn.functional.logsigmoid(-t)])
    p, values = logprobs.detach().exp(), estimate(logprobs, torch.full((2,), math.log(0.5), dtype=torch.float64))
    (gradient,) = torch.autograd.grad((p * values).sum(), t)
    mean = (p * values.detach()).sum()
    return gradient.item(), (p * (values.detach() - mean) ** 2).sum().sqrt().item()


def true_gradients(theta: float) -> tuple[float, float]:
    """Return the gradients by θ of KL(π‖ref) and of KL(ref‖π)."""
    p = 1 / (1 + math.exp(-theta))
    return p * (1 - p) * theta, p - 0.5


def plot_weighings() -> Figure:
    """Draw the coefficient of a token over the length of its sequence, in one batch of sequences of many lengths."""
    lengths = [2**i for i in range(2, 12)]
    weighings: dict[str, Weighing] = {
        "token_mean": token_mean,
        "sequence_mean": sequence_mean,
        "sequence_sum_mean": sequence_sum_mean,
        "fixed_length(2048)": fixed_length(2048),
    }
    with style():
        figure, axes = panels(2)
        for i, (name, weigh) in enumerate(weighings.items()):
            one = coefficients(weigh, lengths)
            look = {"color": COLOURS[i], "linestyle": DASHES[i], "label": name}
            axes[0][0].loglog(lengths, one, **look)
            axes[0][1].loglog(lengths, [c * n for c, n in zip(one, lengths, strict=True)], **look)
        for panel, label in zip(axes[0], ("coefficient of a token", "sum over a sequence"), strict=True):
            panel.set_xlabel("length of the sequence, tokens")
            panel.set_ylabel(label)
        return finish(figure, axes[0][0], len(weighings))


def coefficients(weigh: Weighing, lengths: Sequence[int]) -> list[float]:
    """Return the coefficient of one token of each sequence: share over count."""
    from lossfns.losses.supervised import cross_entropy

    n = torch.tensor(lengths)
    logprobs = torch.full((int(n.sum()),), -1.0, dtype=torch.float64, requires_grad=True)
    total, _ = cross_entropy(weigh=weigh).packed(logprobs, torch.ones(len(logprobs)), lengths=n)
    (gradient,) = torch.autograd.grad(total, logprobs)
    return [-g.item() for g in gradient[n.cumsum(0) - 1]]


def plot_advantages(group: int = 8) -> Figure:
    """Draw the advantage of a right and of a wrong answer over the number of right answers in its group."""
    with style():
        figure, axes = panels(2)
        for panel, scale in zip(axes[0], ("std", "none"), strict=True):
            right, wrong = [], []
            for count in range(1, group):
                made = group_advantages([1.0] * count + [0.0] * (group - count), [0] * group, scale=scale)
                right.append(float(made[0]))
                wrong.append(float(made[-1]))
            x = list(range(1, group))
            panel.plot(x, right, "o-", color=COLOURS[0], label="right answer, reward 1")
            panel.plot(x, wrong, "s--", color=COLOURS[1], label="wrong answer, reward 0")
            panel.axhline(0, color=GREY, linewidth=0.7)
            panel.set_title(f'group_advantages(scale="{scale}")')
            panel.set_xlabel(f"right answers in a group of {group}")
            panel.set_ylabel("advantage")
        return finish(figure, axes[0][0], 2)


def save(figure: Figure, path: Any) -> None:
    """Save a figure. The same figure gives the same file: an SVG has no date in it."""
    with style():
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None, dpi=150)
