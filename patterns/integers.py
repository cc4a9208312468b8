"""Which nodes hold integers, and between which bounds."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from quantpass.graph.instructions import Add, Cast, Clamp, Instruction, Move, Operand, Round, ways
from quantpass.graph.node_memo import NodeMemo
from quantpass.graph.schema import ReaderTable, call_reader
from quantpass.graph.static_values import StaticValues, as_dtype

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

    Args:
        values: the graph's static values.
        tools: readers of tools' operators that return bounded integers.
    """

    def __init__(self, values: StaticValues, tools: ReaderTable[Bounds | None]) -> None:
        self.values = values
        self._tools = tools
        self._memo = NodeMemo[Bounds]()

    def integer_range(self, node: Any) -> Range | None:
        """Bounds of a node whose elements are integers, None where they might not be. A bound may be infinite."""
        bounds = self.bounds(node)
        return (bounds.low, bounds.high) if bounds.whole else None

    def bounds(self, node: Any) -> Bounds:
        return self._memo(node, self._find) if isinstance(node, Node) else Bounds()

    def _find(self, node: Node) -> Bounds:
        found = None
        if node not in self.values.mutated:
            # Of an operator with several results, its reader is asked about the one that is taken.
            source = node.args[0] if node.target is operator.getitem else node
            reader = self._tools.get(source.target) if isinstance(source, Node) else None
            if reader is not None and isinstance(source, Node):
                found = call_reader(reader, source, self, node)
            elif (instruction := self.values.decode(node)) is not None:
                if isinstance(instruction, Move):
                    return self.bounds(instruction.source)
                several = (self._interpreted(node, way) for way in ways(instruction))
                found = next((b for b in several if b is not None), None)
        if found is None:
            fake = node.meta.get("val")
            if isinstance(fake, torch.Tensor) and fake.dtype in (torch.int8, torch.uint8, torch.int16):
                return Bounds(*integer_span(fake.dtype), whole=True)
        return found or Bounds()

    def _interpreted(self, node: Node, instruction: Instruction) -> Bounds | None:
        match instruction:
            case Round(source):
                return _rounded(self.bounds(source))
            case Clamp(source, low, high):
                return self._clamped(node, source, low, high)
            case Add(source, other, multiple):
                return self._shifted(node, source, other, multiple)
            case Cast(source, dtype):
                return self._converted(source, dtype)
        return None

    def _clamped(self, node: Node, value: Operand, low: Operand | None, high: Operand | None) -> Bounds | None:
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

    def _shifted(self, node: Node, value: Operand, offset: Operand, multiple: int | float) -> Bounds | None:
        inner, number = self.bounds(value), self.values.uniform(offset)
        if number is None or not inner.whole or not float(number * multiple).is_integer():
            return None
        held = (inner.low + number * multiple, inner.high + number * multiple)
        dtype = node.meta["val"].dtype
        if dtype.is_floating_point:
            # Integers stay whole at any size, but beyond the mantissa they are rounded: past the bound, even.
            exact = _largest_exact(dtype)
            low, high = held
            return Bounds(low if abs(low) <= exact else -math.inf, high if abs(high) <= exact else math.inf, whole=True)
        # In an integer container the sum must not wrap.
        return Bounds(*held, whole=True) if all(map(math.isfinite, held)) and fits(held, dtype) else None

    def _converted(self, value: Operand, dtype: torch.dtype | None) -> Bounds | None:
        inner = self.bounds(value)
        if dtype is None:
            return inner
        if not inner.whole:  # 267 is no bfloat16: what was bounded by it is rounded to 268
            return Bounds(as_dtype(inner.low, dtype), as_dtype(inner.high, dtype)) if dtype.is_floating_point else None
        if dtype == torch.bool or dtype.is_complex:
            return None
        if dtype.is_floating_point:
            exact = _largest_exact(dtype)
            return inner if max(abs(inner.low), abs(inner.high)) <= exact else None
        return inner if fits((inner.low, inner.high), dtype) else None


def _rounded(inner: Bounds) -> Bounds:
    low = inner.low if math.isinf(inner.low) else math.floor(inner.low)
    high = inner.high if math.isinf(inner.high) else math.ceil(inner.high)
    return Bounds(low, high, whole=True)
