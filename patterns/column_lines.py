"""What a large weight is read into, some columns at a time: a layout, lines over the codes, the codes themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from quantpass.graph.expr import Const
from quantpass.graph.grids import Grid, dense, pointwise
from quantpass.graph.records import Weight
from quantpass.graph.static_values import StaticValues
from quantpass.patterns.code_lines import compact, group_size
from quantpass.patterns.operands import OperandBlocks


class OnlyWhole(Exception):
    """What only the whole operand tells."""


class Nonlinear(Exception):
    """The codes do not explain the operand."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows to a group, the order of rows (None: their own), and what is subtracted from the codes."""

    group: int
    order: torch.Tensor | None
    shift: int


class Again(Exception):
    """To be read anew with another layout."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout


@dataclass(slots=True)
class Codes:
    """int8 codes: a matrix of the graph's own as long as it holds them, else a new one, ``(N, K)``.

    Attributes:
        shape: ``(K, N)``.
        leaf: the graph's own tensor, if it may be that.
        transposed: they are stored ``(N, K)``.
        made: the new one.
        low: the smallest code so far.
        high: the largest.
    """

    shape: tuple[int, int]
    leaf: Const | None
    transposed: bool = True
    made: torch.Tensor | None = None
    low: int = 127
    high: int = -128

    def put(self, columns: slice, codes: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Keep ``codes``, ``(K, columns)`` int8 between ``low`` and ``high``; returns the same where they are kept."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.leaf is not None and not columns.start:
            k, n = self.shape
            self.transposed = tuple(self.leaf.tensor.shape) == (n, k)
            self.transposed = self.transposed and (k != n or self._holds(columns, codes))
        if self.leaf is not None and self._holds(columns, codes):
            return self._own(columns)
        if self.made is None:
            self.made = torch.empty(self.shape[::-1], dtype=torch.int8)
            if self.leaf is not None:
                before = slice(0, columns.start)
                self.made[before].copy_(self._own(before).t())
            self.leaf, self.transposed = None, True
        self.made[columns].copy_(codes.t())
        return self.made[columns].t()

    def stored(self, label: str) -> Const:
        """All of them, once every column was put."""
        if self.leaf is not None:
            return self.leaf
        assert self.made is not None
        return Const(self.made, label=label)

    def _holds(self, columns: slice, codes: torch.Tensor) -> bool:
        return torch.equal(self._own(columns), codes)

    def _own(self, columns: slice) -> torch.Tensor:
        assert self.leaf is not None
        return self.leaf.tensor[columns].t() if self.transposed else self.leaf.tensor[:, columns]


@dataclass(slots=True)
class SoFar:
    """What was read: codes, and the scales and zero points of each block, ``(K / group, columns)``."""

    codes: Codes
    scales: list[torch.Tensor] = field(default_factory=list)
    zeros: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines over the codes of some columns: start, slope and zero point of each, ``(K / group, columns)``."""

    start: torch.Tensor
    step: torch.Tensor
    zero: torch.Tensor

    def part(self, columns: slice) -> Lines:
        return Lines(self.start[:, columns], self.step[:, columns], self.zero[:, columns])

    def codes(self, actual: torch.Tensor) -> torch.Tensor:
        """What the lines say the codes of ``actual``, ``(K, columns)``, are; not rounded."""
        grouped = actual.unflatten(0, (self.step.shape[0], -1))
        if bool(self.start.any()):
            grouped = grouped - self.start[:, None]
        found: torch.Tensor = (grouped / self.step[:, None]).flatten(0, 1)
        return found


def int8_matrix(values: StaticValues, leaf: Node, shape: tuple[int, int]) -> Const | None:
    """The stored tensor that the codes may be."""
    fake = leaf.meta.get("val")
    if leaf.op == "call_function" or not isinstance(fake, torch.Tensor) or fake.dtype != torch.int8:
        return None
    return Const(values.value(leaf), leaf, leaf.name) if tuple(fake.shape) in (shape, shape[::-1]) else None


def probed(blocks: OperandBlocks, columns: slice) -> list[Grid]:
    """The columns with the codes 0, 1 and 2."""
    try:
        return [blocks.with_codes(columns, code) for code in (0, 1, 2)]
    except (RuntimeError, IndexError):
        raise Nonlinear from None


def check_straight(at: Sequence[Grid], same: float) -> None:
    """Raise where the columns with the code 2 are not on the line through those with 0 and 1."""

    def straight(t: list[torch.Tensor]) -> torch.Tensor:
        step = t[1] - t[0]
        return (t[2] - t[0] - 2 * step).abs() <= same * (step.abs() + t[0].abs())

    if not bool(pointwise(straight, at).tensor.all()):
        raise Nonlinear


def lines_of(at: Sequence[Grid], layout: Layout, same: float) -> Lines:
    """The lines through the columns with the codes 0 and 1."""
    step = pointwise(lambda t: t[1] - t[0], at[:2])
    if not bool(step.tensor.all()):
        raise OnlyWhole  # a column without a scale
    grids = at[0], step, pointwise(lambda t: -t[0] / t[1], [at[0], step])
    found = [_of_groups(g, layout) for g in grids]
    if any(f is None for f in found):
        _check_groups(step.dense(), grids[2].dense(), layout, same)
        found = [g.dense()[:: layout.group].clone() for g in grids]
    start, slope, zero = (f for f in found if f is not None)
    return Lines(start, slope, zero)


def _check_groups(slope: torch.Tensor, zero: torch.Tensor, layout: Layout, same: float) -> None:
    """Raise where parameters ``(K, columns)`` are not one in each group, up to ``same``."""
    if layout.order is not None:
        raise OnlyWhole
    own = math.gcd(group_size(slope, zero, same) or 1, layout.group)
    if own == 1:
        raise OnlyWhole
    if own != layout.group:
        raise Again(replace(layout, group=own))


def _of_groups(grid: Grid, layout: Layout) -> torch.Tensor | None:
    """A parameter ``(K, columns)`` as ``(K / group, columns)``; None where it is not exactly one in each group."""
    if layout.order is not None:
        grid = dense(grid.dense()[layout.order])
    k, n = grid.shape
    parts = grid.reshaped((k // layout.group, layout.group, n))
    outer, inner = len(parts.parts[0]), len(parts.parts[1])
    held = parts.tensor.shape
    if all(size == 1 for size in held[outer : outer + inner]):
        of_groups = parts.tensor.reshape(*held[:outer], *held[outer + inner :])
        return Grid(of_groups, (parts.parts[0], parts.parts[2])).dense()
    full = parts.dense()
    return full[:, 0].clone() if bool((full == full[:, :1]).all()) else None  # a view would keep every element


def put_together(read: SoFar, layout: Layout, shape: tuple[int, int], label: str) -> Weight:
    """The weight, once every column was read."""
    k, n = shape
    scale, zero = (compact(torch.cat(t, dim=1)) for t in (read.scales, read.zeros))
    if bool(zero.any()) and scale.shape != zero.shape:
        scale, zero = (t.contiguous() for t in torch.broadcast_tensors(scale, zero))
    zero_point = Const(zero) if bool(zero.any()) else None
    codes = read.codes
    group = 0 if layout.group == k else layout.group
    stored = codes.stored(label)
    return Weight(
        stored, codes.transposed, k, n, Const(scale), zero_point, group, codes.low, codes.high, True,
        k_order=layout.order,
    )  # fmt: skip
