"""Adapters replayed as their trainers call them: 2 ranks with 2 micro-batches each, under the trainer's own reduction.

Most trainers do not install beside this library. Stand-ins with their documented names of fields take their place: each
replay below follows the documented rule of its trainer, and must give loss and gradient of the whole batch as datums.
"""

import ast
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from batches import sdks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lossfns
from lossfns import (
    ON_POLICY,
    Datum,
    Loss,
    LossInputError,
    ModelInput,
    cispo,
    cross_entropy,
    dapo,
    dpo,
    dro,
    fixed_length,
    grpo,
    gspo,
    gspo_token,
    importance_sampling,
    multi_target_cross_entropy,
    ppo,
    reinforce,
    sequence_level,
    sequence_mean,
    sequence_sum_mean,
    token_mean,
    token_sum,
    with_kl,
    with_tis,
)
from lossfns.integrations import (
    hatchery,
    nemo_rl,
    openrlhf,
    prime_rl,
    skyrl,
    slime,
    swift,
    tinker_cookbook,
    torchtitan,
    trinity,
    verl,
    xtuner,
)

B, T, V = 8, 6, 7
RANKS, PARTS = 2, 4
Batch = dict[str, Tensor]
"""Tensors ``[B, T]`` by name: logprobs, mask and every column; and logits ``[B, T, V]`` with their targets."""


def batch(seed: int = 0) -> Batch:
    """Sequences of 1 to 6 tokens, padded on either side, so that every micro-batch has another number of tokens."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for i, (begin, end) in enumerate([(0, 6), (1, 6), (0, 1), (3, 5), (0, 4), (5, 6), (2, 6), (0, 3)]):
        mask[i, begin:end] = True
    logits = torch.randn(B, T, V, generator=g, dtype=torch.float64)
    targets = torch.randint(0, V, (B, T), generator=g)
    lp = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    def near(x: Tensor) -> Tensor:
        return (x + 0.4 * torch.randn(B, T, generator=g, dtype=torch.float64)).clamp(max=0)

    old = near(lp)
    columns = {"old_logprobs": old, "sampler_logprobs": near(old), "ref_logprobs": near(lp)}
    advantages = torch.randn(B, 1, generator=g, dtype=torch.float64).expand(B, T).clone()
    return {"logits": logits, "targets": targets, "logprobs": lp, "mask": mask, "advantages": advantages, **columns}


def leaf(whole: Batch, name: str) -> Tensor:
    """Replace one of the tensors by a leaf, and return it."""
    whole[name] = whole[name].detach().clone().requires_grad_()
    return whole[name]


def parts(whole: Batch) -> list[Batch]:
    """The four micro-batches; the first rank has the first two."""
    return [{name: x[i : i + B // PARTS] for name, x in whole.items()} for i in range(0, B, B // PARTS)]


def expected(loss: Loss, whole: Batch, wrt: str = "logprobs", weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the whole batch as datums, each of one row."""
    x = leaf(whole, wrt)
    lp = x if wrt == "logprobs" else x.log_softmax(-1).gather(-1, whole["targets"][..., None])[..., 0]
    w = whole["mask"].double() if weights is None else weights
    data = [Datum(ModelInput.from_ints([0] * T), {"target_tokens": [0] * T, "weights": row.tolist()}) for row in w]
    value, _ = loss.bind(**{name: list(whole[name]) for name in loss.reads})(data, list(lp))
    return value.detach(), torch.autograd.grad(value, x)[0]


