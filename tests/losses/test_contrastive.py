"""The contrastive loss of embeddings, by hand."""

import math

import pytest
import torch

from lossfns import LossInputError, info_nce


def test_each_query_classifies_its_document_among_the_batch() -> None:
    """Cosines [[1, 0], [0.6, 0.8]], τ = ½: (log(1 + e⁻²) + log(1 + e^(−0.4))) / 2, whatever the lengths."""
    query, document = torch.tensor([[2.0, 0.0], [0.6, 0.8]]), torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    loss, metrics = info_nce(temperature=0.5)([], [query[0], document[0], query[1], document[1]])
    assert loss.item() == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(-0.4))) / 2)
    assert metrics == {"accuracy": 1.0, "similarity": pytest.approx(0.9)}


def test_every_embedding_has_a_gradient() -> None:
    leaves = [torch.randn(4, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(6)]
    info_nce()([], leaves)[0].backward()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("shapes", [[], [(3,)], [(3,), (3,), (3,)], [(3,), (4,)], [(1, 3), (1, 3)]])
def test_what_is_no_batch_of_pairs_is_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(LossInputError, match="two embeddings"):
        info_nce()([], [torch.ones(shape) for shape in shapes])


def test_a_temperature_of_0_is_refused() -> None:
    with pytest.raises(LossInputError, match="temperature"):
        info_nce(temperature=0)


def test_embeddings_that_are_not_finite_are_refused() -> None:
    """A nan would give a loss of nan beside an accuracy of 1."""
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(LossInputError, match="embeddings: expected finite numbers"):
            info_nce()([], [torch.tensor([1.0, wrong]), torch.ones(2)])
