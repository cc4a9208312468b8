"""What has to be known of a value before it is narrowed, divided or rounded.

A constant is looked at element by element. Of a value that only the run knows, its dtype and the graph's own clamps
are known and nothing else: it may be 0, subnormal, infinite or not a number. Every comparison here is false where a
NaN takes part, and false means "not safe".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from quantpass.graph import expr as ex
from quantpass.graph.expr import Call, Const, Expr, Recentred, Ref

aten = torch.ops.aten

INT32_MAX = 2**31 - 1
SMALLEST_NORMAL = 2.0**-126

_EXPONENT_BITS = {torch.float16: 5, torch.bfloat16: 8, torch.float32: 8, torch.float64: 11}
_LARGEST_WHOLE = {torch.float16: 2**11, torch.bfloat16: 2**8, torch.float32: 2**24, torch.float64: 2**53}
"""Up to here every integer is a number of the dtype."""


def magnitude(e: Any, ranges: Mapping[Node, tuple[float, float]]) -> float:
    """An upper bound of ``|e|``: infinite where the run could make it anything.

    Args:
        e: an expression or a number.
        ranges: what the graph itself guarantees of integer nodes.
    """
    if isinstance(e, int | float):
        return abs(float(e))
    if isinstance(e, Const):
        largest = float(e.tensor.double().abs().max()) if e.tensor.numel() else 0.0
        return math.inf if math.isnan(largest) else largest
    if isinstance(e, Recentred):
        return 128.0
    if isinstance(e, Ref):
        low, high = ranges.get(e.node, _of_dtype(ex.dtype_of(e)))
        return max(abs(low), abs(high))
    return _of_call(e, ranges) if isinstance(e, Call) else math.inf


def _of_dtype(dtype: torch.dtype) -> tuple[float, float]:
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        return -math.inf, math.inf
    info = torch.iinfo(dtype)
    return info.min, info.max


def _of_call(e: Call, ranges: Mapping[Node, tuple[float, float]]) -> float:
    if _keeps_sizes(e):
        return magnitude(e.args[0], ranges)
    if e.target is aten._to_copy.default:
        held = magnitude(e.args[0], ranges)
        return held if e.dtype.is_floating_point or held <= torch.iinfo(e.dtype).max else math.inf
    if e.target is aten.mul.Tensor:
        a, b = (magnitude(x, ranges) for x in e.args)
        return 0.0 if 0.0 in (a, b) else a * b
    if e.target in (aten.add.Tensor, aten.sub.Tensor):
        return sum(magnitude(x, ranges) for x in e.args)
    if e.target is aten.sum.dim_IntList:
        (dim,) = e.args[1]
        terms = ex.shape_of(e.args[0])[dim]
        return magnitude(e.args[0], ranges) * terms if isinstance(terms, int) else math.inf
    return math.inf


def _keeps_sizes(e: Call) -> bool:
    """True where every element is one of the first operand's, but for its sign."""
    return e.target in (aten.neg.default, aten.index_select.default) or ex.movement_in(e, len(e.shape)) is not None


def held_dtype(e: Expr) -> torch.dtype:
    """The dtype that holds every value of ``e``: the one it was widened from, if it was."""
    while isinstance(e, Call):
        widens = e.target is aten._to_copy.default and lossless(ex.dtype_of(e.args[0]), e.dtype)
        if not widens and not _keeps_sizes(e):
            break
        e = e.args[0]
    return ex.dtype_of(e)


def lossless(source: torch.dtype, target: torch.dtype) -> bool:
    """True where every value of ``source`` is one of ``target``."""
    if source == target:
        return True
    if source.is_floating_point or not target.is_floating_point:
        return torch.promote_types(source, target) == target
    return max(map(abs, _of_dtype(source))) <= _LARGEST_WHOLE[target]


def same_range(source: torch.dtype, target: torch.dtype) -> bool:
    """True where a cast from the floating dtype ``source`` can round, but neither overflow nor flush to zero."""
    return source.is_floating_point and _EXPONENT_BITS[source] <= _EXPONENT_BITS[target]


def all_finite(e: Expr | None) -> bool:
    """True where ``e`` is absent, or a constant without infinities and NaN."""
    return e is None or (isinstance(e, Const) and bool(torch.isfinite(e.tensor).all()))


def relative_change(wide: torch.Tensor, narrow: torch.Tensor) -> float:
    """The largest ``|narrow - wide| / |wide|``; 0 where both are 0, infinite where one is not finite."""
    a, b = wide.double(), narrow.double()
    if not bool((torch.isfinite(a) & torch.isfinite(b)).all()):
        return math.inf
    if torch.equal(a, b):
        return 0.0
    return float(torch.where(a == b, 0.0, (b - a).abs() / a.abs()).max())


def is_normal(wide: torch.Tensor) -> bool:
    """True where every element but for its sign is between float32's smallest normal number and 2^127."""
    least, most = (float(x) for x in torch.aminmax(wide.abs()))
    return least >= SMALLEST_NORMAL and most < 2.0**127


def fits_float32(wide: torch.Tensor) -> bool:
    """True where float32 holds every element but for its last digits; zeros stay zeros."""
    return not wide.numel() or is_normal(wide) or relative_change(wide, wide.to(torch.float32)) <= 2.0**-23
