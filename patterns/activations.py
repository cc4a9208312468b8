"""Reading how an activation is quantized: from the integer codes back to the tensor that they are made of.

``codes = clamp(round(x * rate) + zero_point, low, high)``, where ``rate`` is known when compiling (*static*) or is the
inverse of a scale that the graph finds from each row of ``x`` or from all of it (*dynamic*). Any spelling is read by
what it computes, every argument of every node on the way accounted for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.fx import Node

from quantpass.basics.symbolic import same_shape
from quantpass.graph import expr as ex
from quantpass.graph.expr import Call, Const, Expr, Recentred, Ref
from quantpass.graph.instructions import Add, Cast, Clamp, Move, Multiply, Round, ways
from quantpass.graph.static_values import as_dtype
from quantpass.patterns.affine import AffineReader, reciprocal
from quantpass.patterns.integers import Range, integer_span
from quantpass.patterns.magnitudes import MAGNITUDE, Magnitude, MagnitudeReader, QuantizedRows, widens
from quantpass.patterns.norms import NormReader
from quantpass.patterns.steps import Operand, arguments, dtype_of, shape_of, step_of, view
from quantpass.patterns.terms import Term, term_of

_LARGEST_CODE = 127
"""Of an int8 code, either sign: what relative errors count up to."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How int8 codes are made of a floating tensor.

    Attributes:
        kind: ``"token"`` and ``"tensor"`` (the scale is found from each row of ``x``, from all of ``x``), ``"static"``.
        x: the tensor. The codes have its elements in row-major order, and its last dimension.
        low: smallest code.
        high: largest code.
        zero_point: the code of 0.
        rate: static: what ``x`` is multiplied by, one number or a vector along the last dimension.
        divisor: dynamic: the largest magnitude becomes this code.
        error: how far ``x * rate`` may be off in units of codes, from rounding in the graph.
        magnitude: dynamic: what ``x`` is divided by, or multiplied by.
        smooth: what ``x`` is multiplied by first, ``(K,)`` in its dtype; None for nothing.
    """

    kind: Literal["token", "tensor", "static"]
    x: Node
    low: int
    high: int
    zero_point: int
    error: float
    rate: Expr | None = None
    divisor: float = 0.0
    magnitude: Magnitude | None = None
    smooth: Const | None = None


@dataclass(frozen=True, slots=True)
class NotRead:
    """Why a quantization can't be given to an operator: an id of :mod:`quantpass.basics.reasons`, and the fact."""

    reason: str
    rule: str = "requantize.spelling"


@dataclass(frozen=True, slots=True)
class Quantizer:
    """A named operator that quantizes: ``clamp(round(x * rate) + zero_point, low, high)``.

    Attributes:
        x: its input.
        scale: what the input is divided by, aligned with it.
        zero_point: a number or a node; None for none.
        low: smallest code.
        high: largest code.
        dtype: what it computes in.
    """

    x: Operand
    scale: Operand
    zero_point: Any
    low: int
    high: int
    dtype: torch.dtype = torch.float32


@dataclass(slots=True)
class _Walk:
    """Where a walk from the codes back to their tensor stands: ``codes = operand + offset``, within bounds.

    Attributes:
        offset: what has to be added to the operand (or to its rounding) to give the int8 codes.
        low: the codes are clamped to at least this.
        high: and to at most this.
        fits: what no clamp has limited yet has to lie in here, or a cast wraps around.
        error: what rounding may change before the codes are made, in units of codes.
        rates: the constants that the tensor is multiplied by.
        magnitude: what it is divided by, where that is found at run time.
    """

    offset: int = 0
    low: float = -math.inf
    high: float = math.inf
    fits: Range = (-math.inf, math.inf)
    error: float = 0.0
    rates: list[Expr] = field(default_factory=list)
    magnitude: Magnitude | None = None

    def within(self, held: Range) -> None:
        """What the walk has come to must lie in ``held``."""
        low, high = held
        self.fits = (max(self.fits[0], low + self.offset), min(self.fits[1], high + self.offset))

    def clamp(self, low: float, high: float) -> bool:
        """Notes bounds of the codes, and of what casts behind the clamp are given; casts before it may wrap around."""
        low, high = low + self.offset, high + self.offset
        self.low, self.high = max(self.low, low), min(self.high, high)
        least, most = self.fits
        self.fits = (-math.inf if low >= least else least, math.inf if high <= most else most)
        return all(math.isinf(b) or float(b).is_integer() for b in (low, high)) and self.low < self.high

    def rounded(self, dtype: torch.dtype, largest: float = _LARGEST_CODE) -> None:
        """An operation in ``dtype`` on values up to ``largest``, in units of codes."""
        self.error += largest * torch.finfo(dtype).eps / 2


