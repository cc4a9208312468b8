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
from quantpass.graph.instructions import Add, Cast, Move, Multiply, Operand, ways
from quantpass.graph.node_memo import NodeMemo
from quantpass.graph.schema import call_reader, op_name, positional
from quantpass.graph.static_values import StaticValues
from quantpass.patterns.dialect import Dialects
from quantpass.patterns.integers import IntegerReader, Range, fits, integer_span
from quantpass.patterns.terms import Term, is_matrix, term_of

aten = torch.ops.aten

UNBOUNDED = "read.activation.unbounded"
"""The rule of a value that was rounded and scaled, as codes are, but not clamped to a range."""

_CODE_DTYPES = (torch.int8, torch.uint8)


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

    def moved(self, node: Node, movement: Move) -> Affine | None:
        """This value after the data-movement ``node``."""
        after = tuple(node.meta["val"].shape)
        terms = [t.moved(movement, self.shape, after) for t in (*self.factors, *filter(None, [self.zero_point]))]
        if any(t is None for t in terms):
            return None
        factors = tuple(t for t in terms[: len(self.factors)] if t is not None)
        zero_point = terms[-1] if self.zero_point is not None else None
        codes = self.codes if movement.kind == "same" else _replayed(node, movement, self.codes)
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
        return replace(self, factors=(*self.factors, replace(term, expr=ex.wide(term.expr))))

    def minus(self, term: Term) -> Affine | NotAffine:
        """This value less ``term``: ``F * (c - z) - b = F * (c - (z + b / F))``, so F and b must be known."""
        return self._shifted(replace(term, expr=ex.signed(ex.wide(term.expr))))

    def plus(self, term: Term) -> Affine | NotAffine:
        """This value and ``term``."""
        return self._shifted(replace(term, expr=ex.neg(ex.wide(term.expr))))

    def _shifted(self, less: Term) -> Affine | NotAffine:
        """This value less ``less``, which is wide."""
        if ex.is_all(less.expr, 0):
            return self
        zero_point: Term | None = less
        for factor in self.factors:
            if not ex.known(factor.expr, less.expr):
                return NotAffine("an offset is added after a scale that is not known when compiling", quantized=True)
            zero_point = broadcast(less, factor, ex.div)
            if zero_point is None:
                return NotAffine("an offset and a scale vary along different dimensions", quantized=True)
            less = zero_point
        if self.zero_point is not None and zero_point is not None:
            zero_point = broadcast(self.zero_point, zero_point, ex.add)
            if zero_point is None:
                return NotAffine("two zero points vary along different dimensions", quantized=True)
        if zero_point is not None and ex.is_all(zero_point.expr, 0):
            zero_point = None
        return replace(self, zero_point=zero_point)


def _replayed(node: Node, movement: Move, codes: Expr) -> Expr:
    """The data movement of ``node`` applied to ``codes``."""
    shape = tuple(node.meta["val"].shape)
    if movement.kind == "reshape" and movement.sizes is not None:
        # The copies before a view are not replayed, so the codes may lie in memory otherwise than its input did.
        return ex.apply(aten.reshape.default, codes, list(movement.sizes), dtype=ex.dtype_of(codes), shape=shape)
    args, kwargs = positional(node, self=codes)
    return ex.apply(node.target, *args, dtype=ex.dtype_of(codes), shape=shape, **kwargs)


@dataclass(frozen=True, slots=True)
class NotAffine:
    """Why a value could not be read.

    ``quantized`` tells an unusable quantized value from a float; ``rule`` is what a report calls the reason; ``hint``
    is given where more can be said than the rule does.
    """

    reason: str
    quantized: bool = False
    hint: str = ""
    rule: str = "read.weight"


def along_k() -> NotAffine:
    """Why a weight is none that the operators take a scale for."""
    return NotAffine("its scale or zero point varies along K", quantized=True, rule="read.weight.along_k")


