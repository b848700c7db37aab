"""Advantages in plain floats: loops over samples and tokens, straight from the papers."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence

Row = list[float]
Rows = list[Row]
Groups = Sequence[Hashable]
Rewards = Sequence[float | None]
"""One reward for each sample; None where a sample abstains."""


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float], ddof: int = 1) -> float:
    """Standard deviation with the divisor n − ddof; 0 for one value."""
    m = mean(values)
    return math.sqrt(math.fsum((x - m) ** 2 for x in values) / max(len(values) - ddof, 1))


def compared(
    rewards: Rewards,
    groups: Groups,
    among: Callable[[int, float, Row], float],
    alone: Callable[[float], float] = lambda r: r,
    group_of_one: str = "zero",
) -> Row:
    """A of each sample among the rewards of its group: 0 where it abstains, and where all these are equal.

    ``alone`` is the advantage in a group of one that keeps its reward.
    """
    result = []
    for i, r in enumerate(rewards):
        peers = [x for x, group in zip(rewards, groups, strict=True) if group == groups[i] and x is not None]
        if r is None:
            result.append(0.0)
        elif len(peers) == 1:
            result.append(alone(r) if group_of_one == "reward" else 0.0)
        else:
            result.append(0.0 if max(peers) == min(peers) else among(i, r, peers))
    return result


# Relative to the group


def group_advantages(
    *,
    rewards: Rewards,
    groups: Groups,
    scale: str = "std",
    eps: float = 1e-6,
    ddof: int = 1,
    group_of_one: str = "zero",
) -> Row:
    """A = (r − mean) / (std + eps) within each group, 0 where all rewards agree (Shao et al. 2024).

    With scale "none", nothing is divided by the std (Liu et al. 2025); with "batch", by that of all rewards.
    """
    if scale not in ("std", "none", "batch"):
        raise ValueError(f"scale is 'std', 'none' or 'batch', not {scale!r}")
    everyone = [r for r in rewards if r is not None]

    def divisor(peers: Row) -> float:
        if scale == "none":
            return 1.0
        return deviation(everyone, ddof) + eps if scale == "batch" else deviation(peers, ddof) + eps

    def among(i: int, r: float, peers: Row) -> float:
        return (r - mean(peers)) / divisor(peers)

    def alone(r: float) -> float:
        return r / (1 + eps) if scale == "std" else r / divisor([r])

    return compared(rewards, groups, among, alone, group_of_one)


def leave_one_out_advantages(*, rewards: Rewards, groups: Groups, group_of_one: str = "zero") -> Row:
    """A = r − the mean of the other rewards (Ahmadian et al. 2024)."""

    def among(i: int, r: float, peers: Row) -> float:
        return r - (math.fsum(peers) - r) / (len(peers) - 1)

    return compared(rewards, groups, among, group_of_one=group_of_one)


def opo_advantages(*, rewards: Rewards, groups: Groups, lengths: Sequence[float], group_of_one: str = "zero") -> Row:
    """A = r − Σ l·r / Σ l (Hao et al. 2025)."""

    def among(i: int, r: float, peers: Row) -> float:
        own = [(n, x) for n, x, g in zip(lengths, rewards, groups, strict=True) if g == groups[i] and x is not None]
        return r - math.fsum(n * x for n, x in own) / math.fsum(n for n, _ in own)

    return compared(rewards, groups, among, group_of_one=group_of_one)


def pass_at_k_advantages(
    *, rewards: Rewards, groups: Groups, scale: str = "none", eps: float = 1e-6, ddof: int = 1
) -> Row:
    """A = max of the group − max of the others (Tang et al. 2025)."""

    def among(i: int, r: float, peers: Row) -> float:
        others = sorted(peers)
        others.remove(r)
        return (max(peers) - max(others)) / (1.0 if scale == "none" else deviation(peers, ddof) + eps)

    return compared(rewards, groups, among)


def maxrl_advantages(*, rewards: Rewards, groups: Groups, eps: float = 0.0, group_of_one: str = "zero") -> Row:
    """A = (r − mean) / mean (MaxRL, arXiv:2602.02710)."""

    def among(i: int, r: float, peers: Row) -> float:
        return (r - mean(peers)) / (mean(peers) + eps)

    return compared(rewards, groups, among, group_of_one=group_of_one)


def gpg_advantages(
    *,
    rewards: Rewards,
    groups: Groups,
    alpha: str = "signal",
    scale: str = "none",
    eps: float = 1e-6,
    ddof: int = 1,
    group_of_one: str = "zero",
) -> Row:
    """A = B / (B − M) · (r − mean) / F, with M samples in groups that agree (Chu et al. 2025)."""
    scored = [r for r in rewards if r is not None]
    if alpha == "nonzero":
        kept = sum(r != 0 for r in scored)
    else:
        kept = sum(x != 0 for x in compared(rewards, groups, lambda i, r, peers: 1.0))
    plain = group_advantages(rewards=rewards, groups=groups, scale=scale, eps=eps, ddof=ddof, group_of_one=group_of_one)
    return [len(scored) / max(kept, 1) * a for a in plain]


def asymre_advantages(*, rewards: Rewards, groups: Groups, shift: float = -0.1, group_of_one: str = "zero") -> Row:
    """A = r − (mean + shift), also where all rewards agree (Arnal et al. 2025)."""
    plain = group_advantages(rewards=rewards, groups=groups, scale="none", group_of_one=group_of_one)
    counted = [r is not None for r in rewards]
    size = [sum(c and g == group for c, g in zip(counted, groups)) for group in groups]
    return [a - shift if c and n > 1 else a for a, c, n in zip(plain, counted, size)]


def remax_advantages(*, rewards: Rewards, greedy_rewards: Rewards) -> Row:
    """A = r − reward of the greedy answer (Li et al. 2024)."""
    return [0.0 if r is None or g is None else r - g for r, g in zip(rewards, greedy_rewards, strict=True)]


# Over the batch


def standardised(
    values: Sequence[float | None], lengths: Sequence[float] | None, eps: float, ddof: int, root: bool = False
) -> Row:
    """(x − mean) / (std + eps), or over √(variance + eps), with each value counted as often as its length says."""
    seen = [x for x in values if x is not None]
    counts = [1.0] * len(seen) if lengths is None else [n for n, x in zip(lengths, values) if x is not None]
    used = [x for x, n in zip(seen, counts) if n > 0]
    if max(used) == min(used):
        return [0.0] * len(values)
    n = math.fsum(counts)
    m = math.fsum(c * x for c, x in zip(counts, seen)) / n
    variance = math.fsum(c * (x - m) ** 2 for c, x in zip(counts, seen)) / max(n - ddof, 1)
    by = math.sqrt(variance + eps) if root else math.sqrt(variance) + eps
    return [0.0 if x is None else (x - m) / by for x in values]


def batch_advantages(
    *, rewards: Rewards, lengths: Sequence[float] | None = None, eps: float = 1e-6, ddof: int = 0
) -> Row:
    """A = (r − mean of the batch) / (std of the batch + eps)."""
    return standardised(rewards, lengths, eps, ddof)


def reinforce_plus_plus_baseline_advantages(
    *,
    rewards: Rewards,
    groups: Groups,
    lengths: Sequence[float] | None = None,
    eps: float = 1e-8,
    ddof: int = 1,
    group_of_one: str = "zero",
) -> Row:
    """r − mean of the group, then (A − mean) / √(variance + eps) over the batch (Hu et al. 2025)."""
    plain = group_advantages(rewards=rewards, groups=groups, scale="none", group_of_one=group_of_one)
    result = standardised([None if r is None else a for r, a in zip(rewards, plain)], lengths, eps, ddof, root=True)
    if lengths is not None or group_of_one == "reward":
        return result
    return [a if x != 0 else 0.0 for a, x in zip(result, compared(rewards, groups, lambda i, r, peers: 1.0))]


def gdpo_advantages(
    *,
    rewards: Sequence[Sequence[float | None]],
    groups: Groups,
    reward_weights: Sequence[float] | None = None,
    lengths: Sequence[float] | None = None,
    eps: float = 1e-6,
    ddof: int = 1,
) -> Row:
    """Σ w·z of each reward's own z within the group, then (S − mean) / (std + eps) over the batch (Liu et al. 2026)."""
    columns = list(zip(*rewards, strict=True))
    weights = reward_weights or [1.0] * len(columns)
    zs = [group_advantages(rewards=column, groups=groups, eps=eps, ddof=ddof) for column in columns]
    sums = [math.fsum(w * z for w, z in zip(weights, row, strict=True)) for row in zip(*zs)]
    scored = [any(r is not None for r in row) for row in rewards]
    result = standardised([x if has else None for x, has in zip(sums, scored)], lengths, eps, ddof)
    differs = [compared(column, groups, lambda i, r, peers: 1.0) for column in columns]
    moved = [lengths is not None or any(row) for row in zip(*differs)]
    return [a if keep else 0.0 for a, keep in zip(result, moved)]


