"""A right operand that is static, and its value: whole, or some columns of N at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from quantpass.basics.symbolic import statically_true
from quantpass.graph.carried_codes import CarriedCodes
from quantpass.graph.grids import Grid
from quantpass.graph.row_blocks import RowBlocks
from quantpass.graph.row_rules import NotByRows, RowRules
from quantpass.graph.static_values import StaticValues

BLOCKWISE = 1 << 18
"""From this many elements on an operand is computed in blocks; below, the arithmetic is not what takes the time."""


STRUCTURED = 1 << 13
"""From this many elements on it is asked first whether operators alone tell what each is; below, looking is quicker."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A right operand and how it lies: ``(..., N, K)`` where ``transposed``; seen as ``matrix`` where that is given."""

    node: Node
    transposed: bool
    matrix: tuple[int, int] | None = None

    def kn(self, value: torch.Tensor) -> torch.Tensor:
        """The operand's value as ``(K, N)``; the first of equal matrices."""
        value = value.reshape(self.matrix) if self.matrix else value.reshape(-1, *value.shape[-2:])[0]
        return value.t() if self.transposed else value

    @property
    def is_large(self) -> bool:
        return self._has(BLOCKWISE)

    @property
    def is_structured(self) -> bool:
        return self._has(min(STRUCTURED, BLOCKWISE))

    def _has(self, elements: int) -> bool:
        fake = self.node.meta["val"]
        return self.matrix is None and fake.dim() == 2 and statically_true(fake.numel() >= elements) is True


@dataclass(frozen=True, slots=True)
class CodesOfColumns:
    """The codes of an operand, each in the place of the element that it makes."""

    codes: CarriedCodes
    transposed: bool

    def __call__(self, columns: slice) -> torch.Tensor:
        """Those of ``columns``, ``(K, columns)``."""
        found = self.codes.value(columns)
        return found.t() if self.transposed else found

    @property
    def is_stored(self) -> bool:
        """True where they are a view of what is stored."""
        return self.codes.is_stored


class OperandBlocks:
    """An operand's value in float64 (or as the graph computes it), columns of N by columns of N, as ``(K, columns)``.

    Attributes:
        all: every column.
        rows_of_k: K.

    Args:
        values: the graph's static values.
        operand: a matrix.
        rules: what tools' operators do to rows.
        cuts: nodes that :meth:`with_codes` gives other values.
        wide: in float64.

    Raises:
        NotByRows: it can only be computed whole.
    """

    def __init__(
        self,
        values: StaticValues,
        operand: Operand,
        rules: RowRules | None,
        cuts: Sequence[Node] = (),
        *,
        wide: bool = True,
    ) -> None:
        self._transposed = operand.transposed
        dim = 0 if operand.transposed else 1
        shape = operand.node.meta["val"].shape
        self.all, self.rows_of_k = slice(0, shape[dim]), shape[1 - dim]
        self._blocks = RowBlocks(values, operand.node, dim, rules, cuts, wide=wide)

    def __iter__(self) -> Iterator[slice]:
        return iter(self._blocks)

    def value(self, columns: slice) -> torch.Tensor:
        """The operand's ``columns``, ``(K, columns)``."""
        found = self._blocks.value(columns)
        return found.t() if self._transposed else found

    def carried(self) -> CodesOfColumns:
        """What gives the codes of some columns.

        Raises:
            NotByRows: it can't be told by the operators that each element is a line over its own code.
        """
        return CodesOfColumns(CarriedCodes(self._blocks), self._transposed)

    def ahead(self, columns: slice) -> slice:
        """``columns`` and as many behind them as :meth:`with_codes` can give at once."""
        return self._blocks.ahead(columns)

    def with_codes(self, columns: slice, code: int) -> Grid:
        """The same with ``code`` in place of every element of the cuts."""
        found = self._blocks.with_codes(columns, code)
        return found.permuted((1, 0)) if self._transposed else found


def blocks_of(
    values: StaticValues, operand: Operand, rules: RowRules | None, *, wide: bool = True
) -> Iterator[tuple[slice | None, torch.Tensor]]:
    """The operand's value as ``(K, columns)`` and which columns these are: None for all of them at once."""
    blocks = None
    if operand.is_large:
        try:
            blocks = OperandBlocks(values, operand, rules, wide=wide)
        except NotByRows:
            blocks = None
    if blocks is None:
        yield None, operand.kn(values.widened(operand.node).double() if wide else values.value(operand.node))
        return
    for columns in blocks:
        value = blocks.value(columns)
        yield columns, value.double() if wide else value
