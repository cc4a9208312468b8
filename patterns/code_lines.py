"""The line through what an operand would be with the codes 0, 1 and 2, and what groups its slope and offset form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from quantpass.patterns.affine import NotAffine
from quantpass.patterns.proof import TOLERANCE, rows_at_a_time


@dataclass(frozen=True, slots=True)
class Line:
    """``value = slope * codes + intercept``, elementwise, all ``(K, N)`` in float64."""

    codes: torch.Tensor
    slope: torch.Tensor
    intercept: torch.Tensor


def line_through(at: Sequence[torch.Tensor], actual: torch.Tensor, same: float) -> Line | None:
    """The line that explains every element of ``actual``; None where there is none.

    Args:
        at: the operand with the codes 0, 1 and 2, ``(K, N)``.
        actual: the operand as it is.
        same: how far the three may be from a line, relative to their size.
    """
    intercept = at[0]
    slope, codes = torch.empty_like(actual), torch.empty_like(actual)
    for rows in rows_at_a_time(*actual.shape):
        start, step = intercept[rows], at[1][rows] - intercept[rows]
        flat = step == 0
        straight = (at[2][rows] - start - 2 * step).abs() <= same * (step.abs() + start.abs())
        exact = torch.where(flat, 0.0, (actual[rows] - start) / torch.where(flat, 1.0, step))
        whole = exact.round()
        near = ((exact - whole).abs() <= TOLERANCE) & (~flat | (actual[rows] == start))
        if not bool((straight & near).all()):
            return None
        slope[rows], codes[rows] = step, whole
    return None if not bool(slope.any()) else Line(codes, slope, intercept)


def symmetric(line: Line) -> Line:
    """Binary weights ``-s, s`` with the codes -1 and 1: as 0 and 1 they would need the zero point one half."""
    binary = bool((2 * line.intercept[:1] == -line.slope[:1]).all()) and bool((2 * line.intercept == -line.slope).all())
    binary = binary and bool(((line.codes == 0) | (line.codes == 1)).all())
    return Line(2 * line.codes - 1, line.slope / 2, torch.zeros_like(line.slope)) if binary else line


def group_size(slope: torch.Tensor, zero: torch.Tensor, same: float) -> int | None:
    """The largest group of rows within which nothing changes; None where every row would be its own group."""
    k, n = slope.shape
    changed = torch.zeros(k, dtype=torch.bool)
    for rows in rows_at_a_time(k - 1, n):
        after = slice(rows.start + 1, rows.stop + 1)
        offsets = torch.maximum(zero[after].abs(), zero[rows].abs()) + 1
        steps = torch.maximum(slope[after].abs(), slope[rows].abs())
        # A step is the difference of two values that hold the offset as well.
        kept = (slope[after] - slope[rows]).abs() <= same * steps * offsets
        kept &= (zero[after] - zero[rows]).abs() <= same * offsets
        changed[rows] = ~kept.all(dim=1)
    group = math.gcd(k, *(changed.nonzero().flatten() + 1).tolist())
    return group if group > 1 or k == 1 else None


def act_order(slope: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor | None, int | None]:
    """The order of rows that makes groups regular, and their size: quantization in order of activation size."""
    k = slope.shape[0]
    rows = torch.cat([slope, zero], dim=1)
    _, which, counts = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    group = math.gcd(*counts.tolist())
    if group <= 1 or group == k:
        return None, None
    # Groups in the order of their first rows, so that the order stays as close to the graph's as it can.
    first = torch.full((len(counts),), k, dtype=torch.int64).scatter_reduce(0, which, torch.arange(k), "amin")
    return torch.argsort(first[which], stable=True), group


def per_group(parameter: torch.Tensor, group: int) -> torch.Tensor:
    """``(K, N)`` to ``(K / group, N)``, to ``(N,)`` where there is one group, to ``(1,)`` where all are equal."""
    return compact(parameter[::group])


def compact(rows: torch.Tensor) -> torch.Tensor:
    """``(groups, N)`` as it is, as ``(N,)`` where there is one group, as ``(1,)`` where all are equal."""
    if rows.shape[0] > 1:
        return rows.contiguous()
    row = rows[0]
    if bool(((row - row[0]).abs() <= 1e-12 * row[0].abs()).all()):
        return row[:1].clone()
    return row.contiguous()


def nonlinear() -> NotAffine:
    """Why an operand that no line explains is no weight."""
    return NotAffine("its value is not a linear function of its codes", quantized=True, rule="read.weight.nonlinear")


def source_of(cuts: Sequence[Node]) -> Node:
    """The tensor behind codes that are only moved and converted, else the node where two meet."""
    leaf = cuts[0]
    while leaf.op == "call_function" and len(leaf.all_input_nodes) == 1:
        leaf = leaf.all_input_nodes[0]
    return leaf
