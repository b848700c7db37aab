"""Token weights: the plain-float oracle, numbers by hand, the formulas of other frameworks, and exact splits."""

import math
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import rollout_oracle as plain
import torch
from batches import Batch, Case, apart, call, random_batch
from rollout_oracle import Rows, kept, product, ratios, weighted_ppo, whole
from torch import Tensor

import lossfns
from lossfns import (
    LossInputError,
    TokenWeight,
    accepted_weights,
    geometric_level,
    k3,
    maximum_level,
    merge_metrics,
    ppo,
    proximal_logprobs,
    rollout_summary,
    sequence_level,
    support_logprobs,
    token_level,
    top_p_support,
    with_kl,
    with_rollout_weight,
)
from lossfns.export.datums import keeps_weights
from lossfns.kl import binary_kl, binary_tv, larger_way, swapped
from lossfns.rollout import (
    inside,
    masked,
    ratio,
    sequence_normalized,
    token_normalized,
    total_variation_mask,
    truncated,
    within,
    without_outliers,
)
from lossfns.testing import oracle

LEVELS = {"token": token_level, "sequence": sequence_level, "geometric": geometric_level}
BOUNDS = (0.7, 1.6)
FACTORS: dict[str, tuple[TokenWeight, Callable[..., Rows]]] = {}
"""Name → our weight, and the oracle's function of the columns."""


def add(weight: TokenWeight, factor: Callable[..., Rows]) -> None:
    FACTORS[repr(weight)] = weight, factor


def of_ratio(level: str, numerator: str, change: Callable[[float], float]) -> Callable[..., Rows]:
    def factor(**given: Any) -> Rows:
        rows = ratios(given["weights"], given[numerator], given["sampler_logprobs"], level)
        return [[change(r) for r in row] for row in rows]

    return factor


def of_divergence(divergence: Callable[[float, float], float], high: float, how: Any) -> Callable[..., Rows]:
    def factor(**given: Any) -> Rows:
        values = plain.of_pairs(divergence, given["sampler_logprobs"], given["old_logprobs"])
        return kept(values if how is None else whole(given["weights"], values, how), -math.inf, high)

    return factor


def plain_k3(lp: float, ref: float) -> float:
    x = min(max(ref - lp, -20.0), 20.0)
    return math.exp(x) - x - 1


def plain_tv(lp: float, ref: float) -> float:
    return abs(math.exp(lp) - math.exp(ref))


for _level, _function in LEVELS.items():
    for _numerator in ("old_logprobs", "logprobs"):
        _of = lambda change, level=_level, numerator=_numerator: of_ratio(level, numerator, change)  # noqa: E731
        add(ratio(_function, _numerator), _of(lambda r: r))
        add(truncated(BOUNDS, _function, _numerator), _of(lambda r: min(max(r, BOUNDS[0]), BOUNDS[1])))
        add(masked(BOUNDS, _function, _numerator), _of(lambda r: r if BOUNDS[0] <= r <= BOUNDS[1] else 0.0))
        add(inside(BOUNDS, _function, _numerator), _of(lambda r: float(BOUNDS[0] <= r <= BOUNDS[1])))
for _divergence, _plain in ((k3, plain_k3), (binary_kl, plain.binary_kl), (binary_tv, plain_tv)):
    for _function, _how in (
        (token_level, None),
        (sequence_level, plain.weighted_sum),
        (geometric_level, plain.weighted_mean),
        (maximum_level, plain.maximum),
    ):
        add(within(_divergence, 0.05, _function), of_divergence(_plain, 0.05, _how))
add(within(swapped(k3), 0.05), of_divergence(lambda lp, ref: plain_k3(ref, lp), 0.05, None))
add(
    within(larger_way(binary_kl), 0.05, maximum_level),
    of_divergence(lambda lp, ref: max(plain.binary_kl(lp, ref), plain.binary_kl(ref, lp)), 0.05, plain.maximum),
)


def outliers(**given: Any) -> Rows:
    r = ratios(given["weights"], given["old_logprobs"], given["sampler_logprobs"], "token")
    outside = [[1 - x for x in row] for row in kept(r, 0.4, 3.0)]
    return [[1 - x for x in row] for row in whole(given["weights"], outside, plain.maximum)]


