"""What happens to a matmul's result: scales, biases, casts, views, ReLU, and a quantize at the end.

The walk follows the result while it has a single reader and records each step. Whether and how far the steps can be
taken into a fused operator is for planning to decide, so every prefix of the steps is a possible stopping place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from quantpass.basics.symbolic import same_shape, same_size
from quantpass.graph import expr as ex
from quantpass.graph.instructions import Add, Cast, Clamp, Instruction, Move, Multiply, Operand, Round, ways
from quantpass.graph.schema import call_reader
from quantpass.patterns.affine import AffineReader, reciprocal
from quantpass.patterns.contractions import Contraction, Own
from quantpass.patterns.terms import Term

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on the running value.

    ``kind``: ``"scale"`` and ``"add"`` (with ``term``), ``"cast"``, ``"view"``, ``"relu"``, ``"round"``, ``"clamp"``
    (with ``bounds``) or ``"quantize"`` (scale, zero point and bounds in one named operator).
    ``inverted`` marks a scale that the graph divides by. ``node`` computes the value after the step; it is the matmul
    itself for what the matmul operator does by itself, where ``own_dtype`` is the dtype after the step.
    """

    kind: str
    node: Node
    term: Term | None = None
    zero_point: int = 0
    bounds: tuple[float, float] | None = None
    inverted: bool = False
    own_dtype: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the value after the step."""
        dtype: torch.dtype = self.node.meta["val"].dtype
        return self.own_dtype or dtype


@dataclass(frozen=True, slots=True)
class Epilogue:
    """The steps after a matmul, and why the walk ended."""

    steps: tuple[Step, ...]
    ended: str


def read_epilogue(reader: AffineReader, contraction: Contraction) -> Epilogue:
    """Walk from the matmul towards its users."""
    node = contraction.node
    steps = own_steps(reader, contraction)
    if contraction.out_order is not None:
        return Epilogue(tuple(steps), "its dimensions are in another order than a matmul's")
    while True:
        users = [u for u in node.users if not _only_asserts(u)]
        if len(users) != 1:
            return Epilogue(tuple(steps), f"its value has {len(users)} readers")
        step = _read_step(reader, node, users[0])
        if isinstance(step, str):
            return Epilogue(tuple(steps), step)
        steps.append(step)
        node = step.node


def own_steps(reader: AffineReader, c: Contraction) -> list[Step]:
    """What the matmul operator does to its product by itself (alpha, beta and bias, scales of fused operators)."""
    dtype, steps = c.product_dtype, []
    for own in c.own:
        if own.kind == "quantize":
            steps.append(_own_quantize(reader, own, c))
            continue
        if own.kind == "cast" or (own.kind == "scale" and not dtype.is_floating_point):
            dtype = c.node.meta["val"].dtype if own.kind == "cast" else torch.float32
        term = None if own.kind == "cast" else _own_term(reader, own, c)
        steps.append(Step(own.kind, c.node, term, own_dtype=dtype))
    return steps


def _own_quantize(reader: AffineReader, own: Own, c: Contraction) -> Step:
    """To int8, scaled already; the step has no term where its zero point is not known."""
    one = Term(ex.reshape(ex.scalar(1.0), (1,)), (1,) * len(c.product_shape))
    zero = 0.0 if own.operand is None else _number(_own_term(reader, own, c))
    if zero is None:
        return Step("quantize", c.node, own_dtype=torch.int8)
    return Step("quantize", c.node, one, zero_point=int(zero), bounds=(-128, 127), own_dtype=torch.int8)


def _number(term: Term | None) -> float | None:
    """The whole number that every element of a term is."""
    if term is None or term.constant is None or not term.constant.numel():
        return None
    first = float(term.constant.reshape(-1)[0])
    return first if first.is_integer() and ex.is_all(term.expr, first) else None


def _own_term(reader: AffineReader, own: Own, c: Contraction) -> Term | None:
    shape = c.product_shape
    if own.read is not None:
        term: Term | None = own.read(reader, own.operand, shape)
        return term
    if own.along is not None:
        term = reader.vector(own.operand, shape, rows=own.along == "rows")
    else:
        # The operand broadcasts against what the operator returns, which may be the product transposed.
        term = reader.term(own.operand, tuple(c.node.meta["val"].shape))
        if term is not None and c.out_order is not None:
            term = term.permuted(tuple(c.out_order.index(d) for d in range(len(shape))))
    if term is None or (isinstance(own.times, int | float) and own.times == 1):
        return term
    times = reader.term(own.times, shape)
    return None if times is None else replace(term, expr=ex.mul(ex.wide(term.expr), times.expr))


def _only_asserts(user: Node) -> bool:
    return user.op == "call_function" and user.target is aten._assert_tensor_metadata.default


def _read_step(reader: AffineReader, value: Node, user: Node) -> Step | str:
    fake = user.meta.get("val")
    if user.op == "output":
        return "it is an output of the graph"
    if user.op != "call_function" or not isinstance(fake, torch.Tensor) or user in reader.values.mutated:
        return f"{user.name} is not an operator on tensors"
    if sum(a is value for a in _flat_arguments(user)) != 1:
        return f"{user.name} uses the value more than once"
    shape = value.meta["val"].shape
    instruction = reader.values.decode(user)
    if isinstance(instruction, Move):
        after = fake.shape
        kept = instruction.kind == "reshape" and len(after) and len(shape) and same_size(after[-1], shape[-1])
        return Step("view", user) if instruction.kind == "same" or kept else f"{user.name} rearranges the result"
    if not same_shape(fake.shape, shape):
        return f"{user.name} changes the shape of the result"
    tool = reader.dialects.steps.get(user.target)
    if tool is None and not _is_step(instruction):
        return f"{user.target} is not part of an epilogue"
    step = call_reader(tool, user, reader, value, user) if tool else _step(reader, value, user, instruction)
    return step or f"{user.name} combines the result with something that is not per column or row"


def _flat_arguments(node: Node) -> list[Any]:
    return [*node.args, *node.kwargs.values(), *(b for a in node.args if isinstance(a, list | tuple) for b in a)]


def _is_step(instruction: Instruction | None) -> bool:
    if isinstance(instruction, Round):
        return instruction.to == "nearest"
    return isinstance(instruction, Multiply | Add | Cast | Clamp)


def _step(reader: AffineReader, value: Node, node: Node, instruction: Instruction | None) -> Step | None:
    for way in ways(instruction) if instruction is not None else ():
        if way.source is value:
            return _interpreted(reader, value, node, way)
    return None


def _interpreted(reader: AffineReader, value: Node, node: Node, instruction: Instruction) -> Step | None:
    match instruction:
        case Multiply(_, other, inverted):
            return _scale(reader, value, node, other, inverted=inverted)
        case Add(_, other, multiple):
            return _add(reader, value, node, other, multiple)
        case Cast():
            return _cast(value, node)
        case Clamp(_, low, high):
            return _clamp(reader, node, low, high)
        case Round():
            return Step("round", node)
    return None


def _scale(reader: AffineReader, value: Node, node: Node, other: Operand, *, inverted: bool) -> Step | None:
    term = reader.term(other, tuple(value.meta["val"].shape))
    if term is None or (not value.meta["val"].dtype.is_floating_point and not node.meta["val"].dtype.is_floating_point):
        return None
    scale = reciprocal(term.expr) if inverted else ex.wide(term.expr)
    return Step("scale", node, replace(term, expr=scale), inverted=inverted)


def _add(reader: AffineReader, value: Node, node: Node, other: Operand, multiple: int | float) -> Step | None:
    term = reader.term(other, tuple(value.meta["val"].shape))
    if term is not None and multiple != 1:
        term = replace(term, expr=ex.mul(ex.wide(term.expr), ex.scalar(multiple)))
    return None if term is None else Step("add", node, term)


def _cast(value: Node, node: Node) -> Step | None:
    source, target = value.meta["val"].dtype, node.meta["val"].dtype
    if value.meta["val"].device != node.meta["val"].device or target == torch.bool or target.is_complex:
        return None
    if source == torch.int32 and not target.is_floating_point:
        return None
    return Step("cast", node)


def _clamp(reader: AffineReader, node: Node, low: Operand | None, high: Operand | None) -> Step | None:
    least = -math.inf if low is None else reader.values.uniform(low)
    most = math.inf if high is None else reader.values.uniform(high)
    if least is None or most is None:
        return None
    return Step("relu", node) if (least, most) == (0, math.inf) else Step("clamp", node, bounds=(least, most))
