"""TRL's trainers with our losses: TRL's own gradients, where both mean the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainers import llama, output, parameters, quick_collection, tokenizer

from lossfns import (
    ON_POLICY,
    LossInputError,
    cispo,
    cross_entropy,
    dapo,
    dpo,
    fixed_length,
    grpo,
    gspo,
    importance_sampling,
    orpo,
    ppo,
    reinforce,
    rpo,
    sequence_mean,
    sequence_sum_mean,
    sum_losses,
    token_mean,
    with_tis,
)

trl = pytest.importorskip("trl", reason="needs the extra trl")
datasets = pytest.importorskip("datasets", reason="needs the extra trl")
ours = pytest.importorskip("lossfns.integrations.trl", reason="needs the extra trl")

PROMPTS = ["w5 w6 w7", "w8 w9", "w10 w4 w6 w12", "w11"]


@pytest.fixture(scope="module", autouse=True)
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tiny model on disk: TRL loads a reference model from where the model came from."""
    llama().save_pretrained(SAVED.setdefault("folder", tmp_path_factory.mktemp("llama")))
    with quick_collection():
        yield


SAVED: dict[str, Path] = {}


def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(SAVED["folder"])


def reward(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between completions: the sum of their words' numbers, modulo 7."""
    return [float(sum(int(word[1:]) for word in text.split()) % 7) for text in completions]


def sampled(folder: Path, trainer: Any, config: Any, loss: Any = None, **settings: Any) -> Any:
    """A trainer of TRL that samples: 2 steps of 2 micro-batches, each with 2 completions of 2 prompts."""
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 2}
    steps = {"max_completion_length": 6, "max_steps": 2, "learning_rate": 0.3, "seed": 7}  # lengths differ
    both = {**output(folder), **sizes, **steps, **settings}
    data = datasets.Dataset.from_dict({"prompt": PROMPTS * 2})
    options = {"args": config(**both), "train_dataset": data, "processing_class": tokenizer()}
    return trainer(model(), reward, **options, **({} if loss is None else {"loss": loss}))


def preferences(folder: Path, trainer: Any, loss: Any = None, rows: int = 8, **settings: Any) -> Any:
    """A trainer of TRL on pairs whose sides differ in length: 4 steps of 2 micro-batches of one or more pairs."""
    pairs = [("w5 w6", "w7 w8 w9 w2", "w10 w2"), ("w4", "w5 w2", "w6 w12 w13 w14 w2"), ("w9", "w3 w2", "w8 w2")]
    data = datasets.Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), pairs[i % 3])) for i in range(rows)])
    sizes = {"per_device_train_batch_size": rows // 4, "gradient_accumulation_steps": 2}
    args = trl.DPOConfig(**{**output(folder), **sizes, **settings})
    options = {"args": args, "train_dataset": data, "processing_class": tokenizer()}
    return trainer(model(), **options, **({} if loss is None else {"loss": loss}))


def supervised(folder: Path, trainer: Any, loss: Any = None, steps: int = 1, **settings: Any) -> Any:
    """TRL's trainer on prompts and completions: one optimizer step, of so many micro-batches."""
    rows = [("w5 w6", "w7 w8 w9"), ("w4", "w5"), ("w9", "w3 w4 w5 w6 w7 w8 w9"), ("w8 w11", "w12 w13")]
    data = datasets.Dataset.from_list([{"prompt": f"{prompt} ", "completion": answer} for prompt, answer in rows])
    sizes = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps}
    args = trl.SFTConfig(**{**output(folder), **sizes, **settings})
    options = {"args": args, "train_dataset": data, "processing_class": tokenizer()}
    return trainer(model(), **options, **({} if loss is None else {"loss": loss}))


def train(trainer: Any, moved: float = 1e-3) -> Tensor:
    """The parameters after training, which have changed."""
    start = parameters(trainer.model)
    trainer.train()
    assert (parameters(trainer.model) - start).abs().max() > moved
    return parameters(trainer.model)