add(without_outliers((0.4, 3.0)), outliers)
_band = ratio() * inside((0.8, 1.25), geometric_level)
add(
    _band,
    lambda **g: product(
        FACTORS[repr(ratio())][1](**g),
        of_ratio("geometric", "old_logprobs", lambda r: float(0.8 <= r <= 1.25))(**g),
    ),
)


def grouped(batch: Batch, labels: list[int]) -> Batch:
    batch.columns["groups"] = [[float(label)] * len(row) for label, row in zip(labels, batch.weights)]
    return batch


def group_mean(numbers: list[float], counts: list[float], labels: list[int]) -> list[float]:
    """Σ numbers / Σ counts of each datum's group."""
    of = [[i for i, other in enumerate(labels) if other == label] for label in labels]
    return [math.fsum(numbers[i] for i in rows) / (math.fsum(counts[i] for i in rows) or 1.0) for rows in of]


def plain_labels(groups: Rows) -> list[int]:
    return [int(row[0]) for row in groups]


def token_normalised(**g: Any) -> Rows:
    factor, weights = FACTORS[repr(truncated(BOUNDS))][1](**g), g["weights"]
    sums = [math.fsum(w * r for w, r in zip(*rows)) for rows in zip(weights, factor)]
    means = group_mean(sums, [math.fsum(row) for row in weights], plain_labels(g["groups"]))
    return [[r / (mean or 1.0) for r in row] for row, mean in zip(factor, means)]


def sequence_normalised(**g: Any) -> Rows:
    factor, weights = FACTORS[repr(masked(BOUNDS))][1](**g), g["weights"]
    present = [float(any(row)) for row in weights]
    averages = [row[0] for row in whole(weights, factor, plain.weighted_mean)]
    means = group_mean(averages, present, plain_labels(g["groups"]))
    return [[r / (mean or 1.0) for r in row] for row, mean in zip(factor, means)]


def tv_masked(**g: Any) -> Rows:
    r = ratios(g["weights"], g["logprobs"], g["sampler_logprobs"], "token")
    half = [[abs(x - 1) / 2 for x in row] for row in r]
    averages = [row[0] for row in whole(g["weights"], half, plain.weighted_mean)]
    means = group_mean(averages, [float(any(row)) for row in g["weights"]], plain_labels(g["groups"]))
    rows = zip(g["advantages"], g["logprobs"], g["sampler_logprobs"], means)
    return [[float(mean <= 0.3 or a * (x - s) <= 0) for a, x, s in zip(*row)] for *row, mean in rows]


GROUPED = {
    repr(weight): (weight, factor)
    for weight, factor in (
        (token_normalized(truncated(BOUNDS)), token_normalised),
        (sequence_normalized(masked(BOUNDS)), sequence_normalised),
        (total_variation_mask(0.3), tv_masked),
    )
}


def case_of(weight: TokenWeight, factor: Callable[..., Rows], weigh: str = "token_mean") -> Case:
    loss = with_rollout_weight(ppo(weigh=weigh), weight)  # type: ignore[arg-type]
    return Case(loss, weighted_ppo, {"weigh": weigh, "factor": factor})


