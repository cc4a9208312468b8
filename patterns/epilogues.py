"""What happens to a matmul's result: scales, biases, casts, views, ReLU, and a quantize at the end.

The walk follows the result while it has a single reader and records each step. Whether and how far the steps can be
taken into a fused operator is for planning to decide, so every prefix of the steps is a possible stopping place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from quantpass.basics.symbolic import same_shape, same_size
from quantpass.graph import expr as ex
from quantpass.graph.schema import ReaderTable, call_reader
from quantpass.patterns.affine import AffineReader, reciprocal
from quantpass.patterns.contractions import Contraction, Own
from quantpass.patterns.terms import Term, wide

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


def read_epilogue(reader: AffineReader, table: ReaderTable, contraction: Contraction) -> Epilogue:
    """Walk from the matmul towards its users."""
    node = contraction.node
    steps = own_steps(reader, contraction)
    if contraction.out_order is not None:
        return Epilogue(tuple(steps), "its dimensions are in another order than a matmul's")
    while True:
        users = [u for u in node.users if not _only_asserts(u)]
        if len(users) != 1:
            return Epilogue(tuple(steps), f"its value has {len(users)} readers")
        step = _read_step(reader, table, node, users[0])
        if isinstance(step, str):
            return Epilogue(tuple(steps), step)
        steps.append(step)
        node = step.node


def own_steps(reader: AffineReader, c: Contraction) -> list[Step]:
    """What the matmul operator does to its product by itself (alpha, beta and bias, scales of fused operators)."""
    dtype, steps = c.product_dtype, []
    for own in c.own:
        if own.kind == "cast" or (own.kind == "scale" and not dtype.is_floating_point):
            dtype = c.node.meta["val"].dtype if own.kind == "cast" else torch.float32
        term = None if own.kind == "cast" else _own_term(reader, own, c)
        steps.append(Step(own.kind, c.node, term, own_dtype=dtype))
    return steps


def _own_term(reader: AffineReader, own: Own, c: Contraction) -> Term | None:
    shape = c.product_shape
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
    return None if times is None else replace(term, expr=ex.mul(wide(term.expr), times.expr))


def _only_asserts(user: Node) -> bool:
    return user.op == "call_function" and user.target is aten._assert_tensor_metadata.default


def _read_step(reader: AffineReader, table: ReaderTable, value: Node, user: Node) -> Step | str:
    fake = user.meta.get("val")
    if user.op == "output":
        return "it is an output of the graph"
    if user.op != "call_function" or not isinstance(fake, torch.Tensor) or user in reader.values.mutated:
        return f"{user.name} is not an operator on tensors"
    if sum(a is value for a in _flat_arguments(user)) != 1:
        return f"{user.name} uses the value more than once"
    shape = value.meta["val"].shape
    movement = reader.movement(user)
    if movement is not None:
        if movement.kind == "same":
            return Step("view", user)
        after = fake.shape
        if movement.kind == "reshape" and len(after) and len(shape) and same_size(after[-1], shape[-1]):
            return Step("view", user)
        return f"{user.name} rearranges the result"
    if not same_shape(fake.shape, shape):
        return f"{user.name} changes the shape of the result"
    step_reader = table.get(user.target)  # type: ignore[call-overload]
    if step_reader is None:
        return f"{user.target} is not part of an epilogue"
    step: Step | None = call_reader(step_reader, user, reader, value, user)
    return step if step is not None else f"{user.name} combines the result with something that is not per column or row"


def _flat_arguments(node: Node) -> list[Any]:
    return [*node.args, *node.kwargs.values(), *(b for a in node.args if isinstance(a, list | tuple) for b in a)]


def _scale(reader: AffineReader, value: Node, node: Node, other: Any, *, divide: bool = False) -> Step | None:
    term = reader.term(other, tuple(value.meta["val"].shape))
    if term is None or (not value.meta["val"].dtype.is_floating_point and not node.meta["val"].dtype.is_floating_point):
        return None
    scale = reciprocal(term.expr) if divide else wide(term.expr)
    return Step("scale", node, replace(term, expr=scale), inverted=divide)


def _mul(reader: AffineReader, value: Node, node: Node, *, self: Any, other: Any) -> Step | None:
    return _scale(reader, value, node, other if self is value else self)


def _div(reader: AffineReader, value: Node, node: Node, *, self: Any, other: Any) -> Step | None:
    return _scale(reader, value, node, other, divide=True) if self is value else None


def _add_term(reader: AffineReader, value: Node, node: Node, other: Any, multiple: Any) -> Step | None:
    term = reader.term(other, tuple(value.meta["val"].shape))
    if term is None or reader.values.uniform(multiple) is None:
        return None
    if multiple != 1:
        term = replace(term, expr=ex.mul(wide(term.expr), ex.scalar(multiple)))
    return Step("add", node, term)


def _add(reader: AffineReader, value: Node, node: Node, *, self: Any, other: Any, alpha: Any) -> Step | None:
    if self is value:
        return _add_term(reader, value, node, other, alpha)
    return _add_term(reader, value, node, self, 1) if alpha == 1 else None


def _sub(reader: AffineReader, value: Node, node: Node, *, self: Any, other: Any, alpha: Any) -> Step | None:
    return _add_term(reader, value, node, other, -alpha) if self is value else None


def _cast(value: Node, node: Node) -> Step | None:
    source, target = value.meta["val"].dtype, node.meta["val"].dtype
    if value.meta["val"].device != node.meta["val"].device or target == torch.bool or target.is_complex:
        return None
    if source == torch.int32 and not target.is_floating_point:
        return None
    return Step("cast", node)


def _to_copy(
    reader: AffineReader,
    value: Node,
    node: Node,
    *,
    self: Any,
    dtype: Any,
    layout: Any,
    device: Any,
    pin_memory: Any,
    non_blocking: bool,
    memory_format: Any,
) -> Step | None:
    del reader, self, dtype, device, pin_memory, non_blocking, memory_format  # dtype and device: from meta["val"]
    return _cast(value, node) if layout in (None, torch.strided) else None


def _to_dtype(
    reader: AffineReader,
    value: Node,
    node: Node,
    *,
    self: Any,
    dtype: Any,
    non_blocking: bool,
    copy: bool,
    memory_format: Any,
) -> Step | None:
    del reader, self, dtype, non_blocking, copy, memory_format
    return _cast(value, node)


def _convert_element_type(reader: AffineReader, value: Node, node: Node, *, a: Any, dtype: Any) -> Step | None:
    del reader, a, dtype
    return _cast(value, node)


def _relu(reader: AffineReader, value: Node, node: Node, *, self: Any) -> Step | None:
    del reader, value, self
    return Step("relu", node)


def _round(reader: AffineReader, value: Node, node: Node, *, self: Any) -> Step | None:
    del reader, value, self
    return Step("round", node)


def _clamp(reader: AffineReader, value: Node, node: Node, *, self: Any, min: Any, max: Any) -> Step | None:
    low = -float("inf") if min is None else reader.values.uniform(min)
    high = float("inf") if max is None else reader.values.uniform(max)
    if self is not value or low is None or high is None:
        return None
    if (low, high) == (0, float("inf")):
        return Step("relu", node)
    return Step("clamp", node, bounds=(low, high))


def _clamp_min(reader: AffineReader, value: Node, node: Node, *, self: Any, min: Any) -> Step | None:
    return _clamp(reader, value, node, self=self, min=min, max=None)


def _clamp_max(reader: AffineReader, value: Node, node: Node, *, self: Any, max: Any) -> Step | None:
    return _clamp(reader, value, node, self=self, min=None, max=max)


def arithmetic_steps() -> ReaderTable:
    """Readers of the operators that an epilogue is spelled with."""
    return ReaderTable(
        {
            aten.mul.Tensor: _mul,
            aten.mul.Scalar: _mul,
            aten.div.Tensor: _div,
            aten.div.Scalar: _div,
            aten.add.Tensor: _add,
            aten.add.Scalar: _add,
            aten.sub.Tensor: _sub,
            aten.sub.Scalar: _sub,
            aten._to_copy.default: _to_copy,
            aten.to.dtype: _to_dtype,
            torch.ops.prims.convert_element_type.default: _convert_element_type,
            aten.relu.default: _relu,
            aten.round.default: _round,
            aten.clamp.default: _clamp,
            aten.clamp.Tensor: _clamp,
            aten.clamp_min.default: _clamp_min,
            aten.clamp_max.default: _clamp_max,
        },
        leading=3,
    )
