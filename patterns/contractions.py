"""How graphs spell a matmul."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch._ops import OpOverload
from torch.fx import Node

from quantpass.basics.symbolic import is_one
from quantpass.graph.schema import ReaderTable, call_reader, op_name

aten = torch.ops.aten

_WRAPPING = (torch.int8, torch.uint8, torch.int16)
"""Result dtypes too small for a sum of products of codes."""


@dataclass(frozen=True, slots=True)
class Own:
    """Something that a matmul operator does to its product by itself.

    Attributes:
        kind: ``"scale"``, ``"add"``, ``"cast"`` (to the dtype of the operator's result) or ``"quantize"`` (to int8, the
            operand is the zero point).
        operand: a node or a number.
        times: a number that the operand is multiplied by.
        along: ``"columns"`` or ``"rows"`` for a vector along N or M whatever its shape; None where the operand
            broadcasts as in arithmetic.
        read: reads the operand where it is no plain tensor: ``(reader, operand, shape of the product) -> Term | None``.
    """

    kind: str
    operand: Any = None
    times: Any = 1
    along: str | None = None
    read: Callable[[Any, Any, tuple[Any, ...]], Any] | None = None


@dataclass(frozen=True, slots=True)
class Contraction:
    """A matmul: ``lhs @ rhs``, and what the operator does to the product by itself.

    Attributes:
        node: the node that computes it.
        form: operator name, for reports.
        lhs: left operand, ``(..., M, K)`` after ``lhs_order``.
        rhs: right operand, ``(..., K, N)``, or ``(N, K)`` where ``rhs_transposed``.
        rhs_transposed: the operator transposes its right operand itself (``aten.linear``).
        own: what the operator does to the product, in this order.
        whole: the operator's own steps can't be left to other nodes: a plan has to take in all of them.
        integer: the product is an int32 one although the operator returns floats.
        lhs_order: permutation that brings K last in ``lhs``; None where it is.
        out_order: permutation that takes the product ``(..., M, N)`` to what the operator returns; None for none.
        matrix: shape of ``rhs`` as a matrix, where it is stored in more dimensions (a 1x1 convolution).
        weight: reads the right operand where it is packed in a way that only this operator understands.
    """

    node: Node
    form: str
    lhs: Node
    rhs: Node
    rhs_transposed: bool = False
    own: tuple[Own, ...] = ()
    whole: bool = False
    integer: bool = False
    lhs_order: tuple[int, ...] | None = None
    out_order: tuple[int, ...] | None = None
    matrix: tuple[int, int] | None = None
    weight: Callable[[Any], Any] | None = None

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype of the product, before what the operator does to it."""
        dtype: torch.dtype = self.node.meta["val"].dtype
        return torch.int32 if self.integer else dtype

    @property
    def product_shape(self) -> tuple[Any, ...]:
        """Shape of the product, ``(..., M, N)``."""
        shape = tuple(self.node.meta["val"].shape)
        if self.out_order is None:
            return shape
        product = list(shape)
        for d, source in enumerate(self.out_order):
            product[source] = shape[d]
        return tuple(product)

    def swapped(self) -> Contraction | None:
        """``rhs^T @ lhs^T``, transposed: the same matmul with the weight on the right."""
        if self.whole or self.rhs_transposed:
            return None
        swap = tuple((*range(r - 2), r - 1, r - 2) for r in (n.meta["val"].dim() for n in (self.rhs, self.node)))
        return replace(self, lhs=self.rhs, rhs=self.lhs, rhs_transposed=True, lhs_order=swap[0], out_order=swap[1])


@dataclass(frozen=True, slots=True)
class NoContraction:
    """A matmul in a form that is not read; ``operands`` may still be quantized.

    Attributes:
        reason: what it is.
        operands: what is multiplied; one of them has to be quantized for a verdict.
        hint: what to do, where more can be said than the rule does.
        certain: the operator is a quantized matmul by its name.
        rule: what a report calls the reason.
        codes: integers that were not dequantized count as well as dequantized values.
        weights_only: only what was dequantized from stored codes counts, no quantized activation.
    """

    reason: str
    operands: tuple[Node, ...]
    hint: str = ""
    certain: bool = False
    rule: str = "read.matmul"
    codes: bool = True
    weights_only: bool = False


def contractions() -> dict[Any, Any]:
    """Readers of PyTorch's matmul operators."""
    return {
        aten.mm.default: _mm,
        aten.mm.dtype: _mm_dtype,
        aten._int_mm.default: _mm,
        aten.bmm.default: _mm,
        aten.matmul.default: _matmul,
        aten.linear.default: _linear,
        aten.addmm.default: _addmm,
        aten.baddbmm.default: _baddbmm,
        aten.convolution.default: _convolution,
        aten.conv1d.default: _conv,
        aten.conv2d.default: _conv,
    }


Matmuls: TypeAlias = ReaderTable[Contraction | NoContraction | None]