@pytest.mark.filterwarnings("ignore:the mean .log-ratio. is")
def test_every_weight_equals_the_oracle() -> None:
    """Value, gradient and the mean weight, in float64 to 1e-12 and in float32 to 2e-5."""
    for seed, (name, (weight, factor)) in enumerate({**FACTORS, **GROUPED}.items()):
        case = case_of(weight, factor, ("token_mean", "sequence_mean")[seed % 2])
        for batch in (random_batch(Random(seed)), random_batch(Random(seed + 100), longest=3)):
            batch = grouped(batch, [i // 2 for i in range(len(batch.weights))])
            value, gradients, metrics = call(case.loss, batch)
            assert apart([value, gradients], list(case.expected(batch))) < 1e-12, name
            slots = [(i, t) for i, row in enumerate(batch.weights) for t in oracle.active(row)]
            rho = factor(logprobs=batch.logprobs, weights=batch.weights, **batch.columns)
            mean = math.fsum(rho[i][t] for i, t in slots) / len(slots)
            assert metrics["rollout_weight"] == pytest.approx(mean, rel=1e-6), name
            assert metrics["rollout_rejected"] == pytest.approx(sum(rho[i][t] == 0 for i, t in slots) / len(slots)), (
                name
            )
            if max(abs(x) for row in gradients for x in row) < 1e3:
                single = call(case.loss, batch, dtype=torch.float32)
                assert apart([single[0], single[1]], [value, gradients]) < 2e-5, name


@pytest.mark.filterwarnings("ignore:the mean .log-ratio. is")
def test_every_split_that_keeps_groups_whole_adds_up_and_its_metrics_merge() -> None:
    for seed, (name, (weight, factor)) in enumerate({**FACTORS, **GROUPED}.items()):
        loss = case_of(weight, factor).loss
        batch = random_batch(Random(seed), sequences=7)
        labels = [0, 1, 0, 2, 1, 2, 0]
        batch = grouped(batch, labels)
        value, gradients, metrics = call(loss, batch)
        denominator, parts, total, rows = sum(map(sum, batch.weights)), [], 0.0, [[]] * 7
        for label in range(3):
            which = [i for i in range(7) if labels[i] == label]
            part = batch.take(which)
            if not any(map(any, part.weights)):
                continue
            part_value, part_gradients, part_metrics = call(loss, part, denominator=denominator)
            total += part_value
            parts.append(part_metrics)
            for i, row in zip(which, part_gradients):
                rows[i] = row
        left_out = [i for i in range(7) if not rows[i]]
        for i in left_out:
            rows[i] = gradients[i]
        assert apart([total, rows], [value, gradients]) < 1e-12, name
        merged = merge_metrics(parts)
        for key in ("rollout_weight", "rollout_weight_square", "rollout_limited", "rollout_rejected"):
            assert merged[key] == pytest.approx(metrics[key], rel=1e-6, abs=1e-9), (name, key)
        if not left_out:
            assert rollout_summary(merged) == pytest.approx(rollout_summary(metrics), rel=1e-6), name


BATCH = Batch(
    logprobs=[[-9.0, -1.0, -2.0], [-2.0], [-1.0, -1.0]],
    weights=[[0.0, 1.0, 1.0], [1.0], [1.0, 1.0]],
    columns={
        "advantages": [[1.0] * 3, [-1.0], [2.0, 2.0]],
        "old_logprobs": [[-9.0, -1.0, -2.0], [-2.0], [-1.0, -1.0]],
        "sampler_logprobs": [
            [0.0, -1.0 - math.log(3), -2.0],
            [-2.0 + math.log(4)],
            [-1.0 - math.log(1.5), -1.0 + math.log(2)],
        ],
        "groups": [[7.0] * 3, [7.0], [3.0] * 2],
    },
)
"""On-policy, r = 1. ρ = 3, 1 | ¼ | 1.5, ½. Products 3, ¼, ¾."""


def rho(weight: TokenWeight) -> list[float]:
    """The weights of BATCH's five active tokens: the gradients of −r·A, over −A/5."""
    _, gradients, _ = call(with_rollout_weight(lossfns.importance_sampling(), weight), BATCH)
    slots = [(0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]
    return [-5 * gradients[i][t] / BATCH.columns["advantages"][i][t] for i, t in slots]


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (ratio(), [3, 1, 0.25, 1.5, 0.5]),
        (truncated((0.0, 2.0)), [2, 1, 0.25, 1.5, 0.5]),
        (truncated((0.5, 2.0)), [2, 1, 0.5, 1.5, 0.5]),
        (truncated((0.0, 2.0), sequence_level), [2, 2, 0.25, 0.75, 0.75]),
        (masked((0.5, 2.0)), [0, 1, 0, 1.5, 0.5]),  # on a bound the weight is kept
        (masked((0.0, 2.0), sequence_level), [0, 0, 0.25, 0.75, 0.75]),
        (inside((0.5, 2.0)), [0, 1, 0, 1, 1]),
        (inside((0.5, 2.0), geometric_level), [1, 1, 0, 1, 1]),  # √3, ¼, √¾
        (ratio() * inside((0.5, 2.0), geometric_level), [3, 1, 0, 1.5, 0.5]),
        (without_outliers((0.3, 2.5)), [0, 0, 0, 1, 1]),
        (within(k3, 0.5, token_level), [0, 1, 0, 1, 1]),  # ρ − ln ρ − 1 = 0.90, 0, 0.64, 0.09, 0.19
        (within(k3, 0.5, geometric_level), [1, 1, 0, 1, 1]),  # means 0.45, 0.64, 0.14
        (within(k3, 0.5, maximum_level), [0, 0, 0, 1, 1]),
        (within(k3, 0.25, sequence_level), [0, 0, 0, 0, 0]),  # sums 0.90, 0.64, 0.29
        (token_normalized(ratio()), [3 / (4.25 / 3), 1 / (4.25 / 3), 0.25 / (4.25 / 3), 1.5, 0.5]),
        (sequence_normalized(ratio()), [3 / 1.125, 1 / 1.125, 0.25 / 1.125, 1.5, 0.5]),  # (2 + ¼) / 2 and 1
        (total_variation_mask(0.2), [0, 1, 0, 0, 1]),  # groups (½ + ⅜)/2 and ¼: A·ln ρ > 0 is rejected
        (total_variation_mask(0.3), [0, 1, 0, 1, 1]),
    ],
    ids=repr,
)
def test_weights_by_hand(weight: TokenWeight, expected: list[float]) -> None:
    assert rho(weight) == pytest.approx(expected, abs=1e-12)


def test_statistics_by_hand() -> None:
    """Of ρ = 0, 1, 0, 1.5, ½: one sequence of three is rejected; (Σρ)² / (5·Σρ²) = 9 / 17.5."""
    _, _, metrics = call(with_rollout_weight(ppo(), masked((0.5, 2.0))), BATCH)
    assert metrics["rollout_weight"] == pytest.approx(3 / 5) and metrics["rollout_limited"] == 0
    assert metrics["rollout_weight_square"] == pytest.approx(3.5 / 5)
    assert metrics["rollout_rejected"] == pytest.approx(2 / 5)
    expected = {"effective_sample_size": 9 / 17.5, "rejected_sequences": 1 / 3}
    assert rollout_summary(metrics) == pytest.approx(expected)
    _, _, metrics = call(with_rollout_weight(ppo(), truncated((0.5, 2.0)) * within(k3, 0.01, maximum_level)), BATCH)
    assert metrics["rollout_limited"] == pytest.approx(2 / 5)
    assert rollout_summary(metrics) == {"effective_sample_size": 0.0, "rejected_sequences": 1.0}
    with pytest.raises(LossInputError, match="metrics: expected the metrics rollout_weight"):
        rollout_summary({"tokens": 1.0})


def test_rejected_tokens_stay_in_the_denominator_or_leave_it() -> None:
    """A = 1, −1, 2, 2 with ρ = 0, 1, 0, 1.5, ½: Σρ·A = 1 + 3 + 1 = 5, over 5 tokens or over the 3 that are kept.

    With the accepted weights, the KL penalty counts the kept tokens alone, too, as in verl.
    """
    weight, bound = masked((0.5, 2.0)), {name: BATCH.columns[name] for name in ("old_logprobs", "sampler_logprobs")}
    loss = with_rollout_weight(lossfns.importance_sampling(), weight)
    assert call(loss, BATCH)[0] == pytest.approx(-5 / 5)
    rows = accepted_weights(weight, BATCH.data(), BATCH.tensors(), weights=BATCH.weights, **bound)
    assert [row.tolist() for row in rows] == [[0.0, 0.0, 1.0], [0.0], [1.0, 1.0]]
    kept_only = Batch(BATCH.logprobs, [row.tolist() for row in rows], BATCH.columns)
    value, _, metrics = call(loss, kept_only)
    assert value == pytest.approx(-5 / 3) and metrics["rollout_rejected"] == 0 and metrics["sequences_empty"] == 1
    columns = BATCH.columns | {"ref_logprobs": [[x - 1 for x in row] for row in BATCH.logprobs]}
    with_ref = Batch(BATCH.logprobs, BATCH.weights, columns)
    assert call(with_kl(loss, 1.0, lossfns.k2), with_ref)[0] == pytest.approx(-5 / 5 + 0.5)
    with_ref = Batch(BATCH.logprobs, kept_only.weights, columns)
    assert call(with_kl(loss, 1.0, lossfns.k2), with_ref)[0] == pytest.approx(-5 / 3 + 0.5)
    with pytest.raises(LossInputError, match="accepted_weights: expected columns that the weight reads, got 'old_lp'"):
        accepted_weights(weight, BATCH.data(), BATCH.tensors(), old_lp=[])


def test_a_factor_has_no_gradient_and_a_group_without_weight_stays_as_it_is() -> None:
    """With the current policy in the numerator, ∂/∂lp of ρ·r·A is ρ·r·A and not twice that."""
    _, gradients, _ = call(with_rollout_weight(lossfns.importance_sampling(), ratio(numerator="logprobs")), BATCH)
    assert gradients[0] == pytest.approx([0.0, -3 / 5, -1 / 5])
    assert rho(token_normalized(masked((1.0, 1.0)))) == pytest.approx([0, 3, 0, 0, 0])


# Other frameworks


def verl_weights(x: Tensor, mask: Tensor, level: str, upper: float, lower: float | None, normalise: bool) -> Tensor:
    """compute_rollout_correction_weights of verl 0.9.1, trainer/ppo/rollout_corr_helper.py. x is old − sampler."""
    if level == "sequence":
        x = (x * mask).sum(-1, keepdim=True).expand_as(x)
    raw = x.clamp(-20, 20).exp() * mask
    weights = raw.clamp(max=upper)
    if lower is not None:
        weights = torch.where((raw >= lower) & (raw <= upper), raw, 0)
    if normalise and level == "token":
        weights = weights / ((weights * mask).sum() / mask.sum())
    elif normalise:
        weights = weights / ((weights * mask).sum(-1) / mask.sum(-1)).mean()
    return weights


def verl_mask(x: Tensor, mask: Tensor, option: str, upper: float) -> Tensor:
    """compute_rollout_rejection_mask of verl 0.9.1, the options of k2 and k3."""
    x = x.clamp(-20, 20)
    token = 0.5 * x.square() if option.endswith("k2") else x.exp() - 1 - x
    rows = (token * mask).sum(-1, keepdim=True)
    statistic = {
        "token": token,
        "seq_sum": rows.expand_as(x),
        "seq_mean": (rows / mask.sum(-1, keepdim=True)).expand_as(x),
        "seq_max": token.masked_fill(mask == 0, -math.inf).amax(-1, keepdim=True).expand_as(x),
    }[option[:-3]]
    return (statistic <= upper) * mask


def trl_ratio(x: Tensor, mask: Tensor, mode: str, low: float | None, high: float | None) -> Tensor:
    """The ratio of TRL 1.16, trainer/grpo_trainer.py, ``vllm_importance_sampling_mode``."""
    x = x * mask
    r = (x.sum(-1, keepdim=True) if mode.startswith("sequence") else x).exp().expand_as(x)
    if low is None and high is None:
        return r
    if mode.endswith("truncate"):
        return r.clamp(low, high)
    outside = (r < (-math.inf if low is None else low)) | (r > (math.inf if high is None else high))
    return r.masked_fill(outside, 0.0)


def skyrl_mask(x: Tensor, mask: Tensor, kind: str, low: float, high: float) -> Tensor:
    """The masks of SkyRL, utils/off_policy_correction_utils.py: outlier, token, geometric and product."""
    token = x.clamp(-20, 20).exp()
    if kind == "outlier":
        outside = ((token > high) | (token < low)) & (mask > 0)
        return (~outside.any(-1, keepdim=True)).expand_as(x) * mask
    rows = (x * mask).sum(-1, keepdim=True)
    mean = rows / mask.sum(-1, keepdim=True)
    r = {"token": token, "geometric": mean.clamp(-20, 20).exp(), "product": rows.clamp(-20, 20).exp()}[kind]
    return ((r >= low) & (r <= high)).expand_as(x) * mask


def test_the_weights_of_other_frameworks() -> None:
    """Random differences, a ragged mask, and one token 25 nats away."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64) * 0.4
    x[2, 1] = 25.0
    mask = torch.tensor([[1, 1, 1, 1, 1]] * 3 + [[1, 1, 0, 0, 0]] * 2 + [[0, 0, 0, 1, 1]]).double()
    old = torch.full_like(x, -30.0)
    near = x.clone()
    near[2, 1] = 0.3
    levels = {"token": token_level, "seq_sum": sequence_level, "seq_mean": geometric_level, "seq_max": maximum_level}
    theirs: list[tuple[TokenWeight, Tensor, Tensor]] = []
    for level, function in (("token", token_level), ("sequence", sequence_level)):
        normal = token_normalized if level == "token" else sequence_normalized
        theirs += [
            (truncated((0.0, 2.0), function), verl_weights(x, mask, level, 2.0, None, False), x),
            (masked((0.5, 2.0), function), verl_weights(x, mask, level, 2.0, 0.5, False), x),
            (normal(truncated((0.0, 2.0), function)), verl_weights(x, mask, level, 2.0, None, True), x),
            (truncated((0.5, 3.0), function), trl_ratio(x, mask, f"{level}_truncate", 0.5, 3.0), x),
            (masked((0.0, 3.0), function), trl_ratio(x, mask, f"{level}_mask", None, 3.0), x),
            (ratio(function), trl_ratio(near, mask, f"{level}_truncate", None, None), near),
        ]
    for option, function in levels.items():
        for k, name in ((lossfns.k2, "k2"), (k3, "k3")):
            theirs.append((within(k, 0.2, function), verl_mask(x, mask, f"{option}_{name}", 0.2), x))
    theirs += [
        (without_outliers((1e-4, 100.0)), skyrl_mask(x, mask, "outlier", 1e-4, 100.0), x),
        (without_outliers((0.5, 1.5)), skyrl_mask(x, mask, "outlier", 0.5, 1.5), x),
        (inside((0.5, 2.0)), skyrl_mask(x, mask, "token", 0.5, 2.0), x),
        (inside((0.9, 1.1), geometric_level), skyrl_mask(x, mask, "geometric", 0.9, 1.1), x),
        (inside((0.5, 2.0), sequence_level), skyrl_mask(x, mask, "product", 0.5, 2.0), x),
    ]
    for weight, expected, gaps in theirs:
        loss = with_rollout_weight(lossfns.importance_sampling(), weight)
        lp = old.clone().requires_grad_()
        columns = {"advantages": torch.ones(6), "old_logprobs": old, "sampler_logprobs": old - gaps}
        groups = {"groups": torch.zeros_like(old)} if "groups" in loss.reads else {}
        total, _ = loss.padded(lp, mask, **columns, **groups)
        got = -torch.autograd.grad(total, lp)[0] * mask.sum()
        assert torch.allclose(got, expected * mask, rtol=1e-12, atol=1e-12), weight


def test_verl_bounds_the_reciprocal_ratio_by_k1() -> None:
    """verl's token_k1 with "0.5_3" keeps ½ <= sampler/old <= 3; ``inside`` bounds old/sampler."""
    r = torch.tensor([0.4, 0.6, 1.0, 1.9, 2.5], dtype=torch.float64)
    k1 = -r.log()
    theirs = (k1 >= math.log(0.5)) & (k1 <= math.log(3.0))
    lp = torch.full((1, 5), -9.0, dtype=torch.float64, requires_grad=True)
    loss = with_rollout_weight(lossfns.importance_sampling(), inside((1 / 3, 2.0)))
    columns = {"old_logprobs": lp.detach(), "sampler_logprobs": lp.detach() - r.log()}
    total, _ = loss.padded(lp, torch.ones(1, 5), advantages=torch.ones(1), **columns)
    assert (torch.autograd.grad(total, lp)[0][0] != 0).tolist() == theirs.tolist() == [True, True, True, True, False]


def test_decoupled_ppo_clips_against_the_proximal_policy_and_corrects_for_the_sampler() -> None:
    """AReaL: −min(rA, clip(r)A)·(prox/behaviour)·[prox/behaviour <= 5] with r = π/prox."""
    prox = proximal_logprobs(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -2.0]), torch.tensor([2, 4]), version=4)
    assert prox.tolist() == [-1.5, -2.0]
    loss = with_rollout_weight(ppo(), ratio() * inside((0.0, 5.0)))
    columns = {"advantages": [[1.0, 1.0]], "old_logprobs": [prox.tolist()], "sampler_logprobs": [[-2.0, -2.0]]}
    value, gradients, _ = call(loss, Batch([[-1.0, -2.0]], [[1.0, 1.0]], columns))
    assert value == pytest.approx(-(1.2 * math.exp(0.5) + 1.0) / 2)
    assert gradients == [[0.0, -0.5]]


