"""Factors, zero points and addends: tensors that broadcast against the value they meet.

A term follows its value through views: where the value is reshaped or permuted, :meth:`Term.moved` says what the term
looks like afterwards, or that it no longer lines up with a dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from quantpass.basics.symbolic import is_one, same_size
from quantpass.graph import expr as ex
from quantpass.graph.expr import Const, Expr
from quantpass.graph.instructions import Move
from quantpass.graph.static_values import StaticValues

aten = torch.ops.aten

_MANY = 1 << 18


@dataclass(frozen=True, slots=True)
class Term:
    """A tensor aligned with a value.

    Attributes:
        expr: the tensor, in any shape with the row-major order of ``shape``.
        shape: rank of the value; 1 in every dimension along which the term does not vary.
    """

    expr: Expr
    shape: tuple[Any, ...]

    @property
    def kind(self) -> str:
        """``"scalar"``, ``"columns"`` (varies along the last dimension), ``"rows"`` (along others), ``"other"``."""
        *leading, last = [not is_one(s) for s in self.shape] or [False]
        if not any(leading):
            return "columns" if last else "scalar"
        return "other" if last else "rows"

    @property
    def constant(self) -> torch.Tensor | None:
        return self.expr.tensor if isinstance(self.expr, Const) else None

    def moved(self, movement: Move, before: Sequence[Any], after: Sequence[Any]) -> Term | None:
        """This term after its value of shape ``before`` was moved into shape ``after``; None where it can't follow."""
        if self.kind == "scalar":
            return replace(self, shape=(1,) * len(after))
        if movement.kind == "same":
            return self
        if movement.kind == "permute":
            return self.permuted(movement.order)
        if movement.kind == "expand":
            added = len(after) - len(before)
            return replace(self, shape=(1,) * added + self.shape)
        return self._reshaped(before, after)

    def _reshaped(self, before: Sequence[Any], after: Sequence[Any]) -> Term | None:
        if not after or not before or not same_size(before[-1], after[-1]):
            return None
        if self.kind == "columns":
            return replace(self, shape=(1,) * (len(after) - 1) + self.shape[-1:])
        full = all(is_one(b) or not is_one(s) for s, b in zip(self.shape[:-1], before[:-1], strict=True))
        return replace(self, shape=(*after[:-1], 1)) if self.kind == "rows" and full else None

    def permuted(self, order: tuple[int, ...]) -> Term | None:
        """This term after its value's dimensions were put into another order."""
        shape = tuple(self.shape[d] for d in order)
        moving = [d for d in order if not is_one(self.shape[d])]
        if moving == sorted(moving):
            return replace(self, shape=shape)
        if not all(isinstance(s, int) for s in self.shape):
            return None
        full = ex.reshape(self.expr, self.shape)
        return Term(ex.apply(aten.permute.default, full, list(order), dtype=ex.dtype_of(full), shape=shape), shape)

    def per_row(self, shape: Sequence[Any]) -> Expr | None:
        """The term of a value ``(..., M, N)`` as a vector with one element for each row, all leading dimensions in one.

        A scalar keeps its one element; None where the term varies along N, or only symbolic sizes could tell.
        """
        if self.kind == "scalar":
            return self.flat()
        if self.kind != "rows":
            return None
        lead = tuple(shape[:-1])
        if all(is_one(size) or not is_one(own) for own, size in zip(self.shape[:-1], lead, strict=True)):
            return self.flat()
        if not all(isinstance(s, int) for s in (*lead, *self.shape)):
            return None
        return ex.reshape(ex.expanded(ex.reshape(self.expr, self.shape), (*lead, 1)), (-1,))

    def flat(self) -> Expr:
        """The term as a vector (a scalar has one element)."""
        return ex.reshape(self.expr, (1,) if self.kind == "scalar" else (-1,))


def term_of(values: StaticValues, value: Any, shape: Sequence[Any]) -> Term | None:
    """Read ``value`` (a number or a node) as a term of something of shape ``shape``.

    None where it is not a numeric tensor that broadcasts against that shape without enlarging it.
    """
    rank = len(shape)
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return Term(ex.scalar(value), (1,) * rank)
    if not isinstance(value, Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return None
    uniform = values.uniform(value)
    if uniform is not None:
        return Term(ex.scalar(uniform), (1,) * rank)
    value = _unexpanded(values, value)
    fake = value.meta["val"]
    if fake.dtype == torch.bool or fake.dtype.is_complex or fake.dim() > rank:
        return None
    aligned = (1,) * (rank - fake.dim()) + tuple(fake.shape)
    if not all(is_one(t) or same_size(t, s) for t, s in zip(aligned, shape, strict=True)):
        return None
    # A dimension of size 1 on both sides does not vary; aligned already says 1 there.
    expr = values.expr(value)
    if isinstance(expr, Const):
        expr = Const(expr.tensor, expr.origin, expr.label)
    return Term(expr, aligned)


def is_matrix(values: StaticValues, value: Any, shape: Sequence[Any]) -> bool:
    """True for a known tensor of many elements that varies along the last dimension of ``shape`` and along others."""
    if not isinstance(value, Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return False
    if values.uniform(value) is not None or not values.is_static(value):
        return False
    fake = _unexpanded(values, value).meta["val"]
    aligned = (1,) * (len(shape) - fake.dim()) + tuple(fake.shape)
    several = isinstance(fake.numel(), int) and fake.numel() >= _MANY and fake.dim() <= len(shape)
    return several and not is_one(aligned[-1]) and any(not is_one(s) for s in aligned[:-1])


def _unexpanded(values: StaticValues, node: Node) -> Node:
    """The source of a broadcast made explicit: ``expand`` adds nothing that broadcasting would not."""
    while isinstance(move := values.decode(node), Move) and move.kind == "expand":
        if move.source.meta["val"].dim() != node.meta["val"].dim():
            break
        node = move.source
    return node