class ActivationReader:
    """Reads the quantizations of one graph.

    Args:
        reader: what the graph is read with.
    """

    def __init__(self, reader: AffineReader) -> None:
        self.reader = reader
        self.magnitudes = MagnitudeReader(reader)
        self.norms = NormReader(reader, self.magnitudes)

    def read(self, codes: Expr) -> Quantization | NotRead:
        """How the int8 ``codes`` are made."""
        walk = _Walk()
        walk.within(integer_span(torch.int8))
        e: Operand = codes
        while True:
            e = e.node if isinstance(e, Ref) else e
            if isinstance(e, Recentred):
                walk.offset -= 128
                e = e.node
                continue
            named = self._named(e)
            if named is not None:
                return self._by_name(walk, named)
            rows = self.magnitudes.quantized_rows(e, 0)
            if rows is not None:
                return self._by_operator(walk, rows)
            step = step_of(self.reader, e)
            match step:
                case Round(source, "nearest" | "down" as to):
                    return self._values(walk, source, down=to == "down")
                case Cast(source):
                    problem = self._fits(walk, e, source)
                    if problem is not None:
                        return problem
                    inner: Operand = source
                case Add():
                    inner = self._moved(walk, step)
                    if inner is None:
                        return _asymmetric(e)
                case Clamp():
                    inner = self._clamped(walk, step)
                    if inner is None:
                        return NotRead(f"{_name(e)} limits the codes to what is known only at run time")
                case _:
                    inner = view(e, step, rows=True)
                    if inner is None:
                        return NotRead(f"{_name(e)} is no step of a quantization")
            e = inner

    def scale(self, e: Expr) -> Magnitude | None:
        """A factor of a dequantization, read as a multiple of a largest magnitude."""
        m = self.magnitudes.read(e)
        return m if m is not None and m.kind == MAGNITUDE and not m.inverted else None

    # -- integers ------------------------------------------------------------------------------------------------------

    def _named(self, e: Operand) -> Quantizer | None:
        if not isinstance(e, Node | Call) or (isinstance(e, Node) and e in self.reader.values.mutated):
            return None
        reader = self.reader.dialects.quantizers.get(e.target)
        if reader is None:
            return None
        quantizer: Quantizer | None = reader(**arguments(e))
        return quantizer

    def _fits(self, walk: _Walk, e: Operand, source: Operand) -> NotRead | None:
        """Notes that a cast to integers wraps around outside of their range."""
        dtype = dtype_of(e)
        if dtype.is_floating_point:
            return None
        if dtype == torch.bool:
            return NotRead("its codes are booleans")
        if dtype.itemsize < 4:  # beyond int32 a number has no code in the graph either
            walk.within(integer_span(dtype))
        if dtype_of(source).is_floating_point and not _is_whole(self.reader, source):
            return NotRead(f"{_name(e)} truncates what is not rounded")
        return None

    def _moved(self, walk: _Walk, step: Add) -> Operand:
        """An integer added to the codes; the operand that it is added to, None where it is not known."""
        for way in ways(step):
            assert isinstance(way, Add)
            number = self.magnitudes.number(way.other)
            if (
                number is None
                or not (number * way.multiple).is_integer()
                or self.magnitudes.number(way.source) is not None
            ):
                continue
            walk.offset += int(number * way.multiple)
            return way.source
        return None

    def _clamped(self, walk: _Walk, step: Clamp) -> Operand:
        """Codes between two integers; the operand that is limited, None where a bound is not known."""
        for way in ways(step):
            assert isinstance(way, Clamp)
            low = -math.inf if way.low is None else self.magnitudes.number(way.low)
            high = math.inf if way.high is None else self.magnitudes.number(way.high)
            if low is not None and high is not None:
                return way.source if walk.clamp(low, high) else None
        return None

    # -- floats --------------------------------------------------------------------------------------------------------

    def _values(self, walk: _Walk, e: Operand, *, down: bool) -> Quantization | NotRead:
        """From what is rounded to what is scaled."""
        shift = -0.5 if down else 0.0
        while True:
            e = e.node if isinstance(e, Ref) else e
            if not dtype_of(e).is_floating_point:
                return NotRead(f"it rounds {_name(e)}, which holds integers")
            step = step_of(self.reader, e)
            match step:
                case Add(source, other, multiple):
                    number = self.magnitudes.number(other)
                    if number is None:
                        return _asymmetric(e)
                    walk.rounded(dtype_of(e), _LARGEST_CODE + abs(number * multiple))
                    shift, e = shift + number * multiple, source
                case Clamp() if shift == 0:
                    inner = self._clamped(walk, step)
                    if inner is None:
                        return NotRead(f"{_name(e)} limits the codes to what is known only at run time")
                    e = inner
                case Cast(source) if dtype_of(source).is_floating_point:
                    if not widens(source, e):
                        walk.rounded(dtype_of(e))
                    e = source
                case Multiply():
                    if not shift.is_integer():
                        return NotRead("it is rounded down" if shift == -0.5 else f"{shift:g} is added before rounding")
                    walk.offset += int(shift)
                    return self._scaled(walk, step, e)
                case _:
                    inner = view(e, step, rows=True)
                    if inner is None:
                        return NotRead("nothing scales a floating tensor to codes")
                    e = inner

    def _scaled(self, walk: _Walk, step: Multiply, e: Operand) -> Quantization | NotRead:
        """From what is scaled to the tensor."""
        inner = self._divided(walk, step, e)
        if inner is None:
            return NotRead(f"its scale ({_name(e)}) is neither known nor a largest magnitude")
        while inner is not None:
            walk.rounded(dtype_of(e))
            e = self.magnitudes.origin(inner)
            before = step_of(self.reader, e)
            of_floats = dtype_of(e).is_floating_point
            inner = self._divided(walk, before, e) if isinstance(before, Multiply) and of_floats else None
        return self._finished(walk, e)

    def _divided(self, walk: _Walk, step: Multiply, e: Operand) -> Operand:
        """What a factor was taken of; None where the step belongs to the tensor that is quantized."""
        shape = shape_of(e)
        for way in ways(step):
            assert isinstance(way, Multiply)
            value, factor = way.source, way.other
            if not same_shape(shape_of(value), shape):
                continue
            if self._is_the_tensor(walk, e):
                return None
            m = self.magnitudes.read(factor) if walk.magnitude is None else None
            if m is not None and m.kind == MAGNITUDE and m.inverted != step.inverted:
                walk.magnitude = m
                return value
            rate = self.rate(factor, shape, inverted=step.inverted)
            if rate is None or (ex.shape_of(rate) != (1,) and (walk.rates or walk.magnitude is not None)):
                continue
            walk.rates.append(rate)
            if may_round(factor, dtype_of(e)):
                walk.rounded(dtype_of(e))
            return value
        return None

    def _is_the_tensor(self, walk: _Walk, e: Operand) -> bool:
        """True where the scale was found from this very value."""
        m = walk.magnitude
        return m is not None and self.magnitudes.origin(e, rows=not m.whole) is m.x

    def rate(self, factor: Operand, shape: tuple[Any, ...], *, inverted: bool) -> Expr | None:
        """A known factor of a value of this shape as one number or a vector along K; its inverse where ``inverted``."""
        number = self.magnitudes.number(factor)
        if number is not None:
            rate: Expr = ex.reshape(ex.scalar(number), (1,))
        else:
            e = factor.node if isinstance(factor, Ref) else factor
            term = term_of(self.reader.values, e, shape) if isinstance(e, Node) else _aligned(e, shape)
            if term is None or term.constant is None or term.kind != "columns":
                return None
            rate = ex.wide(term.flat())
        rate = reciprocal(rate) if inverted else rate
        return rate if isinstance(rate, Const) and bool(torch.isfinite(rate.tensor).all()) else None

    def _by_name(self, walk: _Walk, q: Quantizer) -> Quantization | NotRead:
        if not dtype_of(q.x).is_floating_point:
            return NotRead(f"it quantizes {_name(q.x)}, which holds integers")
        walk.clamp(q.low, q.high)
        zero = 0.0 if q.zero_point is None else self.magnitudes.number(q.zero_point)
        if zero is None or not zero.is_integer():
            return _asymmetric(q.zero_point)
        walk.offset += int(zero)
        inner = self._divided(walk, Multiply(q.x, q.scale, inverted=True), q.x)  # type: ignore[arg-type]
        if inner is None:
            return NotRead(f"its scale ({_name(q.scale)}) is neither known nor a largest magnitude")
        for _ in range(2):  # the inverse of the scale, and the product
            walk.rounded(q.dtype)
        return self._finished(walk, self.magnitudes.origin(inner))

    def _by_operator(self, walk: _Walk, rows: QuantizedRows) -> Quantization | NotRead:
        """By an operator that finds the scales itself."""
        smooth = None if rows.smooth is None else self.reader.values.expr(rows.smooth)
        if smooth is not None and not isinstance(smooth, Const):
            return NotRead(f"the smoothing factor of {rows.node.name} is known only at run time")
        walk.clamp(*integer_span(torch.int8))
        for _ in range(2):  # the inverse of the scale, and the product
            walk.rounded(rows.dtype)
        walk.magnitude = rows.magnitude
        found = self._in_range(walk, rows.source, float(rows.largest))
        return found if isinstance(found, NotRead) else replace(found, smooth=smooth)

    # -- the result ----------------------------------------------------------------------------------------------------

    def _finished(self, walk: _Walk, e: Operand) -> Quantization | NotRead:
        low, high, m = walk.low, walk.high, walk.magnitude
        x = self.magnitudes.origin(e)
        if x is None or not dtype_of(x).is_floating_point or (m is None and not walk.rates):
            return NotRead("nothing scales a floating tensor to codes")
        if m is None:
            if walk.fits != (-math.inf, math.inf):
                return NotRead("its codes are not clamped, and wrap around")
            rate = walk.rates[0]
            for factor in walk.rates[1:]:
                rate = ex.mul(rate, factor)
            return Quantization("static", x, int(low), int(high), walk.offset, walk.error, rate)
        if not self._is_the_tensor(walk, e):
            return NotRead(f"its scale is found from {m.x.name}, and it quantizes {x.name}")
        divisor = m.factor if m.inverted else 1 / m.factor
        for factor in walk.rates:
            divisor *= float(factor.tensor) if isinstance(factor, Const) else math.nan
        return self._in_range(walk, x, divisor)

    def _in_range(self, walk: _Walk, x: Node, divisor: float) -> Quantization | NotRead:
        """A dynamic quantization whose codes wrap around nowhere."""
        low, high, m = walk.low, walk.high, walk.magnitude
        assert m is not None
        error = walk.error + divisor * m.error
        largest = math.ceil(divisor + error - 0.5) + walk.offset
        smallest = -math.ceil(divisor + error - 0.5) + walk.offset
        if smallest < walk.fits[0] or largest > walk.fits[1]:
            return NotRead("its codes are not clamped, and may wrap around")
        kind: Literal["tensor", "token"] = "tensor" if m.whole else "token"
        low, high = max(low, walk.fits[0]), min(high, walk.fits[1])
        return Quantization(kind, x, int(low), int(high), walk.offset, error, divisor=divisor, magnitude=m)


