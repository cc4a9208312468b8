"""Scales that a graph finds at run time: multiples of the largest magnitude of each row, or of a whole tensor.

Any spelling is read by what it computes: ``amax(abs(x))``, or the larger of ``-min(x)`` and ``max(x)``; divided or
multiplied by numbers, kept from zero by a smallest value, inverted, cast. What the roundings on the way may change is
part of the reading.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from quantpass.graph.expr import Const, Ref
from quantpass.graph.instructions import Add, Cast, Clamp, Move, Multiply, ways
from quantpass.graph.node_memo import NodeMemo
from quantpass.graph.static_values import as_dtype
from quantpass.patterns.affine import AffineReader
from quantpass.patterns.steps import (
    Abs,
    Chosen,
    Compared,
    Extreme,
    Negative,
    Number,
    Operand,
    Reciprocal,
    Step,
    arguments,
    dtype_of,
    shape_of,
    step_of,
    view,
)

aten = torch.ops.aten

MAGNITUDE, HIGH, LOW, DEPTH = "largest magnitude", "largest", "smallest", "smallest, negated"

_STEADY = 400
"""A value added to the largest magnitude is felt by codes up to where it is this share of it."""


_NEAR = 1 / 16
"""By how much a bound and what is put in its place may differ, relative: one of them may be rounded to float16."""


@dataclass(frozen=True, slots=True)
class Magnitude:
    """``factor * L``, or ``factor / L`` where ``inverted``, with ``L = max(max|x|, floor) + added``.

    Attributes:
        kind: of which extreme; only :data:`MAGNITUDE` is symmetric, the others are on the way there.
        x: the tensor.
        whole: the extreme of the whole tensor, not of each row (all dimensions but the last).
        factor: what it is multiplied by.
        inverted: it stands in the denominator.
        floor: the least that it is taken to be.
        added: what is added to it.
        error: how far rounding may take the value, relative.
        lost: how far rounding below the smallest normal number, or overflow, may take ``L``.
    """

    kind: str
    x: Node
    whole: bool
    factor: float = 1.0
    inverted: bool = False
    floor: float = 0.0
    added: float = 0.0
    error: float = 0.0
    lost: float = 0.0

    @property
    def steady_from(self) -> float:
        """From which largest magnitude on neither ``floor`` nor ``added`` nor ``lost`` move a code by much."""
        return max(self.floor, _STEADY * self.added, _STEADY * self.lost)


@dataclass(frozen=True, slots=True)
class ChosenScale:
    """The results of a named operator that chooses a scale and a zero point for a tensor.

    Attributes:
        source: the tensor.
        whole: one scale for all of it, not one for each row.
        divisor: the scale is the largest magnitude over this.
        floor: the least that the largest magnitude is taken to be.
        zero_point: the zero point.
        dtype: what it computes in.
    """

    source: Operand
    whole: bool
    divisor: float
    floor: float
    zero_point: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """An operator that finds a scale for each row of a tensor and quantizes by it, symmetrically.

    Attributes:
        node: its call.
        source: the tensor.
        largest: the code of a row's largest magnitude.
        smooth: what the tensor is multiplied by first, ``(K,)``; None for nothing.
        dtype: what it computes in.
    """

    node: Node
    source: Node
    largest: int
    smooth: Node | None
    dtype: torch.dtype = torch.float32

    @property
    def magnitude(self) -> Magnitude:
        """Its scales. With a smoothing factor they belong to no tensor of the graph, but to this call alone."""
        x = self.source if self.smooth is None else self.node
        return _rounded(Magnitude(MAGNITUDE, x, whole=False, factor=1 / self.largest), self.dtype)


class MagnitudeReader:
    """Reads the magnitudes of one graph, each node once.

    Args:
        reader: what the graph is read with.
    """

    def __init__(self, reader: AffineReader) -> None:
        self._reader = reader
        self._memo = NodeMemo[Magnitude | None]()

    def read(self, e: Operand) -> Magnitude | None:
        """``e`` as an extreme of a tensor; None where it is none."""
        if isinstance(e, Ref):
            e = e.node
        if isinstance(e, Node):
            return self._memo(e, self._read)
        return None if e is None or isinstance(e, Const | int | float) else self._read(e)

    def number(self, e: Any) -> float | None:
        """The one number that every element of ``e`` is."""
        if isinstance(e, Ref):
            e = e.node
        if isinstance(e, Const):
            first = e.tensor.reshape(-1)[:1]
            return float(first) if e.tensor.numel() and bool((e.tensor == first).all()) else None
        made = self._unmoved(e)
        chosen, step = self._chosen_scale(made, 1), step_of(self._reader, made)
        if chosen is not None:
            return float(chosen.zero_point)
        if isinstance(step, Number) and isinstance(step.value, int | float) and made is e:
            return as_dtype(step.value, dtype_of(e))
        found = self._reader.values.uniform(e)
        return None if found is None else float(found)

    def origin(self, e: Operand, *, rows: bool = True) -> Node | None:
        """The node whose values ``e`` holds, in a shape and a dtype of its own; ``rows`` keeps the last dimension."""
        while (before := self.before(e, rows=rows)) is not None:
            e = before
        e = e.node if isinstance(e, Ref) else e
        return e if isinstance(e, Node) else None

    def before(self, e: Operand, *, rows: bool) -> Operand | None:
        """``e`` before a view or a cast to a wider dtype; None where it is neither."""
        step = step_of(self._reader, e)
        if isinstance(step, Cast):
            return step.source if widens(step.source, e) else None
        return view(e, step, rows=rows)

    def _unmoved(self, e: Any) -> Any:
        """``e`` before views and casts."""
        while isinstance(step := step_of(self._reader, e), Move | Cast):
            e = step.source
        return e

    def _chosen_scale(self, e: Any, index: int) -> ChosenScale | None:
        """What a named operator chose, where ``e`` is its result number ``index``."""
        if not isinstance(e, Node) or e.target is not operator.getitem or e.args[1] != index:
            return None
        several = e.args[0]
        if not isinstance(several, Node) or several in self._reader.values.mutated:
            return None
        reader = self._reader.dialects.scales.get(several.target)
        if reader is None:
            return None
        chosen: ChosenScale | None = reader(**arguments(several))
        return chosen

    def quantized_rows(self, e: Any, index: int) -> QuantizedRows | None:
        """The operator that quantizes rows by scales of its own, where ``e`` is its result number ``index``."""
        if not isinstance(e, Node) or e.target is not operator.getitem or e.args[1] != index:
            return None
        several = e.args[0]
        if not isinstance(several, Node) or several in self._reader.values.mutated:
            return None
        reader = self._reader.dialects.quantized_rows.get(several.target)
        found: QuantizedRows | None = None if reader is None else reader(several, **arguments(several))
        if found is None or found.smooth is not None:
            return found
        source = self.origin(found.source)
        return None if source is None else replace(found, source=source)

    def _read(self, e: Any) -> Magnitude | None:
        chosen = self._chosen_scale(e, 0)
        if chosen is not None:
            return self._by_name(chosen)
        rows = self.quantized_rows(e, 1)
        if rows is not None:
            return rows.magnitude
        step = step_of(self._reader, e)
        if step is None or not dtype_of(e).is_floating_point:
            return None
        match step:
            case Extreme():
                return self._extreme(step)
            case Multiply():
                return self._scaled(step, e)
            case Clamp():
                return self._limited(step)
            case Chosen():
                return self._chosen(step)
        return self._alone(step, e)

    def _by_name(self, chosen: ChosenScale) -> Magnitude | None:
        x = self.origin(chosen.source, rows=not chosen.whole)
        if x is None or not (dtype_of(x).is_floating_point and chosen.dtype.is_floating_point):
            return None
        found = Magnitude(MAGNITUDE, x, chosen.whole, 1 / chosen.divisor, floor=chosen.floor)
        return _rounded(found, chosen.dtype)

    def _extreme(self, step: Extreme) -> Magnitude | None:
        rank = len(shape_of(step.source))
        dims = set(range(rank)) if step.dims is None else {d % rank for d in step.dims}
        for whole in (False, True):
            if dims != (set(range(rank)) if whole else {rank - 1}):
                continue
            source, of = self._without_abs(step.source, rows=not whole)
            x = self.origin(source, rows=not whole)
            if x is None or not dtype_of(x).is_floating_point or (of and not step.largest):
                return None
            if not whole and rank == 1 and len(shape_of(self.origin(x, rows=False))) > 1:
                continue  # all of a tensor that was made flat
            return Magnitude(MAGNITUDE if of else HIGH if step.largest else LOW, x, whole)
        return None

    def _without_abs(self, e: Operand, *, rows: bool) -> tuple[Operand, bool]:
        while True:
            step = step_of(self._reader, e)
            if isinstance(step, Abs):
                return step.source, True
            before = self.before(e, rows=rows)
            if before is None:
                return e, False
            e = before

    def _scaled(self, step: Multiply, e: Any) -> Magnitude | None:
        """By a number, or a number divided by it."""
        dtype = dtype_of(e)
        for value, other in ((step.source, step.other), (step.other, step.source)):
            m, number = self.read(value), self.number(other)
            if m is None or number is None or not number > 0 or not math.isfinite(number):
                continue
            if as_dtype(number, dtype) != number:
                m = _rounded(m, dtype)  # the number itself may be rounded first
            if not step.inverted:
                return _rounded(replace(m, factor=m.factor * number), dtype)
            if value is step.source:
                return _rounded(replace(m, factor=m.factor / number), dtype)
            return _inverse(m, number, dtype)
        return None

    def _limited(self, step: Clamp) -> Magnitude | None:
        """By numbers, or by the other end of the tensor's values."""
        for way in ways(step):
            assert isinstance(way, Clamp)
            bounds = [None if b is None else self.number(b) for b in (way.low, way.high)]
            given = all(n is not None or b is None for n, b in zip(bounds, (way.low, way.high), strict=True))
            m = self.read(way.source) if given else None
            if m is not None:
                return _limited(m, *bounds)
        a, b = self.read(step.source), self.read(step.low)
        if a is None or b is None or not step.exchangeable or {a.kind, b.kind} != {HIGH, DEPTH}:
            return None
        plain = (1.0, False, 0.0, 0.0)
        if any((m.factor, m.inverted, m.floor, m.added) != plain for m in (a, b)) or (a.x, a.whole) != (b.x, b.whole):
            return None
        return replace(a, kind=MAGNITUDE, error=max(a.error, b.error), lost=max(a.lost, b.lost))

    def _chosen(self, step: Chosen) -> Magnitude | None:
        """A number instead of what is zero, or of what is smaller than that number."""
        condition = step_of(self._reader, step.condition)
        if not isinstance(condition, Compared):
            return None
        m, instead, bound = self.read(step.no), self.number(step.yes), self.number(condition.bound)
        asked = self.read(condition.source)
        if m is None or instead is None or bound is None or asked is None or m.inverted or instead <= 0:
            return None
        if replace(asked, factor=m.factor, error=m.error, lost=m.lost) != m or m.kind != MAGNITUDE:
            return None
        if condition.relation in ("eq", "le") and bound == 0:
            return m  # a row of zeros: its codes are zeros, whatever they are divided by
        near = math.isclose(bound, instead, rel_tol=_NEAR)
        return _limited(m, max(bound, instead), None) if condition.relation != "eq" and near and asked == m else None

    def _alone(self, step: Step, e: Any) -> Magnitude | None:
        m = self.read(getattr(step, "source", None))
        if m is None:
            return None
        match step:
            case Move(kind="same" | "reshape"):
                return m
            case Move(kind="expand"):
                return m if m.whole else None
            case Cast():
                return m if widens(step.source, e) else _rounded(m, dtype_of(e))
            case Reciprocal():
                return _inverse(m, 1.0, dtype_of(e))
            case Negative():
                plain = m.factor == 1 and not m.inverted and m.kind == LOW
                return replace(m, kind=DEPTH) if plain else None
            case Abs():
                return replace(m, kind=DEPTH if m.kind == LOW else m.kind)
            case Add(_, other, multiple):
                number = self.number(other)
                return None if number is None else _added(m, number * multiple, dtype_of(e))
        return None