class AffineReader:
    """Reads the nodes of one graph; every node is read once.

    Args:
        values: the graph's static values.
        dialects: the tools' operators.
        given: what is known of nodes from outside of the graph.
    """

    def __init__(self, values: StaticValues, dialects: Dialects, given: Mapping[Node, NotAffine] | None = None) -> None:
        self.values = values
        self.dialects = dialects
        self._integers = IntegerReader(values, dialects.integers)
        self._memo = NodeMemo[Affine | NotAffine]()
        self._given = given or {}
        self.weights: dict[Any, Any] = {}

    def read(self, node: Node) -> Affine | NotAffine:
        """Read the value of ``node``."""
        return self._memo(node, self._read)

    def forget(self, node: Node) -> None:
        """Let go of what was read of ``node``: a static operand's parameters in float64 are several times its own."""
        self._memo.forget(node)

    def dequantizes(self, node: Node) -> bool:
        """True for a named operator that returns a dequantized value."""
        return self.dialects.dequantizers.get(node.target) is not None

    def movement(self, node: Node) -> Move | None:
        found = self.values.decode(node)
        return found if isinstance(found, Move) else None

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
        reader = self.dialects.recentre.get(node.target)
        int8 = None if reader is None else call_reader(reader, node, node)
        down = Term(ex.scalar(-128.0), (1,) * len(shape))
        return Affine(int8 or recentred(node), (held[0] - 128, held[1] - 128), (), down, shape)

    def _read_call(self, node: Node) -> Affine | NotAffine | None:
        several = node.target is operator.getitem
        source = node.args[0] if several else node
        if not isinstance(source, Node) or (several and node.args[1] != 0):
            return None
        reader = self.dialects.dequantizers.get(source.target)
        if reader is not None:
            return call_reader(reader, source, self, node)
        match self.values.decode(node):
            case Move() as movement:
                return self._moved(node, movement)
            case Multiply() | Add() as combination:
                return self._combined(node, combination)
            case Cast(source):
                return self._converted(node, source)
        return None

    def _moved(self, node: Node, movement: Move) -> Affine | NotAffine:
        inner = self.read(movement.source)
        if isinstance(inner, NotAffine):
            return inner
        return inner.moved(node, movement) or NotAffine(
            f"{op_name(node)} mixes the elements that share a scale", quantized=True
        )

    def _combined(self, node: Node, combination: Multiply | Add) -> Affine | NotAffine | None:
        """A value and what broadcasts against it; None where integers could wrap around."""
        shape = tuple(node.meta["val"].shape)
        best = NotAffine(f"no operand of {op_name(node)} is a dequantized value")
        for way in ways(combination):
            if (
                not isinstance(way, Multiply | Add)
                or not isinstance(way.source, Node)
                or not _has_shape(way.source, shape)
            ):
                continue
            if self.values.is_static(node) and is_matrix(self.values, way.other, shape):
                # Of a large weight, the parameters of each element are not computed for nothing.
                inner = self.read(way.source)
                best = along_k() if isinstance(inner, Affine) else inner if inner.quantized else best
                continue
            term = self.term(way.other, shape)
            if term is None or (term.kind == "other" and term.constant is None):
                continue
            inner = self.read(way.source)
            if isinstance(inner, Affine):
                return self._unwrapped(node, _interpreted(way, inner, term))
            if inner.quantized or inner.rule == UNBOUNDED:
                best = inner
        return best

    # -- what the readers of tools' operators use ----------------------------------------------------------------

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

    def _converted(self, node: Node, source: Operand) -> Affine | NotAffine | None:
        """``source`` in the dtype of ``node``; None where the cast itself makes the codes."""
        if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
            return NotAffine("the cast of something that is not a tensor")
        before, after = source.meta["val"], node.meta["val"]
        if before.device.type != after.device.type:
            return NotAffine("the value is moved to another device")
        if any(t.dtype == torch.bool or t.is_complex() for t in (before, after)):
            return NotAffine("a cast between boolean or complex numbers")
        if before.is_floating_point() and not after.is_floating_point():
            return None
        return self._unwrapped(node, self.read(source))

    def _unwrapped(self, node: Node, read: Affine | NotAffine) -> Affine | NotAffine | None:
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


def _interpreted(way: Multiply | Add, value: Affine, term: Term) -> Affine | NotAffine:
    """``way`` applied to its source and its other operand, as read."""
    match way:
        case Multiply(inverted=inverted):
            return value.times(replace(term, expr=reciprocal(term.expr)) if inverted else term)
        case Add(multiple=multiple):
            return value.plus(replace(term, expr=ex.mul(ex.wide(term.expr), ex.scalar(float(multiple)))))


def _has_shape(node: Node, shape: tuple[Any, ...]) -> bool:
    fake = node.meta.get("val")
    return isinstance(fake, torch.Tensor) and same_shape(fake.shape, shape)


def _unbounded(node: Node, held: Range) -> NotAffine:
    span = f"[{held[0]:g}, {held[1]:g}]"
    return NotAffine(f"{node.name} holds integers in {span}, which are no 8-bit codes", rule=UNBOUNDED)


def recentred(node: Node) -> Recentred:
    """The integers of ``node`` less 128, in int8."""
    shape = tuple(node.meta["val"].shape)
    whole = Call(aten._to_copy.default, (Ref(node),), {"dtype": torch.int32}, torch.int32, shape)
    less = Call(aten.sub.Scalar, (whole, 128), {}, torch.int32, shape)
    return Recentred(node, Call(aten._to_copy.default, (less,), {"dtype": torch.int8}, torch.int8, shape))


def reciprocal(e: Expr) -> Expr:
    """``1 / e``."""
    e = ex.wide(e)
    return ex.apply(aten.reciprocal.default, e, dtype=ex.dtype_of(e), shape=ex.shape_of(e))


def broadcast(a: Term, b: Term, op: Callable[[Expr, Expr], Expr]) -> Term | None:
    """``op`` of two terms of the same value, as a term; None where only nodes could tell its shape."""
    if a.kind == "scalar" and b.kind == "scalar":
        return Term(op(ex.reshape(ex.wide(a.expr), ()), ex.reshape(ex.wide(b.expr), ())), a.shape)
    shapes = (a.shape, b.shape)
    if not all(isinstance(s, int) for shape in shapes for s in shape):
        return None
    shape = broadcast_shape(*shapes)
    return Term(op(ex.reshape(ex.wide(a.expr), a.shape), ex.reshape(ex.wide(b.expr), b.shape)), shape)
