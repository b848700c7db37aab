"""Print what each loss learns in the worlds, or draw the paths.

python -m tools.worlds table     # for each loss: the world, the steps, the point, and the distance from it
python -m tools.worlds picture   # write docs/worlds.png (extra ``viz``)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lossfns import cispo, dapo, k1, k2, k3, ppo, reinforce, with_kl
from lossfns.loss import Loss
from lossfns.testing.public import presets
from lossfns.testing.worlds import Policy, World, bandit, learn, lessons, tree, two_arms
from lossfns.testing.worlds.combined import COMBINED
from lossfns.testing.worlds.points import tilted, towards_reference, two_token_tree

PICTURE = Path("docs/worlds.png")


def table() -> Iterator[str]:
    """Yield a line for each lesson of each loss."""
    for name in (*presets(), *COMBINED):
        for lesson in lessons(name):
            point = " | ".join(" ".join(f"{p:.3f}" for p in row) for row in lesson.point if len(row) > 1)
            where = f"{lesson.world.name:10} {lesson.steps:3} steps to {point:27}"
            yield f"{name:28} {where} {lesson.miss():.0e}  {lesson.says}"


class Line(NamedTuple):
    """A path of one probability, and the level at which theory says that it ends."""

    label: str
    loss: Any
    end: float | None
    style: str = "-"


class Panel(NamedTuple):
    """Paths of several losses in one world.

    Attributes:
        title, ylabel: texts.
        world: the world.
        of: the number of a policy that is drawn.
        steps, rate: as for ``learn``.
        lines: the losses.
    """

    title: str
    ylabel: str
    world: World
    of: Callable[[Policy], float]
    steps: int
    rate: float
    lines: list[Line]


def first(policy: Policy) -> float:
    """Return the probability of the first token of the first node."""
    return policy[0][0]


def second(policy: Policy) -> float:
    """Return the probability of the second token of the first node."""
    return policy[0][1]


def panels() -> list[Panel]:
    """Return the panels of the picture."""
    arms = bandit.ref[0]
    reference = tree.ref[0], tree.ref[1]
    share = answers.rewards[0] - answers.rewards[1]
    data = letters.old[0] if letters.old else ()
    seen = candidates.ref[0][0]
    return [
        Panel(
            "Arms drawn anew: the KL decides\nwhether and where the policy stops",
            "π of the best arm",
            bandit,
            second,
            12,
            0.8,
            [
                Line("no KL: collapse", ppo(), 1.0),
                Line("k1: no effect", with_kl(ppo(), 0.5, k1), None),
                Line("k2: ref·exp(r/β)", with_kl(ppo(), 0.5, k2), tilted(arms, bandit.rewards, 0.5)[1]),
                Line("k3: β·ref/(λ − r)", with_kl(ppo(), 0.5, k3), towards_reference(arms, bandit.rewards, 0.5)[1]),
            ],
        ),
        Panel(
            "Arms drawn once: where steps\non the same samples end",
            "π of the good arm",
            two_arms,
            first,
            40,
            0.08,
            [
                Line("ppo (0.8, 1.2)", ppo(), 0.6),
                Line("dapo (0.8, 1.28)", dapo(), 0.64),
                Line("dppo_tv 0.2", dppo_tv(), 0.7),
                Line("sapo: slowly on", sapo(), None),
                Line("cispo: on", cispo(), None),
            ],
        ),
        Panel(
            "Answers of 1 and 2 tokens, with KL:\nthe length bias",
            "π of the short answer",
            tree,
            first,
            24,
            0.8,
            [
                Line(
                    "mean over tokens",
                    with_kl(reinforce(), 0.5, k2),
                    two_token_tree(reference, tree.rewards, 0.5, (1, 1), (1, 1))[0][0],
                ),
                Line(
                    "mean over sequences",
                    with_kl(reinforce(weigh="sequence_mean"), 0.5, k2),
                    two_token_tree(reference, tree.rewards, 0.5, (1, 0.5), (1, 0.5))[0][0],
                ),
            ],
        ),
        Panel(
            "Pairs: 69% prefer the answer\n(β = 1, reference 0.6)",
            "π of the preferred answer",
            answers,
            first,
            16,
            2.0,
            [
                Line("dpo", dpo(beta=1.0), 1 / (1 + math.exp(-share) * 0.4 / 0.6)),
                Line("ipo", ipo(beta=1.0), None),
                Line("simpo", simpo(beta=1.0), None),
                Line("orpo", orpo(lam=1.0), None),
            ],
        ),
        Panel(
            "Labels: desirable in 80% and 30%",
            "π of the first answer",
            judged,
            first,
            24,
            4.0,
            [
                Line("kto: its mode", kto(beta=1.0), 1.0),
                Line("bco: its odds", bco(beta=1.0), None),
            ],
        ),
        Panel(
            "Data: 45% have this token",
            "π of the most frequent token",
            letters,
            first,
            24,
            0.8,
            [
                Line("cross_entropy", cross_entropy(), data[0]),
                Line("focal", focal(), None),
                Line("sft_phi", sft_phi(), balanced(data, lambda p: p - 1)[0]),
                Line("dft: the mode", dft(), 1.0),
            ],
        ),
        Panel(
            "Teacher with 0.45 here and\n0.1 on the token not seen",
            "π of the likeliest token",
            candidates,
            first,
            24,
            0.8,
            [
                Line("forward, raw", top_k_forward_kl(support="raw_support"), seen / 0.9),
                Line("reverse, raw", top_k_reverse_kl(support="raw_support"), seen / math.e),
                Line("both, with tail", top_k_mixed_kl(support="tail_support"), seen),
            ],
        ),
    ]


def draw(panel: Panel, axes: Any) -> None:
    """Draw the paths of a panel, and a dotted line at each stated end, with the label at the end of the path."""
    ends = []
    for i, line in enumerate(panel.lines):
        like = line.loss if isinstance(line.loss, Loss) else None
        path = [panel.of(p) for p in learn(line.loss, panel.world, panel.steps, rate=panel.rate, like=like)]
        axes.plot(path, color=f"C{i}", linestyle=line.style, linewidth=1.6)
        if line.end is not None:
            axes.axhline(line.end, color=f"C{i}", linestyle=":", linewidth=1)
        ends.append((path[-1], line.label, f"C{i}"))
    heights = spaced([y for y, _, _ in ends])
    for (_, label, colour), y in zip(ends, heights):
        axes.annotate(label, (panel.steps, y), (4, 0), textcoords="offset points", annotation_clip=False,
            color=colour, va="center", fontsize=8)  # fmt: skip
    axes.set(title=panel.title, xlabel="exact steps", ylabel=panel.ylabel, ylim=(-0.03, 1.03), xlim=(0, panel.steps))
    axes.title.set_fontsize(9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)


def spaced(heights: list[float], gap: float = 0.075) -> list[float]:
    """Move labels apart, so that neighbours are at least ``gap`` from each other, in the same order."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = dict.fromkeys(order, 0.0)
    lowest = -1.0
    for i in order:
        placed[i] = lowest = max(heights[i], lowest + gap)
    excess = max(0.0, lowest - 1.0)
    return [placed[i] - excess for i in range(len(heights))]


def picture() -> None:
    """Draw all panels."""
    from matplotlib.figure import Figure

    drawn = panels()
    figure = Figure(figsize=(12, 2.7 * -(-len(drawn) // 3)), layout="constrained")
    for i, panel in enumerate(drawn):
        draw(panel, figure.add_subplot(-(-len(drawn) // 3), 3, i + 1))
    figure.savefig(PICTURE, dpi=110)


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
