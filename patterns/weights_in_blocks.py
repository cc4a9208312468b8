"""Reading a large weight by value some columns at a time: what :mod:`weights_by_value` does, with little memory.

The first block tells how the weight is laid out: which group size, in which order of rows. Every block, the first one
too, then has to be a line over its codes, to keep to that layout, and to be given back by what the operator would
compute with, element by element. A block that asks for smaller groups, or for codes moved to fit int8, starts the
reading anew; what else does not fit is left to the reading of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from quantpass.graph.expr import Const, Expr
from quantpass.graph.grids import Grid, dense, pointwise
from quantpass.graph.records import Weight
from quantpass.graph.static_values import StaticValues
from quantpass.patterns.affine import NotAffine
from quantpass.patterns.code_lines import (
    Line,
    act_order,
    compact,
    group_size,
    line_through,
    nonlinear,
    source_of,
    symmetric,
)
from quantpass.patterns.operands import OperandBlocks
from quantpass.patterns.proof import TOLERANCE, is_rebuilt

_TRIES = 4


class _OnlyWhole(Exception):
    """What only the whole operand tells."""


class _Nonlinear(Exception):
    """The codes do not explain the operand."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Rows to a group, the order of rows (None: their own), and what is subtracted from the codes."""

    group: int
    order: torch.Tensor | None
    shift: int


class _Again(Exception):
    """To be read anew with another layout."""

    def __init__(self, layout: _Layout) -> None:
        super().__init__()
        self.layout = layout


@dataclass(slots=True)
class _Codes:
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
class _SoFar:
    """What was read: codes, and the scales and zero points of each block, ``(K / group, columns)``."""

    codes: _Codes
    scales: list[torch.Tensor] = field(default_factory=list)
    zeros: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Lines:
    """The lines over the codes of some columns: start, slope and zero point of each, ``(K / group, columns)``."""

    start: torch.Tensor
    step: torch.Tensor
    zero: torch.Tensor

    def part(self, columns: slice) -> _Lines:
        return _Lines(self.start[:, columns], self.step[:, columns], self.zero[:, columns])

    def codes(self, actual: torch.Tensor) -> torch.Tensor:
        """What the lines say the codes of ``actual``, ``(K, columns)``, are; not rounded."""
        grouped = actual.unflatten(0, (self.step.shape[0], -1))
        if bool(self.start.any()):
            grouped = grouped - self.start[:, None]
        found: torch.Tensor = (grouped / self.step[:, None]).flatten(0, 1)
        return found


def read_in_blocks(
    values: StaticValues, blocks: OperandBlocks, cuts: Sequence[Node], shape: tuple[int, int], same: float
) -> Weight | NotAffine | None:
    """Read an operand as a line over what ``cuts`` hold.

    Args:
        values: the graph's static values.
        blocks: the operand.
        cuts: the integers that are its codes, one by one or together.
        shape: ``(K, N)``.
        same: what two scales may differ by and still be one.

    Returns:
        The weight, or why it is none; None where only the whole operand tells.
    """
    if any(cut.meta["val"].dtype == torch.bool for cut in cuts):
        return None
    source, layout = source_of(cuts), None
    try:
        for _ in range(_TRIES):
            read = _SoFar(_Codes(shape, _int8_matrix(values, source, shape)))
            try:
                layout = _read(blocks, read, layout, same)
                return _weight(read, layout, shape, source.name)
            except _Again as again:
                layout = again.layout
    except _OnlyWhole:
        return None
    except _Nonlinear:
        return nonlinear()
    return None


def _int8_matrix(values: StaticValues, leaf: Node, shape: tuple[int, int]) -> Const | None:
    """The stored tensor that the codes may be."""
    fake = leaf.meta.get("val")
    if leaf.op == "call_function" or not isinstance(fake, torch.Tensor) or fake.dtype != torch.int8:
        return None
    return Const(values.value(leaf), leaf, leaf.name) if tuple(fake.shape) in (shape, shape[::-1]) else None


def _read(blocks: OperandBlocks, read: _SoFar, layout: _Layout | None, same: float) -> _Layout:
    lines, held = None, slice(0, 0)
    for columns in blocks:
        actual = blocks.value(columns)
        if layout is None:
            at = [g.dense() for g in _probed(blocks, columns)]
            layout = _layout_of(line_through(at, actual, same), same)
        if lines is None or columns.stop > held.stop:
            held = blocks.ahead(columns)
            lines = _lines(_probed(blocks, held), layout, same)
            read.scales.append(lines.step)
            read.zeros.append(lines.zero - layout.shift)
        own = lines.part(slice(columns.start - held.start, columns.stop - held.start))
        _take_in(blocks, columns, actual, own, layout, read, same)
    assert layout is not None
    return layout


