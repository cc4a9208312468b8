"""Where the rows of an operator's operands lie: what is known of movements, elementwise operators and some of ATen's.

Of anything else nothing is assumed. A tool's operator may be known by its formula as well: then the small parameters
of a large weight stay small (:mod:`quantpass.graph.grids`), and no operator is called for each of its elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch._ops import OpOverload
from torch.fx import Node

from quantpass.graph.grids import Grid
from quantpass.graph.instructions import Move
from quantpass.graph.schema import ReaderTable, call_reader

aten = torch.ops.aten

_UNTAGGED = frozenset(f"aten::__{name}__" for name in ("and", "or", "xor", "lshift", "rshift"))
"""Elementwise operators that PyTorch does not tag as such."""

Needs: TypeAlias = "dict[Node, int | None]"
"""For each operand, along which of its dimensions the rows lie; None for an operand that is needed whole."""


@dataclass(frozen=True, slots=True)
class Formula:
    """What an operator does to rows, and what it computes.

    Attributes:
        needs: where the operands' rows lie.
        compute: the operator's result in float64 from parts of its operands: integers as the graph has them, floating
            numbers in any dtype. Where the operator computes in integers it does so as well, wrapping around alike.
        line_over: the operand in whose elements each element of the result is a line: ``a * element + b``, element by
            element, where ``a`` and ``b`` are made of the other operands. None where it is not said.
    """

    needs: Needs
    compute: Callable[[Mapping[Node, Grid]], Grid]
    line_over: Node | None = None


RowRules: TypeAlias = "ReaderTable[Needs | Formula | None]"
"""Readers take ``(node, dim, **arguments)``, with ``dim`` of the result along which rows lie."""


class NotByRows(Exception):
    """A value can't be computed by rows."""


def is_pointwise(target: OpOverload) -> bool:
    """True for an elementwise operator."""
    return torch.Tag.pointwise in target.tags or target._schema.name in _UNTAGGED


def needs_by_rule(node: Node, dim: int, rules: RowRules | None) -> Needs | Formula:
    """What a tool's table ``rules``, or that of ATen's operators, says of ``node``.

    Raises:
        NotByRows: neither knows it, or it mixes rows.
    """
    for table in (_rules(), rules):
        reader = None if table is None else table.get(node.target)
        needs = None if reader is None else call_reader(reader, node, node, dim)
        if needs is not None:
            return needs
    raise NotByRows(f"{node.target} may mix rows")


def source_dim(move: Move, shape: Sequence[int], dim: int) -> int:
    """The dimension along which the rows of a movement's operand lie; ``shape`` is that of its result."""
    before = move.source.meta["val"].shape
    if move.kind == "same":
        return dim
    if move.kind == "permute":
        return move.order[dim]
    if move.kind == "expand":
        source = dim - (len(shape) - len(before))
        if source < 0 or before[source] != shape[dim]:
            raise NotByRows("rows are copies of each other")
        return source
    outside = math.prod(shape[:dim])
    for e in reversed(range(len(before))):
        if math.prod(before[:e]) == outside:
            return e
    raise NotByRows("a view mixes rows with what lies outside of them")


def of_elements(node: Node, dim: int) -> Needs:
    """The same of an elementwise operator."""
    shape = node.meta["val"].shape
    needs: Needs = {}
    for i in node.all_input_nodes:
        fake = i.meta.get("val")
        if not isinstance(fake, torch.Tensor):
            raise NotByRows(f"{i.name} is no tensor")
        own = dim - (len(shape) - fake.dim())
        needs[i] = own if own >= 0 and fake.shape[own] == shape[dim] and shape[dim] > 1 else None
    return needs


def _stack(node: Node, at: int, *, tensors: Sequence[Node], dim: int) -> Needs | None:
    dim %= node.meta["val"].dim()
    return None if at == dim else dict.fromkeys(tensors, at - (at > dim))


def _cat(node: Node, at: int, *, tensors: Sequence[Node], dim: int) -> Needs | None:
    return None if at == dim % node.meta["val"].dim() else dict.fromkeys(tensors, at)


def _select(node: Node, at: int, *, self: Node, dim: int, index: Any) -> Needs | None:
    del index  # along another dimension
    dim %= self.meta["val"].dim()
    return {self: at + (at >= dim)} if node.meta["val"].dim() else None


def _slice(node: Node, at: int, *, self: Node, dim: int, start: Any, end: Any, step: Any) -> Needs | None:
    del start, end, step  # along another dimension, or all of it
    whole = node.meta["val"].shape == self.meta["val"].shape
    return {self: at} if at != dim % self.meta["val"].dim() or whole else None


def _index(node: Node, at: int, *, self: Node, indices: Sequence[Any]) -> Needs | None:
    del node
    return _indexed(at, self, indices)


def _indexed(at: int, self: Node, indices: Sequence[Any]) -> Needs | None:
    """One index: rows along what is left of the operand's dimensions, or along those of the index."""
    where = [d for d, i in enumerate(indices) if i is not None]
    if len(where) != 1 or not isinstance(indices[where[0]], Node):
        return None
    (first,), index = where, indices[where[0]]
    fake = index.meta["val"]
    if index is self or fake.dtype == torch.bool or fake.dtype == torch.uint8:
        return None
    if at < first:
        return {self: at, index: None}
    if at < first + fake.dim():
        return {self: None, index: at - first}
    return {self: at - fake.dim() + 1, index: None}


def _index_select(node: Node, at: int, *, self: Node, dim: int, index: Node) -> Needs | None:
    indices = [None] * (dim % node.meta["val"].dim()) + [index]
    return _indexed(at, self, indices)


def _repeat_interleave(node: Node, at: int, *, self: Node, repeats: Any, dim: Any, output_size: Any) -> Needs | None:
    """Each of a dimension's elements several times, side by side."""
    fixed = output_size is not None and at == dim % node.meta["val"].dim() if dim is not None else True
    return {self: at} if isinstance(repeats, int) and not fixed else None


def _bit_cast(node: Node, at: int, *, self: Node, dtype: torch.dtype) -> Needs | None:
    same = dtype.itemsize == self.meta["val"].dtype.itemsize
    return {self: at} if same or at != node.meta["val"].dim() - 1 else None


@cache
def _rules() -> RowRules:
    return ReaderTable(
        {
            aten.stack.default: _stack,
            aten.cat.default: _cat,
            aten.select.int: _select,
            aten.slice.Tensor: _slice,
            aten.index.Tensor: _index,
            aten.index_select.default: _index_select,
            aten.repeat_interleave.self_int: _repeat_interleave,
            aten.view.dtype: _bit_cast,
        },
        leading=2,
    )
