"""Comparing a weight as an operator would rebuild it with what the graph computes, element by element.

A reading is kept only where ``(codes - zero_point) * scale``, with everything that was done to it since (groups, a
scale along K, moved codes), gives back each element. What an element may differ by depends on its own scale, code and
zero point alone: neither a larger column, row or group nor an outlier elsewhere loosens it.
"""

from __future__ import annotations

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


def rows_at_a_time(k: int, n: int) -> Iterator[slice]:
    """Slices of ``range(k)`` that keep temporaries of ``(rows, n)`` small."""
    step = max(1, _ELEMENTS // max(1, n))
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
    """
    if tuple(actual.shape) != (weight.k, weight.n):
        return False
    stored = codes.t() if weight.transposed else codes
    own, least = 0.0, 0.0
    if rounding is not None and rounding.is_floating_point:
        limits = torch.finfo(rounding)
        own, least = limits.eps / 2, limits.tiny * limits.eps / 2
    for rows in rows_at_a_time(weight.k, weight.n):
        which = rows if weight.k_order is None else weight.k_order[rows]
        step = _for_rows(scale, weight.group_size, rows).double()
        if weight.k_scale is not None:
            step = step * weight.k_scale[rows, None]
        whole, wanted = stored[rows].double(), actual[which].double()
        magnitude = whole.abs() + 1
        rebuilt = whole
        if zero_point is not None:
            zero = _for_rows(zero_point, weight.group_size, rows).double()
            magnitude = magnitude + zero.abs()
            rebuilt = rebuilt - zero
        rebuilt = rebuilt * step
        least_step = step.abs() if slope is None else torch.minimum(step.abs(), slope[which].abs())
        slack = least_step * (magnitude * same).clamp(max=TOLERANCE)
        if rounding is not None:
            slack = slack + own * wanted.abs() + least
        if not bool(((rebuilt - wanted).abs() <= slack).all()):  # NaN is not within
            return False
    return True


def _for_rows(parameter: torch.Tensor, group: int, rows: slice) -> torch.Tensor:
    """The parameter that belongs to each of ``rows`` of K, broadcasting against ``(rows, N)``."""
    if parameter.dim() < 2:
        return parameter
    return parameter[torch.arange(rows.start, rows.stop) // group]