def test_the_proximal_policy_is_interpolated_by_the_age_of_the_weights() -> None:
    """v = 4: α = (3 − v_s)/(4 − v_s) = ¾, ⅔, ½, 0, and 0 where the sampler has the current weights."""
    now, then = torch.full((5,), -1.0, dtype=torch.float64), torch.full((5,), -2.0, dtype=torch.float64)
    found = proximal_logprobs(now.requires_grad_(), then, torch.tensor([0, 1, 2, 3, 4]), version=4)
    assert found.tolist() == pytest.approx([-1.25, -2 + 2 / 3, -1.5, -2.0, -2.0]) and not found.requires_grad
    with pytest.raises(LossInputError, match="versions: expected at most version = 4, got 5"):
        proximal_logprobs(now, then, torch.full((5,), 5), version=4)
    with pytest.raises(LossInputError, match="versions: expected 5 values, one for each of logprobs, got 4"):
        proximal_logprobs(now, then, torch.zeros(4), version=4)


# The support of a sampler


def test_logprobs_on_the_support_of_top_p_are_those_that_a_sampler_draws_from() -> None:
    """p = ½, ¼, ⅛, ⅛ with top_p = 0.7: {½, ¼}, so ⅔ and ⅓. A nucleus ends with the token that reaches top_p."""
    full = torch.tensor([[0.125, 0.5, 0.125, 0.25]] * 4, dtype=torch.float64).log()
    sampled = torch.tensor([1, 3, 0, 1])
    support = top_p_support(full[:2], sampled[:2], 0.7)
    assert support.tolist() == [[False, True, False, True]] * 2
    assert support_logprobs(full[:2], sampled[:2], support).exp().tolist() == pytest.approx([2 / 3, 1 / 3])
    assert top_p_support(full[:1], sampled[:1], 0.75).tolist() == [[False, True, False, True]]
    assert top_p_support(full[:1], sampled[:1], 0.5).tolist() == [[False, True, False, False]]
    assert top_p_support(full[:1], sampled[:1], 1.0).all()
    outside = top_p_support(full[2:3], sampled[2:3], 0.7)  # the sampler drew it all the same: it is in the support
    assert outside.tolist() == [[True, True, False, True]]
    assert support_logprobs(full[2:3], sampled[2:3], outside).exp().tolist() == pytest.approx([1 / 7])