def assert_same(total: Tensor, x: Tensor, want: tuple[Tensor, Tensor], rtol: float = 1e-12) -> None:
    (gradient,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(total.detach(), want[0], rtol=rtol, atol=rtol)
    torch.testing.assert_close(gradient, want[1], rtol=rtol, atol=rtol)


# verl -----------------------------------------------------------------------------------------------------------------


@dataclass
class ActorConfig:
    global_batch_info: dict[str, Any] = field(default_factory=dict)


def verl_config(whole: Batch, factor: float | None = None) -> ActorConfig:
    tokens, batch_size = int(whole["mask"].sum()), len(whole["mask"])
    counts = {"dp_size": RANKS, "batch_num_tokens": tokens, "global_batch_size": batch_size}
    return ActorConfig({**counts, "loss_scale_factor": factor})


def verl_call(fn: verl.PolicyLoss, x: Batch, mode: str, config: ActorConfig, **kwargs: Any) -> Any:
    named = {"old_log_prob": x["old_logprobs"], "log_prob": x["logprobs"], "advantages": x["advantages"]}
    return fn(**named, response_mask=x["mask"], loss_agg_mode=mode, config=config, **kwargs)


@pytest.mark.parametrize(
    ("loss", "mode"),
    [
        (ppo(dual_clip=3.0), "token-mean"),
        (reinforce(), "token-mean"),
        (gspo(clip=(0.9, 1.1)), "seq-mean-token-mean"),
        (cispo(weigh=sequence_sum_mean), "seq-mean-token-sum"),
        (dapo(weigh=fixed_length(5)), "seq-mean-token-sum-norm"),
        (importance_sampling(weigh=token_sum), "token-sum"),
    ],
    ids=str,
)
@pytest.mark.parametrize("corrected", [False, True])
def test_verl_averages_gradients_over_ranks(loss: Loss, mode: str, corrected: bool) -> None:
    """With rollout weights v the term of each token is v·l: the same as with advantages v·A."""
    whole = batch()
    v = torch.linspace(0.5, 2.0, B * T, dtype=torch.float64).view(B, T)
    scaled = {**whole, "advantages": whole["advantages"] * v} if corrected else whole
    want = expected(loss, scaled)
    x, fn = leaf(whole, "logprobs"), verl.policy_loss(loss)
    config = verl_config(whole, 5 if mode.endswith("norm") else None)
    weights = [v[i : i + 2] if corrected else None for i in range(0, B, 2)]
    called = [verl_call(fn, part, mode, config, rollout_is_weights=w) for part, w in zip(parts(whole), weights)]
    assert_same(torch.stack([total for total, _ in called]).sum() / RANKS, x, want)
    assert all(isinstance(value, float) for _, metrics in called for value in metrics.values())


def test_verl_gets_the_means_of_a_micro_batch_under_actor() -> None:
    """log-ratios 0.3 and −0.1 at active tokens: mean |d| = 0.2. The masked token has nan everywhere."""
    old, lp = torch.tensor([[-1.0, -1.0, torch.nan]]), torch.tensor([[-0.7, -1.1, torch.nan]])
    x = {"old_logprobs": old, "logprobs": lp, "mask": torch.tensor([[1, 1, 0]]), "advantages": torch.ones(1, 3)}
    _, metrics = verl_call(verl.policy_loss(ppo()), x, "token-mean", verl_config(x))
    assert metrics["actor/log_ratio_abs"] == pytest.approx(0.2)
    assert metrics["actor/clip_high"] == 0.5  # e^0.3 = 1.35 is above 1.2
    assert "actor/tokens" not in metrics  # a count must not be averaged


@pytest.mark.parametrize(
    ("loss", "mode", "factor", "message"),
    [
        (ppo(), "seq-mean-token-mean", None, "ppo: loss_agg_mode: expected the mode of ppo"),
        (gspo(), "token-mean", None, "seq-mean-token-mean is sequence_mean"),
        (dapo(weigh=fixed_length(5)), "seq-mean-token-sum-norm", None, "loss_scale_factor=None"),
        (dapo(weigh=fixed_length(5)), "seq-mean-token-sum-norm", 6, "loss_scale_factor=6"),
        (ppo(), "no-such-mode", None, "got 'no-such-mode'"),
    ],
)
def test_verl_is_refused_another_mode(loss: Loss, mode: str, factor: float | None, message: str) -> None:
    whole = batch()
    with pytest.raises(LossInputError, match=message):
        verl_call(verl.policy_loss(loss), whole, mode, verl_config(whole, factor))


def test_verl_is_refused_without_its_counts() -> None:
    whole = batch()
    with pytest.raises(LossInputError, match="global_batch_info: expected dp_size and verl's counts, got no dp_size"):
        verl_call(verl.policy_loss(ppo()), whole, "token-mean", ActorConfig())
    config = verl_config(whole)
    config.global_batch_info["batch_num_tokens"] = None
    with pytest.raises(LossInputError, match="ppo: tokens: expected the number of tokens in the whole batch"):
        verl_call(verl.policy_loss(ppo()), whole, "token-mean", config)


# SkyRL ----------------------------------------------------------------------------------------------------------------


def skyrl_advantages(whole: Batch, reduction: str) -> Tensor:
    """The advantages as ``apply_loss_reduction_to_advantages_minibatch`` documents them."""
    lengths = whole["mask"].sum(1, keepdim=True)
    counts = {"token_mean": lengths.sum(), "sequence_mean": B * lengths, "seq_mean_token_sum_norm": B * 5}
    return whole["advantages"] / counts[reduction]


@pytest.mark.parametrize(
    ("build", "reduction", "weigh"),
    [
        (ppo, "token_mean", token_mean),
        (cispo, "sequence_mean", sequence_mean),
        (gspo, "sequence_mean", sequence_mean),
        (dapo, "seq_mean_token_sum_norm", fixed_length(5)),
        (lambda weigh: with_tis(ppo(weigh=weigh, dual_clip=3.0), cap=1.3), "token_mean", token_mean),
    ],
)
def test_skyrl_divides_the_advantages(build: Callable[..., Loss], reduction: str, weigh: Any) -> None:
    whole = batch()
    want = expected(build(weigh=weigh), whole)
    x, fn = leaf(whole, "logprobs"), skyrl.policy_loss(build(weigh=token_sum))
    whole["advantages"] = skyrl_advantages(whole, reduction)
    config = SimpleNamespace(off_policy_correction=SimpleNamespace(tis_ratio_type=None))
    total = 0
    for p in parts(whole):
        columns = {"loss_mask": p["mask"].float(), "rollout_logprobs": p["sampler_logprobs"]}
        policy_loss, metrics = fn(p["logprobs"], p["old_logprobs"], p["advantages"], config=config, **columns)
        total = total + policy_loss * RANKS  # grad_sum_correction_factor
        assert all(isinstance(value, float) for value in metrics.values())
    assert_same(total / RANKS, x, want)


def test_skyrl_is_refused_what_it_would_not_divide() -> None:
    with pytest.raises(LossInputError, match="expected token_sum in SkyRL, got ppo"):
        skyrl.policy_loss(ppo())
    with pytest.raises(LossInputError, match="terms proportional to the advantages"):
        skyrl.policy_loss(dro(weigh=token_sum))
    with pytest.raises(LossInputError, match="terms proportional to the advantages"):
        skyrl.policy_loss(cross_entropy(weigh=token_sum))
    whole = batch()
    args = (whole["logprobs"], whole["old_logprobs"], whole["advantages"])
    fn = skyrl.policy_loss(ppo(weigh=token_sum))
    asked = SimpleNamespace(off_policy_correction=SimpleNamespace(tis_ratio_type="token"))
    with pytest.raises(LossInputError, match=r"off_policy_correction.tis_ratio_type: expected None, got 'token'"):
        fn(*args, config=asked, loss_mask=whole["mask"])
    with pytest.raises(LossInputError, match="loss_mask"):
        fn(*args, config=SimpleNamespace())


# prime-rl -------------------------------------------------------------------------------------------------------------


@dataclass
class PrimeInputs:
    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


def prime_inputs(whole: Batch, i: int, **changes: Any) -> PrimeInputs:
    rows = {name: x[i] for name, x in whole.items()}
    given = (rows["logprobs"], rows["old_logprobs"], rows["ref_logprobs"], rows["advantages"], rows["mask"])
    return PrimeInputs(*given, **changes)


@pytest.mark.parametrize(
    "loss", [dapo(), dapo(weigh=token_sum), grpo(kl_beta=0.1), gspo(weigh=token_mean), reinforce()], ids=str
)
def test_prime_rl_divides_the_sum_by_its_tokens(loss: Loss) -> None:
    """rl_loss / rl_scale: for ``token_sum`` this is the token mean, too."""
    whole = batch()
    mean = dapo() if loss.name == "dapo" else loss
    want = expected(mean, whole)
    x, fn = leaf(whole, "logprobs"), prime_rl.loss_fn(loss)
    outputs = [fn(prime_inputs(whole, i)) for i in range(B)]
    assert_same(sum(o.loss for o in outputs) / int(whole["mask"].sum()), x, want)
    assert torch.stack([o.metrics["nll" if loss.name == "reinforce" else "ratio"] for o in outputs]).shape == (B,)


def test_prime_rl_multiplies_terms_by_its_weights() -> None:
    """gspo's ratio stays a plain mean over the tokens: weights v of the loss are no weights of the mean."""
    whole = batch()
    v = torch.linspace(0.5, 2.0, T, dtype=torch.float64)
    want = expected(gspo_token(weigh=token_mean), {**whole, "advantages": whole["advantages"] * v})
    x, fn = leaf(whole, "logprobs"), prime_rl.loss_fn(gspo_token(weigh=token_mean))
    total = sum(fn(prime_inputs(whole, i, loss_weights=v)).loss for i in range(B))
    assert_same(total / int(whole["mask"].sum()), x, want)


def test_prime_rl_is_refused_what_one_sequence_cannot_tell() -> None:
    with pytest.raises(LossInputError, match="expected token_mean or token_sum in prime-rl, got gspo"):
        prime_rl.loss_fn(gspo())
    with pytest.raises(LossInputError, match="sampler_logprobs: expected one of the columns of prime-rl"):
        prime_rl.loss_fn(with_tis(ppo()))
    inputs = prime_inputs(batch(), 0)
    inputs.ref_logprobs = None
    with pytest.raises(LossInputError, match="grpo: ref_logprobs: expected a tensor from prime-rl, got None"):
        prime_rl.loss_fn(grpo())(inputs)


# NeMo-RL --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes a module with these names importable under the name of a trainer's module."""

    def provide(name: str, **names: Any) -> None:
        for i in range(name.count(".") + 1):
            monkeypatch.setitem(sys.modules, ".".join(name.split(".")[: i + 1]), ModuleType(name))
        for attribute, value in names.items():
            setattr(sys.modules[name], attribute, value)

    return provide


def nemo_names() -> dict[str, Any]:
    return {
        "LossType": Enum("LossType", {"TOKEN_LEVEL": "token_level", "SEQUENCE_LEVEL": "sequence_level"}),
        "LossInputType": Enum("LossInputType", {"LOGIT": "logit", "LOGPROB": "logprob"}),
        "MetricNormalizer": Enum("MetricNormalizer", {"TOKENS": "tokens", "SEQUENCES": "sequences", "NONE": "none"}),
    }


def nemo_data(p: Batch) -> dict[str, Tensor]:
    """Position j is token j, so all but ``next_token_logprobs`` have one more entry in front."""
    names = {**nemo_rl.FIELDS, "mask": "token_mask"}
    data = {theirs: torch.nn.functional.pad(p[ours].double(), (1, 0), value=9.0) for ours, theirs in names.items()}
    return {**data, "sample_mask": torch.ones(len(p["mask"]))}


@pytest.mark.parametrize(
    ("loss", "level"),
    [
        (grpo(kl_beta=0.1), "TOKEN_LEVEL"),
        (gspo(clip=(0.9, 1.1)), "SEQUENCE_LEVEL"),
        (with_tis(ppo(weigh=fixed_length(5)), cap=1.3), "SEQUENCE_LEVEL"),
    ],
    ids=str,
)
def test_nemo_rl_adds_up_losses_and_metrics(stand_in: Callable[..., None], loss: Loss, level: str) -> None:
    """The trainer multiplies by the number of ranks, which the average over them undoes, and adds up the metrics."""
    stand_in("nemo_rl.algorithms.loss.interfaces", **nemo_names())
    whole = batch()
    want = expected(loss, whole)
    x, fn = leaf(whole, "logprobs"), nemo_rl.LossFn(loss)
    toks, seqs = whole["mask"].sum(), torch.tensor(B)
    totals, metrics = zip(*[fn(nemo_data(p), seqs, toks, next_token_logprobs=p["logprobs"]) for p in parts(whole)])
    assert_same(sum(totals) * RANKS / RANKS, x, want)
    assert (fn.loss_type.name, fn.input_type.name) == (level, "LOGPROB")
    _, means = loss.padded(whole["logprobs"], whole["mask"], **{name: whole[name] for name in loss.reads})
    for name in ("ratio", "clip_low", "loss"):
        assert sum(m[name] for m in metrics) == pytest.approx(means[name], rel=1e-9)
    error = (whole["sampler_logprobs"] - whole["old_logprobs"]).abs()[whole["mask"]].exp().mean()
    assert sum(m["token_mult_prob_error"] for m in metrics) == pytest.approx(float(error))
    assert sum(m["num_valid_samples"] for m in metrics) == B
    assert set(metrics[0]) - {"loss"} == set(fn.metric_normalizations)


def test_nemo_rl_leaves_out_invalid_samples_and_refuses_what_it_cannot_scale(stand_in: Callable[..., None]) -> None:
    stand_in("nemo_rl.algorithms.loss.interfaces", **nemo_names())
    data = nemo_data(batch())
    data["sample_mask"][1:] = 0
    toks, lp = data["token_mask"][0, 1:].sum(), batch()["logprobs"]
    total, metrics = nemo_rl.LossFn(reinforce())(data, torch.tensor(1), toks, next_token_logprobs=lp)
    row = batch()["mask"][0]
    assert float(total) == pytest.approx(float(-(batch()["advantages"] * lp)[0][row].mean()))
    assert metrics["num_valid_samples"] == 1
    with pytest.raises(LossInputError, match="a loss that is divided by tokens or sequences"):
        nemo_rl.LossFn(ppo(weigh=token_sum))
    del data["reference_policy_logprobs"]
    with pytest.raises(LossInputError, match="grpo: ref_logprobs: expected a tensor from NeMo-RL"):
        nemo_rl.LossFn(grpo())(data, torch.tensor(1), toks, next_token_logprobs=lp)


# xtuner ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [dapo(), ppo(weigh=token_sum, dual_clip=3.0), cispo()], ids=str)
def test_xtuner_has_divided_the_weights(loss: Loss) -> None:
    """Each rank's packed row holds its four sequences, end to end; importance weights v are in the weights."""
    whole = batch()
    v = torch.linspace(0.5, 2.0, B * T, dtype=torch.float64).view(B, T)
    mean = ppo(dual_clip=3.0) if loss.name == "ppo" else loss
    want = expected(mean, {**whole, "advantages": whole["advantages"] * v})
    x, fn = leaf(whole, "logprobs"), xtuner.policy_loss(loss)
    weights = whole["mask"].double() / whole["mask"].sum() * v
    rows = [{name: y.view(RANKS, 1, -1)[r] for name, y in whole.items() if name != "logits"} for r in range(RANKS)]
    total = sum(
        fn(row["logprobs"], row["old_logprobs"], row["advantages"], w, {"loss_type": "mine"})
        for row, w in zip(rows, weights.view(RANKS, 1, -1))
    )
    assert_same(total, x, want)


@pytest.mark.parametrize("adapt", [xtuner.policy_loss, torchtitan.rl_loss])
def test_a_packed_row_has_no_sequences(adapt: Callable[..., Any]) -> None:
    with pytest.raises(LossInputError, match="expected a loss whose tokens stand for themselves, got gspo"):
        adapt(gspo(weigh=token_mean))
    with pytest.raises(LossInputError, match="expected token_mean"):
        adapt(ppo(weigh=sequence_mean))
    with pytest.raises(LossInputError, match="ref_logprobs"):
        adapt(grpo())


# torchtitan -----------------------------------------------------------------------------------------------------------


def compute_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def test_torchtitan_adds_up_gradients_and_metrics(stand_in: Callable[..., None]) -> None:
    """A token without a finite generator logprob counts nowhere; ``num_global_valid_tokens`` leaves it out, too."""
    stand_in("torchtitan.components.loss", compute_logprobs=compute_logprobs)
    whole = batch()
    whole["old_logprobs"][0, 0] = torch.nan
    valid = whole["mask"] & torch.isfinite(whole["old_logprobs"])
    whole["old_logprobs"] = torch.where(valid, whole["old_logprobs"], 0)
    want = expected(dapo(), whole, "logits", weights=valid.double())
    whole["old_logprobs"][0, 0] = torch.nan
    x, fn = leaf(whole, "logits"), torchtitan.rl_loss(dapo())
    called = [
        fn(
            p["logits"],
            p["targets"],
            int(valid.sum()),
            generator_logprobs=p["old_logprobs"],
            advantages=p["advantages"],
            loss_mask=p["mask"],
        )
        for p in parts(whole)
    ]
    assert_same(sum(total for total, _ in called), x, want)
    assert sum(m["loss/mean"] for _, m in called) == pytest.approx(float(want[0]))
    d = (whole["logprobs"] - whole["old_logprobs"])[valid].exp()
    torch.testing.assert_close(sum(m["loss/ratio/mean"] for _, m in called), d.mean())
    with pytest.raises(LossInputError, match="dapo: tokens: expected the number of tokens in the whole batch"):
        fn(
            whole["logits"],
            whole["targets"],
            generator_logprobs=whole["old_logprobs"],
            advantages=whole["advantages"],
            loss_mask=whole["mask"],
        )


# OpenRLHF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss", [ppo(), gspo(clip=(0.9, 1.1)), with_tis(dapo(weigh=sequence_sum_mean), level=sequence_level)], ids=str
)
def test_openrlhf_divides_by_accumulation_steps_and_averages_over_ranks(loss: Loss) -> None:
    """Its counts are divided by the 2 steps, so that DeepSpeed's division of each loss by 2 is undone."""
    whole, steps = batch(), PARTS // RANKS
    want = expected(loss, whole)
    x, fn = leaf(whole, "logprobs"), openrlhf.policy_loss(loss)
    counts = {"batch_num_tokens": whole["mask"].sum() / steps, "global_batch_size": torch.tensor(B / steps)}
    called = [
        fn(
            p["logprobs"],
            p["old_logprobs"],
            p["advantages"],
            action_mask=p["mask"],
            rollout_log_probs=p["sampler_logprobs"],
            dp_size=RANKS,
            **counts,
        )
        for p in parts(whole)
    ]
    assert_same(sum(total for total, *_ in called) / steps / RANKS, x, want)
    first = parts(whole)[0]
    drift = (first["old_logprobs"] - first["logprobs"].detach())[first["mask"]].mean()
    torch.testing.assert_close(called[0][2], drift)
    assert called[0][3:] == (None, None)


