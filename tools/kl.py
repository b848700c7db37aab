"""Write docs/kl.md: which KL divergence the value and the gradient of each estimator belong to, by exact enumeration.

python -m tools.kl write
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lossfns.combine import penalty
from lossfns.kl import KL, k1, k1_plus, k2, k3, k3_plus, k3_uncapped, k_abs, k_squared, swapped
from lossfns.rollout import TokenWeight, detached, ratio_to, score_function
from lossfns.testing.enumeration import Estimator, Verdict, identify
from lossfns.tokens import Tokens

PAGE = Path("docs/kl.md")


class Row(NamedTuple):
    """An estimator of the table, and where it is in use."""

    kl: KL
    weight: TokenWeight | None
    peers: str
    to: str = "ref_logprobs"


RATIO = ratio_to("old_logprobs")
ROWS = (
    Row(k1, None, "verl k1, in a loss"),
    Row(k2, None, "verl k2, open-instruct 1"),
    Row(k3, None, "Fireworks; with `kl_cap=10.0` verl low_var_kl, SkyRL"),
    Row(k3_uncapped, None, "TRL before 1.16, slime, Liger; with d capped at ±40 open-instruct 2, its default"),
    Row(k_abs, None, "verl, SkyRL abs"),
    Row(k_squared, None, "(prime-rl has it against the sampler)"),
    Row(k1_plus, None, "verl k1+"),
    Row(k3_plus, None, "verl k3+"),
    Row(k1, RATIO, "open-instruct 3"),
    Row(k3, RATIO, "TRL from 1.16, slime `--use-unbiased-kl`, DeepSeek-V3.2"),
    Row(k2, RATIO, "slime `--use-unbiased-kl` with k2"),
    Row(k1, detached(RATIO), ""),
    Row(k2, detached(RATIO), ""),
    Row(k3, detached(RATIO), ""),
    Row(k1_plus, detached(RATIO), ""),
    Row(k3_plus, detached(RATIO), ""),
    Row(k1, score_function, "NeMo-RL k1"),
    Row(k3, score_function, "NeMo-RL k3"),
    Row(k_squared, None, "prime-rl `kl_tau`", "sampler_logprobs"),
    Row(k3, None, "", "sampler_logprobs"),
    Row(swapped(k3), None, "", "sampler_logprobs"),
    Row(k3, RATIO, "", "sampler_logprobs"),
    Row(k2, detached(RATIO), "", "sampler_logprobs"),
)


def estimator_of(row: Row) -> Estimator:
    """Return the penalty of ``with_kl`` for one outcome. The old policy is the sampler."""

    def of_outcome(lp: Tensor, ref: Tensor, sampler: Tensor) -> Tensor:
        columns = {"ref_logprobs": ref, "old_logprobs": sampler, "sampler_logprobs": sampler}
        return penalty(Tokens(lp, torch.ones_like(lp), None, columns), row.kl, row.weight, None, row.to)

    return of_outcome


@cache
def verdicts(row: Row) -> tuple[Verdict, Verdict]:
    """Return the verdicts on-policy and off-policy. They are the same for one step and for two."""
    found = []
    for off_policy in (False, True):
        one, two = (identify(estimator_of(row), off_policy=off_policy, steps=steps) for steps in (1, 2))
        assert one == two, row
        found.append(one)
    return found[0], found[1]


TEXT = """# KL penalties: which divergence, and which gradient

<!-- Written by `python -m tools.kl write`. Do not edit. -->

A penalty computed from one sampled token has a value, which is logged, and a gradient, which trains. The two need not
belong to the same divergence. If the tokens come from an older policy, they often belong to none.

The table is exact: `lossfns.testing.enumeration` sums over every outcome of a vocabulary of four tokens, for one token
and for two in a row, and compares values and gradients to 1e-12. A gradient of `2·KL` is twice that of the KL.

π is the current policy, `old` is the policy that sampled, and r = π / old is the ratio. On-policy, old is π.
`KL(π‖ref)` is the reverse KL, the intended penalty of RLHF; `KL(ref‖π)` is the forward KL.

## Towards the reference

{ref}

- **k1 alone is no penalty.** On-policy its gradient is 0. Off-policy it is −∇KL(old‖π): minimising it drives π away
  from the policy that sampled.
- **k3 alone** has the value of the reverse KL and the gradient of the forward KL.
- **k2, and the straight-through `k1_plus` and `k3_plus`** (value of one, gradient of k2) have the gradient of the
  reverse KL on-policy. Off-policy they need the ratio as a constant.
- **The ratio with its gradient** makes k1 and k3 exact, on- and off-policy: for every π, the mean of r·k over samples
  of `old` is the KL, so its gradient is that of the KL. With k2, `k1_plus` and `k3_plus`, the gradient of the ratio
  adds a wrong term: multiply these by the ratio as a constant.
- **The score function** exp(lp − sg(lp)) has the value 1. On-policy it is the ratio. Off-policy it corrects nothing.

## Towards the sampler

The tokens come from the sampler, near which π is to stay. The table is off-policy; on-policy every value and gradient
is 0.

{sampler}

`k_squared` (prime-rl) keeps π near, but its gradient is that of none of these divergences. `swapped(k3)` has the value
and the gradient of KL(sampler‖π).

## What the table does not say

- A penalty over tokens takes the prefixes as given. Over two steps and more, its gradient is that of the KL at each
  prefix, averaged over the sampled prefixes. It is not that of KL(π‖ref) between whole sequences, in which earlier
  tokens also change the KL of later tokens. For the KL between sequences, put the KL into the reward.
- A bounded ratio or estimator (`log_ratio_cap`, `kl_cap`, k3's ±20) is exact where no bound is reached.
- An estimator that is exact in expectation may have a large variance. Near the reference, that of k1 is the largest.

## An estimator of your own

```python
>>> from lossfns.testing.enumeration import identify
>>> def mine(logprobs, ref_logprobs, sampler_logprobs):
...     ratio = (logprobs - sampler_logprobs).exp().detach()
...     return ratio * (logprobs - ref_logprobs) ** 2 / 2
>>> identify(mine, off_policy=True, steps=2)
Verdict(value='none of these', gradient='KL(π‖ref)')

```
"""


def table(rows: list[list[str]]) -> str:
    """Return a table in Markdown; the first row is the header."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def code(row: Row) -> str:
    """Return the arguments of ``with_kl``."""
    weight = "" if row.weight is None else f", kl_weight={row.weight!r}"
    return f"`kl={row.kl.__name__}{weight}`"


def render() -> str:
    """Return the page."""
    ref = [["`with_kl(loss, β, ...)`", "value, on-policy", "gradient", "value, off-policy", "gradient", "in use as"]]
    sampler = [['`with_kl(loss, β, ..., kl_to="sampler_logprobs")`', "value", "gradient", "in use as"]]
    for row in ROWS:
        on_policy, off_policy = verdicts(row)
        if row.to == "ref_logprobs":
            cells = [*on_policy, *off_policy]
            ref.append([code(row), *(cell.replace("|", "\\|").replace("sampler", "old") for cell in cells), row.peers])
        else:
            sampler.append([code(row), *(cell.replace("|", "\\|") for cell in off_policy), row.peers])
    return TEXT.format(ref=table(ref), sampler=table(sampler))


def main(arguments: list[str]) -> int:
    """Write the page."""
    if arguments != ["write"]:
        print(__doc__)
        return 2
    PAGE.write_text(render())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
