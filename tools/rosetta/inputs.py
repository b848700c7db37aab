"""The fixed inputs of the table, in float64: every number follows from a seed of Python's own generator.

B sequences of at most T tokens are padded on the right. Each batch has tokens on both sides of every common bound:
ratios below 0.8, above 1.28 and above 3, for advantages of both signs.
"""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor

from tools.rosetta.batch import Batch

CEILING = -0.01
"""The largest logprob. A logprob above 0 is refused at the door."""


def table(rows: list[list[float]]) -> Tensor:
    """Return numbers as a float64 tensor."""
    return torch.tensor(rows, dtype=torch.float64)


def numbers(rng: Random, shape: tuple[int, int], low: float, high: float) -> Tensor:
    """Draw uniform numbers, rounded to four decimals."""
    return table([[round(rng.uniform(low, high), 4) for _ in range(shape[1])] for _ in range(shape[0])])


def gaps(rng: Random, shape: tuple[int, int], scale: float) -> Tensor:
    """Draw normal numbers, rounded to four decimals."""
    return table([[round(rng.gauss(0, scale), 4) for _ in range(shape[1])] for _ in range(shape[0])])


def ragged(lengths: list[int], width: int) -> Tensor:
    """Return the mask of rows of these lengths."""
    return table([[1.0] * n + [0.0] * (width - n) for n in lengths])


SECOND_WEIGHTS = ("ce_weights", "nll_weights", "sft_weights", "positive_weights")
"""The columns of the weights of the second part, by our names."""


def policy() -> Batch:
    """Six answers to two prompts of three each, with every column of a policy loss."""
    rng, shape = Random(15), (6, 7)
    logprobs = numbers(rng, shape, -2.2, -0.15)
    d = gaps(rng, shape, 0.25)
    # Planted log-ratios: beyond the dual clip for both signs of A, and beyond each bound.
    for row, column, value in ((3, 0, 1.4), (4, 1, 1.3), (0, 1, 0.5), (1, 2, -0.6), (2, 3, -0.5), (5, 0, 0.4)):
        logprobs[row, column], d[row, column] = -1.2, value
    old = (logprobs - d).clamp(max=CEILING)
    mismatch = gaps(rng, shape, 0.3)
    mismatch[0, 2], mismatch[4, 0], mismatch[5, 1] = 1.2, -1.1, 0.9
    columns = {
        "advantages": torch.tensor([1.1, -0.7, 0.4, -1.3, 0.9, -0.4], dtype=torch.float64),
        "old_logprobs": old,
        "sampler_logprobs": (old - mismatch).clamp(max=CEILING),
        "ref_logprobs": (logprobs - gaps(rng, shape, 0.4)).clamp(max=CEILING),
        "teacher_logprobs": (logprobs - gaps(rng, shape, 0.5)).clamp(max=CEILING),
        "entropy": numbers(rng, shape, 0.1, 2.0),
        "groups": torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.float64),
        "rewards": torch.tensor([0.9, 0.1, 0.6, 0.0, 1.0, 0.3], dtype=torch.float64),
        "reference_point": torch.full((6,), 0.15, dtype=torch.float64),
        "labels": torch.tensor([1, 0, 1, 0, 1, 0], dtype=torch.float64),
        "values": numbers(rng, shape, -0.5, 0.9),
        "old_values": numbers(rng, shape, -0.5, 0.9),
        "returns": numbers(rng, shape, -0.2, 1.1),
    }
    return Batch(logprobs, ragged([7, 4, 6, 2, 5, 3], 7), columns)


def token_advantages() -> Batch:
    """The policy batch with an advantage for each token, of one sign within a sequence."""
    b = policy()
    spread = numbers(Random(19), (6, 7), 0.5, 1.5)
    return Batch(b.leaf, b.mask, {**b.columns, "advantages": b.advantages[:, None] * spread})


def one_group() -> Batch:
    """The policy batch, whose sequences are all compared with each other: the form of frameworks without groups."""
    b = policy()
    return Batch(b.leaf, b.mask, {**b.columns, "groups": torch.zeros(6, dtype=torch.float64)})


def masked_row() -> Batch:
    """The policy batch with a third sequence that is masked whole, as a truncated answer may be."""
    b = policy()
    mask = b.mask.clone()
    mask[2] = 0
    return Batch(b.leaf, mask, b.columns)


def far() -> Batch:
    """The policy batch with log-ratios of 21 and of −21: beyond the usual bound of 20, which exp survives."""
    b = policy()
    leaf, old = b.leaf.clone(), b.old_logprobs.clone()
    old[5, 2], leaf[1, 1], old[1, 1] = leaf[5, 2] - 21, -22.0, -1.0
    return Batch(leaf, b.mask, {**b.columns, "old_logprobs": old})


def far_reference() -> Batch:
    """The policy batch with two tokens whose k3 is above 10: what the bounds of a KL are for."""
    b = policy()
    ref = b.ref_logprobs.clone()
    leaf = b.leaf.clone()
    leaf[0, 3], ref[0, 3] = -4.0, -0.5
    leaf[3, 1], ref[3, 1] = -0.2, -12.5
    old = torch.where(leaf == b.leaf, b.old_logprobs, leaf)
    return Batch(leaf, b.mask, {**b.columns, "ref_logprobs": ref, "old_logprobs": old})


def on_policy() -> Batch:
    """The policy batch whose old policy is the current one: one update for each batch."""
    b = policy()
    return Batch(b.leaf, b.mask, {**b.columns, "old_logprobs": b.leaf.clone()})


def sampler_is_old() -> Batch:
    """The policy batch whose old policy is the sampler: no logprobs are computed again after sampling."""
    b = policy()
    return Batch(b.leaf, b.mask, {**b.columns, "old_logprobs": b.sampler_logprobs})


