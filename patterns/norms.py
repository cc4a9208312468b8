"""Reading RMSNorm: ``x / sqrt(mean(x^2) + eps) * gamma`` over the last dimension, in any spelling.

From the normalised value back to the tensor that it is made of. What is squared, averaged and rooted has to be computed
in float32 at least, since a sum in 16 bits is another number; the roundings of everything else are counted. The
vendor's own operator is read as well, so that what comes behind it can be joined with it.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from quantpass.basics.symbolic import is_one, same_shape
from quantpass.graph import expr as ex
from quantpass.graph.expr import Const
from quantpass.graph.instructions import Add, Cast, Move, Multiply, ways
from quantpass.graph.schema import bind
from quantpass.patterns.affine import AffineReader
from quantpass.patterns.magnitudes import MagnitudeReader, widens
from quantpass.patterns.steps import Mean, Operand, Power, Reciprocal, dtype_of, shape_of, step_of, view

aten = torch.ops.aten

_LEAST_EPS = 2.0**-100
"""With less, rows whose squares are below float32's smallest numbers would be normalised by what is left of them."""

_VENDORS = "npu::npu_add_rms_norm"


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """``output = x / sqrt(mean(x^2) + eps) * gamma``, over the last dimension.

    Attributes:
        output: the normalised tensor.
        x: the tensor.
        gamma: a factor for each of the K elements of a row, ``(K,)`` in the dtype of x, its values known.
        eps: what is added to the mean of the squares.
        error: how far the graph's own roundings, and that of gamma to the dtype of x, take the output, relative.
        addends: two tensors of x's shape and dtype whose sum x is; none where it is no such sum.
        call: the vendor's ``npu_add_rms_norm`` where the graph calls that.
    """

    output: Node
    x: Node
    gamma: Const
    eps: float
    error: float
    addends: tuple[Node, Node] | None = None
    call: Node | None = None


@dataclass(frozen=True, slots=True)
class _Root:
    """``1 / sqrt(mean(x^2) + eps)`` of each row."""

    x: Node
    eps: float
    error: float
    inverted: bool = False