def test_openrlhf_gets_the_share_of_clipped_tokens() -> None:
    """Ratios e^0.3 with A > 0 and e^−0.3 with A < 0 are clipped, e^0.3 with A < 0 is not: 2 of 3."""
    lp, old = torch.tensor([[-0.7, -1.3, -0.7]]), torch.full((1, 3), -1.0)
    fn = openrlhf.policy_loss(ppo())
    _, clip_ratio, *_ = fn(lp, old, torch.tensor([[1.0, -1.0, -1.0]]), torch.ones(1, 3), batch_num_tokens=3.0)
    assert float(clip_ratio) == pytest.approx(2 / 3)
    with pytest.raises(LossInputError, match="ppo: tokens: expected the number"):
        fn(lp, old, torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(LossInputError, match="sampler_logprobs: expected a tensor from OpenRLHF, got None"):
        openrlhf.policy_loss(with_tis(ppo()))(lp, old, torch.ones(1, 3), torch.ones(1, 3), batch_num_tokens=3.0)


# ms-swift -------------------------------------------------------------------------------------------------------------


def swift_labels(whole: Batch) -> tuple[Tensor, Tensor]:
    """Labels of T + 1 tokens, not shifted, and logits with one more position at the end."""
    labels = torch.where(whole["mask"], whole["targets"], -100)
    return torch.nn.functional.pad(labels, (1, 0), value=-100), torch.nn.functional.pad(whole["logits"], (0, 0, 0, 1))


@pytest.mark.parametrize("scaled", [False, True])
def test_ms_swift_passes_the_tokens_of_all_ranks(scaled: bool) -> None:
    """The trainer multiplies by the number of ranks, which the average undoes; a scale is rolled and flattened."""
    whole = batch()
    labels, _ = swift_labels(whole)
    scale = torch.linspace(0.5, 2.0, B * (T + 1), dtype=torch.float64).view(B, T + 1) if scaled else None
    tokens = int(whole["mask"].sum())
    weights = whole["mask"].double() if scale is None else whole["mask"] * scale[:, 1:]
    value, gradient = expected(cross_entropy(weigh=token_sum), whole, "logits", weights=weights)
    x, fn = leaf(whole, "logits"), swift.sft_loss(cross_entropy())(SimpleNamespace(), SimpleNamespace())
    total = 0
    for i, p in zip(range(0, B, 2), parts(whole)):
        outputs = SimpleNamespace(logits=swift_labels(p)[1])
        rolled = None if scale is None else scale[i : i + 2].roll(-1, -1).view(-1)
        total = total + fn(outputs, labels[i : i + 2], num_items_in_batch=tokens, loss_scale=rolled, trainer=None)
    assert_same(total * RANKS / RANKS, x, (value / tokens, gradient / tokens), rtol=1e-6)  # weights are float32


def test_ms_swift_evaluates_each_batch_by_itself_and_is_refused_what_it_cannot_pass() -> None:
    whole = batch()
    labels, logits = swift_labels(whole)
    fn = swift.sft_loss(cross_entropy())(None, None)
    want = expected(cross_entropy(), whole)[0]
    torch.testing.assert_close(fn(SimpleNamespace(logits=logits), labels), want)
    sharded = SimpleNamespace(template=SimpleNamespace(sequence_parallel_size=2))
    with pytest.raises(LossInputError, match="sequence_parallel_size: expected 1, got 2"):
        swift.sft_loss(cross_entropy())(None, sharded)(SimpleNamespace(logits=logits), labels)
    with pytest.raises(LossInputError, match="expected token_mean in ms-swift"):
        swift.sft_loss(cross_entropy(weigh=sequence_mean))
    with pytest.raises(LossInputError, match="advantages"):
        swift.sft_loss(reinforce())


# slime ----------------------------------------------------------------------------------------------------------------


def ragged(x: Tensor, whole: Batch) -> list[Tensor]:
    """Responses as slime has them: the rows cut to the span that has active tokens, and a masked token in front."""
    spans = [(max(int(m.nonzero()[0]) - 1, 0), int(m.nonzero()[-1]) + 1) for m in whole["mask"]]
    return [row[begin:end] for row, (begin, end) in zip(x, spans)]


@pytest.mark.parametrize("weigh", [sequence_mean, sequence_sum_mean, fixed_length(5), token_mean], ids=str)
def test_slime_divides_by_samples_or_by_tokens(weigh: Any) -> None:
    """loss · micro-batches / samples · ranks, of which Megatron takes the mean; or the sum over its tokens."""
    whole = batch()
    want = expected(cross_entropy(weigh=weigh), whole)
    x, per_token = leaf(whole, "logprobs"), weigh is token_mean
    total = 0
    for p in parts(whole):
        masks = ragged(p["mask"].float(), p)
        lengths = [len(m) for m in masks]
        reduce = slime.pg_loss_reducer(weigh)([n + 3 for n in lengths], lengths, masks, per_token)
        total = total + reduce(-torch.cat(ragged(p["logprobs"], p)))
    assert_same(total / (int(whole["mask"].sum()) if per_token else B), x, want)


@pytest.mark.parametrize("level", [lossfns.token_level, sequence_level], ids=lambda level: level.__name__)
def test_slime_weighs_terms_as_with_tis(level: Any) -> None:
    whole = batch()
    want = expected(with_tis(reinforce(), cap=1.3, level=level), whole)
    x = leaf(whole, "logprobs")
    columns = ("old_logprobs", "sampler_logprobs", "mask")
    old, sampler, masks = (ragged(whole[name], whole) for name in columns)
    pg_loss = torch.cat(ragged(-whole["advantages"] * whole["logprobs"], whole))
    lists = {"train_log_probs": old, "rollout_log_probs": sampler, "loss_masks": masks}
    terms, kept, metrics = slime.tis(cap=1.3, level=level)(None, pg_loss=pg_loss, **lists, total_lengths=[])
    lengths = [len(m) for m in masks]
    total = slime.pg_loss_reducer(token_mean)(lengths, lengths, kept, True)(terms) / int(whole["mask"].sum())
    assert_same(total, x, want)
    assert kept is masks
    assert metrics["tis"].max() <= 1.3 and metrics["tis_clipfrac"].shape == pg_loss.shape


def test_slime_is_refused_what_it_divides_otherwise() -> None:
    masks = [torch.ones(2), torch.ones(1)]
    with pytest.raises(LossInputError, match="expected one that divides by the number of samples, got token_mean"):
        slime.pg_loss_reducer(token_mean)([2, 1], [2, 1], masks, False)
    with pytest.raises(LossInputError, match="expected one that divides by the number of tokens, got sequence_mean"):
        slime.pg_loss_reducer(sequence_mean)([2, 1], [2, 1], masks, True)
    with pytest.raises(LossInputError, match="a mean, since slime divides"):
        slime.pg_loss_reducer(token_sum)
    with pytest.raises(LossInputError, match=r"pg_loss: expected shape \(3,\), that of loss_masks, got \(2,\)"):
        slime.pg_loss_reducer(sequence_mean)([2, 1], [2, 1], masks)(torch.ones(2))
    with pytest.raises(LossInputError, match="cap"):
        slime.tis(cap=0)


# Trinity-RFT ----------------------------------------------------------------------------------------------------------


class PolicyLossFn:
    """A class with the constructor that Trinity-RFT's base class has."""

    def __init__(self, backend: str = "verl") -> None:
        self.backend = backend


@pytest.mark.parametrize("loss", [ppo(), gspo(clip=(0.9, 1.1)), dapo(weigh=fixed_length(5))], ids=str)
def test_trinity_calls_with_one_batch(stand_in: Callable[..., None], loss: Loss) -> None:
    stand_in("trinity.algorithm.policy_loss_fn.policy_loss_fn", PolicyLossFn=PolicyLossFn)
    whole = batch()
    want = expected(loss, whole)
    x, cls = leaf(whole, "logprobs"), trinity.policy_loss(loss)
    named = {"old_logprob": whole["old_logprobs"], "action_mask": whole["mask"], "advantages": whole["advantages"]}
    total, metrics = cls(backend="verl")(logprob=whole["logprobs"], **named)
    assert_same(total, x, want)
    assert metrics["pg_loss"] == pytest.approx(float(want[0])) and "ratio" in metrics
    assert cls.default_args() == {} and cls.__name__ == loss.name
    one = {name: y[0] for name, y in named.items()}
    assert cls(backend="tinker")(logprob=whole["logprobs"][0], **one)[0].ndim == 0


# Hatchery -------------------------------------------------------------------------------------------------------------


@dataclass
class HatcheryInputs:
    logits: Tensor
    target_tokens: Tensor
    weights: Tensor | None
    old_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    loss_fn_config: dict[str, Any] | None = None


@pytest.mark.parametrize("loss", [ppo(weigh=token_sum), cross_entropy(weigh=token_sum)], ids=str)
def test_hatchery_scales_each_part_by_its_targets(loss: Loss) -> None:
    """Weights of 0 at half of the targets: the sum is divided by all targets, the trainer's own count."""
    whole = batch()
    weights = whole["mask"] * torch.tensor([1.0, 0.0, 1.0, 0.5, 0.0, 1.0], dtype=torch.float64)
    targets = torch.where(whole["mask"], whole["targets"], -100)
    value, gradient = expected(loss, whole, "logits", weights=weights)
    count = int(whole["mask"].sum())
    x, fn = leaf(whole, "logits"), hatchery.loss_fn(loss)
    total = 0
    for i, p in zip(range(0, B, 2), parts(whole)):
        inputs = HatcheryInputs(p["logits"], targets[i : i + 2], weights[i : i + 2], p["old_logprobs"], p["advantages"])
        part, metrics = fn(inputs)
        total = total + part * int((targets[i : i + 2] != -100).sum()) / count  # the server's scale
        assert all(isinstance(x, float) for x in metrics.values())
    assert_same(total, x, (value / count, gradient / count))
    with pytest.raises(LossInputError, match="expected token_sum in Hatchery"):
        hatchery.loss_fn(cross_entropy())
    with pytest.raises(LossInputError, match="ppo: advantages: expected a tensor from Hatchery, got None"):
        hatchery.loss_fn(ppo(weigh=token_sum))(HatcheryInputs(p["logits"], targets[:2], None, p["old_logprobs"]))


# tinker_cookbook ------------------------------------------------------------------------------------------------------


def rl_datum(sdk: Any, mask: list[float]) -> Any:
    n = len(mask)
    floats = {"logprobs": [-1.0] * n, "advantages": [2.0] * n, "mask": mask}
    inputs = {name: sdk.TensorData(x, "float32", [n]) for name, x in floats.items()}
    inputs["target_tokens"] = sdk.TensorData(list(range(n)), "int64", [n])
    return sdk.Datum(sdk.ModelInput.from_ints(list(range(n))), inputs)


def test_tinker_cookbooks_mask_becomes_the_weights() -> None:
    """Two active tokens with r = e^0.1 and A = 2: −2·e^0.1. Without the conversion the batch is refused."""
    for sdk in sdks():
        data = [rl_datum(sdk, [0.0, 1.0, 0.0]), rl_datum(sdk, [0.0, 1.0])]
        lps = [torch.full((3,), -0.9), torch.full((2,), -0.9)]
        with pytest.raises(LossInputError, match="Its 'mask' is not read"):
            ppo()(data, lps)
        value, metrics = ppo()(tinker_cookbook.mask_as_weights(data), lps)
        assert float(value) == pytest.approx(-2 * 2.718281828**0.1, rel=1e-5)
        assert metrics["tokens"] == 2
        assert "mask" in data[0].loss_fn_inputs  # the originals stay as they are


def test_tinker_cookbooks_supervised_datums_need_no_conversion() -> None:
    data = [Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [0.0, 1.0]})]
    with pytest.raises(LossInputError, match=r"datum\[0\].mask: expected a mask and no weights, got weights"):
        tinker_cookbook.mask_as_weights(data)
    assert float(cross_entropy()(data, [torch.tensor([-5.0, -2.0])])[0]) == 2.0


