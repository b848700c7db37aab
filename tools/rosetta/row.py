"""A row of the table: a framework's setting, our call, a verdict, and how the framework's number is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.installed import Peer

EQUAL, FACTOR, DIFFERENT = "equal", "equal up to a factor", "different"

Formula = Callable[[Batch], Tensor]
"""A framework's loss as a function of a batch, in our own words: a scalar, or one number for each sample."""


@dataclass(frozen=True)
class Row:
    """One setting of one framework.

    Attributes:
        framework: name and version.
        setting: what its user writes.
        call: our call, an expression in the names of ``lossfns`` and in the columns of the inputs.
        verdict: ``EQUAL``, ``FACTOR`` (peer = factor · ours) or ``DIFFERENT``.
        peer: the framework's own functions, or a formula with the same meaning.
        source: where the framework defines it.
        inputs: the name of the batch, one of ``INPUTS``.
        factor: an expression in B (sequences), T (width), n (tokens) and the columns.
        why: the name of the factor, or the reason of the difference; for an equal row, a remark.
    """

    framework: str
    setting: str
    call: str
    verdict: str
    peer: Formula | Peer
    source: str
    inputs: str = "policy"
    factor: str = "1"
    why: str = ""


@dataclass(frozen=True)
class Framework:
    """The rows of one framework, as its file collects them.

    Attributes:
        name: name and version, as the page shows them.
        source: the path that a row has unless it says another.
        inputs: the batch that a row has unless it says another.
        rows: the rows so far.
    """

    name: str
    source: str
    inputs: str = "policy"
    rows: list[Row] = field(default_factory=list)

    def equal(
        self, setting: str, call: str, peer: Formula | Peer, *, why: str = "", inputs: str = "", source: str = ""
    ) -> None:
        """Add a setting whose value and gradient are those of our call."""
        self.add(Row(self.name, setting, call, EQUAL, peer, source or self.source, inputs or self.inputs, why=why))

    def factor(
        self,
        setting: str,
        call: str,
        peer: Formula | Peer,
        *,
        factor: str,
        why: str,
        inputs: str = "",
        source: str = "",
    ) -> None:
        """Add a setting whose value and gradient are those of our call, times a factor with a name."""
        self.add(Row(self.name, setting, call, FACTOR, peer, source or self.source, inputs or self.inputs, factor, why))

    def different(
        self, setting: str, call: str, peer: Formula | Peer, *, why: str, inputs: str = "", source: str = ""
    ) -> None:
        """Add a setting whose nearest call of ours has another value or gradient."""
        self.add(Row(self.name, setting, call, DIFFERENT, peer, source or self.source, inputs or self.inputs, why=why))

    def add(self, row: Row) -> None:
        """Add a row."""
        self.rows.append(row)