class NormReader:
    """Reads the norms of one graph.

    Args:
        reader: what the graph is read with.
        magnitudes: reads numbers, and what a value was before views and casts.
    """

    def __init__(self, reader: AffineReader, magnitudes: MagnitudeReader) -> None:
        self._reader = reader
        self._magnitudes = magnitudes

    def read(self, output: Node) -> RmsNorm | None:
        """``output`` as the result of a norm; None where it is none."""
        fake = output.meta.get("val")
        if not isinstance(fake, torch.Tensor) or fake.dim() < 2 or not isinstance(fake.shape[-1], int):
            return None
        return self._vendors(output) or self._written_out(output, fake)

    def _written_out(self, output: Node, fake: torch.Tensor) -> RmsNorm | None:
        e: Operand = output
        gamma: torch.Tensor | None = None
        origin, error = None, 0.0
        while True:
            step = step_of(self._reader, e)
            match step:
                case Cast(source) if dtype_of(source).is_floating_point and dtype_of(e).is_floating_point:
                    if not widens(source, e):
                        error += _half_a_unit(e)
                    e = source
                case Move():
                    inner = view(e, step, rows=True)
                    if inner is None:
                        return None
                    e = inner
                case Multiply():
                    error += _half_a_unit(e)
                    root = self._normalised(step, e)
                    if root is not None:
                        norm = RmsNorm(output, root.x, Const(torch.ones(fake.shape[-1])), root.eps, error + root.error)
                        return self._finished(norm, gamma, origin)
                    found = None if gamma is not None else self._weighted(step, e)
                    if found is None:
                        return None
                    e, gamma, origin = found
                case _:
                    return None

    def _weighted(self, step: Multiply, e: Operand) -> tuple[Operand, torch.Tensor, Node | None] | None:
        """What a factor for each column was taken of, the factor, and which tensor of the graph that is."""
        for way in ways(step):
            assert isinstance(way, Multiply)
            value, factor = way.source, way.other
            if way.inverted or not isinstance(factor, Node) or not same_shape(shape_of(value), shape_of(e)):
                continue
            expr, shape = self._reader.values.expr(factor), shape_of(factor)
            if isinstance(expr, Const) and expr.tensor.is_floating_point() and all(is_one(s) for s in shape[:-1]):
                return value, expr.tensor.reshape(-1), expr.origin if len(shape) == 1 else None
        return None

    def _finished(self, norm: RmsNorm, gamma: torch.Tensor | None, origin: Node | None) -> RmsNorm | None:
        x, k = norm.x.meta["val"], norm.output.meta["val"].shape[-1]
        if x.dtype != norm.output.meta["val"].dtype or not same_shape(x.shape, norm.output.meta["val"].shape):
            return None
        exact = torch.ones(k) if gamma is None else gamma.expand(k) if gamma.numel() == 1 else gamma
        given = exact.to(x.dtype).contiguous()
        off = (given.double() - exact.double()).abs()
        if not bool(torch.isfinite(given).all() and (off <= exact.double().abs() * _eps(x.dtype) / 2).all()):
            return None
        kept = origin if origin is not None and gamma is not None and gamma.dtype == x.dtype else None
        moved = float((off / exact.double().abs().clamp(min=1e-300)).max()) if k else 0.0
        found = replace(norm, gamma=Const(given, kept, "gamma"), error=norm.error + moved)
        return replace(found, addends=self._addends(norm.x))

    def _addends(self, x: Node) -> tuple[Node, Node] | None:
        step = step_of(self._reader, x)
        if not isinstance(step, Add) or step.multiple != 1:
            return None
        a, b = step.source, step.other
        if not isinstance(a, Node) or not isinstance(b, Node):
            return None
        alike = all(n.meta["val"].dtype == x.meta["val"].dtype for n in (a, b))
        alike = alike and all(same_shape(n.meta["val"].shape, x.meta["val"].shape) for n in (a, b))
        return (a, b) if alike else None

    # -- the root of the mean of squares ---------------------------------------------------------------------------

    def _normalised(self, step: Multiply, e: Operand) -> _Root | None:
        """``x / rms(x)``, where it is that."""
        for way in ways(step):
            assert isinstance(way, Multiply)
            value, factor = way.source, way.other
            root = self._root(factor)
            if root is None or root.inverted != way.inverted or not same_shape(shape_of(value), shape_of(e)):
                continue
            if not same_shape(shape_of(factor), (*shape_of(value)[:-1], 1)):
                continue
            if self._magnitudes.origin(value) is root.x:
                return root
        return None

    def _root(self, e: Operand) -> _Root | None:
        """``e``, one number for each row, as the root of a mean of squares or its inverse."""
        error, inverted = 0.0, False
        while True:
            step = step_of(self._reader, e)
            match step:
                case Move(kind="same" | "reshape", source=source):
                    e = source
                case Cast(source) if dtype_of(source).is_floating_point and dtype_of(e).is_floating_point:
                    error += 0.0 if widens(source, e) else _half_a_unit(e)
                    e = source
                case Reciprocal(source):
                    error, inverted, e = error + _half_a_unit(e), not inverted, source
                case Multiply(source, other) if self._magnitudes.number(source) == 1:
                    error, inverted, e = error + _half_a_unit(e), inverted != step.inverted, other
                case Multiply(source, other) if self._magnitudes.number(other) == 1:
                    e = source
                case Power(source, exponent) if abs(exponent) == 0.5:
                    found = self._mean(source)
                    if found is None or not _is_wide(e):
                        return None
                    # A root with a positive exponent divides.
                    divides = (exponent > 0) != inverted
                    return replace(found, error=found.error + error + _half_a_unit(e), inverted=divides)
                case _:
                    return None

    def _mean(self, e: Operand) -> _Root | None:
        """``mean(x^2) + eps`` of each row."""
        eps = 0.0
        while _is_wide(e):
            step = step_of(self._reader, e)
            match step:
                case Add() if eps == 0 and (added := self._added(step)) is not None:
                    e, eps = added
                case Move(kind="same" | "reshape", source=source):
                    e = source
                case Cast(source) if widens(source, e):
                    e = source
                case Mean():
                    return self._mean_of_squares(step, eps) if _LEAST_EPS <= eps < math.inf else None
                case _:
                    return None
        return None

    def _mean_of_squares(self, step: Mean, eps: float) -> _Root | None:
        source, k = step.source, shape_of(step.source)[-1]
        rank = len(shape_of(source))
        if tuple(d % rank for d in step.dims) != (rank - 1,) or not isinstance(k, int):
            return None
        x = self._squared(source) if _is_wide(source) else None
        # A mean of K numbers that are all positive; the root halves what is relative.
        return None if x is None else _Root(x, eps, (k / 2 + 2) * _eps(torch.float32) / 2)

    def _added(self, step: Add) -> tuple[Operand, float] | None:
        for way in ways(step):
            assert isinstance(way, Add)
            number = self._magnitudes.number(way.other)
            if number is not None and self._magnitudes.number(way.source) is None:
                return way.source, number * way.multiple
        return None

    def _squared(self, e: Operand) -> Node | None:
        """What the rows of ``e`` are the squares of."""
        step = step_of(self._reader, e)
        while isinstance(step, Move) and (inner := view(e, step, rows=True)) is not None:
            e, step = inner, step_of(self._reader, inner)
        match step:
            case Power(source, 2.0):
                return self._magnitudes.origin(source)
            case Multiply(source, other, inverted=False) if same_shape(shape_of(source), shape_of(other)):
                x = self._magnitudes.origin(source)
                return x if x is not None and x is self._magnitudes.origin(other) else None
        return None

    # -- the vendor's ------------------------------------------------------------------------------------------------

    def _vendors(self, output: Node) -> RmsNorm | None:
        """The first result of a call of ``npu_add_rms_norm``."""
        call = output.args[0] if output.target is operator.getitem and output.args[1] == 0 else None
        schema = getattr(getattr(call, "target", None), "_schema", None)
        if not isinstance(call, Node) or schema is None or schema.name != _VENDORS or call in self._mutated:
            return None
        a: dict[str, Any] = bind(call)
        k, x = output.meta["val"].shape[-1], a["x1"]
        gamma = a["gamma"]
        expr = self._reader.values.expr(gamma)
        if ex.shape_of(expr) != (k,) or not isinstance(expr, Const) or not _LEAST_EPS <= a["epsilon"] < math.inf:
            return None
        error = 2 * _eps(output.meta["val"].dtype) / 2 + (k + 4) * _eps(torch.float32) / 2
        return RmsNorm(output, x, expr, a["epsilon"], error, (x, a["x2"]), call)

    @property
    def _mutated(self) -> frozenset[Node]:
        return self._reader.values.mutated


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _half_a_unit(e: Operand) -> float:
    """What rounding to the dtype of ``e`` may change, relative."""
    return _eps(dtype_of(e)) / 2


def _is_wide(e: Operand) -> bool:
    return dtype_of(e) in (torch.float32, torch.float64)