# All ------------------------------------------------------------------------------------------------------------------

POLICY_ADAPTERS = [
    verl.policy_loss,
    skyrl.policy_loss,
    prime_rl.loss_fn,
    xtuner.policy_loss,
    torchtitan.rl_loss,
    openrlhf.policy_loss,
    hatchery.loss_fn,
]


@pytest.mark.parametrize("adapt", POLICY_ADAPTERS, ids=lambda adapt: adapt.__module__.rpartition(".")[2])
def test_a_hook_of_tokens_refuses_other_losses(adapt: Callable[..., Any]) -> None:
    for loss in (dpo(), multi_target_cross_entropy()):
        with pytest.raises(LossInputError, match=f"expected a loss over tokens for .*, got one over {loss.rows}"):
            adapt(loss)
    for bound in ({"denominator": 3.0}, {"grad_l1": True}, {"old_logprobs": [[-1.0]]}):
        name = next(iter(bound))
        with pytest.raises(LossInputError, match=rf"{name}: expected a loss to which nothing is bound, .* Leave bind"):
            adapt(ppo().bind(**bound))
    with pytest.raises(LossInputError, match="a Loss such as"):
        adapt(ppo)


def test_a_count_of_ones_own_is_refused() -> None:
    """No trainer counts sequences with an even number of tokens."""
    own = Loss("own", {}, ("advantages",), reinforce().terms, token_mean.share, lambda t: t.weights.sum() * 2)
    for adapt, name in ((openrlhf.policy_loss, "OpenRLHF"), (verl.policy_loss, "verl")):
        with pytest.raises(LossInputError, match=f"own: weigh: .* which {name} counts, got one divided by a count of"):
            adapt(own)


