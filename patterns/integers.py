"""Which nodes hold integers, and between which bounds."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from quantpass.graph.node_memo import NodeMemo
from quantpass.graph.schema import ReaderTable, call_reader
from quantpass.graph.static_values import StaticValues, as_dtype
from quantpass.patterns.movement import movement_of

aten = torch.ops.aten

Range = tuple[float, float]


def integer_span(dtype: torch.dtype) -> Range:
    info = torch.iinfo(dtype)
    return (info.min, info.max)


def fits(held: Range, dtype: torch.dtype) -> bool:
    """True where every integer of the range is representable in ``dtype``."""
    low, high = integer_span(dtype)
    return low <= held[0] and held[1] <= high


def _largest_exact(dtype: torch.dtype) -> int:
    """Up to here every integer is a number of the floating ``dtype``."""
    return {torch.bfloat16: 2**8, torch.float16: 2**11}.get(dtype, 2**24)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is known of a node's elements. ``whole``: they are integers, whatever the container's dtype."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False


class IntegerReader:
    """Bounds of the nodes of one graph, from how they were computed.

    Infinities and NaN in the input are not accounted for: the codes they give are undefined in every backend.
    """

    def __init__(self, values: StaticValues, movements: ReaderTable, table: ReaderTable) -> None:
        self.values = values
        self._movements = movements
        self._table = table
        self._memo = NodeMemo(self._find)

    def integer_range(self, node: Any) -> Range | None:
        """Bounds of a node whose elements are integers, None where they might not be. A bound may be infinite."""
        bounds = self.bounds(node)
        return (bounds.low, bounds.high) if bounds.whole else None

    def bounds(self, node: Any) -> Bounds:
        return self._memo(node) if isinstance(node, Node) else Bounds()

    def _find(self, node: Node) -> Bounds:
        found = None
        if node not in self.values.mutated:
            movement = movement_of(self._movements, node)
            if movement is not None:
                return self.bounds(movement.source)
            # Of an operator with several results, its reader is asked about the one that is taken.
            source = node.args[0] if node.target is operator.getitem else node
            reader = self._table.get(source.target) if isinstance(source, Node) else None
            if reader is not None and isinstance(source, Node):
                found = call_reader(reader, source, self, node)
        if found is None:
            fake = node.meta.get("val")
            if isinstance(fake, torch.Tensor) and fake.dtype in (torch.int8, torch.uint8, torch.int16):
                return Bounds(*integer_span(fake.dtype), whole=True)
        return found or Bounds()

    def clamped(self, node: Node, value: Any, low: Any, high: Any) -> Bounds | None:
        inner = self.bounds(value)
        lo = -math.inf if low is None else self.values.uniform(low)
        hi = math.inf if high is None else self.values.uniform(high)
        if lo is None or hi is None or lo > hi:
            return None
        dtype = node.meta["val"].dtype
        if dtype.is_floating_point:  # 257 is no bfloat16: elements are clamped to what it becomes there
            lo, hi = as_dtype(lo, dtype), as_dtype(hi, dtype)
        whole = inner.whole and all(float(b).is_integer() or math.isinf(b) for b in (lo, hi))
        return Bounds(min(max(inner.low, lo), hi), max(min(inner.high, hi), lo), whole)

    def shifted(self, node: Node, value: Any, offset: Any, multiple: Any) -> Bounds | None:
        inner, number = self.bounds(value), self.values.uniform(offset)
        if number is None or not inner.whole or not float(number * multiple).is_integer():
            return None
        held = (inner.low + number * multiple, inner.high + number * multiple)
        dtype = node.meta["val"].dtype
        if dtype.is_floating_point:
            # Integers stay whole at any size, but beyond the mantissa they are rounded: past the bound, even.
            exact = _largest_exact(dtype)
            low, high = held
            return Bounds(low if low >= -exact else -math.inf, high if high <= exact else math.inf, whole=True)
        # In an integer container the sum must not wrap.
        return Bounds(*held, whole=True) if all(map(math.isfinite, held)) and fits(held, dtype) else None

    def converted(self, value: Any, dtype: torch.dtype | None) -> Bounds | None:
        inner = self.bounds(value)
        if dtype is None or not inner.whole:
            return inner if dtype is None or dtype.is_floating_point else None
        if dtype == torch.bool or dtype.is_complex:
            return None
        if dtype.is_floating_point:
            exact = _largest_exact(dtype)
            return inner if max(abs(inner.low), abs(inner.high)) <= exact else None
        return inner if fits((inner.low, inner.high), dtype) else None


def _round(reader: IntegerReader, node: Node, *, self: Any) -> Bounds:
    del node
    inner = reader.bounds(self)
    low = inner.low if math.isinf(inner.low) else math.floor(inner.low)
    high = inner.high if math.isinf(inner.high) else math.ceil(inner.high)
    return Bounds(low, high, whole=True)


def _clamp(reader: IntegerReader, node: Node, *, self: Any, min: Any, max: Any) -> Bounds | None:
    return reader.clamped(node, self, min, max)


def _clamp_min(reader: IntegerReader, node: Node, *, self: Any, min: Any) -> Bounds | None:
    return reader.clamped(node, self, min, None)


def _clamp_max(reader: IntegerReader, node: Node, *, self: Any, max: Any) -> Bounds | None:
    return reader.clamped(node, self, None, max)


def _minimum(reader: IntegerReader, node: Node, *, self: Any, other: Any) -> Bounds | None:
    return reader.clamped(node, self, None, other) or reader.clamped(node, other, None, self)


def _maximum(reader: IntegerReader, node: Node, *, self: Any, other: Any) -> Bounds | None:
    return reader.clamped(node, self, other, None) or reader.clamped(node, other, self, None)


def _add(reader: IntegerReader, node: Node, *, self: Any, other: Any, alpha: Any) -> Bounds | None:
    return reader.shifted(node, self, other, alpha) or (reader.shifted(node, other, self, 1) if alpha == 1 else None)


def _sub(reader: IntegerReader, node: Node, *, self: Any, other: Any, alpha: Any) -> Bounds | None:
    return reader.shifted(node, self, other, -alpha)


def _to_copy(
    reader: IntegerReader,
    node: Node,
    *,
    self: Any,
    dtype: Any,
    layout: Any,
    device: Any,
    pin_memory: Any,
    non_blocking: bool,
    memory_format: Any,
) -> Bounds | None:
    del node, layout, device, pin_memory, non_blocking, memory_format  # the elements stay what they are
    return reader.converted(self, dtype)


def _to_dtype(
    reader: IntegerReader, node: Node, *, self: Any, dtype: Any, non_blocking: bool, copy: bool, memory_format: Any
) -> Bounds | None:
    del node, non_blocking, copy, memory_format
    return reader.converted(self, dtype)


def _convert_element_type(reader: IntegerReader, node: Node, *, a: Any, dtype: Any) -> Bounds | None:
    del node
    return reader.converted(a, dtype)


def bounds_table() -> ReaderTable:
    """Readers of the operators that round, clamp or keep integers."""
    return ReaderTable(
        {
            aten.round.default: _round,
            aten.floor.default: _round,
            aten.ceil.default: _round,
            aten.trunc.default: _round,
            aten.clamp.default: _clamp,
            aten.clamp.Tensor: _clamp,
            aten.clamp_min.default: _clamp_min,
            aten.clamp_min.Tensor: _clamp_min,
            aten.clamp_max.default: _clamp_max,
            aten.clamp_max.Tensor: _clamp_max,
            aten.minimum.default: _minimum,
            aten.maximum.default: _maximum,
            aten.add.Tensor: _add,
            aten.add.Scalar: _add,
            aten.sub.Tensor: _sub,
            aten.sub.Scalar: _sub,
            aten._to_copy.default: _to_copy,
            aten.to.dtype: _to_dtype,
            torch.ops.prims.convert_element_type.default: _convert_element_type,
        },
        leading=2,
    )