def read_contraction(table: Matmuls, node: Node) -> Contraction | NoContraction | None:
    """The matmul that ``node`` computes; None where it computes none."""
    reader = table.get(node.target)
    if reader is None:
        return _out_dtype(table, node) if node.target is torch.ops.higher_order.out_dtype else None
    found = call_reader(reader, node, node)
    return None if found is None else _checked(found)


def _checked(found: Contraction | NoContraction) -> Contraction | NoContraction | None:
    if isinstance(found, NoContraction):
        return found
    ranks = [_rank(found.lhs), _rank(found.rhs)]
    if None in ranks:
        return None
    if found.product_dtype in _WRAPPING:
        return NoContraction(
            f"{found.form} of integers with a {found.product_dtype} result, which wraps around",
            (found.lhs, found.rhs),
            "cast the operands to int32 first, or use torch._int_mm",
        )
    if found.weight is None and min(r for r in ranks if r is not None) < 2:
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


def _mm_dtype(node: Node, *, self: Node, mat2: Node, out_dtype: torch.dtype) -> Contraction | NoContraction:
    if out_dtype == self.meta["val"].dtype or (self.meta["val"].dtype, out_dtype) == (torch.int8, torch.int32):
        return Contraction(node, op_name(node), self, mat2)
    return NoContraction(f"{op_name(node)} with result dtype {out_dtype}", (self, mat2))


def _matmul(node: Node, *, self: Node, other: Node) -> Contraction:
    return Contraction(node, op_name(node), self, other)


def _linear(node: Node, *, input_: Node, weight: Node, bias: Node | None) -> Contraction:
    return Contraction(node, op_name(node), input_, weight, rhs_transposed=True, own=_weighted(1, bias, 1))


def _addmm(node: Node, *, self: Node, mat1: Node, mat2: Node, beta: Any, alpha: Any) -> Contraction:
    return Contraction(node, op_name(node), mat1, mat2, own=_weighted(alpha, self, beta))


def _baddbmm(node: Node, *, self: Node, batch1: Node, batch2: Node, beta: Any, alpha: Any) -> Contraction:
    return Contraction(node, op_name(node), batch1, batch2, own=_weighted(alpha, self, beta))


def _weighted(alpha: Any, bias: Node | None, beta: Any) -> tuple[Own, ...]:
    """``alpha * product + beta * bias``; a beta of 0 drops the bias whatever it holds."""
    scaled = () if _is(alpha, 1) else (Own("scale", alpha),)
    return scaled if bias is None or _is(beta, 0) else (*scaled, Own("add", bias, times=beta))


def _is(number: Any, value: int) -> bool:
    return isinstance(number, int | float) and number == value


def _convolution(
    node: Node,
    *,
    input_: Node,
    weight: Node,
    bias: Node | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Contraction | NoContraction | None:
    del dilation  # of a kernel with one tap
    plain = not transposed and groups == 1 and not any(output_padding)
    return _one_tap(node, input_, weight, bias, stride, padding) if plain else None


def _conv(
    node: Node, *, input_: Node, weight: Node, bias: Node | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Contraction | NoContraction | None:
    del dilation
    return _one_tap(node, input_, weight, bias, stride, padding) if groups == 1 else None


def _one_tap(
    node: Node, x: Node, weight: Node, bias: Node | None, stride: Any, padding: Any
) -> Contraction | NoContraction | None:
    """A convolution with a kernel of one element is a matmul over the channels."""
    n, c, *kernel = weight.meta["val"].shape
    rank = x.meta["val"].dim()
    if not all(map(is_one, (*kernel, *stride))) or any(padding) or rank != len(kernel) + 2:
        return None
    if not all(isinstance(s, int) for s in (n, c)):
        return NoContraction(f"{op_name(node)} with a weight of symbolic sizes", (x, weight))
    own = () if bias is None else (Own("add", bias, along="columns"),)
    return Contraction(
        node, op_name(node), x, weight, rhs_transposed=True, own=own, whole=True, matrix=(n, c),
        lhs_order=(0, *range(2, rank), 1), out_order=(0, rank - 1, *range(1, rank - 1)),
    )  # fmt: skip


def _out_dtype(table: Matmuls, node: Node) -> Contraction | NoContraction | None:
    """``out_dtype(op, dtype, *args)``: ``op`` with its result accumulated and returned in ``dtype``."""
    inner: Any = node.args[0]
    dtype, *arguments = node.args[1:]
    reader: Callable[..., Any] | None = table.get(inner) if isinstance(inner, OpOverload) else None
    if reader is None:
        return None
    operands = tuple(a for a in arguments if isinstance(a, Node))
    name = f"out_dtype({inner._schema.name.replace('::', '.')})"
    plain = (aten.mm.default, aten.bmm.default, aten.matmul.default, aten.linear.default)
    if dtype != torch.int32 or inner not in plain or node.kwargs or len(operands) != 2:
        return NoContraction(f"{name} with result dtype {dtype}", operands)
    if any(o.meta["val"].dtype not in (torch.int8, torch.int16) for o in operands):
        return NoContraction(f"{name} of operands that are no int8 or int16", operands)
    return _checked(Contraction(node, name, *operands, rhs_transposed=inner is aten.linear.default))
