"""What computes a tensor of a quantization: a node of the graph, or an expression over nodes.

Both are decoded alike. What :mod:`quantpass.graph.instructions` has no word for, since only scales are made that way
(magnitudes, extremes, choices), is decoded here, every argument accounted for.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from quantpass.basics.symbolic import same_size
from quantpass.graph import expr as ex
from quantpass.graph.decode import decode_call
from quantpass.graph.expr import Call, Expr, Ref
from quantpass.graph.instructions import Clamp, Instruction, Move
from quantpass.graph.schema import ReaderTable, bind, bind_call, parameters
from quantpass.patterns.affine import AffineReader

aten = torch.ops.aten

Operand: TypeAlias = Node | Expr | int | float | None


@dataclass(frozen=True, slots=True)
class Abs:
    """The magnitude of ``source``."""

    source: Operand


@dataclass(frozen=True, slots=True)
class Negative:
    """``-source``."""

    source: Operand


@dataclass(frozen=True, slots=True)
class Reciprocal:
    """``1 / source``."""

    source: Operand


@dataclass(frozen=True, slots=True)
class Power:
    """``source ** exponent``."""

    source: Operand
    exponent: float


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of ``source`` over ``dims``, added up in the dtype of the result."""

    source: Operand
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Extreme:
    """The largest element of ``source``, or the smallest, over ``dims``; None for all of them."""

    source: Operand
    dims: tuple[int, ...] | None
    largest: bool


@dataclass(frozen=True, slots=True)
class Compared:
    """Whether ``source`` ``relation`` (``"eq"``, ``"lt"`` or ``"le"``) ``bound``."""

    relation: str
    source: Operand
    bound: Operand


@dataclass(frozen=True, slots=True)
class Chosen:
    """``yes`` where ``condition`` holds, else ``no``."""

    condition: Operand
    yes: Operand
    no: Operand


@dataclass(frozen=True, slots=True)
class Number:
    """A tensor of one number."""

    value: Operand


Step: TypeAlias = Instruction | Abs | Negative | Reciprocal | Power | Mean | Extreme | Compared | Chosen | Number


def step_of(reader: AffineReader, operand: Operand) -> Step | None:
    """What computes ``operand``; None where it is a leaf, or computed by something that is not understood."""
    e = operand.node if isinstance(operand, Ref) else operand
    if isinstance(e, Call):
        return _own(e) or decode_call(e.target, e.args, e.kwargs, len(e.shape))
    if not isinstance(e, Node) or e.op != "call_function" or e in reader.values.mutated:
        return None
    if e.target is operator.getitem:
        several, index = e.args
        return _taken(several, index) if isinstance(several, Node) else None
    return _own(e) or reader.values.decode(e)


def view(e: Operand, step: Step | None, *, rows: bool) -> Operand:
    """What ``e`` shows in row-major order, maybe in another shape; with ``rows`` the last dimension has to stay."""
    if not isinstance(step, Move) or step.kind not in ("same", "reshape"):
        return None
    before, after = shape_of(step.source), shape_of(e)
    kept = step.kind == "same" or (bool(before) and bool(after) and same_size(before[-1], after[-1]))
    return step.source if kept or not rows else None


def arguments(e: Node | Call) -> dict[str, Any]:
    """All arguments of what a node or an expression calls, under a reader's names, defaults filled in."""
    return parameters(bind_call(e.target, e.args, e.kwargs))


def shape_of(e: Operand) -> tuple[Any, ...]:
    """The shape of an operand; a number has none."""
    if isinstance(e, Node):
        return tuple(e.meta["val"].shape)
    return () if e is None or isinstance(e, int | float) else ex.shape_of(e)


def dtype_of(e: Any) -> torch.dtype:
    """The dtype of a tensor operand."""
    if isinstance(e, Node):
        dtype: torch.dtype = e.meta["val"].dtype
        return dtype
    return ex.dtype_of(e)


