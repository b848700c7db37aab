"""``transformers.Trainer`` with our losses: the gradient of one big batch, whatever is accumulated."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from trainers import llama, output, parameters, quick_collection

from lossfns import LossInputError, Rows, cross_entropy, dpo, fixed_length, ppo, reinforce, sequence_mean, token_sum
from lossfns.integrations.trainer import denominator_for, for_trainer

ROWS = [[1, 5, 6, 7, 8, 2], [1, 9, 10, 2], [1, 11, 12, 13, 14, 15, 16, 2], [1, 4, 2], [1, 6, 6, 2], [1, 7, 8, 9, 2]]
ROWS += [[1, 3, 5, 7, 9, 11, 13, 2], [1, 4, 6, 2]]
PROMPTS = [2, 1, 3, 1, 1, 2, 1, 4]  # the last row has no trained token


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    import_module("lossfns.integrations.transformers")  # before what is alive is frozen
    with quick_collection():
        yield


def collate(indices: list[int]) -> dict[str, Tensor]:
    """A batch padded on the right, whose prompts and padding have labels of −100."""
    length = max(len(ROWS[i]) for i in indices)
    ids = torch.tensor([ROWS[i] + [0] * (length - len(ROWS[i])) for i in indices])
    labels = [[-100] * PROMPTS[i] + ROWS[i][PROMPTS[i] :] + [-100] * (length - len(ROWS[i])) for i in indices]
    return {"input_ids": ids, "labels": torch.tensor(labels), "attention_mask": (ids != 0).long()}


def run(folder: Path, model: Any, steps: int, make: Any = None, **settings: Any) -> Any:
    """A trainer after one optimizer step on all rows, in so many micro-batches."""
    import transformers

    from lossfns.integrations.transformers import Trainer

    batch = {"per_device_train_batch_size": len(ROWS) // steps, "gradient_accumulation_steps": steps}
    args = transformers.TrainingArguments(**{**output(folder), **batch, "remove_unused_columns": False, **settings})
    given = make() if make else {"loss": cross_entropy()}
    data = {"train_dataset": list(range(len(ROWS))), "eval_dataset": [0, 2], "data_collator": collate}
    trainer = (transformers.Trainer if make else Trainer)(model, args, **data, **given)
    trainer.train()
    return trainer


def by_hand(model: Any) -> tuple[float, Tensor]:
    """The mean over all trained tokens in one batch, and the parameters after a step of 1 along its gradient."""
    batch = collate(list(range(len(ROWS))))
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), parameters(model) - torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accumulation_of_1_2_and_4_equals_one_big_batch(dtype: torch.dtype, tmp_path: Path) -> None:
    loss, expected = by_hand(llama(dtype=dtype))
    assert (expected - parameters(llama(dtype=dtype))).abs().max() > 0.01
    for steps in (1, 2, 4):
        trainer = run(tmp_path, llama(dtype=dtype), steps)
        torch.testing.assert_close(parameters(trainer.model), expected, rtol=0, atol=1e-6)
        first = trainer.state.log_history[0]
        assert first["loss"] == pytest.approx(loss, abs=1e-5)
        assert first["cross_entropy/nll"] == pytest.approx(loss, abs=1e-5)
        assert first["cross_entropy/tokens"] == sum(len(row) - max(p, 1) for row, p in zip(ROWS, PROMPTS))
        assert first["cross_entropy/sequences_empty"] == 1


def test_compute_loss_func_is_the_same_in_a_trainer_of_ones_own(tmp_path: Path) -> None:
    from lossfns.integrations.transformers import compute_loss_func

    _, expected = by_hand(llama())
    trainer = run(tmp_path, llama(), 4, lambda: {"compute_loss_func": compute_loss_func(cross_entropy())})
    torch.testing.assert_close(parameters(trainer.model), expected, rtol=0, atol=1e-6)


def test_evaluation_has_metrics_of_its_own(tmp_path: Path) -> None:
    trainer = run(tmp_path, llama(), 2, per_device_eval_batch_size=1)
    trainer.predict([1, 3])  # which logs nothing
    metrics = trainer.evaluate()
    assert metrics["eval_cross_entropy/tokens"] == 4 + 5
    assert not any(name.startswith("cross_entropy") for name in metrics)
    with torch.no_grad():
        model, total = trainer.model, 0.0
        for i in (0, 2):
            batch = collate([i])
            logits, labels = model(batch["input_ids"]).logits[0, :-1], batch["labels"][0, 1:]
            total += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
    assert metrics["eval_cross_entropy/nll"] == pytest.approx(total / 9, abs=1e-5)


def test_the_denominator_comes_from_the_trainers_count_of_what_the_loss_counts() -> None:
    some = torch.tensor([[1, 0]])
    assert denominator_for(cross_entropy(), "a trainer", some, tokens=torch.tensor(7)) == 7
    assert denominator_for(cross_entropy(), "a trainer", some, tokens=0.5) == 0.5  # one token of two ranks
    assert denominator_for(ppo(weigh=sequence_mean), "a trainer", some, tokens=7, sequences=3) == 3
    assert denominator_for(ppo(weigh=fixed_length(10)), "a trainer", some, tokens=7, sequences=3) == 30
    assert denominator_for(dpo(), "a trainer", some, pairs=2) == 2
    assert dpo().rows is Rows.PAIRS


@pytest.mark.parametrize("count", [0, 0.0, torch.tensor(0), torch.tensor([0.0])])
def test_a_count_of_0_is_1_where_nothing_is_trained_and_refused_where_something_is(count: Any) -> None:
    logprobs = torch.full((1, 2), -1.0, requires_grad=True)
    for mask in (torch.zeros(1, 2), torch.ones(1, 2)):
        divisor = denominator_for(cross_entropy(), "a trainer", mask, tokens=count)
        if mask.any():
            with pytest.raises(LossInputError, match="denominator: expected a finite number above 0, got 0"):
                cross_entropy().padded(logprobs, mask, denominator=divisor)
            continue
        total, metrics = cross_entropy().padded(logprobs, mask, denominator=divisor)
        total.backward()
        assert total == 0 and metrics["denominator"] == 1
        assert logprobs.grad is not None and logprobs.grad.abs().sum() == 0


def test_a_count_of_0_on_a_device_stays_there() -> None:
    """On the device ``meta`` no value can be read at all."""
    count = torch.tensor(0, device="meta")
    divisor = denominator_for(cross_entropy(), "a trainer", torch.ones(1, 2, device="meta"), tokens=count)
    assert divisor.device.type == "meta" and divisor.shape == ()


@pytest.mark.parametrize(
    ("loss", "counts", "message"),
    [
        (
            cross_entropy(weigh=token_sum),
            {"tokens": 4},
            "expected a loss that is divided by tokens.*got a sum that is never divided",
        ),
        (cross_entropy(weigh=sequence_mean), {"tokens": 4}, "divided by tokens.*got one divided by sequences"),
        (ppo(), {"sequences": 4}, "divided by sequences.*got one divided by tokens"),
        (dpo(), {"tokens": 4, "sequences": 4}, "expected a loss over tokens for a trainer, got one over pairs"),
        (cross_entropy(), {"tokens": None}, "tokens: expected the number of tokens.*from a trainer, got None"),
        (cross_entropy(), {"tokens": torch.ones(2)}, r"got shape \(2,\)\. Start one process.*torchrun.*DataParallel"),
    ],
)
def test_a_count_that_the_trainer_does_not_have_is_refused(loss: Any, counts: Any, message: str) -> None:
    with pytest.raises(LossInputError, match=message):
        denominator_for(
            for_trainer(loss, "a trainer", loss.reads, counts).loss, "a trainer", torch.ones(1, 2), **counts
        )


def test_a_model_whose_labels_are_not_shifted_and_a_router_are_refused() -> None:
    from transformers.modeling_outputs import MaskedLMOutput, MoeCausalLMOutputWithPast, Seq2SeqLMOutput

    from lossfns.integrations.transformers import compute_loss_func

    compute_loss = compute_loss_func(cross_entropy())
    logits, labels = torch.zeros(1, 3, 4), torch.ones(1, 3, dtype=torch.long)
    for outputs in (
        Seq2SeqLMOutput(logits=logits, encoder_last_hidden_state=torch.zeros(1, 3, 2)),
        MoeCausalLMOutputWithPast(logits=logits, aux_loss=torch.tensor(0.1)),
    ):
        with pytest.raises(LossInputError, match="expected those of a plain causal language model"):
            compute_loss(outputs, labels, num_items_in_batch=2)
    with pytest.raises(LossInputError, match=r"got a MaskedLMOutput\. Its labels are not shifted"):
        compute_loss(MaskedLMOutput(logits=logits), labels, num_items_in_batch=2)
    with pytest.raises(LossInputError, match="labels: expected labels in each batch, got None"):
        compute_loss(Seq2SeqLMOutput(logits=logits), None, num_items_in_batch=2)
    with pytest.raises(LossInputError, match=r"tokens: .* got None\. Pass on the trainer's own"):
        compute_loss(Seq2SeqLMOutput(logits=logits), labels)


def test_a_preset_that_was_not_called_is_refused() -> None:
    from lossfns.integrations.transformers import compute_loss_func

    with pytest.raises(LossInputError, match="a Loss such as ppo"):
        compute_loss_func(cross_entropy)  # type: ignore[arg-type]


def test_a_loss_with_a_denominator_of_its_own_and_label_smoothing_are_refused(tmp_path: Path) -> None:
    from lossfns.integrations.transformers import Trainer, compute_loss_func

    for bound in ({"advantages": [1.0]}, {"denominator": 2.0}, {"grad_l1": True}):
        (name,) = bound
        with pytest.raises(LossInputError, match=rf"nothing is bound.*got {name}=.*Leave bind\({name}=\.\.\.\) out"):
            compute_loss_func(reinforce().bind(**bound))
    with pytest.raises(LossInputError, match="compute_loss_func: expected None beside loss="):
        Trainer(llama(), loss=cross_entropy(), compute_loss_func=compute_loss_func(cross_entropy()))
    with pytest.raises(LossInputError, match=r"label_smoothing_factor: expected 0\.0 in the trainer's args, got 0\.1"):
        run(tmp_path, llama(), 1, label_smoothing_factor=0.1)
