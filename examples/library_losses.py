"""Policy and preference losses of other libraries, imported and called through small adapters.

Each loss needs the package of its library: ``lossfns check examples/library_losses.py:hatchery_gspo`` needs
``hatchery-core``. ``docs/findings.md`` has the results.
"""

from dataclasses import MISSING, fields
from types import SimpleNamespace
from unittest import mock

import torch
from torch.nn.utils.rnn import pad_sequence

# hatchery.core.losses: functions of logits. The adapter replaces their step from logits to logprobs.


def hatchery(name, logprobs, weights, old_logprobs=None, advantages=None):
    from hatchery.core import losses

    targets = torch.zeros_like(logprobs, dtype=torch.long)
    columns = [x if x is None else x.float() for x in (weights, old_logprobs, advantages)]
    inputs = losses.LossInputs(logprobs, targets, *columns)
    with mock.patch.object(losses, "_new_logprobs_at_targets", lambda logits, targets: logits.float()):
        return losses.compute(name, inputs)


def hatchery_cross_entropy(logprobs, weights):
    return hatchery("cross_entropy", logprobs, weights)


def hatchery_orpo(logprobs, weights):
    return hatchery("orpo", logprobs, weights)


def hatchery_grpo(logprobs, weights, old_logprobs, advantages):
    return hatchery("grpo", logprobs, weights, old_logprobs, advantages)


def hatchery_gspo(logprobs, weights, old_logprobs, advantages):
    return hatchery("gspo", logprobs, weights, old_logprobs, advantages)


# verl.trainer.ppo.core_algos, with the default configuration of an actor.


def verl(name, log_prob, response_mask, old_log_prob, advantages):
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import FSDPActorConfig

    config = FSDPActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    return get_policy_loss_fn(name)(old_log_prob, log_prob, advantages, response_mask, config=config)


def verl_vanilla(log_prob, response_mask, old_log_prob, advantages):
    return verl("vanilla", log_prob, response_mask, old_log_prob, advantages)


def verl_gspo(log_prob, response_mask, old_log_prob, advantages):
    return verl("gspo", log_prob, response_mask, old_log_prob, advantages)


def verl_geo_mean(log_prob, response_mask, old_log_prob, advantages):
    return verl("geo_mean", log_prob, response_mask, old_log_prob, advantages)


# trl.GRPOTrainer._compute_loss, on a mock of the trainer whose model returns these logprobs.


def trl_grpo(logprobs, mask, advantages, old_logprobs, ref_logprobs):
    from trl.trainer.grpo_trainer import GRPOConfig, GRPOTrainer

    usual = {field.name: field.default for field in fields(GRPOConfig) if field.default is not MISSING}
    usual |= {"loss_type": "grpo", "beta": 0.04, "epsilon_low": 0.2, "epsilon_high": 0.2}
    trainer = mock.MagicMock(
        **usual,
        args=SimpleNamespace(**usual),
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
    )
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask}
    inputs |= {"advantages": advantages, "old_per_token_logps": old_logprobs, "ref_per_token_logps": ref_logprobs}
    return GRPOTrainer._compute_loss(trainer, None, inputs)


# liger_kernel.chunked_loss: the part of the fused linear GRPO loss that takes a chunk's logprobs.


def liger_grpo(advantages, old_logprobs, ref_logprobs):
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    A = torch.tensor(advantages, dtype=torch.float32)  # one for each sequence
    old, ref = pad_sequence(old_logprobs, batch_first=True), pad_sequence(ref_logprobs, batch_first=True)

    def loss_fn(data, logprobs_list):
        mask = pad_sequence([datum.loss_fn_inputs["weights"].to_torch() for datum in data], batch_first=True)
        logprobs = pad_sequence(logprobs_list, batch_first=True)
        assert mask.shape == logprobs.shape, "one weight for each logprob"
        loss, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(logprobs, mask, A, mask, ref, old)
        return loss, {}

    return loss_fn
