"""Reading ``product of factors * (codes - zero_point)`` symbolically.

One reader serves activations, whose values are unknown, and weights in plain spellings. It walks from a matmul's
operand towards its integers and accounts for every argument of every node it passes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from quantpass.basics.symbolic import broadcast_shape, elements, same_shape, same_size
from quantpass.graph import expr as ex
from quantpass.graph.expr import Call, Expr, Recentred, Ref
from quantpass.graph.node_memo import NodeMemo
from quantpass.graph.schema import ReaderTable, bind, call_reader, op_name, positional
from quantpass.graph.static_values import StaticValues
from quantpass.patterns.integers import IntegerReader, Range, fits, integer_span
from quantpass.patterns.movement import Movement, movement_of
from quantpass.patterns.terms import Term, term_of, wide

aten = torch.ops.aten

UNBOUNDED = "read.activation.unbounded"
"""The rule of a value that was rounded and scaled, as codes are, but not clamped to a range."""

_CODE_DTYPES = (torch.int8, torch.uint8)
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.view_copy.default)


@dataclass(frozen=True, slots=True)
class Affine:
    """A value read as ``product(factors) * (codes - zero_point)``.

    Attributes:
        codes: integer-valued expression of the value's shape.
        span: smallest and largest integer that ``codes`` can hold.
        factors: what the codes are multiplied by, aligned with the value.
        zero_point: subtracted from the codes; None where it is zero.
        shape: shape of the value.
    """

    codes: Expr
    span: Range
    factors: tuple[Term, ...]
    zero_point: Term | None
    shape: tuple[Any, ...]

    def moved(self, node: Node, movement: Movement) -> Affine | None:
        """This value after the data-movement ``node``."""
        after = tuple(node.meta["val"].shape)
        terms = [t.moved(movement, self.shape, after) for t in (*self.factors, *filter(None, [self.zero_point]))]
        if any(t is None for t in terms):
            return None
        factors = tuple(t for t in terms[: len(self.factors)] if t is not None)
        zero_point = terms[-1] if self.zero_point is not None else None
        codes = self.codes if movement.kind == "same" else _replayed(node, self.codes)
        return Affine(codes, self.span, factors, zero_point, after)

    def permuted(self, order: tuple[int, ...]) -> Affine | None:
        """This value with its dimensions in another order."""
        terms = [t.permuted(order) for t in (*self.factors, *filter(None, [self.zero_point]))]
        if any(t is None for t in terms):
            return None
        factors = tuple(t for t in terms[: len(self.factors)] if t is not None)
        zero_point = terms[-1] if self.zero_point is not None else None
        shape = tuple(self.shape[d] for d in order)
        return Affine(ex.permute(self.codes, order), self.span, factors, zero_point, shape)

    def times(self, term: Term) -> Affine:
        """This value multiplied by ``term``."""
        return replace(self, factors=(*self.factors, replace(term, expr=wide(term.expr))))

    def minus(self, term: Term) -> Affine | NotAffine:
        """This value less ``term``."""
        return self.plus(replace(term, expr=ex.neg(wide(term.expr))))

    def plus(self, term: Term) -> Affine | NotAffine:
        """This value and ``term``: ``F * (c - z) + b = F * (c - (z - b / F))``, so F and b must be known."""
        term = replace(term, expr=wide(term.expr))
        if ex.is_all(term.expr, 0):
            return self
        for factor in self.factors:
            if not ex.known(factor.expr, term.expr):
                return NotAffine("an offset is added after a scale that is not known when compiling", quantized=True)
            divided = broadcast(term, factor, ex.div)
            if divided is None:
                return NotAffine("an offset and a scale vary along different dimensions", quantized=True)
            term = divided
        zero_point: Term | None = replace(term, expr=ex.neg(term.expr))
        if self.zero_point is not None and zero_point is not None:
            zero_point = broadcast(self.zero_point, zero_point, ex.add)
            if zero_point is None:
                return NotAffine("two zero points vary along different dimensions", quantized=True)
        if zero_point is not None and ex.is_all(zero_point.expr, 0):
            zero_point = None
        return replace(self, zero_point=zero_point)


def _replayed(node: Node, codes: Expr) -> Expr:
    """The data movement of ``node`` applied to ``codes``."""
    shape = tuple(node.meta["val"].shape)
    if node.target in _VIEWS:
        # The copies before a view are not replayed, so the codes may lie in memory otherwise than its input did.
        return ex.apply(aten.reshape.default, codes, bind(node)["size"], dtype=ex.dtype_of(codes), shape=shape)
    args, kwargs = positional(node, self=codes)
    return ex.apply(node.target, *args, dtype=ex.dtype_of(codes), shape=shape, **kwargs)


@dataclass(frozen=True, slots=True)
class NotAffine:
    """Why a value could not be read.

    ``quantized`` tells an unusable quantized value from a float; ``rule`` is what a report calls the reason.
    """

    reason: str
    quantized: bool = False
    hint: str = ""
    rule: str = "read.weight"


class AffineReader:
    """Reads the nodes of one graph; every node is read once.

    Args:
        values: the graph's static values.
        movements: readers of data movements.
        integers: readers of what bounds integers.
        arithmetic: readers of the operators that a dequantization is spelled with.
        dequantizers: readers of named operators that return a dequantized value.
        recentre: readers of named quantize operators that can give int8 codes instead of uint8 ones.
        given: what is known of nodes from outside of the graph.
    """

    def __init__(
        self,
        values: StaticValues,
        movements: ReaderTable,
        integers: ReaderTable,
        arithmetic: ReaderTable,
        dequantizers: ReaderTable,
        recentre: ReaderTable,
        given: Mapping[Node, NotAffine] | None = None,
    ) -> None:
        self.values = values
        self._movements = movements
        self._arithmetic = arithmetic
        self._dequantizers = dequantizers
        self._recentre = recentre
        self._integers = IntegerReader(values, movements, integers)
        self._memo = NodeMemo(self._read)
        self._given = given or {}
        self.weights: dict[Any, Any] = {}

    def read(self, node: Node) -> Affine | NotAffine:
        """Read the value of ``node``."""
        return self._memo(node)

    def dequantizes(self, node: Node) -> bool:
        """True for a named operator that returns a dequantized value."""
        return self._dequantizers.get(node.target) is not None  # type: ignore[call-overload]

    def movement(self, node: Node) -> Movement | None:
        return movement_of(self._movements, node)

    def integer_range(self, node: Node) -> Range | None:
        """Bounds of a node whose elements are integers, from how the graph makes them."""
        return self._integers.integer_range(node)

    def term(self, value: Any, shape: tuple[Any, ...]) -> Term | None:
        return term_of(self.values, value, shape)

    def _read(self, node: Node) -> Affine | NotAffine:
        if node in self._given:
            return self._given[node]
        fake = node.meta.get("val")
        if not isinstance(fake, torch.Tensor):
            return NotAffine("it is not a tensor")
        if node in self.values.mutated:
            return NotAffine(
                "the graph writes to this tensor in place",
                quantized=fake.dtype in _CODE_DTYPES,
                hint="make the graph functional first: run_decompositions({}) on an exported program; multiply by what "
                "the update returns, not by the tensor that it writes to",
                rule="read.mutated",
            )
        found: Affine | NotAffine | None = None
        if node.op == "call_function":
            found = self._read_call(node)
            if isinstance(found, Affine):
                return found
        if fake.dtype in _CODE_DTYPES:
            return self._codes(node, integer_span(fake.dtype))
        if fake.dtype.is_floating_point or fake.dtype == torch.int32:
            held = self._integers.integer_range(node)
            if held is not None and fits(held, torch.uint8 if held[0] >= 0 else torch.int8):
                return self._codes(node, held)
            if held is not None and fake.dtype.is_floating_point:
                return _unbounded(node, held)
        return found or NotAffine(f"{op_name(node) if node.op == 'call_function' else node.op} is not a dequantization")

    def _codes(self, node: Node, held: Range) -> Affine:
        """A node whose elements are the integers themselves, as int8: codes of 0 to 255 are moved down by 128."""
        shape = tuple(node.meta["val"].shape)
        if fits(held, torch.int8):
            return Affine(ex.cast(Ref(node), torch.int8), held, (), None, shape)
        reader = self._recentre.get(node.target)
        int8 = None if reader is None else call_reader(reader, node, node)
        down = Term(ex.scalar(-128.0), (1,) * len(shape))
        return Affine(int8 or recentred(node), (held[0] - 128, held[1] - 128), (), down, shape)

    def _read_call(self, node: Node) -> Affine | NotAffine | None:
        if node.target is operator.getitem:
            several, index = node.args
            if index != 0 or not isinstance(several, Node):
                return None
            reader = self._dequantizers.get(several.target)  # type: ignore[call-overload]
            return None if reader is None else call_reader(reader, several, self, node)
        for table in (self._dequantizers, self._arithmetic):
            reader = table.get(node.target)  # type: ignore[call-overload]
            if reader is not None:
                read: Affine | NotAffine | None = call_reader(reader, node, self, node)
                return read
        movement = self.movement(node)
        if movement is None:
            return None
        inner = self.read(movement.source)
        if isinstance(inner, NotAffine):
            return inner
        return inner.moved(node, movement) or NotAffine(
            f"{op_name(node)} mixes the elements that share a scale", quantized=True
        )

    # -- what the readers of arithmetic operators use ------------------------------------------------------------

    def scaled(self, node: Node, value: Any, factor: Any, *, divide: bool = False) -> Affine | NotAffine:
        """``value * factor`` (or ``value / factor``)."""
        found = self._value_and_term(node, value, factor)
        if isinstance(found, NotAffine):
            return found
        inner, term = found
        return inner.times(replace(term, expr=reciprocal(term.expr)) if divide else term)

    def shifted(self, node: Node, value: Any, offset: Any, multiple: Any) -> Affine | NotAffine:
        """``value + multiple * offset``; ``multiple`` is a number."""
        found = self._value_and_term(node, value, offset)
        if isinstance(found, NotAffine):
            return found
        inner, term = found
        if self.values.uniform(multiple) is None:
            return NotAffine("the multiple of an addend is not a number", quantized=True)
        return inner.plus(replace(term, expr=ex.mul(wide(term.expr), ex.scalar(float(multiple)))))

    def dequantized(self, node: Node, codes: Any, scale: Any, zero_point: Any, axis: int | None) -> Affine | NotAffine:
        """``(codes - zero_point) * scale`` with both along ``axis``, or for the whole tensor where that is None."""
        if not isinstance(codes, Node):
            return NotAffine(f"the input of {op_name(node)} is not a tensor", quantized=True)
        value = self.read(codes)
        shape = tuple(node.meta["val"].shape)
        for operand, combine in ((zero_point, Affine.minus), (scale, Affine.times)):
            if isinstance(value, NotAffine):
                return replace(value, quantized=True)
            if operand is not None:
                term = self.along(operand, shape, axis)
                if term is None:
                    return NotAffine(f"a parameter of {op_name(node)} has an unexpected shape", quantized=True)
                value = combine(value, term)
        return value

    def along(self, operand: Any, shape: tuple[Any, ...], axis: int | None) -> Term | None:
        """A parameter of a named operator: one number, or a vector along ``axis`` of the value."""
        if axis is None:
            term = self.term(operand, shape)
            return term if term is not None and term.kind == "scalar" else None
        axis %= len(shape)
        if not isinstance(operand, Node) or not same_shape(operand.meta["val"].shape, (shape[axis],)):
            return None
        uniform = self.values.uniform(operand)
        if uniform is not None:
            return Term(ex.scalar(uniform), (1,) * len(shape))
        aligned = tuple(s if d == axis else 1 for d, s in enumerate(shape))
        return Term(self.values.expr(operand), aligned)

    def vector(self, operand: Any, shape: tuple[Any, ...], *, rows: bool) -> Term | None:
        """A tensor with an element for each column (or row) of a value ``(..., M, N)``, whatever its own shape."""
        if not isinstance(operand, Node) or not isinstance(operand.meta.get("val"), torch.Tensor):
            return self.term(operand, shape)
        aligned = (*shape[:-1], 1) if rows else (1,) * (len(shape) - 1) + (shape[-1],)
        if not same_size(operand.meta["val"].numel(), elements(aligned)):
            return None
        return Term(self.values.expr(operand), aligned)

    def converted(self, value: Any, dtype: torch.dtype | None) -> Affine | NotAffine | None:
        """``value`` in another dtype; None where the cast itself makes the codes."""
        if not isinstance(value, Node) or not isinstance(value.meta.get("val"), torch.Tensor):
            return NotAffine("the cast of something that is not a tensor")
        source = value.meta["val"].dtype
        target = dtype or source
        if torch.bool in (source, target) or source.is_complex or target.is_complex:
            return NotAffine("a cast between boolean or complex numbers")
        if source.is_floating_point and not target.is_floating_point:
            return None
        inner = self.read(value)
        if isinstance(inner, NotAffine) or target.is_floating_point:
            return inner
        return inner if self._holds(inner, target) else None

    def arithmetic_holds(self, node: Node, read: Affine | NotAffine) -> Affine | NotAffine | None:
        """``read`` unless the node computes in integers that could wrap around."""
        dtype = node.meta["val"].dtype
        if dtype.is_floating_point or isinstance(read, NotAffine):
            return read
        return read if self._holds(read, dtype) else None

    def _holds(self, value: Affine, dtype: torch.dtype) -> bool:
        """True where every value fits the integer type, so that nothing wraps around."""
        if value.factors:
            return False
        low, high = value.span
        if value.zero_point is not None:
            zero = value.zero_point.constant
            if zero is None:
                return False
            low, high = low - float(zero.max()), high - float(zero.min())
        return fits((low, high), dtype)

    def _value_and_term(self, node: Node, a: Any, b: Any) -> tuple[Affine, Term] | NotAffine:
        """Which of two operands is the value and which broadcasts against it."""
        shape = tuple(node.meta["val"].shape)
        best = NotAffine(f"no operand of {op_name(node)} is a dequantized value")
        for value, other in ((a, b), (b, a)):
            if not isinstance(value, Node) or not isinstance(value.meta.get("val"), torch.Tensor):
                continue
            if not same_shape(value.meta["val"].shape, shape):
                continue
            term = self.term(other, shape)
            if term is None or (term.kind == "other" and term.constant is None):
                continue
            inner = self.read(value)
            if isinstance(inner, Affine):
                return inner, term
            if inner.quantized or inner.rule == UNBOUNDED:
                best = inner
        return best


def _unbounded(node: Node, held: Range) -> NotAffine:
    span = f"[{held[0]:g}, {held[1]:g}]"
    return NotAffine(
        f"{node.name} holds integers in {span}, which are no 8-bit codes",
        hint="clamp the rounded values to the range of their codes",
        rule=UNBOUNDED,
    )


def recentred(node: Node) -> Recentred:
    """The integers of ``node`` less 128, in int8."""
    shape = tuple(node.meta["val"].shape)
    whole = Call(aten._to_copy.default, (Ref(node),), {"dtype": torch.int32}, torch.int32, shape)
    less = Call(aten.sub.Scalar, (whole, 128), {}, torch.int32, shape)
    return Recentred(node, Call(aten._to_copy.default, (less,), {"dtype": torch.int8}, torch.int8, shape))


def reciprocal(e: Expr) -> Expr:
    """``1 / e``."""
    e = wide(e)
    return ex.apply(aten.reciprocal.default, e, dtype=ex.dtype_of(e), shape=ex.shape_of(e))


def broadcast(a: Term, b: Term, op: Callable[[Expr, Expr], Expr]) -> Term | None:
    """``op`` of two terms of the same value, as a term; None where only nodes could tell its shape."""
    if a.kind == "scalar" and b.kind == "scalar":
        return Term(op(ex.reshape(wide(a.expr), ()), ex.reshape(wide(b.expr), ())), a.shape)
    shapes = (a.shape, b.shape)
    if not all(isinstance(s, int) for shape in shapes for s in shape):
        return None
    shape = broadcast_shape(*shapes)
    return Term(op(ex.reshape(wide(a.expr), a.shape), ex.reshape(wide(b.expr), b.shape)), shape)