@pytest.mark.parametrize("adapt", [openrlhf.policy_loss, torchtitan.rl_loss, trinity.policy_loss, swift.sft_loss])
def test_a_sum_is_refused_where_the_trainer_divides(stand_in: Callable[..., None], adapt: Callable[..., Any]) -> None:
    stand_in("trinity.algorithm.policy_loss_fn.policy_loss_fn", PolicyLossFn=PolicyLossFn)
    loss = cross_entropy(weigh=token_sum) if adapt is swift.sft_loss else ppo(weigh=token_sum)
    with pytest.raises(LossInputError, match="weigh: expected"):
        adapt(loss)


def test_a_batch_without_a_trained_token_has_a_loss_and_a_gradient_of_0(stand_in: Callable[..., None]) -> None:
    stand_in("trinity.algorithm.policy_loss_fn.policy_loss_fn", PolicyLossFn=PolicyLossFn)
    stand_in("nemo_rl.algorithms.loss.interfaces", **nemo_names())
    stand_in("torchtitan.components.loss", compute_logprobs=compute_logprobs)
    whole = {**batch(), "mask": torch.zeros(B, T, dtype=torch.bool)}
    lp, logits = leaf(whole, "logprobs"), leaf(whole, "logits")
    old, advantages, mask = (whole[name] for name in ("old_logprobs", "advantages", "mask"))
    labels, none = torch.full((B, T), -100), torch.tensor(0)
    generator = {"generator_logprobs": old, "advantages": advantages, "loss_mask": mask}
    counts = {"global_valid_seqs": none, "global_valid_toks": none}
    outputs = SimpleNamespace(logits=logits)
    evaluate = swift.sft_loss(cross_entropy())(None, None)
    totals = [
        verl_call(verl.policy_loss(ppo()), whole, "token-mean", verl_config(whole))[0],
        nemo_rl.LossFn(ppo())(nemo_data(whole), **counts, next_token_logprobs=lp)[0],
        openrlhf.policy_loss(ppo())(lp, old, advantages, mask, batch_num_tokens=none)[0],
        trinity.policy_loss(gspo())()(logprob=lp, old_logprob=old, action_mask=mask, advantages=advantages)[0],
        torchtitan.rl_loss(ppo())(logits, whole["targets"], none, **generator)[0],
        evaluate(outputs, labels),
        evaluate(outputs, labels, num_items_in_batch=none),
        hatchery.loss_fn(ppo(weigh=token_sum))(HatcheryInputs(logits, labels, None, old, advantages))[0],
        slime.pg_loss_reducer(sequence_mean)([], [T] * B, list(mask.float()))(lp.flatten()),
    ]
    assert [float(total.detach()) for total in totals] == [0.0] * len(totals)
    for total in totals:
        gradients = torch.autograd.grad(total, [lp, logits], allow_unused=True, retain_graph=True)
        assert all(g is None or not g.any() for g in gradients)


