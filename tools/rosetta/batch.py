"""One batch of inputs: what both sides of a row read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One batch, and what both sides of a row read from it.

    Attributes:
        leaf: the tensor that both sides are differentiated by: logprobs ``[B, T]``, logits ``[B, T, K]`` or scores.
        mask: ``[B, T]``, 1 for each token that counts.
        columns: the columns by our names, ``[B, T]``, ``[B, T, K]`` or ``[B]``.
        output: the kind of leaf: ``"logprobs"``, ``"logits"`` whose entries are all targets, or ``"token of logits"``,
            whose first entry is the target.
        lengths: the number of tokens that count of each sequence.
    """

    leaf: Tensor
    mask: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)
    output: str = "logprobs"

    def __getattr__(self, name: str) -> Any:
        """Return a column as an attribute: ``b.old_logprobs``."""
        return self.column(name)

    def column(self, name: str) -> Tensor:
        """Return a column; the entropy of logits is a function of the leaf."""
        if name == "entropy" and self.output == "token of logits":
            log_p = self.leaf.log_softmax(-1)
            return -(log_p.exp() * log_p).sum(-1)
        if name not in self.columns:
            raise AttributeError(name)
        return self.columns[name]

    @property
    def lp(self) -> Tensor:
        """The logprobs of all targets."""
        if self.output == "logprobs":
            return self.leaf
        log_p = self.leaf.log_softmax(-1)
        return log_p if self.output == "logits" else log_p[..., 0]

    @property
    def lengths(self) -> Tensor:
        """Tokens that count of each sequence ``[B]``."""
        return self.mask.sum(-1)

    @property
    def A(self) -> Tensor:
        """The advantage of each token ``[B, T]``."""
        a: Tensor = self.advantages
        return a if a.ndim == 2 else a[:, None].expand_as(self.mask)