def _own(e: Node | Call) -> Step | None:
    read = _table().get(e.target)
    return None if read is None else read(**arguments(e))


def _taken(several: Node, index: Any) -> Step | None:
    """One result of an operator that has several."""
    if several.target in (aten.max.dim, aten.min.dim) and index == 0:
        bound = bind(several)
        return Extreme(bound["self"], (bound["dim"],), several.target is aten.max.dim)  # keepdim: in meta["val"]
    if several.target is aten.aminmax.default and index in (0, 1):
        bound = bind(several)
        dims = None if bound["dim"] is None else (bound["dim"],)
        return Extreme(bound["self"], dims, index == 1)
    return None


def _abs(*, self: Any) -> Step:
    return Abs(self)


def _neg(*, self: Any) -> Step:
    return Negative(self)


def _reciprocal(*, self: Any) -> Step:
    return Reciprocal(self)


def _pow(*, self: Any, exponent: Any) -> Step | None:
    return Power(self, float(exponent)) if isinstance(exponent, int | float) else None


def _square(*, self: Any) -> Step:
    return Power(self, 2.0)


def _sqrt(*, self: Any) -> Step:
    return Power(self, 0.5)


def _rsqrt(*, self: Any) -> Step:
    return Power(self, -0.5)


def _mean(*, self: Any, dim: Any, keepdim: bool, dtype: Any) -> Step | None:
    del keepdim, dtype  # in meta["val"]
    return Mean(self, tuple(dim)) if dim else None


def _larger(*, self: Any, other: Any) -> Step:
    return Clamp(self, other, None, exchangeable=True)


def _smaller(*, self: Any, other: Any) -> Step:
    return Clamp(self, None, other, exchangeable=True)


def _amax(*, self: Any, dim: Any, keepdim: bool) -> Step:
    del keepdim  # in meta["val"]
    return Extreme(self, tuple(dim) or None, largest=True)


def _amin(*, self: Any, dim: Any, keepdim: bool) -> Step:
    del keepdim
    return Extreme(self, tuple(dim) or None, largest=False)


def _max(*, self: Any) -> Step:
    return Extreme(self, None, largest=True)


def _min(*, self: Any) -> Step:
    return Extreme(self, None, largest=False)


def _scalar_tensor(*, s: Any, dtype: Any, layout: Any, device: Any, pin_memory: Any) -> Step:
    del dtype, layout, device, pin_memory  # dtype: in meta["val"]
    return Number(s)


def _eq(*, self: Any, other: Any) -> Step:
    return Compared("eq", self, other)


def _lt(*, self: Any, other: Any) -> Step:
    return Compared("lt", self, other)


def _le(*, self: Any, other: Any) -> Step:
    return Compared("le", self, other)


def _where(*, condition: Any, self: Any, other: Any) -> Step:
    return Chosen(condition, self, other)


@cache
def _table() -> ReaderTable[Step | None]:
    return ReaderTable(
        {
            aten.abs.default: _abs,
            aten.neg.default: _neg,
            aten.reciprocal.default: _reciprocal,
            aten.pow.Tensor_Scalar: _pow,
            aten.square.default: _square,
            aten.sqrt.default: _sqrt,
            aten.rsqrt.default: _rsqrt,
            aten.mean.dim: _mean,
            aten.max.other: _larger,
            aten.min.other: _smaller,
            aten.amax.default: _amax,
            aten.amin.default: _amin,
            aten.max.default: _max,
            aten.min.default: _min,
            aten.scalar_tensor.default: _scalar_tensor,
            **dict.fromkeys((aten.eq.Scalar, aten.eq.Tensor), _eq),
            **dict.fromkeys((aten.lt.Scalar, aten.lt.Tensor), _lt),
            **dict.fromkeys((aten.le.Scalar, aten.le.Tensor), _le),
            aten.where.self: _where,
            aten.where.ScalarSelf: _where,
            aten.where.ScalarOther: _where,
        },
        leading=0,
    )
