"""Decoding ATen's operators into instructions, every argument of theirs accounted for.

A decoder's keyword parameters are all arguments of its operator: :class:`~quantpass.graph.schema.ReaderTable` refuses
one that leaves an argument out, and a linter rule one that is named and not used. An argument that says nothing about
elements is deleted by name. A decoder returns None where arguments make the operator something else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.fx import Node

from quantpass.graph.instructions import Add, Cast, Clamp, Instruction, Move, Multiply, Operand, Part, Round
from quantpass.graph.schema import ReaderTable, bind_call, parameters

aten = torch.ops.aten
prims = torch.ops.prims


@dataclass(frozen=True, slots=True)
class _Permuted:
    """A permutation before the rank is known: ``order`` puts a list of dimensions in their new order."""

    source: Node
    order: Callable[[list[int]], list[int]]


def decode(node: Node) -> Instruction | None:
    """What ``node`` does to its operand's elements; None for an operator or arguments that are not understood."""
    fake = node.meta.get("val")
    rank = fake.dim() if isinstance(fake, torch.Tensor) else 0
    found = decode_call(node.target, node.args, node.kwargs, rank)
    return None if isinstance(found, Move) and not isinstance(found.source, Node) else found


def decode_call(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], rank: int) -> Instruction | None:
    """The same of an operator, what it is called with, and the rank of its result."""
    decoder = decoders().get(target)
    found = None if decoder is None else decoder(**parameters(bind_call(target, args, kwargs)))
    if isinstance(found, _Permuted):
        return Move("permute", found.source, tuple(found.order(list(range(rank)))))
    return found


def rounds(target: Any) -> bool:
    """True for an operator that :func:`decode` reads as a rounding."""
    return decoders().get(target) in (_round, _floor, _ceil, _trunc)


class Decoder:
    """:func:`decode` for the nodes of one graph, each looked at once."""

    def __init__(self) -> None:
        self._known: dict[Node, Instruction | None] = {}

    def __call__(self, node: Node) -> Instruction | None:
        if node not in self._known:
            self._known[node] = decode(node)
        return self._known[node]


# -- movements ---------------------------------------------------------------------------------------------------------


def _same(*, self: Node) -> Move:
    return Move("same", self)


def _clone(*, self: Node, memory_format: Any) -> Move:
    del memory_format  # strides only: no element moves
    return Move("same", self)


def _dropout(*, input_: Node, p: float, train: bool) -> Move | None:
    return Move("same", input_) if not train or p == 0 else None


def _view(*, self: Node, size: Sequence[Operand]) -> Move:
    return Move("reshape", self, sizes=tuple(size))


def _reshape(*, self: Node, shape: Sequence[Operand]) -> Move:
    return Move("reshape", self, sizes=tuple(shape))


def _one_dim(*, self: Node, dim: Any) -> Move:
    del dim  # the shape of the result is in its meta["val"]
    return Move("reshape", self)


def _squeeze(*, self: Node) -> Move:
    return Move("reshape", self)


def _flatten(*, self: Node, start_dim: int, end_dim: int) -> Move:
    del start_dim, end_dim
    return Move("reshape", self)


def _unflatten(*, self: Node, dim: int, sizes: Any) -> Move:
    del dim, sizes
    return Move("reshape", self)


def _reverse(*, self: Node) -> _Permuted:
    return _Permuted(self, lambda dims: dims[::-1])


def _swap_last_two(*, self: Node) -> _Permuted:
    return _transpose(self=self, dim0=-2, dim1=-1)


def _transpose(*, self: Node, dim0: int, dim1: int) -> _Permuted:
    def swapped(dims: list[int]) -> list[int]:
        if dims:
            dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
        return dims

    return _Permuted(self, swapped)


def _swap(*, self: Node, axis0: int, axis1: int) -> _Permuted:
    return _transpose(self=self, dim0=axis0, dim1=axis1)


def _permute(*, self: Node, dims: Sequence[int]) -> _Permuted:
    return _Permuted(self, lambda own: [own[d] for d in dims])