def no_reference_point() -> Batch:
    """The policy batch with KTO's reference point at 0."""
    b = policy()
    return Batch(b.leaf, b.mask, {**b.columns, "reference_point": torch.zeros(6, dtype=torch.float64)})


def pairs() -> Batch:
    """Four pairs whose sides differ in length: row 2i is chosen, row 2i + 1 rejected."""
    rng, shape = Random(16), (8, 6)
    logprobs = numbers(rng, shape, -2.0, -0.1)
    mask = ragged([6, 3, 4, 6, 3, 4, 5, 2], 6)
    columns = {
        "sft_weights": mask * table([[1.0], [0.0]] * 4),
        "ref_logprobs": (logprobs - gaps(rng, shape, 0.6)).clamp(max=CEILING),
        "sum_square_probs": logprobs.exp().square() + numbers(rng, shape, 0.01, 0.1),
        "target_margin": torch.tensor([0.5, 0, 0.2, 0, 1.0, 0, 0.1, 0], dtype=torch.float64),
        "reference_point": torch.zeros(8, dtype=torch.float64),
        "groups": torch.zeros(8, dtype=torch.float64),
    }
    return Batch(logprobs, mask, columns)


def chosen() -> Batch:
    """The pairs, of which the chosen sides alone are trained."""
    b = pairs()
    return Batch(b.leaf, b.sft_weights, b.columns)


def equal_margins() -> Batch:
    """The pairs with one target margin for all."""
    b = pairs()
    return Batch(b.leaf, b.mask, {**b.columns, "target_margin": table([[0.5, 0.0]] * 4).flatten()})


def two_parts() -> Batch:
    """The policy batch in two parts: answers of negative advantage, and the others under weights of their own."""
    b = policy()
    positive = (b.advantages > 0)[:, None].double()
    second = dict.fromkeys(SECOND_WEIGHTS, b.mask * positive)
    return Batch(b.leaf, b.mask * (1 - positive), {**b.columns, **second})


def scores() -> Batch:
    """Four pairs of one score each, at the last token."""
    b = pairs()
    return Batch(
        torch.tensor([[0.7], [-0.3], [0.1], [0.4], [-0.9], [-1.2], [1.5], [-0.2]], dtype=torch.float64),
        torch.ones(8, 1, dtype=torch.float64),
        {"target_margin": b.target_margin},
    )


def values() -> Batch:
    """The scores of a value head in place of logprobs."""
    b = policy()
    return Batch(b.values.clone(), b.mask, b.columns)


def vocabulary() -> Batch:
    """Logits of a student and a teacher over a vocabulary of five tokens, which are all candidates."""
    rng, k = Random(17), 5
    mask = ragged([4, 2, 3], 4)
    student = gaps(rng, (12, k), 1.0).view(3, 4, k)
    teacher = gaps(rng, (12, k), 1.0).view(3, 4, k).log_softmax(-1)
    return Batch(student, mask[..., None].expand(3, 4, k).clone(), {"teacher_logprobs": teacher}, output="logits")


def token_of_logits() -> Batch:
    """The policy batch with a vocabulary of 20 tokens, of which the first one was sampled at each position."""
    b, rng = policy(), Random(20)
    logits = gaps(rng, (42, 20), 1.0).view(6, 7, 20)
    logits[..., 0] += 3
    log_p = logits.log_softmax(-1)[..., 0]
    old = (log_p + b.old_logprobs - b.leaf).clamp(max=CEILING)
    columns = {"advantages": b.advantages, "groups": torch.zeros(6, dtype=torch.float64), "old_logprobs": old}
    return Batch(logits, b.mask, {**columns, "ref_logprobs": old}, output="token of logits")


def candidates() -> Batch:
    """Logprobs of student and teacher at three candidates of each position, which do not exhaust the vocabulary."""
    b = vocabulary()
    return Batch(
        b.lp[..., :3].detach().clone(),
        b.mask[..., :3].clone(),
        {"teacher_logprobs": b.teacher_logprobs[..., :3].clone()},
    )


def samples() -> Batch:
    """Rewards of eight answers to two prompts, for estimators of advantages."""
    rewards = [1.0, 0.0, 0.5, 0.2, 0.9, 0.9, 0.1, 0.4]
    lengths = [3, 1, 4, 2, 4, 3, 2, 1]
    rng = Random(18)
    logprobs = numbers(rng, (8, 4), -2.0, -0.1)
    columns = {
        "rewards": torch.tensor(rewards, dtype=torch.float64),
        "groups": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
        "flat_rewards": torch.tensor([0.1, 0.1, 0.1, 0.3, 0.9, 0.9, 0.1, 0.4], dtype=torch.float64),
        "singles": torch.arange(8),
        "greedy_rewards": torch.tensor([0.4] * 4 + [0.6] * 4, dtype=torch.float64),
        "several_rewards": numbers(rng, (8, 2), 0.0, 1.0),
        "values": numbers(rng, (8, 4), -0.5, 0.9),
        "logprobs": logprobs,
        "sum_square_probs": logprobs.exp().square() + numbers(rng, (8, 4), 0.01, 0.1),
        "ref_logprobs": numbers(rng, (8, 4), -2.0, -0.1),
    }
    return Batch(torch.zeros(8, dtype=torch.float64), ragged(lengths, 4), columns)


INPUTS = {
    f.__name__: f
    for f in (
        policy,
        token_advantages,
        one_group,
        masked_row,
        far,
        far_reference,
        on_policy,
        sampler_is_old,
        no_reference_point,
        pairs,
        chosen,
        equal_margins,
        two_parts,
        scores,
        values,
        vocabulary,
        token_of_logits,
        candidates,
        samples,
    )
}