def assert_same(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


SEVERAL = {"num_iterations": 2}  # TRL then has old logprobs, and the ratio moves away from 1


@pytest.mark.parametrize(
    ("shared", "theirs", "loss", "above_0"),
    [
        pytest.param({}, {}, dapo(clip=(0.8, 1.2)), "tokens", id="dapo"),
        pytest.param(
            SEVERAL,
            {"epsilon": 0.01, "epsilon_high": 0.02},
            dapo(clip=(0.99, 1.02)),
            "clip_high",
            id="dapo, clipped",
        ),
        pytest.param(
            {**SEVERAL, "mask_truncated_completions": True},
            {"epsilon": 0.01, "loss_type": "grpo"},
            ppo(clip=(0.99, 1.01), weigh=sequence_mean),
            "sequences_empty",
            id="grpo, with masked sequences",
        ),
        pytest.param(
            SEVERAL,
            {"epsilon": 0.01, "delta": 1.02},
            ppo(clip=(0.99, 1.01), dual_clip=1.02),
            "clip_dual",
            id="delta is dual_clip",
        ),
        pytest.param({}, {"loss_type": "dr_grpo"}, ppo(weigh=fixed_length(6)), "count", id="dr_grpo"),
        pytest.param(
            SEVERAL, {"loss_type": "cispo", "epsilon_high": 1.05}, cispo(clip=(0.0, 1.05)), "bound_high", id="cispo"
        ),
        pytest.param(
            SEVERAL,
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.001},
            gspo(clip=(0.999, 1.001)),
            "clip_high",
            id="gspo",
        ),
        pytest.param(
            SEVERAL,
            {"loss_type": "luspo", "importance_sampling_level": "sequence"},
            gspo(clip=(0.8, 1.2), weigh=sequence_sum_mean),
            "kl_old",
            id="luspo",
        ),
        pytest.param(
            {**SEVERAL, "beta": 0.1}, {"use_bias_correction_kl": False}, grpo(kl_beta=0.1), "kl_ref", id="KL penalty"
        ),
        pytest.param(
            {"steps_per_generation": 4}, {"epsilon": 0.3}, dapo(clip=(0.7, 1.3)), "kl_old", id="one batch, two steps"
        ),
    ],
)
def test_grpo(shared: dict[str, Any], theirs: dict[str, Any], loss: Any, above_0: str, tmp_path: Path) -> None:
    expected = train(sampled(tmp_path, trl.GRPOTrainer, trl.GRPOConfig, **shared, **theirs))
    mine = sampled(tmp_path, ours.GRPOTrainer, trl.GRPOConfig, loss=loss, **shared)
    assert_same(train(mine), expected)
    first, second, *_ = mine.state.log_history
    assert first[f"{loss.name}/ratio"] == 1 and first["entropy"] > 0
    if "steps_per_generation" not in shared:  # else TRL's denominator is the mean of two steps, and the metric exact
        assert first[f"{loss.name}/count"] == first[f"{loss.name}/denominator"] or "mask" in str(shared)
        assert first[f"{loss.name}/loss"] == pytest.approx(first["loss"], abs=1e-5) or "mask" in str(shared)
    assert second[f"{loss.name}/{above_0}"] > 0
    assert not any(name == "kl" or name.startswith("clip_ratio") for name in first)


@pytest.mark.parametrize(
    ("shared", "theirs", "loss"),
    [({}, {"loss_type": "bnpo"}, dapo(clip=(0.8, 1.2))), ({"beta": 0.1}, {}, grpo(kl_beta=0.1))],
    ids=["bnpo averages micro-batches", "the KL is multiplied by the ratio"],
)
def test_where_trl_means_something_else(shared: Any, theirs: Any, loss: Any, tmp_path: Path) -> None:
    """Rows of docs/integrations.md that have no loss here. The KL differs once the policy has left the reference."""
    other = train(sampled(tmp_path, trl.GRPOTrainer, trl.GRPOConfig, **shared, **theirs))
    mine = train(sampled(tmp_path, ours.GRPOTrainer, trl.GRPOConfig, loss, **shared))
    assert (mine - other).abs().max() > 1e-4


