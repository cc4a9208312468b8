"""A static weight once more, as the one form that every chip takes: symmetric int8, one scale for each column.

The fit is least squares: with the codes given, the best scale of a column is ``<w, q> / <q, q>``, and with the scale
given, the best codes are the nearest. Several scales to start from are tried. What the fit costs is measured on every
element, against the value that the graph gives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

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

_ELEMENTS = 1 << 17

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
        w = value[:, columns].t().contiguous() if value is not None else _columns(source, columns)  # type: ignore[arg-type]
        found = _fitted(w, thorough)
        if found is None:
            return None
        codes[columns], scales[columns] = found[0].to(torch.int8), found[1]
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
    w = value[:, some].t().double() if value is not None else _columns(source, some)  # type: ignore[arg-type]
    found = _fitted(w.contiguous(), thorough=False)
    if found is None:
        return None
    codes = torch.full((1, 1), _LEVELS, dtype=torch.int8).expand(n, k)
    cost = replace(found[2], columns=w.shape[0])
    return _as_weight(codes, found[1].repeat_interleave(step)[:n], cost)


def _fitted(w: torch.Tensor, thorough: bool) -> tuple[torch.Tensor, torch.Tensor, Refit] | None:
    """Codes and scales of columns ``(n, K)``, and what they cost; None where an element is not finite."""
    if not bool(torch.isfinite(w).all()):
        return None
    s = _fit(w, thorough)
    q = _nearest(w, s)
    error = torch.addcmul(w, q, s[:, None], value=-1)
    signal, noise, size = w.square().sum(1), error.square().sum(1), w.abs().sum(1)
    sqnr = float(torch.where(noise == 0, math.inf, 10 * (signal / noise).log10()).min())
    growth = float(torch.where(size > 0, q.abs().sum(1) * s / size, 0.0).max())
    return q, s, Refit(sqnr, float(error.abs().max()), float(w.abs().max()), growth)


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


def _columns(weight: Weight, columns: slice) -> torch.Tensor:
    """Some columns of a weight's value, as rows ``(n, K)`` in float64, each in the graph's order."""
    assert isinstance(weight.codes, Const)
    assert isinstance(weight.scale, Const)
    codes = weight.codes.tensor
    w = (codes[columns] if weight.transposed else codes[:, columns].t()).double()
    if isinstance(weight.zero_point, Const):
        w = w - _of_columns(weight, weight.zero_point.tensor, columns)
    w = w * _of_columns(weight, weight.scale.tensor, columns)
    if weight.k_scale is not None:
        w = w * weight.k_scale
    return w.contiguous() if weight.k_order is None else torch.empty_like(w).index_copy_(1, weight.k_order, w)


def _of_columns(weight: Weight, parameter: torch.Tensor, columns: slice) -> torch.Tensor:
    """A scale or zero point as it meets ``(n, K)`` codes."""
    wide = parameter.double()
    if wide.dim() == 2:
        return wide[:, columns].t()[:, torch.arange(weight.k) // weight.group_size]
    return wide if wide.numel() == 1 else wide[columns, None]


def _fit(w: torch.Tensor, thorough: bool) -> torch.Tensor:
    """Scales ``(n,)`` for the rows of ``w``; 0 for a row of zeros."""
    largest = w.abs().amax(1)
    unit = (w / largest[:, None]).nan_to_num(0.0).float()  # rows within [-1, 1]: the search needs no more digits
    best = torch.full_like(largest, 1 / _LEVELS).float()
    least = torch.full_like(best, math.inf)
    for steps in _STEPS if thorough else _STEPS[:1]:
        s = _least_squares(unit, torch.full_like(best, 1 / steps))
        error = torch.addcmul(unit, _nearest(unit, s), s[:, None], value=-1).square_().sum(1)
        best, least = torch.where(error < least, s, best), torch.minimum(error, least)
    scale = largest * best.double()
    # float16 holds the scales that the chips ask for: the codes go with what it holds.
    half = scale.half().double()
    return torch.where((half >= _SMALLEST_HALF) & half.isfinite(), half, scale)


def _least_squares(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    q = _nearest(w, scale)
    squares = q.square().sum(1)
    return torch.where(squares > 0, (w * q).sum(1) / squares, scale)


def _nearest(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The codes of each row, in the dtype of ``w``."""
    return (w / torch.where(scale > 0, scale, 1.0)[:, None]).round_().clamp_(-_LEVELS, _LEVELS)