# Agents


def rae_advantages(
    *,
    rewards: Rewards,
    roles: Groups,
    baselines: Mapping[Hashable, float],
    decay: float = 0.95,
    baseline: str = "updated",
) -> tuple[Row, dict[Hashable, float]]:
    """b ← decay·b + (1 − decay)·r and A = r − b, by role (Liu et al. 2025, SPIRAL)."""
    b, result = dict(baselines), []
    for r, role in zip(rewards, roles, strict=True):
        if r is None:
            result.append(0.0)
            continue
        before = b.get(role, 0.0)
        b[role] = decay * before + (1 - decay) * r
        result.append(r - (before if baseline == "previous" else b[role]))
    return result, b


def hierarchical_advantages(
    *,
    rewards: Rewards,
    groups: Groups,
    episodes: Groups,
    roles: Groups,
    episode_roles: Sequence[Hashable] = ("solver",),
) -> Row:
    """A = r − mean over the same role, of the episode for some roles and of the group for others (prime-rl)."""
    result = []
    for i, r in enumerate(rewards):
        own = [
            x
            for x, group, episode, role in zip(rewards, groups, episodes, roles, strict=True)
            if x is not None
            and (group, role) == (groups[i], roles[i])
            and (role not in episode_roles or episode == episodes[i])
        ]
        result.append(0.0 if r is None or max(own) == min(own) else r - mean(own))
    return result


