"""Exact expectations over a small vocabulary: which divergence does an estimator's value belong to, and its gradient?

Sampling noise hides a wrong gradient. Here every outcome of one or two steps is enumerated with its probability, so an
expectation is a sum, and comparisons hold to 1e-12. An estimator is a function of one outcome:

    >>> def mine(logprobs, ref_logprobs, sampler_logprobs):
    ...     return (logprobs - ref_logprobs) ** 2 / 2
    >>> identify(mine)
    Verdict(value='none of these', gradient='KL(π‖ref)')
    >>> identify(mine, off_policy=True).gradient
    'none of these'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lossfns.checks import check_number, check_positive
from lossfns.errors import LossInputError, show

Estimator = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function ``(logprobs [T], ref_logprobs [T], sampler_logprobs [T]) -> [T]`` of the tokens of one outcome.

The logprobs of π have a graph. The other two are constants."""

TOLERANCE = 1e-12
"""Largest difference, relative above 1, between an estimator's expectation and the exact one."""

NONE = "none of these"

MOST_OUTCOMES = 100_000
"""Largest number of outcomes that are enumerated."""


class Policy(NamedTuple):
    """Logits of a tree of T steps over V tokens: step t has one distribution for each of the V^t prefixes.

    Attributes:
        logits: T float64 tensors; the t-th has t + 1 dimensions of size V, the last one that of its own token.
    """

    logits: tuple[Tensor, ...]

    def logprobs(self) -> Tensor:
        """Logprob of each token of each outcome: ``[V^T, T]``."""
        steps, size = len(self.logits), self.logits[0].shape[-1]
        rows = []
        for t, logits in enumerate(self.logits):
            lp = logits.log_softmax(-1).reshape([size] * (t + 1) + [1] * (steps - t - 1))
            rows.append(lp.expand([size] * steps).reshape(-1))
        return torch.stack(rows, dim=1)


def example_policy(which: int, steps: int = 1, vocabulary: int = 4) -> Policy:
    """Return one of many fixed policies, with requires_grad: no two tokens or prefixes are alike.

    Args:
        which: a number from 0.
        steps: T, 1 or more.
        vocabulary: V, 2 or more.
    """
    shapes = [[vocabulary] * (t + 1) for t in range(steps)]
    return Policy(
        tuple(
            torch.sin(torch.arange(vocabulary ** (t + 1), dtype=torch.float64) * (1.7 + 0.9 * which) + t + which)
            .reshape(shape)
            .requires_grad_()
            for t, shape in enumerate(shapes)
        )
    )


class Expectation(NamedTuple):
    """An exact expectation and its gradient with respect to every logit of π."""

    value: float
    gradient: Tensor


def expectation(estimator: Estimator, policy: Policy, ref: Policy, sampler: Policy) -> Expectation:
    """Return E[Σ_t estimator] over the outcomes of the sampler, and E[∇ Σ_t estimator], the sampler being constant.

    On-policy, pass the policy itself as the sampler: a loss does not see that its tokens depend on π.

    >>> policy, ref = example_policy(0), example_policy(1)
    >>> expectation(lambda lp, ref, sampler: lp, policy, ref, policy).gradient.abs().max() < 1e-15
    tensor(True)
    """
    lp, ref_lp, sampler_lp = policy.logprobs(), ref.logprobs().detach(), sampler.logprobs().detach()
    terms = []
    for row in zip(lp, ref_lp, sampler_lp):
        term = estimator(*row)
        if not isinstance(term, Tensor) or term.shape != row[0].shape:
            got = f"shape {tuple(term.shape)}" if isinstance(term, Tensor) else show(term)
            raise LossInputError("estimator", f"one number for each of {len(row[0])} tokens", got, "Do not reduce it.")
        terms.append(term.sum())
    return of_sum(torch.dot(sampler_lp.sum(1).exp(), torch.stack(terms).to(torch.float64)), policy)


def of_sum(value: Tensor, policy: Policy) -> Expectation:
    """Return a value and its gradient; zeros where it does not depend on the policy."""
    if not value.requires_grad:
        value = value + 0 * policy.logits[0].sum()
    gradients = torch.autograd.grad(value, policy.logits, retain_graph=True, allow_unused=True)
    zeros = [torch.zeros_like(z) if g is None else g for z, g in zip(policy.logits, gradients)]
    return Expectation(value.item(), torch.cat([g.flatten() for g in zeros]))


