"""Reading and proving a large weight by what its operators are: no element is computed.

Where operators alone tell that each element is a line over its own code (:mod:`quantpass.graph.carried_codes`), the
line is had by computing the operand with a few codes in place of all, which takes a number for each group instead of
one for each element; and two lines that are one at two neighboring codes, at the smallest and at the largest are one
at every code between. The codes themselves are only moved to where they belong, and compared with those that are
stored.

Whatever can't be told like that is left to those who look at every element: nothing is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from quantpass.graph.grids import Grid, dense, pointwise
from quantpass.graph.records import Weight
from quantpass.graph.row_rules import RowRules
from quantpass.graph.static_values import StaticValues
from quantpass.patterns.code_lines import act_order, group_size, source_of
from quantpass.patterns.column_lines import (
    Codes,
    Layout,
    OnlyWhole,
    SoFar,
    int8_matrix,
    lines_of,
    put_together,
)
from quantpass.patterns.operands import CodesOfColumns, Operand, OperandBlocks
from quantpass.patterns.proof import FLOAT32, TOLERANCE

_LARGEST_ZERO = 2.0**20
"""In codes. Beside a larger one a code is no longer exact to :data:`FLOAT64` in float64."""

_STEPS = (1e-150, 1e150)
"""Between these float64 computes as exactly as anywhere."""


def read_by_structure(
    values: StaticValues, blocks: OperandBlocks, cuts: Sequence[Node], shape: tuple[int, int], same: float
) -> Weight | None:
    """Read an operand as a line over what ``cuts`` hold.

    Args:
        values: the graph's static values.
        blocks: the operand.
        cuts: the integers that are its codes, one by one or together.
        shape: ``(K, N)``.
        same: what two scales may differ by and still be one.

    Returns:
        The weight that :func:`~quantpass.patterns.weights_in_blocks.read_in_blocks` gives; None where elements have
        to be looked at.
    """
    source = source_of(cuts)
    read, layout = SoFar(Codes(shape, int8_matrix(values, source, shape))), None
    parts: list[slice] = []
    step = zero = torch.empty(0)
    try:
        carried = blocks.carried()
        for columns in _ahead(blocks):
            at = [blocks.with_codes(columns, code) for code in (0, 1)]
            layout = layout or _layout(at, same)
            lines = lines_of([_ordered(g, layout.order) for g in at], replace(layout, order=None), same)
            if not parts:  # all at once: small results between large temporaries would keep the memory of these
                step, zero = (torch.empty(len(lines.step), shape[1], dtype=torch.float64) for _ in range(2))
            step[:, columns], zero[:, columns] = lines.step, lines.zero
            parts.append(columns)
        assert layout is not None
        shift = _take_in(blocks, carried, read.codes, layout.order)
        codes = {read.codes.low + shift, read.codes.high + shift}
        if min(codes) >= 0 and max(codes) <= 1:
            return None  # binary weights have a reading of their own
        if not all(_are_one(blocks, c, step[:, c], zero[:, c], codes, same, layout.order) for c in parts):
            return None
    except Exception:  # whatever can't be told like this, elements may tell
        return None
    read.scales.append(step)
    read.zeros.append(zero - shift)
    return put_together(read, layout, shape, source.name)


def is_proved_by_structure(
    values: StaticValues,
    operand: Operand,
    cuts: Sequence[Node],
    weight: Weight,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    rules: RowRules | None,
) -> bool:
    """True where the operand is ``scale * (codes - zero_point)`` in every element; False where elements have to tell.

    Args:
        values: the graph's static values.
        operand: the operand.
        cuts: integers of its size that it is computed from.
        weight: how the codes lie; without groups.
        codes: as they are stored.
        scale: ``(1,)`` or ``(N,)``.
        zero_point: the same, or None.
        rules: what tools' operators do to rows.
    """
    stored = codes.t() if weight.transposed else codes
    if tuple(stored.shape) != (weight.k, weight.n):
        return False
    try:
        blocks = OperandBlocks(values, operand, rules, cuts)
        carried = blocks.carried()
        if not all(torch.equal(stored[:, c], carried(c)) for c in _parts(blocks, carried)):
            return False
        low, high = (int(bound) for bound in torch.aminmax(codes))
        at = {low, low + 1, high}  # neighbors: integers that wrap around between two others would not show
        zero = torch.zeros(1, dtype=torch.float64) if zero_point is None else zero_point.double()
        step, zero = (t.reshape(1, -1).expand(1, weight.n) for t in (scale.double(), zero))
        return high - low < 256 and all(
            _are_one(blocks, columns, step[:, columns], zero[:, columns], at, FLOAT32) for columns in _ahead(blocks)
        )
    except Exception:  # as above
        return False


def _take_in(blocks: OperandBlocks, carried: CodesOfColumns, codes: Codes, order: torch.Tensor | None) -> int:
    """Keep the codes as int8, their rows in ``order``; returns what was subtracted from them for that."""
    shift = None
    for columns in _parts(blocks, carried):
        own = carried(columns)
        low, high = (int(bound) for bound in torch.aminmax(own.t()))
        if shift is None:
            shift = 128 if low >= 0 and high > 127 else 0
        if not -128 <= low - shift <= high - shift <= 127:
            raise OnlyWhole
        narrow = (own.to(torch.int16) - shift if shift else own).to(torch.int8)
        codes.put(columns, narrow if order is None else narrow[order], low - shift, high - shift)
    assert shift is not None
    return shift


def _parts(blocks: OperandBlocks, carried: CodesOfColumns) -> Iterator[slice]:
    """All columns at once where their codes are looked at where they are stored, else a block at a time."""
    return iter([blocks.all]) if carried.is_stored else iter(blocks)


def _ahead(blocks: OperandBlocks) -> Iterator[slice]:
    """As many columns at a time as a few codes can be tried for."""
    held = slice(0, 0)
    for columns in blocks:
        if columns.stop > held.stop:
            held = blocks.ahead(columns)
            yield held


def _layout(at: Sequence[Grid], same: float) -> Layout:
    """The largest groups of rows within which nothing changes, and the order in which rows make groups."""
    step = pointwise(lambda t: t[1] - t[0], at)
    if not bool(step.tensor.all()):
        raise OnlyWhole
    zero = pointwise(lambda t: -t[0] / t[1], [at[0], step])
    own = math.gcd(_held_rows(step), _held_rows(zero))
    k, n = step.shape
    slopes, zeros = (g.reshaped((k // own, own, n)).dense()[:, 0] for g in (step, zero))
    group = own * (group_size(slopes, zeros, same) or 1)
    if group > 1 or k == 1:
        return Layout(group, None, 0)
    order, size = act_order(slopes, zeros)
    if size is None:
        raise OnlyWhole
    return Layout(size, order, 0)


def _ordered(value: Grid, order: torch.Tensor | None) -> Grid:
    """``(K, columns)`` with its rows in ``order``."""
    return value if order is None else dense(value.dense().index_select(0, order))


def _held_rows(grid: Grid) -> int:
    """How many rows in a row are held as one."""
    held = 1
    for size, has in zip(reversed(grid.parts[0]), reversed(grid.tensor.shape[: len(grid.parts[0])]), strict=True):
        if has != 1:
            break
        held *= size
    return held


def _are_one(
    blocks: OperandBlocks,
    columns: slice,
    step: torch.Tensor,
    zero: torch.Tensor,
    codes: set[int],
    same: float,
    order: torch.Tensor | None = None,
) -> bool:
    """True where the operand with each of ``codes`` in place of all is ``(code - zero) * step``.

    Both parameters are ``(K / group, columns)``, of groups of the operand's rows in ``order``.
    """
    if bool((zero.abs() > _LARGEST_ZERO).any()):
        return False
    low, high = (float(bound) for bound in torch.aminmax(step.abs()))
    if not _STEPS[0] < low <= high < _STEPS[1]:
        return False
    groups, n = step.shape
    line = [Grid(t.unsqueeze(1), ((groups, blocks.rows_of_k // groups), (n,))) for t in (step, zero)]

    def agree(code: int) -> bool:
        def near(t: list[torch.Tensor]) -> torch.Tensor:
            value, step, zero = t
            slack = ((zero.abs() + abs(code) + 1) * same).clamp(max=TOLERANCE) * step.abs()
            return ((code - zero) * step - value).abs() <= slack  # NaN is not

        value = _ordered(blocks.with_codes(columns, code), order)
        return bool(pointwise(near, [value, *line]).tensor.all())

    return all(agree(code) for code in codes)