def _probed(blocks: OperandBlocks, columns: slice) -> list[Grid]:
    """The columns with the codes 0, 1 and 2."""
    try:
        return [blocks.with_codes(columns, code) for code in (0, 1, 2)]
    except (RuntimeError, IndexError):
        raise _Nonlinear from None


def _layout_of(line: Line | None, same: float) -> _Layout:
    """How a weight is laid out, from its first block."""
    if line is None:
        raise _Nonlinear
    if symmetric(line) is not line or not bool(line.slope.all()):
        raise _OnlyWhole
    zero = -line.intercept / line.slope
    group, order = group_size(line.slope, zero, same), None
    if group is None:
        order, group = act_order(line.slope, zero)
    if group is None:
        raise _OnlyWhole
    return _Layout(group, order, 128 if line.codes.min() >= 0 and line.codes.max() > 127 else 0)


def _lines(at: Sequence[Grid], layout: _Layout, same: float) -> _Lines:
    """The lines through the columns with the codes 0, 1 and 2."""

    def straight(t: list[torch.Tensor]) -> torch.Tensor:
        step = t[1] - t[0]
        return (t[2] - t[0] - 2 * step).abs() <= same * (step.abs() + t[0].abs())

    if not bool(pointwise(straight, at).tensor.all()):
        raise _Nonlinear
    step = pointwise(lambda t: t[1] - t[0], at[:2])
    if not bool(step.tensor.all()):
        raise _OnlyWhole  # a column without a scale
    grids = at[0], step, pointwise(lambda t: -t[0] / t[1], [at[0], step])
    found = [_of_groups(g, layout) for g in grids]
    if any(f is None for f in found):
        _check_groups(step.dense(), grids[2].dense(), layout, same)
        found = [g.dense()[:: layout.group] for g in grids]
    start, slope, zero = (f for f in found if f is not None)
    return _Lines(start, slope, zero)


def _check_groups(slope: torch.Tensor, zero: torch.Tensor, layout: _Layout, same: float) -> None:
    """Raise where parameters ``(K, columns)`` are not one in each group, up to ``same``."""
    if layout.order is not None:
        raise _OnlyWhole
    own = math.gcd(group_size(slope, zero, same) or 1, layout.group)
    if own == 1:
        raise _OnlyWhole
    if own != layout.group:
        raise _Again(replace(layout, group=own))


def _take_in(
    blocks: OperandBlocks,
    columns: slice,
    actual: torch.Tensor,
    lines: _Lines,
    layout: _Layout,
    read: _SoFar,
    same: float,
) -> None:
    """Add a block's codes to what was read."""
    ordered = actual if layout.order is None else actual[layout.order]
    whole = lines.codes(ordered).round_()
    bounds = torch.aminmax(whole.t())
    low, high = (float(bound) - layout.shift for bound in bounds)
    if not (low >= -128 and high <= 127):
        if layout.shift or not (min(low, read.codes.low) >= 0 and high <= 255):
            raise _OnlyWhole
        raise _Again(replace(layout, shift=128))
    if layout.shift:
        whole -= layout.shift
    weight = _as_weight(read.codes.put(columns, whole.to(torch.int8), int(low), int(high)), lines, layout)
    if _is_same(weight, actual, 0.0):
        return
    step = pointwise(lambda t: t[1] - t[0], _probed(blocks, columns)[:2]).dense()
    if not _is_same(weight, actual, same, step):
        exact = lines.codes(ordered)
        raise _OnlyWhole if bool(((exact - exact.round()).abs() <= TOLERANCE).all()) else _Nonlinear


def _of_groups(grid: Grid, layout: _Layout) -> torch.Tensor | None:
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
    return full[:, 0] if bool((full == full[:, :1]).all()) else None


def _as_weight(codes: torch.Tensor, lines: _Lines, layout: _Layout) -> Weight:
    """A block as a weight of its own, its codes ``(K, columns)``."""
    (k, n), zero = codes.shape, lines.zero - layout.shift
    group = 0 if layout.group == k else layout.group
    scale, offset = (Const(t if group else t[0]) for t in (lines.step, zero))
    zero_point = offset if bool(zero.any()) else None
    return Weight(Const(codes), False, k, n, scale, zero_point, group, -128, 127, False, k_order=layout.order)


def _is_same(weight: Weight, actual: torch.Tensor, same: float, slope: torch.Tensor | None = None) -> bool:
    codes, scale, zero = (e.tensor if isinstance(e, Const) else None for e in _parts_of(weight))
    assert codes is not None
    assert scale is not None
    return is_rebuilt(weight, codes, scale, zero, actual, same=same, slope=slope)


def _parts_of(weight: Weight) -> tuple[Expr, Expr, Expr | None]:
    return weight.codes, weight.scale, weight.zero_point


def _weight(read: _SoFar, layout: _Layout, shape: tuple[int, int], label: str) -> Weight:
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
