import math
from typing import Any

import pytest
import torch

from lossfns.backend.model.decoder import Decoder, Layer, rotate, rotation
from lossfns.logprobs.linear import linear_logprobs

LENGTHS = [5, 1, 9, 3]


def make(**changes: float) -> Decoder:
    shape: dict[str, Any] = {
        "vocab_size": 31,
        "dim": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "hidden": 48,
    }
    model = Decoder(**shape | {"seed": 3} | changes)
    with torch.no_grad():  # large embeddings, so that every token matters
        model.embed.weight.mul_(20)
    return model


def draw_tokens(n: int) -> torch.Tensor:
    return torch.randint(0, 31, (n,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("lengths", [LENGTHS, [6, 6, 6], [18]])
def test_packed_batch_equals_each_sequence_alone(lengths: list[int]) -> None:
    model, tokens = make(), draw_tokens(18)
    direction = torch.randn(18, 32, generator=torch.Generator().manual_seed(2))

    packed = model(tokens, lengths)
    alone = torch.cat([model(part, [len(part)]) for part in torch.split(tokens, lengths)])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)

    parameters = list(model.parameters())
    grads = [torch.autograd.grad((direction * hidden).sum(), parameters) for hidden in (packed, alone)]
    for a, b in zip(*grads, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-5)


def test_checkpointing_runs_each_layer_again_to_the_same_gradient() -> None:
    model, tokens, calls = make(), draw_tokens(18), []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = torch.autograd.grad(model(tokens, LENGTHS).square().sum(), list(model.parameters()))
    model.checkpointing = True
    ours = torch.autograd.grad(model(tokens, LENGTHS).square().sum(), list(model.parameters()))
    assert len(calls) == 2 + 2 * 2
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    with torch.no_grad():
        model(tokens, LENGTHS)
    assert len(calls) == 2 + 2 * 2 + 2


def test_a_later_token_changes_nothing_before_it() -> None:
    model, tokens = make(), draw_tokens(12)
    changed = tokens.clone()
    changed[7] = (changed[7] + 1) % 31
    before, after = model(tokens, [12]), model(changed, [12])
    torch.testing.assert_close(before[:7], after[:7], atol=1e-6, rtol=0)
    assert ((before[7:] - after[7:]).abs().amax(1) > 1e-3).all()


def test_rotary_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(i: int, j: int) -> float:
        rope = rotation(torch.tensor([i, j]), 16, 10_000.0, torch.float64)
        turned = rotate(torch.cat((q, k)), rope)
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_rotary_first_pair_turns_by_one_radian_per_position() -> None:
    x = torch.zeros(3, 1, 8)
    x[:, 0, 0] = 1
    turned = rotate(x, rotation(torch.arange(3), 8, 10_000.0, torch.float32))
    for position in range(3):
        expected = [math.cos(position), 0, 0, 0, math.sin(position), 0, 0, 0]
        torch.testing.assert_close(turned[position, 0], torch.tensor(expected))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_equals_multi_head_attention_written_out(kv_heads: int) -> None:
    model, tokens, n, d = make(kv_heads=kv_heads, layers=1), draw_tokens(10), 10, 8
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    rope = rotation(torch.arange(n), d, 10_000.0, torch.float32)

    def rms(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    x = model.embed.weight[tokens]
    projected = rms(x) @ layer.qkv.weight.T
    heads = projected.view(n, 4 + 2 * kv_heads, d)
    mixed = []
    for h in range(4):
        group = h * kv_heads // 4
        q, k = rotate(heads[:, [h, 4 + group]], rope).unbind(1)
        scores = (q @ k.T / math.sqrt(d)).masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
        mixed.append(scores.softmax(1) @ heads[:, 4 + kv_heads + group])
    x = x + torch.cat(mixed, 1) @ layer.out.weight.T
    gate, up = (rms(x) @ layer.gate_up.weight.T).chunk(2, dim=1)
    x = x + (gate * gate.sigmoid() * up) @ layer.down.weight.T
    torch.testing.assert_close(model(tokens, [n]), rms(x), atol=1e-5, rtol=1e-5)


def test_cached_decoding_equals_the_packed_forward() -> None:
    model, tokens = make(), draw_tokens(sum(LENGTHS) + 3 * len(LENGTHS))
    sequences = torch.split(tokens, [n + 3 for n in LENGTHS])
    full = torch.split(model(tokens, [n + 3 for n in LENGTHS]), [n + 3 for n in LENGTHS])

    prompts = torch.cat([s[:n] for s, n in zip(sequences, LENGTHS, strict=True)])
    hidden, cache = model.prefill(prompts, LENGTHS, max_new_tokens=3)
    for i in range(4):
        expected = torch.stack([h[n - 1 + i] for h, n in zip(full, LENGTHS, strict=True)])
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
        if i < 3:
            following = torch.stack([s[n + i] for s, n in zip(sequences, LENGTHS, strict=True)])
            hidden = model.step(following, cache)


def test_selected_cache_rows_decode_as_those_rows() -> None:
    model, tokens, rows = make(), draw_tokens(sum(LENGTHS)), torch.tensor([2, 0, 2])
    _, cache = model.prefill(tokens, LENGTHS, max_new_tokens=1)
    picked = cache.select(rows)
    following = torch.tensor([1, 2, 3, 4])
    torch.testing.assert_close(
        model.step(following[rows], picked), model.step(following, cache)[rows], atol=1e-5, rtol=1e-5
    )


def test_shape_and_seed_rebuild_the_model() -> None:
    model = Decoder(vocab_size=31, dim=32, layers=2, heads=4, kv_heads=2, hidden=48, seed=5)
    torch.manual_seed(123)
    again, other = Decoder(**model.shape), Decoder(**model.shape | {"seed": 6})
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(model.head, other.head)


def test_untied_head_is_its_own_weight() -> None:
    tied, untied = make(), make(tied=False)
    assert tied.head is tied.embed.weight
    assert untied.head is not untied.embed.weight and untied.head.shape == (31, 32)
    assert not torch.equal(untied.head, untied.embed.weight)


def test_learns_to_repeat_a_sequence() -> None:
    model, tokens = make(), draw_tokens(16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = -linear_logprobs(model(tokens[:-1], [15]), model.head, tokens[1:]).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert loss < 0.1
