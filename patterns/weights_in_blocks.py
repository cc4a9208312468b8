"""Reading a large weight by value some columns at a time: what :mod:`weights_by_value` does, with little memory.

The first block tells how the weight is laid out: which group size, in which order of rows. Every block, the first one
too, then has to be a line over its codes, to keep to that layout, and to be given back by what the operator would
compute with, element by element. A block that asks for smaller groups, or for codes moved to fit int8, starts the
reading anew; what else does not fit is left to the reading of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from quantpass.graph.expr import Const, Expr
from quantpass.graph.grids import pointwise
from quantpass.graph.records import Weight
from quantpass.graph.static_values import StaticValues
from quantpass.patterns.affine import NotAffine
from quantpass.patterns.code_lines import (
    Line,
    act_order,
    group_size,
    line_through,
    nonlinear,
    source_of,
    symmetric,
)
from quantpass.patterns.column_lines import (
    Again,
    Codes,
    Layout,
    Lines,
    Nonlinear,
    OnlyWhole,
    SoFar,
    check_straight,
    int8_matrix,
    lines_of,
    probed,
    put_together,
)
from quantpass.patterns.operands import OperandBlocks
from quantpass.patterns.proof import TOLERANCE, is_rebuilt

_TRIES = 4


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
            read = SoFar(Codes(shape, int8_matrix(values, source, shape)))
            try:
                layout = _read(blocks, read, layout, same)
                return put_together(read, layout, shape, source.name)
            except Again as again:
                layout = again.layout
    except OnlyWhole:
        return None
    except Nonlinear:
        return nonlinear()
    return None


def _read(blocks: OperandBlocks, read: SoFar, layout: Layout | None, same: float) -> Layout:
    lines, held = None, slice(0, 0)
    for columns in blocks:
        actual = blocks.value(columns)
        if layout is None:
            at = [g.dense() for g in probed(blocks, columns)]
            layout = _layout_of(line_through(at, actual, same), same)
        if lines is None or columns.stop > held.stop:
            held = blocks.ahead(columns)
            few = probed(blocks, held)
            check_straight(few, same)
            lines = lines_of(few, layout, same)
            read.scales.append(lines.step)
            read.zeros.append(lines.zero - layout.shift)
        own = lines.part(slice(columns.start - held.start, columns.stop - held.start))
        _take_in(blocks, columns, actual, own, layout, read, same)
    assert layout is not None
    return layout


def _layout_of(line: Line | None, same: float) -> Layout:
    """How a weight is laid out, from its first block."""
    if line is None:
        raise Nonlinear
    if symmetric(line) is not line or not bool(line.slope.all()):
        raise OnlyWhole
    zero = -line.intercept / line.slope
    group, order = group_size(line.slope, zero, same), None
    if group is None:
        order, group = act_order(line.slope, zero)
    if group is None:
        raise OnlyWhole
    return Layout(group, order, 128 if line.codes.min() >= 0 and line.codes.max() > 127 else 0)


def _take_in(
    blocks: OperandBlocks,
    columns: slice,
    actual: torch.Tensor,
    lines: Lines,
    layout: Layout,
    read: SoFar,
    same: float,
) -> None:
    """Add a block's codes to what was read."""
    ordered = actual if layout.order is None else actual[layout.order]
    whole = lines.codes(ordered).round_()
    bounds = torch.aminmax(whole.t())
    low, high = (float(bound) - layout.shift for bound in bounds)
    if not (low >= -128 and high <= 127):
        if layout.shift or not (min(low, read.codes.low) >= 0 and high <= 255):
            raise OnlyWhole
        raise Again(replace(layout, shift=128))
    if layout.shift:
        whole -= layout.shift
    weight = _as_weight(read.codes.put(columns, whole.to(torch.int8), int(low), int(high)), lines, layout)
    if _is_same(weight, actual, 0.0):
        return
    step = pointwise(lambda t: t[1] - t[0], probed(blocks, columns)[:2]).dense()
    if not _is_same(weight, actual, same, step):
        exact = lines.codes(ordered)
        raise OnlyWhole if bool(((exact - exact.round()).abs() <= TOLERANCE).all()) else Nonlinear


def _as_weight(codes: torch.Tensor, lines: Lines, layout: Layout) -> Weight:
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
