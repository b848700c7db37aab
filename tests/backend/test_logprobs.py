import torch

from lossfns.backend.logprobs import linear_logprobs


def draw(dtype: torch.dtype, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(7, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(50, 16, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype)


def reference(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (hidden.double() @ weight.double().T).log_softmax(1)


def test_one_target_equals_float64_log_softmax() -> None:
    hidden, weight = draw(torch.float32, scale=10.0)
    targets = torch.tensor([0, 49, 3, 3, 17, 8, 20])
    out = linear_logprobs(hidden, weight, targets)
    assert out.shape == (7,) and out.dtype == torch.float32
    expected = reference(hidden, weight)[torch.arange(7), targets]
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-5)


def test_many_targets_are_columns_of_the_same_distribution() -> None:
    hidden, weight = draw(torch.float32)
    targets = torch.arange(50).roll(5).expand(7, 50)
    out = linear_logprobs(hidden, weight, targets)
    assert out.shape == (7, 50)
    torch.testing.assert_close(out.double(), reference(hidden, weight).roll(5, 1), atol=1e-5, rtol=1e-5)


def test_half_precision_logits_are_normalised_in_float32() -> None:
    hidden, weight = draw(torch.bfloat16)
    out = linear_logprobs(hidden, weight, torch.arange(50).expand(7, 50))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.exp().sum(1), torch.ones(7), atol=1e-5, rtol=0)


def test_gradient_in_float64() -> None:
    hidden, weight = draw(torch.float64)
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    for targets in (torch.arange(7), torch.arange(14).view(7, 2)):
        assert torch.autograd.gradcheck(lambda h, w, t=targets: linear_logprobs(h, w, t), inputs)
