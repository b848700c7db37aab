"""The adapters beside the trainers' own losses. A test is skipped where its trainer is not installed, as in CI."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_trainers import RANKS, B, HatcheryInputs, assert_same, batch, expected, leaf, parts, verl_call, verl_config
from torch import Tensor

from lossfns import Loss, fixed_length, ppo, sequence_mean, sequence_sum_mean, token_mean, token_sum
from lossfns.integrations import hatchery, skyrl, tinker_cookbook, trinity, verl


def trainer_module(name: str) -> Any:
    """Import a module of a trainer, or skip the test."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # trainers fail in many ways where a part of them is missing
        pytest.skip(f"{name}: {error!r}"[:200])


def value_and_gradient(total: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return total.detach(), torch.autograd.grad(total, x)[0]


@pytest.mark.parametrize(
    ("mode", "weigh", "factor"),
    [
        ("token-mean", token_mean, None),
        ("token-sum", token_sum, None),
        ("seq-mean-token-mean", sequence_mean, None),
        ("seq-mean-token-sum", sequence_sum_mean, None),
        ("seq-mean-token-sum-norm", fixed_length(5), 5),
    ],
)
def test_verls_own_loss(mode: str, weigh: Any, factor: float | None) -> None:
    """verl adds 1e-8 to the lengths of sequences."""
    core_algos = trainer_module("verl.trainer.ppo.core_algos")
    core_algos.register_policy_loss("ours")(verl.policy_loss(ppo(dual_clip=3.0, weigh=weigh)))
    whole = batch()
    x = leaf(whole, "logprobs")
    clip = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0}
    config: Any = SimpleNamespace(**clip, **vars(verl_config(whole, factor)), get=clip.get)
    ours = theirs = torch.zeros(())
    for p in parts(whole):
        weights = {"rollout_is_weights": torch.rand(p["mask"].shape, dtype=torch.float64)}
        ours = ours + verl_call(core_algos.get_policy_loss_fn("ours"), p, mode, config, **weights)[0]
        floats = {**p, "mask": p["mask"].double()}
        theirs = theirs + verl_call(core_algos.get_policy_loss_fn("vanilla"), floats, mode, config, **weights)[0]
    assert_same(ours, x, value_and_gradient(theirs, x), rtol=1e-7)


@pytest.mark.parametrize(
    ("reduction", "weigh"),
    [("token_mean", token_mean), ("sequence_mean", sequence_mean), ("seq_mean_token_sum_norm", fixed_length(5))],
)
def test_skyrls_own_reduction(reduction: str, weigh: Any) -> None:
    reduce = trainer_module("skyrl.backends.skyrl_train.utils.ppo_utils").apply_loss_reduction_to_advantages_minibatch
    whole = batch()
    want = expected(ppo(weigh=weigh), whole)
    x, fn = leaf(whole, "logprobs"), skyrl.policy_loss(ppo(weigh=token_sum))
    whole["advantages"] = reduce(whole["advantages"], whole["mask"].double(), reduction, B // RANKS, 5)
    config = SimpleNamespace()
    called = [
        fn(p["logprobs"], p["old_logprobs"], p["advantages"], config=config, loss_mask=p["mask"]) for p in parts(whole)
    ]
    assert_same(sum((total for total, _ in called), torch.zeros(())), x, want)


@pytest.mark.parametrize(
    ("mode", "loss"),
    [("token-mean", ppo(dual_clip=3.0)), ("seq-mean-token-mean", ppo(dual_clip=3.0, weigh=sequence_mean))],
)
def test_trinitys_own_loss(mode: str, loss: Loss) -> None:
    own = trainer_module("trinity.algorithm.policy_loss_fn.ppo_policy_loss").PPOPolicyLossFn(
        clip_range=0.2, loss_agg_mode=mode
    )
    adapted: Any = trinity.policy_loss(loss)(backend="verl")
    assert adapted.select_keys == own.select_keys
    whole = batch()
    x = leaf(whole, "logprobs")
    named = {name: whole[ours] for name, ours in (("old_log_probs", "old_logprobs"), ("response_mask", "mask"))}
    args = {"logprob": whole["logprobs"], "advantages": whole["advantages"], **named}
    assert_same(adapted(**args)[0], x, value_and_gradient(own(**args)[0], x), rtol=1e-7)


def test_hatcherys_own_loss() -> None:
    """With weights of 1 at every target both are the mean over the targets. Hatchery's logprobs are float32."""
    losses = trainer_module("hatchery.core.losses")
    losses.register_loss("ours", hatchery.loss_fn(ppo(weigh=token_sum)), override=True)
    whole = batch()
    x = leaf(whole, "logits")
    targets = torch.where(whole["mask"], whole["targets"], -100)
    given = HatcheryInputs(whole["logits"], targets, None, whole["old_logprobs"], whole["advantages"], {})
    ours, _ = losses.compute("ours", given)
    given.weights = whole["mask"].double()
    assert_same(ours, x, value_and_gradient(losses.compute("ppo", given), x), rtol=1e-6)


def test_tinker_cookbooks_own_data() -> None:
    """Rewards 1 and 0 give advantages ±1/2 to 2 and 1 tokens, r = e^0.1: −(2 − 1)·e^0.1 / (2·3)."""
    processing, types = trainer_module("tinker_cookbook.rl.data_processing"), trainer_module("tinker_cookbook.rl.types")
    tinker, completers = trainer_module("tinker"), trainer_module("tinker_cookbook.completers")

    def trajectory(tokens: list[int], reward: float) -> Any:
        action = completers.TokensWithLogprobs(tokens=tokens, maybe_logprobs=[-1.0] * len(tokens))
        prompt = tinker.ModelInput.from_ints([1, 2, 3])
        step = types.Transition(ob=prompt, ac=action, reward=reward, episode_done=True)
        return types.Trajectory(transitions=[step], final_ob=tinker.ModelInput.empty())

    group = types.TrajectoryGroup([trajectory([4, 5], 1.0), trajectory([6], 0.0)], [0.0, 0.0], [{}, {}])
    data, _ = processing.assemble_training_data([group], processing.compute_advantages([group]))
    converted = tinker_cookbook.mask_as_weights(data)
    logprobs = [torch.full((len(d.loss_fn_inputs["target_tokens"].data),), -0.9) for d in data]
    value, metrics = ppo()(converted, logprobs)
    assert float(value) == pytest.approx(-(2.718281828**0.1) / 6, rel=1e-5)
    assert metrics["tokens"] == 3
    assert [d.loss_fn_input_spans for d in converted] == [d.loss_fn_input_spans for d in data]