def test_on_policy_logprobs_may_be_bound() -> None:
    """The ratio is 1, so the loss is that of importance sampling at lp = old: −ΣA / N."""
    whole = batch()
    bound = importance_sampling().bind(old_logprobs=ON_POLICY)
    fn = openrlhf.policy_loss(bound)
    args = (whole["logprobs"], whole["old_logprobs"], whole["advantages"], whole["mask"])
    total, *_ = fn(*args, batch_num_tokens=float(whole["mask"].sum()))
    assert float(total) == pytest.approx(-float(whole["advantages"][whole["mask"]].mean()))


class NoReads(TorchDispatchMode):
    """A mode in which any read of a tensor's value on the host raises."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_trainers_that_want_tensors_wait_for_nothing(stand_in: Callable[..., None]) -> None:
    stand_in("torchtitan.components.loss", compute_logprobs=compute_logprobs)
    whole = batch()
    x, mask = leaf(whole, "logprobs"), whole["mask"]
    rows, packed = prime_inputs(whole, 0), {name: y.view(1, -1) for name, y in whole.items() if name != "logits"}
    named = {name: whole[name] for name in ("advantages", "old_logprobs", "sampler_logprobs")}
    given = {"generator_logprobs": whole["old_logprobs"], "advantages": whole["advantages"], "loss_mask": mask}
    tis = with_tis(gspo(), level=sequence_level)
    hooks = (
        prime_rl.loss_fn(dapo()),
        xtuner.policy_loss(dapo()),
        openrlhf.policy_loss(tis),
        torchtitan.rl_loss(dapo()),
    )
    reduce = slime.pg_loss_reducer(sequence_mean)([], [B * T], [mask.flatten()])
    with NoReads():
        first = hooks[0](rows)
        second = hooks[1](*(packed[name] for name in ("logprobs", "old_logprobs", "advantages", "mask")), {})
        third, *others = hooks[2](
            x, named["old_logprobs"], named["advantages"], mask, named["sampler_logprobs"], RANKS, 30.0, 8.0
        )
        fourth, metrics = hooks[3](whole["logits"], whole["targets"], 30.0, **given)
        total = first.loss + second + third + fourth + reduce(x.flatten())
        total.backward()
    assert all(isinstance(y, Tensor) for y in [*first.metrics.values(), *metrics.values(), *others[:2]])
    with pytest.raises(AssertionError), NoReads():
        total.item()


FOLDER = Path(lossfns.__file__).parent / "integrations"
MODULES = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "trainer"}
"""The trainers that have a module."""


def classes_and_functions() -> dict[str, int]:
    """The lines of each class and function of the integrations, without those of its docstrings."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                inner = [each for each in ast.walk(node) if isinstance(each, ast.ClassDef | ast.FunctionDef)]
                texts = [each.body[0] for each in inner if ast.get_docstring(each) is not None]
                documented = sum((text.end_lineno or 0) - text.lineno + 1 for text in texts)
                found[f"{path.stem}.{node.name}"] = (node.end_lineno or 0) - node.lineno + 1 - documented
    return found