def divergences(policy: Policy, ref: Policy, sampler: Policy) -> dict[str, Expectation]:
    """Return the exact divergences by name, with their gradients.

    At each step they are sums over the vocabulary, averaged over the prefixes that the sampler writes. These are
    constants, as for a loss over tokens. ``"... of sequences"`` is the divergence of the distributions over outcomes,
    whose gradient reaches the prefixes, too.
    """
    pi, q, s = policy.logits, ref.logits, sampler.logits
    sums: dict[str, Tensor] = {}
    prefix = torch.ones((), dtype=torch.float64)  # the sampler's probability of each prefix
    for z, z_ref, z_sampler in zip(pi, q, s):
        lp, lq, ls = z.log_softmax(-1), z_ref.detach().log_softmax(-1), z_sampler.detach().log_softmax(-1)
        each = {
            "KL(π‖ref)": lp.exp() * (lp - lq),
            "KL(ref‖π)": lq.exp() * (lq - lp),
            "KL(π‖sampler)": lp.exp() * (lp - ls),
            "KL(sampler‖π)": ls.exp() * (ls - lp),
            "Σ|π − ref|": (lp.exp() - lq.exp()).abs(),
        }
        for name, x in each.items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + (prefix * x.sum(-1)).sum()
        prefix = prefix[..., None] * ls.exp()
    if len(pi) > 1:
        lp, lq = policy.logprobs().sum(1), ref.logprobs().sum(1).detach()
        sums["KL(π‖ref) of sequences"] = (lp.exp() * (lp - lq)).sum()
        sums["KL(ref‖π) of sequences"] = (lq.exp() * (lq - lp)).sum()
    return {name: of_sum(x, policy) for name, x in sums.items()}


class Verdict(NamedTuple):
    """The divergences that an estimator's expected value and expected gradient belong to.

    Attributes:
        value: the name of a divergence, such as ``"KL(π‖ref)"``, or ``"none of these"``.
        gradient: the same for the gradient, with a factor if there is one, such as ``"2·KL(π‖ref)"``; ``"0"`` if the
            expected gradient is 0.
    """

    value: str
    gradient: str


def identify(
    estimator: Estimator, *, off_policy: bool = False, steps: int = 1, vocabulary: int = 4, tolerance: float = TOLERANCE
) -> Verdict:
    """Say which divergence the value of an estimator is, and of which divergence its gradient is the gradient.

    Args:
        estimator: ``(logprobs [T], ref_logprobs [T], sampler_logprobs [T]) -> [T]``, in torch. It may detach what it
            likes: the gradient is the one that autograd finds.
        off_policy: whether the tokens come from another policy than π.
        steps: T: 1, or 2 for a tree of two steps. A larger T takes V^T outcomes.
        vocabulary: V, at least 3: with two tokens, different divergences may coincide.
        tolerance: the largest difference, relative above 1.

    Raises:
        LossInputError: if an argument is out of its range, or if the estimator returns another shape.

    >>> from lossfns import k1, k3
    >>> identify(lambda lp, ref, sampler: k3(lp, ref))
    Verdict(value='KL(π‖ref)', gradient='KL(ref‖π)')
    >>> identify(lambda lp, ref, sampler: k1(lp, ref), off_policy=True)
    Verdict(value='none of these', gradient='−1·KL(sampler‖π)')
    """
    check_number("steps", steps, "1 or more", lambda x: x >= 1 and x == int(x), "One token, or a tree of two steps.")
    check_number("vocabulary", vocabulary, "3 or more", lambda x: x >= 3 and x == int(x), "Four tokens do.")
    check_positive("tolerance", tolerance)
    if not callable(estimator):
        fix = "lambda lp, ref, sampler: (lp - ref) ** 2 / 2 is one."
        raise LossInputError("estimator", "a function of three rows of logprobs", show(estimator), fix)
    if int(vocabulary) ** min(int(steps), 64) > MOST_OUTCOMES:
        got, fix = f"{vocabulary}^{steps}", "Take fewer: two steps over four tokens tell estimators apart."
        raise LossInputError("vocabulary", f"at most {MOST_OUTCOMES} outcomes", got, fix)
    steps, vocabulary = int(steps), int(vocabulary)
    policy, ref = (example_policy(which, steps, vocabulary) for which in (0, 1))
    sampler = example_policy(2, steps, vocabulary) if off_policy else policy
    found, exact = expectation(estimator, policy, ref, sampler), divergences(policy, ref, sampler)
    if not off_policy:  # the sampler is π: both divergences from it are 0
        exact = {name: x for name, x in exact.items() if "sampler" not in name}
    return Verdict(
        next((name for name, x in exact.items() if close(found.value, x.value, tolerance)), NONE),
        gradient_name(found.gradient, exact, tolerance),
    )


def close(a: float, b: float, tolerance: float) -> bool:
    """Whether two numbers differ by at most the tolerance, relative above 1."""
    return abs(a - b) <= tolerance * max(1.0, abs(a), abs(b))


FACTORS: Sequence[tuple[float, str]] = ((1, ""), (-1, "−1·"), (2, "2·"), (-2, "−2·"), (0.5, "½·"), (-0.5, "−½·"))
"""The factors of a gradient that a verdict names."""


def gradient_name(gradient: Tensor, exact: dict[str, Expectation], tolerance: float) -> str:
    """Return the divergence whose gradient this is, with its factor."""
    if float(gradient.abs().max()) <= tolerance:
        return "0"
    for factor, shown in FACTORS:
        for name, x in exact.items():
            bound = tolerance * max(1.0, float(gradient.abs().max()))
            if float((gradient - factor * x.gradient).abs().max()) <= bound:
                return shown + name
    return NONE
