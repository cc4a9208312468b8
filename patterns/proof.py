"""Comparing a weight as an operator would rebuild it with what the graph computes, element by element.

A reading is kept only where ``(codes - zero_point) * scale``, with everything that was done to it since (groups, a
scale along K, moved codes), gives back each element. What an element may differ by depends on its own scale, code and
zero point alone: neither a larger column, row or group nor an outlier elsewhere loosens it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from quantpass.graph.records import Weight

TOLERANCE = 1e-3
"""How far an element may be from its code, in codes, whatever its magnitude."""

FLOAT64 = 1e-9
"""Relative difference that arithmetic in float64 may leave between two things that are one."""

FLOAT32 = 1e-6
"""The same where an operator computes in float32 inside."""

_ELEMENTS = 1 << 20


def rows_at_a_time(k: int, n: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of ``range(k)`` that keep temporaries of ``(rows, n)`` small, of a ``multiple`` of rows each."""
    step = max(1, _ELEMENTS // max(1, n) // multiple) * multiple
    for start in range(0, k, step):
        yield slice(start, min(start + step, k))


def is_rebuilt(
    weight: Weight,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    actual: torch.Tensor,
    *,
    same: float,
    slope: torch.Tensor | None = None,
    rounding: torch.dtype | None = None,
    columns: slice | None = None,
) -> bool:
    """True where ``weight``, put together as the operator will, equals ``actual`` in every element.

    Args:
        weight: how the tensors below lie, are grouped, ordered and scaled along K.
        codes: its codes as stored.
        scale: its scale, ``(1,)``, ``(N,)`` or ``(K / group, N)``.
        zero_point: its zero point, of the same shape or one that broadcasts against it.
        actual: the operand's value, ``(K, N)``.
        same: :data:`FLOAT64` or :data:`FLOAT32`, relative to the magnitudes that an element was made from.
        slope: the graph's own step of each element, ``(K, N)``; where given, no looser than that.
        rounding: the dtype that the graph rounded each element to, where ``actual`` holds the rounded values.
        columns: those of N that ``actual`` and ``slope`` hold; None for all.
    """
    stored = codes.t() if weight.transposed else codes
    if columns is not None:
        stored = stored[:, columns]
        scale = _of_columns(scale, weight.n, columns)
        zero_point = None if zero_point is None else _of_columns(zero_point, weight.n, columns)
    if actual.shape != stored.shape or (columns is None and tuple(actual.shape) != (weight.k, weight.n)):
        return False
    own, least = 0.0, 0.0
    if rounding is not None and rounding.is_floating_point:
        limits = torch.finfo(rounding)
        own, least = limits.eps / 2, limits.tiny * limits.eps / 2
    group = max(1, weight.group_size)
    for rows in rows_at_a_time(weight.k, stored.shape[1], group):
        which = rows if weight.k_order is None else weight.k_order[rows]
        step = _for_rows(scale, group, rows).double()
        whole, wanted = _in_groups(stored[rows].double(), group), _in_groups(actual[which].double(), group)
        if weight.k_scale is not None:
            step = step * _in_groups(weight.k_scale[rows, None], group)
        zero = None if zero_point is None else _for_rows(zero_point, group, rows).double()
        rebuilt = (whole if zero is None else whole - zero) * step
        if slope is None and torch.equal(rebuilt, wanted) and math.isfinite(float(rebuilt.sum())):
            continue
        magnitude = whole.abs() + 1
        if zero is not None:
            magnitude = magnitude + zero.abs()
        least_step = step.abs()
        if slope is not None:
            least_step = torch.minimum(least_step, _in_groups(slope[which].abs(), group))
        slack = least_step * (magnitude * same).clamp(max=TOLERANCE)
        if rounding is not None:
            slack = slack + own * wanted.abs() + least
        if not bool(((rebuilt - wanted).abs() <= slack).all()):  # NaN is not within
            return False
    return True


def _of_columns(parameter: torch.Tensor, n: int, columns: slice) -> torch.Tensor:
    return parameter if parameter.shape[-1] != n else parameter[..., columns]


def _in_groups(matrix: torch.Tensor, group: int) -> torch.Tensor:
    """``(rows, N)`` as ``(groups, group, N)``."""
    return matrix.reshape(-1, group, matrix.shape[1])


def _for_rows(parameter: torch.Tensor, group: int, rows: slice) -> torch.Tensor:
    """The parameter that belongs to each of ``rows`` of K, broadcasting against ``(groups, group, N)``."""
    return parameter if parameter.dim() < 2 else parameter[rows.start // group : rows.stop // group, None]
