"""``OnDemand``: statistics of rows that are computed when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Tensor


class OnDemand(Mapping[str, Tensor]):
    """Tensors by name, each computed when it is read, so that only one of them is in memory at a time.

    >>> import torch
    >>> statistics = OnDemand(nll=lambda: torch.ones(2)) | {"margin": torch.zeros(2)}
    >>> list(statistics), statistics["nll"]
    (['nll', 'margin'], tensor([1., 1.]))
    """

    def __init__(self, **functions: Callable[[], Tensor]) -> None:
        self.functions = functions

    def __getitem__(self, name: str) -> Tensor:
        return self.functions[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.functions)

    def __len__(self) -> int:
        return len(self.functions)

    def __or__(self, other: Mapping[str, Tensor]) -> OnDemand:
        joined = OnDemand()  # as of dicts, the later of two statistics of one name counts, and names may be of any type
        joined.functions = self.functions | {name: partial(other.__getitem__, name) for name in other}
        return joined

    def __ror__(self, other: Mapping[str, Tensor]) -> OnDemand:
        return OnDemand() | other | self