def may_round(factor: Operand, dtype: torch.dtype) -> bool:
    """True where an operation in ``dtype`` may round its constant ``factor`` first."""
    if isinstance(factor, int | float):
        return as_dtype(float(factor), dtype) != factor
    own = dtype_of(factor)
    return own.is_floating_point and torch.promote_types(own, dtype) != dtype


def _aligned(e: Operand, shape: tuple[Any, ...]) -> Term | None:
    """A constant of an expression as a term of a value."""
    if not isinstance(e, Const) or len(shape_of(e)) > len(shape):
        return None
    return Term(e, (1,) * (len(shape) - len(shape_of(e))) + shape_of(e))


def _is_whole(reader: AffineReader, e: Operand) -> bool:
    """True where the graph rounds the values of ``e`` before they are cast to integers."""
    while True:
        e = e.node if isinstance(e, Ref) else e
        step = step_of(reader, e)
        if isinstance(step, Clamp) and step.exchangeable and shape_of(step.source) != shape_of(e):
            e = step.low if step.low is not None else step.high
        elif isinstance(step, Move | Cast | Clamp | Add):
            e = step.source
        else:
            return isinstance(step, Round) and step.to in ("nearest", "down")


def _asymmetric(e: Operand) -> NotRead:
    return NotRead(f"its zero point ({_name(e)}) is known only at run time", "requantize.asymmetric")


def _name(e: Any) -> str:
    if isinstance(e, Node):
        return e.name
    return str(e.target) if isinstance(e, Call) else type(e).__name__
