"""Attention over the cache, token by token, is attention over the whole sequences."""

from typing import Any

import pytest
import torch

from lossfns.backend.model.attention import Layout
from lossfns.backend.model.cache import Cache

PROMPTS, MORE = [4, 1, 6], 5


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize(
    "options", [{}, {"window": 1}, {"window": 3}, {"softcap": 1.0}, {"window": 3, "softcap": 1.0, "scale": 0.4}]
)
def test_step_by_step_is_attention_over_whole_sequences(options: dict[str, Any], heads: tuple[int, int]) -> None:
    """Two layers, which differ in keys, values and options."""
    generator = torch.Generator().manual_seed(0)
    lengths = [n + MORE for n in PROMPTS]
    layers = [
        [torch.randn(sum(lengths), h, 8, generator=generator, dtype=torch.float64) for h in (heads[0], *heads[1:] * 2)]
        for _ in range(2)
    ]
    layer_options: list[dict[str, Any]] = [options, {}]
    wanted = [Layout(lengths).attend(*qkv, **o).split(lengths) for qkv, o in zip(layers, layer_options)]
    sequences = [[x.split(lengths) for x in qkv] for qkv in layers]

    cache = Cache.empty(PROMPTS, MORE, torch.device("cpu"))
    attend = cache.prefill(Layout(PROMPTS))
    for qkv, o, expected in zip(sequences, layer_options, wanted):
        prompts = (torch.cat([x[:n] for x, n in zip(xs, PROMPTS)]) for xs in qkv)
        torch.testing.assert_close(attend(*prompts, **o), torch.cat([x[:n] for x, n in zip(expected, PROMPTS)]))
    for i in range(MORE):
        positions, attend = cache.step()
        assert positions.tolist() == [n + i for n in PROMPTS]
        for qkv, o, expected in zip(sequences, layer_options, wanted):
            new = (torch.stack([x[n + i] for x, n in zip(xs, PROMPTS)]) for xs in qkv)
            torch.testing.assert_close(attend(*new, **o), torch.stack([x[n + i] for x, n in zip(expected, PROMPTS)]))
    assert cache.lengths.tolist() == lengths and cache.longest == cache.capacity == max(lengths)