def _expand(*, self: Node, size: Sequence[Operand], implicit: bool) -> Move:
    del implicit  # marks where the node came from, not what it does
    return Move("expand", self, sizes=tuple(size))


def _slice(*, self: Any, dim: int, start: Any, end: Any, step: Any) -> Part | Move:
    """All elements, as PyTorch before 2.9 traces ``x[:, None]``, or some: which is not said, only that they are its."""
    del dim
    if start in (None, 0) and end in (None, sys.maxsize) and step == 1:
        return Move("same", self)
    return Part(self)


def _select(*, self: Operand, dim: int, index: Any) -> Part:
    del dim, index
    return Part(self)


# -- arithmetic --------------------------------------------------------------------------------------------------------


def _mul(*, self: Operand, other: Operand) -> Multiply:
    return Multiply(self, other)


def _div(*, self: Operand, other: Operand) -> Multiply:
    return Multiply(self, other, inverted=True)


def _add(*, self: Operand, other: Operand, alpha: Operand) -> Add | None:
    return Add(self, other, alpha) if isinstance(alpha, int | float) else None


def _sub(*, self: Operand, other: Operand, alpha: Operand) -> Add | None:
    return Add(self, other, -alpha) if isinstance(alpha, int | float) else None


def _to_copy(
    *,
    self: Operand,
    dtype: torch.dtype | None,
    layout: Any,
    device: Any,
    pin_memory: Any,
    non_blocking: bool,
    memory_format: Any,
) -> Cast | None:
    del device, pin_memory, non_blocking, memory_format  # where and how the copy lies in memory, not what it holds
    return Cast(self, dtype) if layout in (None, torch.strided) else None


def _to_dtype(*, self: Operand, dtype: torch.dtype, non_blocking: bool, copy: bool, memory_format: Any) -> Cast:
    del non_blocking, copy, memory_format
    return Cast(self, dtype)


def _convert_element_type(*, a: Operand, dtype: torch.dtype) -> Cast:
    return Cast(a, dtype)


def _clamp(*, self: Operand, min: Operand | None, max: Operand | None) -> Clamp:
    return Clamp(self, min, max)


def _clamp_min(*, self: Operand, min: Operand) -> Clamp:
    return Clamp(self, min, None)


def _clamp_max(*, self: Operand, max: Operand) -> Clamp:
    return Clamp(self, None, max)


def _maximum(*, self: Operand, other: Operand) -> Clamp:
    return Clamp(self, other, None, exchangeable=True)


def _minimum(*, self: Operand, other: Operand) -> Clamp:
    return Clamp(self, None, other, exchangeable=True)


def _relu(*, self: Operand) -> Clamp:
    return Clamp(self, 0, None)


def _round(*, self: Operand) -> Round:
    return Round(self, "nearest")


def _floor(*, self: Operand) -> Round:
    return Round(self, "down")


def _ceil(*, self: Operand) -> Round:
    return Round(self, "up")


def _trunc(*, self: Operand) -> Round:
    return Round(self, "zero")


@cache
def decoders() -> ReaderTable[Instruction | _Permuted | None]:
    """The decoder of each operator."""
    return ReaderTable(
        {
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
            aten.slice.Tensor: _slice,
            aten.select.int: _select,
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
            prims.convert_element_type.default: _convert_element_type,
            aten.clamp.default: _clamp,
            aten.clamp.Tensor: _clamp,
            aten.clamp_min.default: _clamp_min,
            aten.clamp_min.Tensor: _clamp_min,
            aten.clamp_max.default: _clamp_max,
            aten.clamp_max.Tensor: _clamp_max,
            aten.maximum.default: _maximum,
            aten.minimum.default: _minimum,
            aten.relu.default: _relu,
            aten.round.default: _round,
            aten.floor.default: _floor,
            aten.ceil.default: _ceil,
            aten.trunc.default: _trunc,
        },
        leading=0,
    )
