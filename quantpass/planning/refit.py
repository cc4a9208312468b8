"""A static weight once more, as the one form that every chip takes: symmetric int8, one scale for each column.

The fit is least squares: with the codes given, the best scale of a column is ``<w, q> / <q, q>``, and with the scale
given, the best codes are the nearest. Several scales to start from are tried. What the fit costs is measured on every
element, against the value that the graph gives it.

Elements of one group with one code are one value. Where that makes far fewer values than elements, as with 16 codes
in groups of 128, each value is fitted once and counts as often as it is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from quantpass.graph import expr as ex
from quantpass.graph.expr import Const
from quantpass.graph.records import Refit, Weight

_LEVELS = 127
_STEPS = (127.0, 126.5, 126.0, 125.0, 123.5, 122.0, 120.0, 118.0, 115.0, 111.0)
"""How many steps a column's largest magnitude is, for each scale to start from.

More than there are would clip it, for finer steps of the others: with 8 bits that pays for columns only that are longer
than an operator takes.
"""

_ELEMENTS = 1 << 18

SAMPLE = 128
"""How many columns of a weight are fitted at most to say what a permission that nobody has given might cost."""

_SMALLEST_HALF = torch.finfo(torch.float16).smallest_normal


def can_be_refitted(weight: Weight) -> bool:
    """True where ``weight`` is known when compiling, one matrix, and not in that form yet."""
    codes_known = isinstance(weight.codes, Const) and weight.codes.tensor.dim() == 2
    plain = not weight.group_size and weight.zero_point is None and weight.k_order is None and weight.k_scale is None
    return codes_known and ex.known(weight.scale, weight.zero_point) and not plain


def refit(source: Weight | Callable[[], torch.Tensor], *, thorough: bool = True) -> Weight | None:
    """Fit a weight.

    Args:
        source: a weight as read, all constants, or what gives the value ``(K, N)`` of one that has no such form.
        thorough: False tries one scale to start from, which takes half the time and is hardly ever better.

    Returns:
        the fit, with what it cost; None where an element is not finite.
    """
    value = None if isinstance(source, Weight) else source().double()
    k, n = (source.k, source.n) if isinstance(source, Weight) else value.shape  # type: ignore[union-attr]
    codes, scales = torch.zeros(n, k, dtype=torch.int8), torch.zeros(n, dtype=torch.float64)
    costs = []
    for columns in _columns_at_a_time(k, n):
        found = _fitted(_values(source, value, columns), thorough)
        if found is None:
            return None
        codes[columns], scales[columns] = found[0], found[1]
        costs.append(found[2])
    return _as_weight(codes, scales, _together(costs))


def refit_of_sample(source: Weight | Callable[[], torch.Tensor]) -> Weight | None:
    """What :func:`refit` would give, as far as every so manieth column tells: to plan with, and for what it may cost.

    The codes hold no values of the weight. A weight of few columns is fitted whole.
    """
    value = None if isinstance(source, Weight) else source()
    k, n = (source.k, source.n) if isinstance(source, Weight) else value.shape  # type: ignore[union-attr]
    if n <= SAMPLE:
        return refit(source, thorough=False)
    step = -(-n // SAMPLE)
    some = slice(0, n, step)
    found = _fitted(_values(source, value, some), thorough=False)
    if found is None:
        return None
    codes = torch.full((1, 1), _LEVELS, dtype=torch.int8).expand(n, k)
    cost = replace(found[2], columns=len(range(n)[some]))
    return _as_weight(codes, found[1].repeat_interleave(step)[:n], cost)


@dataclass(frozen=True, slots=True)
class _Values:
    """The values of some columns, each a row.

    Attributes:
        each: ``(n, T)`` float64: the elements in the order of K, or the different values.
        counts: how often each value is there; None for elements.
        index: which value each element is, in ``each`` flattened, ``(n, K)`` int32; None for elements.
        order: where along K each element of ``index`` belongs; None for its own place.
    """

    each: torch.Tensor
    counts: torch.Tensor | None = None
    index: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def total(self, of_each: torch.Tensor) -> torch.Tensor:
        """The sum over a column's elements."""
        return (of_each if self.counts is None else of_each * self.counts).sum(1)

    def elements(self, of_each: torch.Tensor) -> torch.Tensor:
        """``(n, K)``: of each element what ``of_each`` holds for its value."""
        if self.index is None:
            return of_each
        found = of_each.flatten().index_select(0, self.index.flatten()).view(self.index.shape)
        return found if self.order is None else torch.empty_like(found).index_copy_(1, self.order, found)


def _fitted(w: _Values, thorough: bool) -> tuple[torch.Tensor, torch.Tensor, Refit] | None:
    """Codes ``(n, K)`` and scales of columns, and what they cost; None where an element is not finite."""
    if not bool(torch.isfinite(w.each).all()):
        return None
    s = _fit(w, thorough)
    q = _nearest(w.each, s)
    error = torch.addcmul(w.each, q, s[:, None], value=-1)
    signal, noise, size = w.total(w.each.square()), w.total(error.square()), w.total(w.each.abs())
    sqnr = float(torch.where(noise == 0, math.inf, 10 * (signal / noise).log10()).min())
    growth = float(torch.where(size > 0, w.total(q.abs()) * s / size, 0.0).max())
    cost = Refit(sqnr, float(error.abs().max()), float(w.each.abs().max()), growth)
    return w.elements(q.to(torch.int8)), s, cost


