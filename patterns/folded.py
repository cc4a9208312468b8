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
from functools import cache

import numpy as np
import torch

_COLUMNS_LOOKED_AT = 8
_SEGMENTS = (32, 128)
"""How much of a column to look at beside all of K: the beginning that one group would cover."""

_PRECISIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What values were rounded to: a wider dtype may hold those of a narrower one."""

_COARSEST = max(torch.finfo(p).eps for p in _PRECISIONS)

_MOST_STEPS = 256
_SMALLEST_STEP = 8
"""The value nearest to zero may be this many steps from it."""

_ROUNDED = 0.75
"""How far from its step a value may be, in units of its last place: one rounding, and the uncertainty of the scale."""

_ODDS = -8.0

_SLACK = 1e-6
"""What arithmetic in float64 may do to a bound, by far."""

_FEWEST = 8
"""Different values in a column."""

_LEVELS = np.arange(1.0, _SMALLEST_STEP + 4)
"""How many steps the value nearest to zero may be of a grid that was fitted."""

_ROWS = 1024
"""So many values of a column usually tell that they are too far apart for a grid."""

_VALUES = 32
"""So many usually tell that they lie on none."""


def looks_dequantized(matrix: torch.Tensor) -> bool:
    """True where columns of a float ``(K, N)`` matrix take few values on a regular grid, as only codes do."""
    k, n = matrix.shape
    if not matrix.dtype.is_floating_point or matrix.dtype.itemsize < 2 or k < 32 or n == 0:
        return False
    precisions = _precisions(matrix.dtype)
    looked_at = matrix[:, :: max(1, n // _COLUMNS_LOOKED_AT)][:, :_COLUMNS_LOOKED_AT].t()
    size: np.ndarray = looked_at[:, :_ROWS].abs().double().numpy(force=True)
    if _surely_off_grids(size, k, precisions):
        return False
    return _on_grids(looked_at.double(), precisions)


def _on_grids(columns: torch.Tensor, precisions: tuple[torch.finfo, ...]) -> bool:
    """The answer, from all values of ``columns``, ``(columns, K)``; ``precisions``: their own first."""
    own = precisions[0]
    whole = bool((columns == columns.round()).all())
    if whole or not bool(torch.isfinite(columns).all()) or _is_regular(columns, own.eps):
        return False
    for size in reversed(_segments(columns.shape[1])):
        grids = _fitted_grids(columns[:, :size])
        if grids is None or not bool(grids.fit(_COARSEST, max(p.tiny for p in precisions)).any()):
            continue
        for precision in precisions:
            if 2 * len(grids.columns_on(precision.eps, max(own.tiny, precision.tiny))) >= len(columns):
                return True
    return False


def _segments(k: int) -> list[int]:
    """The lengths to look at, the largest last."""
    return [*(size for size in _SEGMENTS if size < k), k]


@cache
def _precisions(dtype: torch.dtype) -> tuple[torch.finfo, ...]:
    """What values held in ``dtype`` may have been rounded to: that, first, or less."""
    return tuple(p for p in map(torch.finfo, _PRECISIONS) if p.eps >= torch.finfo(dtype).eps)


def _surely_off_grids(size: np.ndarray, k: int, precisions: tuple[torch.finfo, ...]) -> bool:
    """True where :func:`_on_grids` can only say no: in no segment do enough of the columns lie on any grid it tries.

    Args:
        size: how large the first values of each column are, ``(columns, rows)``.
        k: the length of the columns.
        precisions: as there.
    """
    segments, enough = _segments(k), len(size) / 2
    starts = [0, *segments[:-1]]
    farthest = np.maximum.accumulate(np.maximum.reduceat(size, starts, axis=1), axis=1)
    nearest = np.minimum.reduceat(size, starts, axis=1)
    if not nearest.all():
        nearest = np.minimum.reduceat(np.where(size > 0, size, np.inf), starts, axis=1)
    nearest = np.minimum.accumulate(nearest, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):  # columns of zeros, and what is not finite
        steps = np.minimum(1.01 * (1 + _SLACK) * _MOST_STEPS * nearest / farthest, _SMALLEST_STEP) // 1
    # How many steps the smallest value may be: none where the values lie too far apart.
    close = (steps >= 1) & (farthest > 0)
    for i, several in enumerate((close.sum(axis=0) >= enough).tolist()):
        if several:
            length, of = segments[i], close[:, i]
            if length > size.shape[1]:
                return False
            grids = _Places(size[of, :length], nearest[of, i], steps[of, i], max(p.tiny for p in precisions))
            if grids.columns(grids.may_fit(_VALUES)) >= enough:
                finer = max((p.eps for p in precisions if p.eps < _COARSEST), default=0.0)
                told = grids.may_fit(length) & (grids.may_fit(length, finer) | grids.may_be_told())
                if grids.columns(told) >= enough:
                    return False
    return True


@dataclass(frozen=True)
class _Places:
    """Where the values of columns may lie on grids of any step that a fit may end with.

    On a grid of step ``s`` each value ``v`` is ``l * s`` but for its rounding, and the smallest one ``L * s``: so
    ``v / nearest * L`` is whole, but for both roundings. ``L`` is at most three more than the steps that were tried:
    each of the four fits takes the step down to no less than ``(L + 1/2) / (L + 1)`` of what it was.

    Attributes:
        size: how large the values are, ``(columns, values)``.
        nearest: the smallest other than 0, ``(columns,)``.
        steps: how many steps that is tried as, at most.
        tiny: of smaller values nothing is known here.
    """

    size: np.ndarray
    nearest: np.ndarray
    steps: np.ndarray
    tiny: float

    def columns(self, at: np.ndarray) -> int:
        """How many columns may lie on a grid where ``(columns, levels)`` says at which ``L`` they may."""
        may = (at & (self.steps[:, None] + 3 >= _LEVELS)).any(axis=1) | (self.nearest < self.tiny)
        return int((may & ((self.size > 0).sum(axis=1) >= _FEWEST)).sum()) if may.any() else 0

    def may_fit(self, values: int, eps: float = _COARSEST) -> np.ndarray:
        """Whether the first ``values`` may all lie on a grid, rounded to this precision; ``(columns, levels)``."""
        place = (self.size[:, None, :values] / self.nearest[:, None, None]) * _LEVELS[:, None]
        both = 2 * _ROUNDED * eps / (1 - _ROUNDED * eps) * (1 + _SLACK)
        on: np.ndarray = (np.abs(place - np.rint(place)) <= both * place).all(axis=2)
        return on

    def may_be_told(self) -> np.ndarray:
        """Whether values of the coarsest precision may tell a grid of so few steps; ``(columns, levels)``."""
        step = (1 + _ROUNDED * _COARSEST) * (1 + _SLACK) * self.nearest[:, None] / _LEVELS  # at most
        place = np.ldexp(_COARSEST, np.frexp(self.size)[1] - 1)
        chance = np.where(self.size > 0, 2 * _ROUNDED * place, np.inf)[:, None, :] / step[:, :, None]
        told: np.ndarray = np.log10(np.minimum(chance, 1.0)).sum(axis=2) + math.log10(_SMALLEST_STEP) <= _ODDS + _SLACK
        return told


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
    if not bool(count.any()):
        return None  # zeros alone
    values = values[:, : int(count.max())]
    size = values.abs()
    nearest, farthest = size.nan_to_num(math.inf).amin(dim=1), size.nan_to_num(0.0).amax(dim=1)
    steps = torch.arange(1, _SMALLEST_STEP + 1, dtype=torch.float64)
    tried = farthest[:, None] * steps <= 1.01 * nearest[:, None] * _MOST_STEPS
    which, step = (tried & (count >= _FEWEST)[:, None] & (count <= most)[:, None]).nonzero(as_tuple=True)
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
