"""Operators that move data without changing any element: views, transposes, copies.

They commute with every elementwise operator, which is what lets a dequantization be read through them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from quantpass.graph.schema import ReaderTable, call_reader

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Movement:
    """What a data-movement node does to ``source``.

    ``kind`` is ``"same"`` (element order and shape kept), ``"reshape"`` (row-major order kept), ``"permute"``
    (``order`` says which source dimension each result dimension is) or ``"expand"`` (size-1 dimensions repeated).
    """

    kind: str
    source: Node
    order: tuple[int, ...] = ()


def _rank(source: Node) -> int:
    return len(source.meta["val"].shape)


def _same(*, self: Node) -> Movement:
    return Movement("same", self)


def _clone(*, self: Node, memory_format: Any) -> Movement:
    del memory_format  # strides only: no element moves
    return Movement("same", self)


def _dropout(*, input_: Node, p: float, train: bool) -> Movement | None:
    return Movement("same", input_) if not train or p == 0 else None


def _view(*, self: Node, size: Any) -> Movement:
    del size  # the shape of the result is in its meta["val"]
    return Movement("reshape", self)


def _reshape(*, self: Node, shape: Any) -> Movement:
    del shape
    return Movement("reshape", self)


def _one_dim(*, self: Node, dim: Any) -> Movement:
    del dim
    return Movement("reshape", self)


def _squeeze(*, self: Node) -> Movement:
    return Movement("reshape", self)


def _flatten(*, self: Node, start_dim: int, end_dim: int) -> Movement:
    del start_dim, end_dim
    return Movement("reshape", self)


def _unflatten(*, self: Node, dim: int, sizes: Any) -> Movement:
    del dim, sizes
    return Movement("reshape", self)


def _reverse(*, self: Node) -> Movement:
    return Movement("permute", self, tuple(reversed(range(_rank(self)))))


def _swap_last_two(*, self: Node) -> Movement:
    rank = _rank(self)
    return Movement("permute", self, (*range(rank - 2), rank - 1, rank - 2))


def _transpose(*, self: Node, dim0: int, dim1: int) -> Movement:
    order = list(range(_rank(self)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return Movement("permute", self, tuple(order))


def _swap(*, self: Node, axis0: int, axis1: int) -> Movement:
    return _transpose(self=self, dim0=axis0, dim1=axis1)


def _permute(*, self: Node, dims: Any) -> Movement:
    rank = _rank(self)
    return Movement("permute", self, tuple(d % rank for d in dims))


def _expand(*, self: Node, size: Any, implicit: bool) -> Movement:
    del size, implicit  # implicit marks where the node came from, not what it does
    return Movement("expand", self)


def movement_table() -> ReaderTable:
    """Readers of the data-movement operators."""
    return ReaderTable(_movements(), leading=0)


def movement_of(table: ReaderTable, node: Node) -> Movement | None:
    """What ``node`` does, or None where it is not a data movement (or not one of a tensor in the graph)."""
    reader = table.get(node.target)
    if reader is None:
        return None
    movement: Movement | None = call_reader(reader, node)
    return movement if movement is not None and isinstance(movement.source, Node) else None


def _movements() -> dict[Any, Callable[..., Movement | None]]:
    return {
        aten.alias.default: _same,
        aten.detach.default: _same,
        aten.lift_fresh_copy.default: _same,
        aten.lift_fresh.default: _same,
        aten.clone.default: _clone,
        aten.contiguous.default: _clone,
        aten.dropout.default: _dropout,
        aten.view.default: _view,
        aten.view_copy.default: _view,
        aten._unsafe_view.default: _view,
        aten.reshape.default: _reshape,
        aten.unsqueeze.default: _one_dim,
        aten.squeeze.default: _squeeze,
        aten.squeeze.dim: _one_dim,
        aten.squeeze.dims: _one_dim,
        aten.flatten.using_ints: _flatten,
        aten.unflatten.int: _unflatten,
        aten.t.default: _reverse,
        aten.numpy_T.default: _reverse,
        aten.mT.default: _swap_last_two,
        aten.transpose.int: _transpose,
        aten.swapaxes.default: _swap,
        aten.permute.default: _permute,
        aten.expand.default: _expand,
    }