@pytest.mark.parametrize("beta", [0.1, 0.4])
def test_dpo(beta: float, tmp_path: Path) -> None:
    expected = train(preferences(tmp_path, trl.DPOTrainer, beta=beta))
    mine = preferences(tmp_path, ours.DPOTrainer, dpo(beta=beta), beta=beta)
    assert_same(train(mine), expected)
    logs = mine.state.log_history[1]
    assert logs["dpo/accuracy"] == pytest.approx(logs["rewards/accuracies"])
    assert logs["dpo/reward_margin"] == pytest.approx(logs["rewards/margins"], abs=1e-6)


def test_orpo_trains_in_trls_dpo_trainer(tmp_path: Path) -> None:
    mine = preferences(tmp_path, ours.DPOTrainer, orpo())
    train(mine)
    assert mine.state.log_history[0]["orpo/nll"] > 0


def test_sft_under_accumulation(tmp_path: Path) -> None:
    expected = train(supervised(tmp_path, trl.SFTTrainer))
    for steps in (1, 2, 4):
        mine = supervised(tmp_path, ours.SFTTrainer, cross_entropy(), steps)
        assert_same(train(mine), expected)
        first = mine.state.log_history[0]
        assert first["cross_entropy/nll"] == pytest.approx(first["loss"], abs=1e-5)
        assert first["mean_token_accuracy"] >= 0


def test_rloo_of_samples_of_the_policy_is_reinforce(tmp_path: Path) -> None:
    expected = train(sampled(tmp_path, trl.RLOOTrainer, trl.RLOOConfig))
    mine = sampled(tmp_path, ours.RLOOTrainer, trl.RLOOConfig, reinforce(weigh=sequence_sum_mean))
    assert_same(train(mine), expected)


def test_a_ratio_of_1_may_be_bound_in_place_of_old_logprobs(tmp_path: Path) -> None:
    """−A·r with r = exp(lp − sg lp) has the gradient of REINFORCE."""
    expected = train(sampled(tmp_path, ours.RLOOTrainer, trl.RLOOConfig, reinforce(weigh=sequence_sum_mean)))
    loss = importance_sampling(weigh=sequence_sum_mean).bind(old_logprobs=ON_POLICY)
    assert_same(train(sampled(tmp_path, ours.RLOOTrainer, trl.RLOOConfig, loss)), expected)


def test_evaluation_has_metrics_of_its_own(tmp_path: Path) -> None:
    mine = sampled(tmp_path, ours.GRPOTrainer, trl.GRPOConfig, dapo(), per_device_eval_batch_size=8)
    mine.train()
    metrics = mine.evaluate(datasets.Dataset.from_dict({"prompt": PROMPTS}))
    assert metrics["eval_dapo/sequences"] == 8
    assert metrics["eval_dapo/loss"] == pytest.approx(metrics["eval_loss"], abs=1e-5)


def test_sft_evaluates_batches_by_themselves_and_refuses_a_training_step_without_a_count(tmp_path: Path) -> None:
    mine = supervised(tmp_path, ours.SFTTrainer, cross_entropy(), per_device_eval_batch_size=4)
    theirs = supervised(tmp_path, trl.SFTTrainer, per_device_eval_batch_size=4)
    metrics = mine.evaluate(mine.train_dataset)
    assert metrics["eval_loss"] == pytest.approx(theirs.evaluate(theirs.train_dataset)["eval_loss"], abs=1e-5)
    assert metrics["eval_cross_entropy/nll"] == pytest.approx(metrics["eval_loss"], abs=1e-5)
    mine.model.train()
    with pytest.raises(LossInputError, match=r"tokens: .* from TRL's SFTTrainer, got None"):
        mine.compute_loss(mine.model, next(iter(mine.get_train_dataloader())))
    with pytest.raises(LossInputError, match="compute_loss_func: expected None beside loss="):
        both = {"loss": cross_entropy(), "compute_loss_func": lambda *_: 0}
        ours.SFTTrainer(model(), mine.args, train_dataset=mine.train_dataset, processing_class=tokenizer(), **both)