def gigpo_advantages(
    *,
    rewards: Sequence[float],
    groups: Groups,
    episodes: Groups,
    states: Groups,
    omega: float = 1.0,
    gamma: float = 0.95,
    scale: str = "std",
    eps: float = 1e-6,
    ddof: int = 1,
) -> Row:
    """A of the episode's total in its group + ω·A of the step's discounted return in its state (Feng et al. 2025)."""
    own = list(zip(groups, episodes, strict=True))
    steps_of = {e: [t for t, other in enumerate(own) if other == e] for e in dict.fromkeys(own)}
    totals = {e: math.fsum(rewards[t] for t in steps) for e, steps in steps_of.items()}
    of_episode = group_advantages(
        rewards=list(totals.values()), groups=[group for group, _ in totals], scale=scale, eps=eps, ddof=ddof
    )
    by_episode = dict(zip(totals, of_episode))
    returns = [
        math.fsum(gamma**k * rewards[s] for k, s in enumerate(x for x in steps_of[own[t]] if x >= t))
        for t in range(len(rewards))
    ]
    of_state = group_advantages(
        rewards=returns, groups=list(zip(groups, states, strict=True)), scale=scale, eps=eps, ddof=ddof
    )
    return [by_episode[e] + omega * a for e, a in zip(own, of_state)]


# Tokens. A token is active if its weight is not 0; the others are skipped.


def places(weights: Row) -> list[int]:
    """The slots of the active tokens."""
    return [t for t, w in enumerate(weights) if w != 0]


def token_rewards(*, rewards: Sequence[float], weights: Rows, penalties: Rows | None = None) -> Rows:
    """The reward of a sample at its last active token, plus penalties."""
    result = []
    for i, row in enumerate(weights):
        slots = places(row)
        own = [0.0] * len(row)
        for t in slots:
            own[t] = (rewards[i] if t == slots[-1] else 0.0) + (0.0 if penalties is None else penalties[i][t])
        result.append(own)
    return result


def kl_penalties(
    *,
    logprobs: Rows,
    ref_logprobs: Rows,
    weights: Rows,
    kl_beta: float,
    kl: str = "k1",
    centred: bool = False,
    discount: float = 0.0,
    steps: str = "active",
) -> Rows:
    """−β·(KL − mean KL of the batch), summed over the tokens from here with discount."""

    def estimate(lp: float, ref: float) -> float:
        x = ref - lp
        return {"k1": -x, "k2": x * x / 2, "k3": math.exp(x) - x - 1}[kl]

    kls = [
        [estimate(p, q) if w != 0 else 0.0 for w, p, q in zip(*rows, strict=True)]
        for rows in zip(weights, logprobs, ref_logprobs, strict=True)
    ]
    active = [x for row, ws in zip(kls, weights) for x, w in zip(row, ws) if w != 0]
    centre = mean(active) if centred and active else 0.0
    own = [[-kl_beta * (x - centre) if w != 0 else 0.0 for x, w in zip(*rows)] for rows in zip(kls, weights)]
    return returns_to_go(rewards=own, weights=weights, gamma=discount, steps=steps)


