"""How graphs spell a matmul."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Node

from quantpass.schema import ReaderTable, call_reader, op_name

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Contraction:
    """``alpha * (lhs @ rhs) + beta * bias``.

    Attributes:
        node: the node that computes it.
        form: operator name, for reports.
        lhs: left operand, ``(..., M, K)``.
        rhs: right operand, ``(..., K, N)``, or ``(N, K)`` where ``rhs_transposed``.
        rhs_transposed: the operator transposes its right operand itself (``aten.linear``).
        bias: what is added, or None.
        alpha: factor of the product.
        beta: factor of the bias.
    """

    node: Node
    form: str
    lhs: Node
    rhs: Node
    rhs_transposed: bool = False
    bias: Node | None = None
    alpha: Any = 1
    beta: Any = 1

    @property
    def k(self) -> Any:
        return self.lhs.meta["val"].shape[-1]

    @property
    def n(self) -> Any:
        return self.rhs.meta["val"].shape[-2 if self.rhs_transposed else -1]


@dataclass(frozen=True, slots=True)
class NoContraction:
    """A matmul in a form that is not read; ``operands`` may still be quantized."""

    reason: str
    operands: tuple[Node, ...]


def contraction_table() -> ReaderTable:
    """Readers of the matmul operators."""
    return ReaderTable(
        {
            aten.mm.default: _mm,
            aten._int_mm.default: _mm,
            aten.bmm.default: _mm,
            aten.matmul.default: _matmul,
            aten.linear.default: _linear,
            aten.addmm.default: _addmm,
            aten.baddbmm.default: _baddbmm,
        },
        leading=1,
    )


def read_contraction(table: ReaderTable, node: Node) -> Contraction | NoContraction | None:
    """The matmul that ``node`` computes; None where it computes none."""
    if node.op != "call_function":
        return None
    if isinstance(node.target, HigherOrderOperator):
        return _out_dtype(table, node) if node.target is torch.ops.higher_order.out_dtype else None
    reader = table.get(node.target)  # type: ignore[call-overload]
    if reader is None:
        return None
    found: Contraction | NoContraction = call_reader(reader, node, node)
    return _checked(found)


def _checked(found: Contraction | NoContraction) -> Contraction | NoContraction | None:
    if isinstance(found, NoContraction):
        return found
    ranks = [_rank(found.lhs), _rank(found.rhs)]
    if None in ranks:
        return None
    if min(r for r in ranks if r is not None) < 2:
        return NoContraction(
            f"{found.form} of operands of rank {ranks[0]} and {ranks[1]}: a vector has no rows",
            (found.lhs, found.rhs),
        )
    return found


def _rank(node: Any) -> int | None:
    fake = node.meta.get("val") if isinstance(node, Node) else None
    return fake.dim() if isinstance(fake, torch.Tensor) else None


def _mm(node: Node, *, self: Node, mat2: Node) -> Contraction:
    return Contraction(node, op_name(node), self, mat2)


def _matmul(node: Node, *, self: Node, other: Node) -> Contraction:
    return Contraction(node, op_name(node), self, other)


def _linear(node: Node, *, input_: Node, weight: Node, bias: Node | None) -> Contraction:
    return Contraction(node, op_name(node), input_, weight, rhs_transposed=True, bias=bias)


def _addmm(node: Node, *, self: Node, mat1: Node, mat2: Node, beta: Any, alpha: Any) -> Contraction:
    return Contraction(node, op_name(node), mat1, mat2, bias=self, alpha=alpha, beta=beta)


def _baddbmm(node: Node, *, self: Node, batch1: Node, batch2: Node, beta: Any, alpha: Any) -> Contraction:
    return Contraction(node, op_name(node), batch1, batch2, bias=self, alpha=alpha, beta=beta)


def _out_dtype(table: ReaderTable, node: Node) -> Contraction | NoContraction | None:
    """``out_dtype(op, dtype, *args)``: ``op`` with its result accumulated and returned in ``dtype``."""
    inner: Any = node.args[0]
    dtype, *arguments = node.args[1:]
    reader: Callable[..., Any] | None = table.get(inner) if isinstance(inner, OpOverload) else None
    if reader is None:
        return None
    operands = [a for a in arguments if isinstance(a, Node)]
    name = f"out_dtype({inner._schema.name.replace('::', '.')})"
    if dtype != torch.int32 or inner not in (aten.mm.default, aten.bmm.default, aten.matmul.default) or node.kwargs:
        return NoContraction(f"{name} with result dtype {dtype}", tuple(operands))
    if any(o.meta["val"].dtype != torch.int8 for o in operands):
        return NoContraction(f"{name} of operands that are not int8", tuple(operands))
    return _checked(Contraction(node, name, operands[0], operands[1]))