@pytest.mark.parametrize(("name", "lines"), classes_and_functions().items())
def test_an_adapter_has_fewer_than_30_lines(name: str, lines: int) -> None:
    assert lines < 30, f"{name} has {lines} lines"


def test_every_module_of_a_trainer_has_an_adapter() -> None:
    public = {"policy_loss", "loss_fn", "LossFn", "rl_loss", "sft_loss", "pg_loss_reducer", "mask_as_weights"}
    public |= {"Trainer", "GRPOTrainer"}
    modules = [name.partition(".")[0] for name in classes_and_functions() if name.partition(".")[2] in public]
    assert sorted(modules) == sorted(MODULES)


PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()


def test_the_page_imports_names_that_exist() -> None:
    """Each section has a block of code: its lines that import from this library run, but for TRL's, an extra."""
    imports = [line for line in PAGE.splitlines() if line.startswith("from lossfns")]
    assert sum("lossfns.integrations" in line for line in imports) == len(MODULES) + 1  # two of transformers
    names: dict[str, Any] = {}
    exec("\n".join(line for line in imports if "integrations.trl" not in line), names)
    assert callable(names["mask_as_weights"])


def test_the_page_has_a_row_and_a_section_for_each_trainer() -> None:
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| [")]
    links = [row[0].partition("](#")[2].rstrip(")") for row in rows]
    headings = [line[3:] for line in PAGE.splitlines() if line.startswith("## ")]
    anchors = [heading.lower().replace(" ", "-").replace("'", "") for heading in headings]
    assert list(dict.fromkeys(links)) == anchors[1:-1], "the sections of the trainers, in the order of the table"
    assert len(rows) == len(MODULES) + 3, "TRL has four rows"
    assert all(len(row) == 7 for row in rows)
    assert {row[-1].rstrip(" |") for row in rows} == {"trained", "compared", "signature"}


def test_the_page_gives_the_version_that_the_adapter_was_written_for() -> None:
    """The docstring of each module but those of the extras names it, too."""
    for module in MODULES - {"transformers", "trl"}:
        docstring = ast.get_docstring(ast.parse((FOLDER / f"{module}.py").read_text())) or ""
        versions = [row.split(" | ")[1] for row in PAGE.splitlines() if row.startswith("| [")]
        assert any(all(part in docstring for part in version.split(", ")) for version in versions), module


def test_the_page_is_readable_in_80_columns() -> None:
    assert [line for line in PAGE.splitlines() if len(line) > 80 and not line.startswith("|")] == []


def test_the_penalty_of_a_trainer_takes_the_place_of_ours() -> None:
    with pytest.raises(LossInputError, match=r"ref_logprobs: .* Leave the penalty to the trainer's own KL setting"):
        verl.policy_loss(with_kl(ppo(), kl_beta=0.1))
