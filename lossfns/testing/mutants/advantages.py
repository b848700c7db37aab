"""Advantages that are wrong in one expression each: ``(rewards, groups) -> advantages``."""

from __future__ import annotations

import math
from collections.abc import Hashable
from functools import partial
from statistics import median

import torch

import lossfns
from lossfns.testing.mutants import parts
from lossfns.testing.mutants.parts import advantages, deviation, mean, standardised

mutant = partial(parts.mutant, kind="advantages", like=lossfns.group_advantages)


@mutant("std-over-n", seen="unsloth-zoo#832")
def advantages_std_over_n(rewards: list[float], groups: list[Hashable]) -> list[float]:
    """The deviation with n below."""

    def advantage(reward: float, peers: list[float]) -> float:
        return standardised(reward, peers) * math.sqrt(len(peers) / max(len(peers) - 1, 1))

    return advantages(rewards, groups, advantage=advantage)


@mutant("constant-group-noise")
def advantages_of_rounding(rewards: list[float], groups: list[Hashable]) -> list[float]:
    """Guarded by std > 0, which the rounding of the mean gets past."""

    def advantage(reward: float, peers: list[float]) -> float:
        centre = sum(peers) / len(peers)
        std = math.sqrt(sum((r - centre) ** 2 for r in peers) / max(len(peers) - 1, 1))
        return (reward - centre) / std if std > 0 else 0.0

    return advantages(rewards, groups, advantage=advantage)


@mutant("constant-group-noise", seen="atropos#481")
def advantages_of_float32_rounding(rewards: list[float], groups: list[Hashable]) -> list[float]:
    """float32 and an epsilon of 1e-8."""

    def advantage(reward: float, peers: list[float]) -> float:
        r = torch.tensor(peers, dtype=torch.float32)
        centre = r.sum() / len(r)
        std = ((r - centre).square().sum() / max(len(r) - 1, 1)).sqrt()
        return ((torch.tensor(reward, dtype=torch.float32) - centre) / (std + 1e-8)).item()

    return advantages(rewards, groups, advantage=advantage)


@mutant("group-of-one-nan", seen="fw-ai/cookbook")
def advantages_group_of_one(rewards: list[float], groups: list[Hashable]) -> list[float]:
    """The deviation of one value, with n − 1 below."""

    def advantage(reward: float, peers: list[float]) -> float:
        return standardised(reward, peers) if len(peers) > 1 else math.nan

    return advantages(rewards, groups, advantage=advantage)


def by_position(rewards: list[float], groups: list[Hashable]) -> list[list[float]]:
    """The samples cut into as many runs as there are groups."""
    size = -(-len(rewards) // len(set(groups)))
    return [rewards[i - i % size : i - i % size + size] for i in range(len(rewards))]


@mutant("groups-by-position", seen="PrimeIntellect-ai/prime-rl#600")
def advantages_by_position(rewards: list[float], groups: list[Hashable]) -> list[float]:
    """`rewards.reshape(-1, group_size)`, for samples that came back interleaved."""
    return advantages(rewards, groups, peers=by_position)


@mutant("groups-ignored")
def advantages_of_batch(rewards: list[float], groups: list[Hashable]) -> list[float]:
    """Mean and deviation of the whole batch."""
    return advantages(rewards, groups, peers=lambda rewards, groups: [rewards] * len(rewards))


@mutant("not-centred")
def advantages_not_centred(rewards: list[float], groups: list[Hashable]) -> list[float]:
    """r / std."""

    def advantage(reward: float, peers: list[float]) -> float:
        return 0.0 if max(peers) == min(peers) else reward / (deviation(peers) + 1e-6)

    return advantages(rewards, groups, advantage=advantage)


@mutant("not-centred")
def advantages_against_median(rewards: list[float], groups: list[Hashable]) -> list[float]:
    """(r − median) / std."""

    def advantage(reward: float, peers: list[float]) -> float:
        return 0.0 if max(peers) == min(peers) else (reward - median(peers)) / (deviation(peers) + 1e-6)

    return advantages(rewards, groups, advantage=advantage)


@mutant("order-lost")
def advantages_reversed(rewards: list[float], groups: list[Hashable]) -> list[float]:
    """(mean − r) / std: costs taken for rewards."""
    return advantages(rewards, groups, advantage=lambda reward, peers: -standardised(reward, peers))


@mutant("order-lost")
def advantages_of_distance(rewards: list[float], groups: list[Hashable]) -> list[float]:
    """(|r − mean| − its mean) / std: the unusual is taken for the good."""

    def advantage(reward: float, peers: list[float]) -> float:
        centre = mean(peers)
        return standardised(abs(reward - centre), [abs(r - centre) for r in peers])

    return advantages(rewards, groups, advantage=advantage)
