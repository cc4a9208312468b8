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
from dataclasses import dataclass

import torch

_COLUMNS_LOOKED_AT = 8
_SEGMENTS = (None, 128, 32)
"""How much of a column to look at: all of K, or the beginning that one group would cover."""

_PRECISIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What values were rounded to: a wider dtype may hold those of a narrower one."""

_COARSEST = max(torch.finfo(p).eps for p in _PRECISIONS)

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
    precisions = [p for p in map(torch.finfo, _PRECISIONS) if p.eps >= own.eps]
    for size in (size for size in _SEGMENTS if size is None or size < k):
        grids = _fitted_grids(columns[:, :size])
        if grids is None or not bool(grids.fit(_COARSEST, max(p.tiny for p in precisions)).any()):
            continue
        for precision in precisions:
            if 2 * len(grids.columns_on(precision.eps, max(own.tiny, precision.tiny))) >= len(columns):
                return True
    return False


def _is_regular(columns: torch.Tensor, eps: float) -> bool:
    """True for ramps, steps and bands: what a formula makes of positions, where codes go up and down."""
    bends = columns[:, 2:] - 2 * columns[:, 1:-1] + columns[:, :-2]
    return bool(((bends.abs() <= 4 * eps * columns.abs().amax(dim=1, keepdim=True)).double().mean(dim=1) > 0.5).any())


@dataclass(frozen=True)
class _Grids:
    """Grids that columns may lie on: one for each column and each number of steps that its smallest value may be.

    Attributes:
        column: which column each grid is tried on, ``(grids,)``.
        values: its different values other than 0, in no order, ``(grids, values)``.
        held: which of these there are; columns differ in their number.
        step: what the grid's step was fitted as, ``(grids, 1)``.
    """

    column: torch.Tensor
    values: torch.Tensor
    held: torch.Tensor
    step: torch.Tensor

    def fit(self, eps: float, tiny: float) -> torch.Tensor:
        """The grids that hold all values of their column, each rounded to this precision."""
        off = (self.values - (self.values / self.step).round() * self.step).abs()
        return ((off <= _ROUNDED * self._last_place(eps, tiny)) | ~self.held).all(dim=1)

    def columns_on(self, eps: float, tiny: float) -> set[int]:
        """The columns that lie on one of their grids, and not by chance."""
        chance = (2 * _ROUNDED * self._last_place(eps, tiny) / self.step.abs()).clamp(max=1.0).log10()
        odds = torch.where(self.held, chance, 0.0).sum(dim=1) + math.log10(_SMALLEST_STEP)
        return {int(c) for c in self.column[self.fit(eps, tiny) & (odds <= _ODDS)]}

    def _last_place(self, eps: float, tiny: float) -> torch.Tensor:
        return eps * torch.exp2(torch.floor(torch.log2(self.values.abs()))).clamp(min=tiny)


def _fitted_grids(columns: torch.Tensor) -> _Grids | None:
    """The grids to try on ``columns``, ``(columns, K)``; None where no column has few values within 256 steps."""
    most = 2 * _MOST_STEPS
    few = (_distinct(columns[:, : 2 * most])[1] <= most).nonzero()[:, 0]  # more values do not make fewer different ones
    if not len(few):
        return None
    values, count = _distinct(columns[few])
    values = values[:, : int(count.max())]
    size = values.abs()
    nearest, farthest = size.nan_to_num(math.inf).amin(dim=1), size.nan_to_num(0.0).amax(dim=1)
    steps = torch.arange(1, _SMALLEST_STEP + 1, dtype=torch.float64)
    tried = farthest[:, None] * steps <= 1.01 * nearest[:, None] * _MOST_STEPS
    which, step = (tried & (count >= 8)[:, None] & (count <= most)[:, None]).nonzero(as_tuple=True)
    if not len(which):
        return None
    held = ~values[which].isnan()
    found = torch.where(held, values[which], nearest[which, None])  # a place that is not held counts for nothing
    fitted = _fitted(found, held, (nearest[which] / steps[step])[:, None])
    return _Grids(few[which], found, held, fitted)


def _distinct(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The different values of each column other than 0, then NaN; and how many there are."""
    ordered = columns.sort(dim=1).values
    held = ordered != 0
    held[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    return torch.where(held, ordered, math.nan).sort(dim=1).values, held.sum(dim=1)


def _fitted(values: torch.Tensor, held: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """The step of each grid, from its smallest values outwards, where a rough one still tells which step a value is."""
    for bound in (4, 16, 64, _MOST_STEPS):
        levels = (values / step).round()
        levels = torch.where(held & (levels.abs() <= bound), levels, 0.0)
        weight = levels.square().sum(dim=1, keepdim=True)
        step = torch.where(weight > 0, (values * levels).sum(dim=1, keepdim=True) / weight, step)
    return step
