"""The worlds: bandits, a tree, data, preferences, labels, a teacher."""

from __future__ import annotations

from dataclasses import replace

from lossfns.testing.worlds.world import Policy, World, labelled, outcomes, position, preferences

bandit = World(
    "bandit", (((0, 0),), ((0, 1),), ((0, 2),)), outcomes, ((0.5, 0.3, 0.2),), ((0.4, 0.4, 0.2),), (0.0, 1.0, 0.5)
)
"""Three arms, drawn from the current policy. The best arm is not the one that the policy starts with."""

two_arms = World(
    "two arms", (((0, 0),), ((0, 1),)), outcomes, ((0.5, 0.5),), ((0.5, 0.5),), (1.0, 0.0), old=((0.5, 0.5),)
)
"""Two arms, drawn from the policy before the first step: many steps on one batch of samples."""

tree = World(
    "tree",
    (((0, 0),), ((0, 1), (1, 0)), ((0, 1), (1, 1))),
    outcomes,
    ((0.6, 0.4), (0.5, 0.5)),
    ((0.9, 0.1), (0.7, 0.3)),
    (0.0, 1.0, 0.2),
)
"""A first token that ends the answer, or a first token and a second: sequences of lengths 1, 2 and 2."""

corpus = replace(tree, name="corpus", old=((0.3, 0.7), (0.8, 0.2)))
"""The tree, with sequences drawn from the distribution of a data set."""

letters = World(
    "letters", (((0, 0),), ((0, 1),), ((0, 2),)), outcomes, ((0.2, 0.3, 0.5),), ((0.5, 0.4, 0.1),), (0.0, 0.0, 0.0),
    old=((0.45, 0.33, 0.22),),
)  # fmt: skip
"""A data set of answers of one of three tokens. The policy starts with the rarest."""

answers = World(
    "answers",
    (((0, 0),), ((0, 1), (1, 0))),
    preferences,
    ((0.5, 0.5), (1.0,)),
    ((0.6, 0.4), (1.0,)),
    (1.2, 0.4),
)
"""An answer of one token, and one of two tokens whose second is certain. σ(0.8) of the judges prefer the first."""

reward_model = World(
    "reward model", (((0, 0),), ((0, 1),)), preferences, ((0.0, 0.0),), ((0.0, 0.0),), answers.rewards, scores=True
)
"""The scores of two answers, and the same judges."""

judged = replace(answers, name="judged", units=labelled, rewards=(0.8, 0.3), old=answers.start)
"""The two answers, one at a time. They are labelled as desirable with probabilities 0.8 and 0.3."""

teacher = World(
    "teacher", (((0, 0), (0, 1), (0, 2)),), position, ((0.2, 0.3, 0.5),), ((0.5, 0.4, 0.1),), (0.0,), targets=3,
    columns={"weights": lambda world, i, policy, old: list(world.ref[0])},
)  # fmt: skip
"""One position, and the probabilities that a teacher gives to its three tokens, as weights."""

candidates = World(
    "candidates", (((0, 0), (0, 1), (0, 2)),), position, ((0.3, 0.2, 0.1, 0.4),), ((0.45, 0.3, 0.15, 0.1),), (0.0,),
    targets=3,
)  # fmt: skip
"""One position of four tokens, of which the loss sees three. The fourth has 0.1 of the teacher, 0.4 of the policy."""


def reward_of(world: World, i: int, policy: Policy, old: Policy) -> list[float]:
    """Return the reward of a sequence as its advantage."""
    return [world.rewards[i]] * len(world.sequences[i])