def test_the_ratio_on_the_support_is_that_of_the_distributions_that_are_drawn_from() -> None:
    """E over the sampler of π/sampler is 1 on the support of both, and 0.75 or less without it."""
    sampler = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
    policy = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64, requires_grad=True)
    index = torch.arange(2)
    rows = lambda p: p.log().expand(2, 4)  # noqa: E731
    support = top_p_support(rows(sampler), index, 0.7)
    drawn = support_logprobs(rows(sampler), index, support)
    own = support_logprobs(rows(policy), index, support)
    assert (drawn.exp() * (own - drawn).exp()).sum().item() == pytest.approx(1.0)
    assert (drawn.exp() * (policy[:2].log() - drawn).exp()).sum().item() == pytest.approx(0.7)
    assert own.requires_grad


@pytest.mark.parametrize(
    ("call_it", "message"),
    [
        (
            lambda x, i: top_p_support(x[:, :2], i, 0.9),
            r"candidate_logprobs\[0\]: expected a mass of at least top_p = 0.9",
        ),
        (lambda x, i: top_p_support(x, i, 0.0), r"top_p: expected a number in \(0, 1\]"),
        (lambda x, i: top_p_support(x[0], i, 0.5), r"candidate_logprobs: expected numbers of shape \[N, K\]"),
        (lambda x, i: top_p_support(x, i + 4, 0.5), "sampled: expected 2 whole numbers below 4"),
        (lambda x, i: top_p_support(-x, i, 0.5), "candidate_logprobs: expected logprobs, at most 0"),
        (lambda x, i: support_logprobs(x, i, x < -9), r"support\[0\]: expected the sampled token in it"),
        (lambda x, i: support_logprobs(x, i, x), r"support: expected bool of shape \(2, 4\)"),
    ],
)
def test_malformed_candidates_are_refused(call_it: Any, message: str) -> None:
    candidates = torch.tensor([[0.5, 0.25, 0.15, 0.1]] * 2).log()
    with pytest.raises(LossInputError, match=message):
        call_it(candidates, torch.tensor([0, 1]))