def _together(costs: list[Refit]) -> Refit:
    """The worst of several parts of a weight."""
    return Refit(
        min((c.sqnr for c in costs), default=math.inf),
        max((c.largest_error for c in costs), default=0.0),
        max((c.largest for c in costs), default=0.0),
        max((c.growth for c in costs), default=0.0),
    )


def _as_weight(codes: torch.Tensor, scales: torch.Tensor, cost: Refit) -> Weight:
    n, k = codes.shape
    # A column of zeros has no scale of its own; a large one would loosen bounds.
    scales = torch.where(scales > 0, scales, scales.max() if bool(scales.any()) else 1.0)
    low, high = (-_LEVELS, _LEVELS) if cost.columns else (int(codes.min()), int(codes.max()))
    return Weight(Const(codes, label="refit"), True, k, n, Const(scales), None, 0, low, high, proved=True, refit=cost)


def _columns_at_a_time(k: int, n: int) -> Iterator[slice]:
    step = max(1, _ELEMENTS // max(1, k))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _values(source: Weight | Callable[[], torch.Tensor], value: torch.Tensor | None, columns: slice) -> _Values:
    """Some columns of a weight, or of its value ``(K, N)`` where that is given."""
    if value is not None:
        return _Values(value[:, columns].t().double().contiguous())
    assert isinstance(source, Weight)
    assert isinstance(source.codes, Const)
    codes = source.codes.tensor
    codes = codes[columns] if source.transposed else codes[:, columns].t().contiguous()
    low, high = (int(bound) for bound in torch.aminmax(codes))
    few = 2 * (high - low + 1) <= (source.group_size or source.k)
    if few and source.k_scale is None:
        return _counted(source, columns, codes, low, high)
    return _all(source, columns, codes)


def _counted(weight: Weight, columns: slice, codes: torch.Tensor, low: int, high: int) -> _Values:
    """The different values of ``codes``, ``(n, K)`` between ``low`` and ``high``."""
    (n, k), levels = codes.shape, high - low + 1
    group = weight.group_size or k
    groups = -(-k // group)
    first = torch.arange(n, dtype=torch.int32)[:, None] * groups + torch.arange(k, dtype=torch.int32) // group
    index = codes + (first * levels - low)
    counts = torch.bincount(index.flatten(), minlength=n * groups * levels).view(n, -1).double()
    each = torch.arange(low, high + 1, dtype=torch.float64)
    if weight.zero_point is not None:
        each = each - _of_groups(weight.zero_point, columns)
    each = (each * _of_groups(weight.scale, columns)).expand(n, groups, levels).flatten(1)
    return _Values(torch.where(counts > 0, each, 0.0), counts, index, weight.k_order)


def _of_groups(parameter: ex.Expr, columns: slice) -> torch.Tensor:
    """A scale or zero point as it meets ``(n, groups, codes)``."""
    assert isinstance(parameter, Const)
    wide = parameter.tensor.double()
    if wide.dim() == 2:
        return wide[:, columns].t().unsqueeze(2)
    return wide if wide.numel() == 1 else wide[columns, None, None]


def _all(weight: Weight, columns: slice, codes: torch.Tensor) -> _Values:
    """Every element of its own, each computed in the graph's order."""
    w = codes.double()
    if weight.zero_point is not None:
        w = w - _of_elements(weight, weight.zero_point, columns)
    w = w * _of_elements(weight, weight.scale, columns)
    if weight.k_scale is not None:
        w = w * weight.k_scale
    return _Values(w if weight.k_order is None else torch.empty_like(w).index_copy_(1, weight.k_order, w))


def _of_elements(weight: Weight, parameter: ex.Expr, columns: slice) -> torch.Tensor:
    """The same as it meets ``(n, K)`` codes."""
    found = _of_groups(parameter, columns)[..., 0]
    if found.dim() == 2 and found.shape[1] > 1:
        return found.repeat_interleave(weight.group_size, dim=1)[:, : weight.k]
    return found


def _fit(w: _Values, thorough: bool) -> torch.Tensor:
    """Scales ``(n,)`` for columns; 0 for a column of zeros."""
    largest = w.each.abs().amax(1)
    # In [-1, 1]: the search needs no more digits.
    each = (w.each / largest[:, None]).nan_to_num(0.0).float()
    unit = _Values(each, None if w.counts is None else w.counts.float())
    best = torch.full_like(largest, 1 / _LEVELS).float()
    least = torch.full_like(best, math.inf)
    for steps in _STEPS if thorough else _STEPS[:1]:
        s = _least_squares(unit, torch.full_like(best, 1 / steps))
        error = unit.total(torch.addcmul(unit.each, _nearest(unit.each, s), s[:, None], value=-1).square_())
        best, least = torch.where(error < least, s, best), torch.minimum(error, least)
    scale = largest * best.double()
    # float16 holds the scales that the chips ask for: the codes go with what it holds.
    half = scale.half().double()
    return torch.where((half >= _SMALLEST_HALF) & half.isfinite(), half, scale)


def _least_squares(w: _Values, scale: torch.Tensor) -> torch.Tensor:
    q = _nearest(w.each, scale)
    squares = w.total(q.square())
    return torch.where(squares > 0, w.total(w.each * q) / squares, scale)


def _nearest(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The codes of each row, in the dtype of ``w``."""
    return (w / torch.where(scale > 0, scale, 1.0)[:, None]).round_().clamp_(-_LEVELS, _LEVELS)