def test_a_model_without_logprobs_is_refused() -> None:
    refused = pytest.raises(LossInputError, match=r"outputs with log_probs.* Set use_liger_kernel=False")
    with refused, ours.recorded_logprobs(torch.nn.Linear(1, 1)):
        pass


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        (grpo(kl_beta=0.1), {}, r"beta: expected 0\.1 in the trainer's args, got 0\.0\. Pass beta=0\.1"),
        (ppo(), {"beta": 0.1}, r"beta: expected 0\.0 in the trainer's args, got 0\.1"),
        (ppo(), {"loss_type": "grpo"}, "loss_type: expected 'dapo' in the trainer's args, got 'grpo'.*leave it out"),
        (ppo(), {"top_entropy_quantile": 0.2}, "top_entropy_quantile: expected 1.0"),
    ],
)
def test_grpo_refuses_settings_that_have_no_effect(loss: Any, settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(LossInputError, match=message):
        sampled(tmp_path, ours.GRPOTrainer, trl.GRPOConfig, loss, **settings)


def test_grpo_refuses_a_column_or_a_count_that_trl_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(LossInputError, match=r"sampler_logprobs: expected use_vllm=True.*leave with_tis out"):
        sampled(tmp_path, ours.GRPOTrainer, trl.GRPOConfig, with_tis(ppo()))
    with pytest.raises(LossInputError, match=r"divided by tokens or sequences.*got a sum that is never divided"):
        sampled(tmp_path, ours.GRPOTrainer, trl.GRPOConfig, ppo(weigh="token_sum"))
    with pytest.raises(LossInputError, match=r"a loss over tokens for TRL's GRPOTrainer.*DPOTrainer takes"):
        sampled(tmp_path, ours.GRPOTrainer, trl.GRPOConfig, dpo())
    with pytest.raises(LossInputError, match=r"reads advantages, since this trainer has rewards, got cross_entropy"):
        sampled(tmp_path, ours.GRPOTrainer, trl.GRPOConfig, cross_entropy())


def test_the_other_trainers_refuse_what_they_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(LossInputError, match=r"beta: expected 0\.4 in the trainer's args, got 0\.1"):
        preferences(tmp_path, ours.DPOTrainer, dpo(beta=0.4))
    with pytest.raises(LossInputError, match="precompute_ref_log_probs: expected False"):
        preferences(tmp_path, ours.DPOTrainer, dpo(), precompute_ref_log_probs=True)
    with pytest.raises(LossInputError, match="loss_type: expected 'nll'"):
        supervised(tmp_path, ours.SFTTrainer, cross_entropy(), loss_type="dft")
    with pytest.raises(LossInputError, match="samples of the policy"):
        sampled(tmp_path, ours.RLOOTrainer, trl.RLOOConfig, reinforce(weigh=sequence_mean), num_iterations=2)
    with pytest.raises(LossInputError, match="old_logprobs: expected one of the columns of TRL's RLOOTrainer: adv"):
        sampled(tmp_path, ours.RLOOTrainer, trl.RLOOConfig, importance_sampling(weigh=sequence_mean))
    with pytest.raises(LossInputError, match=r"divided by sequences.*got one divided by tokens"):
        sampled(tmp_path, ours.RLOOTrainer, trl.RLOOConfig, reinforce(weigh=token_mean))
    with pytest.raises(LossInputError, match=r"a loss over pairs for TRL's DPOTrainer, got one over tokens.*GRPOTr"):
        preferences(tmp_path, ours.DPOTrainer, ppo())


def test_a_sum_over_pairs_divides_each_part_by_the_pairs(tmp_path: Path) -> None:
    """In the first step, the part of rpo is dpo's own loss, and the whole is their sum. A second mask is refused."""
    logs = []
    for loss in (rpo(dpo(), alpha=0.5), dpo()):
        trainer = preferences(tmp_path, ours.DPOTrainer, loss, logging_steps=1, max_steps=1)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    summed, alone = logs
    assert summed["rpo/loss"] == pytest.approx(summed["rpo/preference/loss"] + 0.5 * summed["rpo/nll/loss"], rel=1e-6)
    for name in ("loss", "margin", "pairs", "denominator"):
        assert summed[f"rpo/preference/{name}"] == pytest.approx(alone[f"dpo/{name}"], rel=1e-6)
    with pytest.raises(LossInputError, match="one mask"):
        preferences(tmp_path, ours.DPOTrainer, sum_losses(preference=dpo(), nll=cross_entropy()))
