"""Labels and masks become targets and weights, shifted once."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lossfns import LossInputError, cross_entropy, target_logprobs, targets_from_labels, weights_from_labels
from lossfns.labels import weights_from_mask


def test_cross_entropy_of_labels_is_that_of_a_trainer() -> None:
    """Trainers shift inside: F.cross_entropy(logits[:, :-1], labels[:, 1:]), the mean over labels other than −100."""
    torch.manual_seed(0)
    logits = torch.randn(3, 6, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (3, 6))
    labels[0, :3] = labels[1, 4:] = -100
    logprobs = target_logprobs(logits[:, :-1], targets_from_labels(labels))
    loss, metrics = cross_entropy().padded(logprobs, weights_from_labels(labels))
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(loss, expected)
    (found,), (expected,) = (torch.autograd.grad(x, logits, retain_graph=True) for x in (loss, expected))
    torch.testing.assert_close(found, expected)
    assert metrics["tokens"] == 11 == (labels[:, 1:] != -100).sum()


def test_the_first_token_after_left_padding_has_weight_0() -> None:
    labels, mask = torch.tensor([[9, 9, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]])
    assert weights_from_labels(labels, attention_mask=mask).tolist() == [[0, 0, 1, 1]]
    assert weights_from_mask(mask).tolist() == [[0, 0, 1, 1]]
    assert weights_from_mask(mask, prompt_lengths=[2]).tolist() == [[0, 0, 0, 1]]
    both = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert weights_from_mask(both, torch.tensor([1, 3])).tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


def test_a_mask_to_be_added_to_scores_is_never_taken_for_its_opposite() -> None:
    """It has 0 at tokens and −inf at padding. No weight is then above 0, which a loss refuses."""
    assert weights_from_mask(torch.tensor([[-torch.inf, -torch.inf, 0, 0]])).sum() == 0


IDS = torch.tensor([[1, 2]])


@pytest.mark.parametrize(
    "call",
    [
        lambda: targets_from_labels([[1, 2]]),  # type: ignore[arg-type]
        lambda: targets_from_labels(IDS[:, :1]),
        lambda: targets_from_labels(IDS.float()),
        lambda: weights_from_labels(IDS, attention_mask=IDS[:, :1]),
        lambda: weights_from_mask(IDS, prompt_lengths=[1, 2]),
        lambda: weights_from_mask(IDS, prompt_lengths=[0.5]),
        lambda: weights_from_mask(IDS, prompt_lengths=[None]),
        lambda: weights_from_mask(IDS, prompt_lengths=[True]),
        lambda: weights_from_mask(IDS, prompt_lengths="2"),
        lambda: targets_from_labels(IDS, ignore_index=None),  # type: ignore[arg-type]
        lambda: weights_from_labels(IDS, ignore_index="-100"),  # type: ignore[arg-type]
        lambda: weights_from_labels(IDS, attention_mask=torch.ones(1, 2, device="meta")),
    ],
)
def test_what_cannot_be_shifted_is_refused(call: Any) -> None:
    with pytest.raises(LossInputError):
        call()