def returns_to_go(*, rewards: Rows, weights: Rows, gamma: float = 1.0, steps: str = "active") -> Rows:
    """Σ_k γᵏ·r of the k-th token from here, where k counts active tokens or slots."""
    result = []
    for row, ws in zip(rewards, weights, strict=True):
        slots, own = places(ws), [0.0] * len(row)
        for t in slots:
            later = [s for s in slots if s >= t]
            distance = [s - t for s in later] if steps == "slots" else range(len(later))
            own[t] = math.fsum(gamma**k * row[s] for k, s in zip(distance, later))
        result.append(own)
    return result


def gae(*, rewards: Rows, values: Rows, weights: Rows, gamma: float = 1.0, lam: float = 0.95) -> tuple[Rows, Rows]:
    """A = Σ_k (γλ)ᵏ·δ of the k-th token from here, δ = r + γ·V of the next token − V; returns A + V (eq. 16)."""
    advantages, returns = [], []
    for row, vs, ws in zip(rewards, values, weights, strict=True):
        slots, a, g = places(ws), [0.0] * len(row), [0.0] * len(row)
        v = [vs[t] for t in slots] + [0.0]
        deltas = [row[t] + gamma * v[k + 1] - v[k] for k, t in enumerate(slots)]
        for k, t in enumerate(slots):
            a[t] = math.fsum((gamma * lam) ** j * d for j, d in enumerate(deltas[k:]))
            g[t] = a[t] + v[k]
        advantages.append(a)
        returns.append(g)
    return advantages, returns


def reinforce_plus_plus_advantages(
    *, rewards: Rows, weights: Rows, gamma: float = 1.0, eps: float = 1e-8, ddof: int = 1
) -> Rows:
    """Returns to go, whitened over the batch (Hu et al. 2025)."""
    returns = returns_to_go(rewards=rewards, weights=weights, gamma=gamma)
    return whiten(values=returns, weights=weights, eps=eps, ddof=ddof)


def whiten(*, values: Rows, weights: Rows, shift_mean: bool = True, eps: float = 1e-8, ddof: int = 1) -> Rows:
    """(x − mean) / √(variance + eps) over the active tokens, plus the mean if it is not shifted."""
    flat = [x if w != 0 else None for row, ws in zip(values, weights, strict=True) for x, w in zip(row, ws)]
    white = iter(standardised(flat, None, eps, ddof, root=True))
    centre = 0.0 if shift_mean else mean([x for x in flat if x is not None])
    return [[x + centre if w != 0 else 0.0 for w, x in zip(ws, white)] for ws in weights]


def optimal_token_advantages(
    *,
    rewards: Rows,
    logprobs: Rows,
    sum_square_probs: Rows,
    weights: Rows,
    groups: Groups,
    importance: Rows | None = None,
    group_of_one: str = "zero",
) -> Rows:
    """A = G − Σ W·G / Σ W over the t-th tokens of the group, W = Σ_{s≤t} ρ²(1 − 2p + Σ p²) (Li et al. 2026)."""
    returns = returns_to_go(rewards=rewards, weights=weights)
    g, w = [], []
    for i, ws in enumerate(weights):
        energies = [
            (1 - 2 * math.exp(logprobs[i][t]) + sum_square_probs[i][t])
            * (1.0 if importance is None else importance[i][t] ** 2)
            for t in places(ws)
        ]
        g.append([returns[i][t] for t in places(ws)])
        w.append([math.fsum(energies[: k + 1]) for k in range(len(energies))])
    result = [[0.0] * len(ws) for ws in weights]
    for i, ws in enumerate(weights):
        for k, t in enumerate(places(ws)):
            own = [j for j in range(len(weights)) if groups[j] == groups[i] and len(g[j]) > k]
            mass = math.fsum(w[j][k] for j in own)
            b = mean([g[j][k] for j in own]) if mass <= 0 else math.fsum(w[j][k] * g[j][k] for j in own) / mass
            same = max(g[j][k] for j in own) == min(g[j][k] for j in own)
            result[i][t] = 0.0 if same else g[i][k] - b
            if len(own) == 1 and group_of_one == "reward":
                result[i][t] = g[i][k]
    return result