def widens(source: Operand, e: Operand) -> bool:
    """True for a cast between floating dtypes that keeps every number."""
    a, b = dtype_of(source), dtype_of(e)
    return a.is_floating_point and b.is_floating_point and torch.promote_types(a, b) == b


def _rounded(m: Magnitude, dtype: torch.dtype) -> Magnitude:
    """``m`` after an operation in ``dtype``."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps / 2
    # Below the normal numbers the error is absolute; beyond the largest one there is nothing but infinity.
    lost = 3 * m.factor / info.max if m.inverted else 1.01 * smallest / m.factor
    return replace(m, error=m.error + info.eps / 2, lost=m.lost + lost)


def _inverse(m: Magnitude, number: float, dtype: torch.dtype) -> Magnitude | None:
    """``number / m``."""
    if m.kind != MAGNITUDE:
        return None
    return _rounded(replace(m, factor=number / m.factor, inverted=not m.inverted), dtype)


def _added(m: Magnitude, number: float, dtype: torch.dtype) -> Magnitude | None:
    if m.kind != MAGNITUDE or m.inverted or not 0 <= number < math.inf:
        return None
    return m if number == 0 else _rounded(replace(m, added=m.added + number / m.factor), dtype)


def _limited(m: Magnitude, low: float | None, high: float | None) -> Magnitude | None:
    """``m`` between two numbers: with a floor, or an extreme that does not cross zero."""
    if m.kind != MAGNITUDE:
        at_zero = (low == 0 and high is None) if m.kind != LOW else (high == 0 and low is None)
        return m if at_zero and m.factor == 1 else None
    if m.inverted:
        if low is not None and low > 0:
            return None  # at most that much: what is larger saturates
        limit = None if high is None else m.factor / high if high > 0 else math.inf
    else:
        if high is not None and high < math.inf:
            return None
        limit = None if low is None else low / m.factor
    if limit is None:
        return m
    return replace(m, floor=max(m.floor, limit)) if limit < math.inf else None
