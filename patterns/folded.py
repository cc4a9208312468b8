"""Telling a weight that was dequantized before the pass from one that was trained as floats.

Constant folding leaves ``codes * scale``, rounded to the graph's dtype: a few values on a grid through zero. Whether a
column lies on a grid by chance is a question of odds, and those depend on the dtype: between two steps of a grid
float16 has a thousand values where it is small, bfloat16 eight near the 16th step and none from the 128th on. So each
value counts for as much as its place could tell, and a column is on a grid only where all of its values fit and the
odds of that are below one in 10^8; half of the columns looked at have to be. 8-bit codes are told in bfloat16 too, by
their small steps.

Not told: grids that do not pass through zero (a zero point that is no whole number), weights that were rounded twice on
the way, fewer than 8 different values in a column, groups of less than 32, scales along K.
"""

from __future__ import annotations

import math

import torch

_COLUMNS_LOOKED_AT = 8
_SEGMENTS = (None, 128, 32)
"""How much of a column to look at: all of K, or the beginning that one group would cover."""

_PRECISIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What values were rounded to: a wider dtype may hold those of a narrower one."""

_MOST_STEPS = 256
_SMALLEST_STEP = 8
"""The value nearest to zero may be this many steps from it."""

_ROUNDED = 0.75
"""How far from its step a value may be, in units of its last place: one rounding, and the uncertainty of the scale."""

_ODDS = -8.0


def looks_dequantized(matrix: torch.Tensor) -> bool:
    """True where columns of a float ``(K, N)`` matrix take few values on a regular grid, as only codes do."""
    k, n = matrix.shape
    if not matrix.dtype.is_floating_point or matrix.dtype.itemsize < 2 or k < 32 or n == 0:
        return False
    columns = matrix[:, :: max(1, n // _COLUMNS_LOOKED_AT)][:, :_COLUMNS_LOOKED_AT].t().double()
    own = torch.finfo(matrix.dtype)
    whole = bool((columns == columns.round()).all())
    if whole or not bool(torch.isfinite(columns).all()) or _is_regular(columns, own.eps):
        return False
    for precision in (torch.finfo(p) for p in _PRECISIONS):
        if precision.eps < own.eps:
            continue
        for size in (size for size in _SEGMENTS if size is None or size < k):
            on_a_grid = [_on_a_grid(c[:size], precision.eps, max(own.tiny, precision.tiny)) for c in columns]
            if 2 * sum(on_a_grid) >= len(on_a_grid):
                return True
    return False


def _is_regular(columns: torch.Tensor, eps: float) -> bool:
    """True for ramps, steps and bands: what a formula makes of positions, where codes go up and down."""
    bends = columns[:, 2:] - 2 * columns[:, 1:-1] + columns[:, :-2]
    return bool(((bends.abs() <= 4 * eps * columns.abs().amax(dim=1, keepdim=True)).double().mean(dim=1) > 0.5).any())


def _on_a_grid(values: torch.Tensor, eps: float, tiny: float) -> bool:
    distinct = torch.unique(values)
    distinct = distinct[distinct != 0]
    if not 8 <= len(distinct) <= 2 * _MOST_STEPS:
        return False
    nearest = float(distinct.abs().min())
    farthest = float(distinct.abs().max())
    last_place = eps * torch.exp2(torch.floor(torch.log2(distinct.abs()))).clamp(min=tiny)
    for steps in range(1, _SMALLEST_STEP + 1):
        if farthest * steps > 1.01 * nearest * _MOST_STEPS:
            break
        step = _fitted(distinct, nearest / steps)
        levels = (distinct / step).round()
        if bool(((distinct - levels * step).abs() <= _ROUNDED * last_place).all()):
            chance = (2 * _ROUNDED * last_place / step).clamp(max=1.0)
            if float(chance.log10().sum()) + math.log10(_SMALLEST_STEP) <= _ODDS:
                return True
    return False


def _fitted(distinct: torch.Tensor, step: float) -> float:
    """The step of a grid, from its smallest values outwards, where a rough one still tells which step a value is."""
    for bound in (4, 16, 64, _MOST_STEPS):
        levels = (distinct / step).round()
        near = levels.abs() <= bound
        weight = float((levels[near] ** 2).sum())
        if weight:
            step = float((distinct[near] * levels[near]).sum()) / weight
    return step
