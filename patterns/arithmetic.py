"""The arithmetic operators that a dequantization is spelled with."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from quantpass.basics.symbolic import same_shape
from quantpass.graph.schema import ReaderTable
from quantpass.patterns.affine import Affine, AffineReader, NotAffine

aten = torch.ops.aten


def _mul(reader: AffineReader, node: Node, *, self: Any, other: Any) -> Affine | NotAffine | None:
    return reader.arithmetic_holds(node, reader.scaled(node, self, other))


def _div(reader: AffineReader, node: Node, *, self: Any, other: Any) -> Affine | NotAffine:
    if not isinstance(self, Node) or not same_shape(self.meta["val"].shape, node.meta["val"].shape):
        return NotAffine("a number or a smaller tensor is divided")
    return reader.scaled(node, self, other, divide=True)


def _add(reader: AffineReader, node: Node, *, self: Any, other: Any, alpha: Any) -> Affine | NotAffine | None:
    if alpha != 1:
        return _weighted(reader, node, self, other, alpha)
    return reader.arithmetic_holds(node, reader.shifted(node, self, other, 1))


def _sub(reader: AffineReader, node: Node, *, self: Any, other: Any, alpha: Any) -> Affine | NotAffine | None:
    return _weighted(reader, node, self, other, -alpha)


def _weighted(reader: AffineReader, node: Node, value: Any, offset: Any, multiple: Any) -> Affine | NotAffine | None:
    """``value + multiple * offset`` where the two can't be swapped."""
    if not isinstance(value, Node) or not same_shape(value.meta["val"].shape, node.meta["val"].shape):
        return NotAffine("the first operand is smaller than the result")
    if reader.term(offset, tuple(node.meta["val"].shape)) is None:
        return NotAffine("it is a sum of two full tensors")
    return reader.arithmetic_holds(node, reader.shifted(node, value, offset, multiple))


def _to_copy(
    reader: AffineReader,
    node: Node,
    *,
    self: Any,
    dtype: Any,
    layout: Any,
    device: Any,
    pin_memory: Any,
    non_blocking: bool,
    memory_format: Any,
) -> Affine | NotAffine | None:
    del node, pin_memory, non_blocking, memory_format  # where and how the copy lies in memory, not what it holds
    if layout not in (None, torch.strided):
        return NotAffine(f"a cast to layout {layout}")
    if device is not None and isinstance(self, Node) and torch.device(device).type != self.meta["val"].device.type:
        return NotAffine("the value is moved to another device")
    return reader.converted(self, dtype)


def _convert_element_type(reader: AffineReader, node: Node, *, a: Any, dtype: Any) -> Affine | NotAffine | None:
    del node
    return reader.converted(a, dtype)


def _to_dtype(
    reader: AffineReader, node: Node, *, self: Any, dtype: Any, non_blocking: bool, copy: bool, memory_format: Any
) -> Affine | NotAffine | None:
    del node, non_blocking, copy, memory_format
    return reader.converted(self, dtype)


def arithmetic_table() -> ReaderTable:
    """Readers of the arithmetic operators that a dequantization is spelled with."""
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
        },
        leading=2,
    )