# Order, names and messages


def test_a_weight_is_given_once_after_tis_and_before_the_penalty() -> None:
    loss = with_rollout_weight(lossfns.with_tis(ppo()), within(k3, 0.01, geometric_level))
    assert with_kl(loss, 0.1).reads == ("advantages", "old_logprobs", "sampler_logprobs", "ref_logprobs")
    with pytest.raises(LossInputError, match="Apply with_kl last"):
        with_rollout_weight(lossfns.grpo(), ratio())
    with pytest.raises(LossInputError, match=r"Pass the product a \* b once"):
        with_rollout_weight(loss, ratio())
    with pytest.raises(LossInputError, match="Apply with_kl last"):
        lossfns.with_tis(loss)
    with pytest.raises(LossInputError, match="weight: expected a TokenWeight"):
        with_rollout_weight(ppo(), lambda t: t.weights)  # type: ignore[arg-type]
    with pytest.raises(LossInputError, match="weight: expected a TokenWeight"):
        ratio() * 2.0  # type: ignore[operator]


def test_a_weight_over_sums_keeps_the_weights_of_a_datum_function_however_far_its_threshold_is() -> None:
    """Share / denominator in place of the weights would change Σ w·k3. Means and maxima do not change."""
    for level, sums in ((sequence_level, True), (geometric_level, False), (maximum_level, False), (token_level, False)):
        loss = with_kl(with_rollout_weight(ppo(), ratio() * within(k3, 1e6, level)), 0.1)
        assert keeps_weights(loss) == sums, level
    with pytest.raises(LossInputError, match="couples the datums of a group"):
        lossfns.export.as_datum_fn(with_rollout_weight(ppo(), token_normalized(ratio())))


def test_the_text_of_a_weight_is_its_constructor_call() -> None:
    names = vars(lossfns)
    for name, (weight, _) in {**FACTORS, **GROUPED}.items():
        assert repr(eval(name, names)) == repr(weight) == name


@pytest.mark.parametrize(
    "build",
    [
        lambda: truncated((0.2, 0.28)),
        lambda: masked((0.5, 2.0), "token_level"),  # type: ignore[arg-type]
        lambda: inside((0.5, 2.0), numerator="sampler_logprobs"),
        lambda: within(k3, 0.0),
        lambda: within("k3", 0.1),  # type: ignore[arg-type]
        lambda: without_outliers((2.0, 100.0)),
        lambda: total_variation_mask(-1.0),
        lambda: token_normalized(k3),  # type: ignore[arg-type]
    ],
)
def test_what_a_weight_cannot_be_is_refused_when_it_is_built(build: Any) -> None:
    with pytest.raises(LossInputError):
        build()
