"""Print what each loss learns in the worlds, or draw some of the paths.

python -m tools.worlds table     # for each loss: the world, the steps, the point, and the distance from it
python -m tools.worlds picture   # write docs/worlds.png (extra ``viz``)
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lossfns as ours
from lossfns import LossWarning, with_kl
from lossfns.loss import Loss
from lossfns.plot.figures import COLOURS, style
from lossfns.testing import worlds
from lossfns.testing.public import presets
from lossfns.testing.worlds import World, learn, lessons
from lossfns.testing.worlds.combined import COMBINED
from lossfns.testing.worlds.others import point_of_rest
from lossfns.testing.worlds.points import balanced, proportional, tilted, towards_reference, two_token_tree

PICTURE = Path("docs/worlds.png")
COLUMNS = 2


def table() -> Iterator[str]:
    """Yield a line for each lesson of each loss."""
    for name in (*presets(), *COMBINED):
        for lesson in lessons(name):
            point = " | ".join(" ".join(f"{p:.3f}" for p in row) for row in lesson.point if len(row) > 1)
            where = f"{lesson.world.name:12} {lesson.steps:3} steps to {point:27}"
            yield f"{name:28} {where} {lesson.miss():.0e}  {lesson.says}"


class Line(NamedTuple):
    """A path, and the probability that theory says it ends at; None if it does not end."""

    label: str
    loss: Loss
    end: float | None


class Panel(NamedTuple):
    """Paths of several losses in one world: the probability of one token of the first node, by steps of this rate."""

    title: str
    world: World
    token: int
    steps: int
    rate: float
    lines: list[Line]


def with_penalties() -> Panel:
    """Return the panel of the KL."""
    arms, ref, rewards = worlds.bandit, worlds.bandit.ref[0], worlds.bandit.rewards
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossWarning)  # with_kl warns of k1, for the reason that the panel shows
        losses = [with_kl(ours.ppo(), 0.5, kl) for kl in (ours.k1, ours.k2, ours.k3)]
    ends = (1.0, tilted(ref, rewards, 0.5)[1], towards_reference(ref, rewards, 0.5)[1])
    labels = ("k1: no effect", "k2: ref·exp(r/β)", "k3: β·ref/(λ − r)")
    title = "Arms drawn anew, with a KL:\nπ of the best arm"
    return Panel(title, arms, 1, 12, 0.8, [Line("no KL", ours.ppo(), 1.0), *map(Line, labels, losses, ends)])


def with_lengths() -> Panel:
    """Return the panel of the length bias."""
    tree = worlds.tree
    ref, weighs = (tree.ref[0], tree.ref[1]), (ours.token_mean, ours.sequence_mean)
    losses = [with_kl(ours.reinforce(weigh=weigh), 0.5, ours.k2) for weigh in weighs]
    ends = [two_token_tree(ref, tree.rewards, 0.5, f, f)[0][0] for f in ((1, 1), (1, 0.5))]
    title = "Answers of 1 and 2 tokens, with a KL:\nπ of the short answer"
    return Panel(title, tree, 0, 24, 0.8, list(map(Line, ("mean over tokens", "over sequences"), losses, ends)))


def on_fixed_samples() -> Panel:
    """Return the panel of bounds."""
    lines = [
        Line("ppo (0.8, 1.2)", ours.ppo(), 0.6),
        Line("dapo (0.8, 1.28)", ours.dapo(), 0.64),
        Line("dppo_tv 0.2", ours.dppo_tv(), 0.7),
        Line("sapo: slows down", ours.sapo(), None),
        Line("cispo: goes on", ours.cispo(), None),
    ]
    return Panel("Arms drawn once:\nπ of the good arm", worlds.two_arms, 0, 40, 0.05, lines)


def imitating() -> Panel:
    """Return the panel of losses with and without a ratio, on fixed samples."""
    cloned = lessons("reinforce")[-1]
    lines = [
        Line("reinforce: μ·r", cloned.loss, cloned.point[0][1]),
        Line("importance_sampling", ours.importance_sampling(), 1.0),
    ]
    title = "Arms drawn once, A = r above 0:\nπ of the best arm"
    return Panel(title, cloned.world, 1, 24, 0.5, lines)


def of_pairs() -> Panel:
    """Return the panel of preferences."""
    made = [ours.dpo(beta=1.0), ours.ipo(beta=1.0), ours.simpo(beta=1.0), ours.orpo(lam=1.0), ours.apo_zero(beta=1.0)]
    lines = [Line(loss.name, loss, point_of_rest(loss, worlds.answers)[0][0]) for loss in made]
    return Panel("Pairs, 69% prefer this answer:\nπ of it", worlds.answers, 0, 40, 0.1, lines)


def of_labels() -> Panel:
    """Return the panel of labels."""
    bco = lessons("bco")[0]
    lines = [Line("kto: the mode", ours.kto(beta=1.0), 1.0), Line("bco: ref·odds", bco.loss, bco.point[0][0])]
    return Panel("Desirable in 80% and 30%:\nπ of the first answer", bco.world, 0, 40, 0.5, lines)


def of_data() -> Panel:
    """Return the panel of likelihoods."""
    data = worlds.letters.old[0] if worlds.letters.old else ()
    lines = [
        Line("dft: the mode", ours.dft(), 1.0),
        Line("sft_phi", ours.sft_phi(), balanced(data, lambda p: p - 1)[0]),
        Line("cross_entropy", ours.cross_entropy(), data[0]),
        Line("focal", ours.focal(), lessons("focal")[-1].point[0][0]),
    ]
    return Panel("Data, 45% have this token:\nπ of it", worlds.letters, 0, 40, 0.4, lines)


def of_teacher() -> Panel:
    """Return the panel of distillation."""
    seen = worlds.candidates.ref[0]
    lines = [
        Line("forward, raw", ours.top_k_forward_kl(support="raw_support"), proportional(seen[:3])[0]),
        Line("with the tail", ours.top_k_mixed_kl(support="tail_support"), seen[0]),
        Line("reverse, raw: q/e", ours.top_k_reverse_kl(support="raw_support"), seen[0] / math.e),
    ]
    return Panel("Teacher with 0.45 here, 0.1 unseen:\nπ of the likeliest token", worlds.candidates, 0, 24, 0.8, lines)


def draw(panel: Panel, axes: Any) -> None:
    """Draw the paths of a panel, and a dotted line at each stated end, with the label at the end of the path."""
    ends = []
    for i, line in enumerate(panel.lines):
        path = [policy[0][panel.token] for policy in learn(line.loss, panel.world, panel.steps, rate=panel.rate)]
        axes.plot(path, color=COLOURS[i])
        if line.end is not None:
            axes.axhline(line.end, color=COLOURS[i], linestyle=":", linewidth=1)
        ends.append(path[-1])
    for i, (line, y) in enumerate(zip(panel.lines, spaced(ends))):
        place = {"xytext": (4, 0), "textcoords": "offset points", "annotation_clip": False, "va": "center"}
        axes.annotate(line.label, (panel.steps, y), color=COLOURS[i], fontsize=8, **place)
    axes.set(xlabel="exact steps", ylim=(-0.03, 1.03), xlim=(0, panel.steps))
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)


def spaced(heights: list[float], gap: float = 0.085) -> list[float]:
    """Move labels apart, in the order of their heights, so that neighbours are at least ``gap`` from each other."""
    placed = dict.fromkeys(range(len(heights)), 0.0)
    lowest = -1.0
    for i in sorted(placed, key=heights.__getitem__):
        placed[i] = lowest = max(heights[i], lowest + gap)
    excess = max(0.0, lowest - 1.0)
    return [placed[i] - excess for i in range(len(heights))]


def picture() -> None:
    """Draw all panels."""
    from matplotlib.figure import Figure

    makers = (with_penalties, on_fixed_samples, imitating, with_lengths, of_pairs, of_labels, of_data, of_teacher)
    rows = -(-len(makers) // COLUMNS)
    with style():
        figure = Figure(figsize=(3.6 * COLUMNS, 2.4 * rows), layout="constrained")
        for i, make in enumerate(makers):
            draw(make(), figure.add_subplot(rows, COLUMNS, i + 1))
        figure.savefig(PICTURE, dpi=150)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("table", "picture"))
    if parser.parse_args().command == "table":
        print("\n".join(table()))
    else:
        picture()


if __name__ == "__main__":
    main()
