"""The ``native`` lowering: the fused operators through the fastest kernels that PyTorch itself has for this processor.

A matmul by a weight that is known when compiling becomes a product (:mod:`quantpass.lowering.cpu_products`, chosen by
:mod:`quantpass.lowering.cpu_contest`) and, around it, the operator's own arithmetic as ATen operators, which an inner
compiler can fuse. What is not of that kind stays as it is, with the reference kernel.

* integer products are exact, and everything behind them is the reference's own code: the results are bit-equal;
* products of floating activations add in another order, and round once more where something is added behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from quantpass.graph.torch_internals import real_tensors
from quantpass.graph.writes import written_arguments
from quantpass.lowering.cpu_contest import fastest
from quantpass.lowering.cpu_products import (
    INTEGER_PRODUCTS,
    WEIGHT_ONLY_PRODUCTS,
    Product,
    StaticWeight,
    Tensors,
    int4_product,
)
from quantpass.lowering.expansion import expand
from quantpass.operators.arguments import Arguments, matrix_shape
from quantpass.operators.integer_matmul import rows_apart
from quantpass.operators.quant_matmul import QUANT_MATMUL, dequantized
from quantpass.operators.results import to_float
from quantpass.operators.weight_quant_matmul import WEIGHT_QUANT_MATMUL

if TYPE_CHECKING:
    from quantpass.chips.rules import Chip
    from quantpass.graph.constants import Constants

aten = torch.ops.aten
_LARGEST_K = 65535
"""Sums of this many products of codes that were moved up by 128 fit int32."""

_TO_FLOAT = tuple({"dtype": d} for d in (torch.float32, torch.bfloat16, torch.float16))


class Native:
    """Matmuls by static weights through PyTorch's own CPU kernels."""

    name = "native"
    mode = "graph"
    needs_a_chip = False
    keeps_casts = False

    def prepare(self, chip: Chip) -> None:
        """Nothing: what is fastest is measured when a weight is there."""

    def lower(self, gm: GraphModule, constants: Constants | None = None) -> None:
        """Replace what can be; operators whose weight is not known keep the reference kernel."""
        if constants is None:
            return
        graph = _NativeGraph(gm, constants)
        changed = [graph.lower(n) for n in list(gm.graph.nodes)]
        if any(changed):
            constants.drop_unread()
            gm.graph.lint()
            gm.recompile()


class _NativeGraph:
    def __init__(self, gm: GraphModule, constants: Constants) -> None:
        self._gm, self._constants = gm, constants
        self._written = _behind(w for n in gm.graph.nodes for w in written_arguments(n))

    def lower(self, node: Node) -> bool:
        """Replace ``node`` where it is a matmul that can be; whether it was."""
        if node.target is QUANT_MATMUL.overload:
            return self._quant_matmul(node, QUANT_MATMUL.bind(node))
        if node.target is WEIGHT_QUANT_MATMUL.overload:
            return self._weight_quant_matmul(node, WEIGHT_QUANT_MATMUL.bind(node))
        return False

    def _quant_matmul(self, node: Node, a: Arguments) -> bool:
        codes = self._values(a.x2)
        grouped = bool(a.group_sizes and a.group_sizes[-1])
        if codes is None or codes.dim() != 2 or grouped or not self._is_matrix(a.x1, a.transpose_x1, torch.int8):
            return False
        out = a.output_dtype or torch.int8
        k, n = matrix_shape(codes, a.transpose_x2)
        whole = _needs_int32(node) if out == torch.int32 else _is_int32(a.bias)
        products = [p for p in INTEGER_PRODUCTS if not (whole and p.rounds_sums)]
        won = self._fastest(products, StaticWeight(codes, a.transpose_x2), a.x1, (k, n)) if k <= _LARGEST_K else None
        if won is None:
            return False
        named = {"scale": a.scale, "offset": a.offset, "pertoken_scale": a.pertoken_scale, "bias": a.bias}

        scale = self._values(a.scale)
        through_word = out == torch.int8 or (out == torch.float16 and a.pertoken_scale is None)
        if scale is not None and scale.dtype != torch.int64 and not through_word and _is_one(scale):
            named["scale"] = None  # a pass over the sums that changes none

        def tail(acc: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
            parameters: Any = {name: given.get(name) for name in named}
            return dequantized(acc, out=out, saturate=a.saturate, **parameters)

        self._replace(node, a.x1, won, named, tail)
        return True

    def _weight_quant_matmul(self, node: Node, a: Arguments) -> bool:
        parameters = [self._values(t) for t in (a.weight, a.antiquant_scale, a.antiquant_offset, a.bias)]
        given = (a.weight, a.antiquant_scale, a.antiquant_offset, a.bias)
        unknown = any(node is not None and value is None for node, value in zip(given, parameters, strict=True))
        dtype = a.x.meta["val"].dtype
        if unknown or a.template != "custom" or a.quant_scale is not None:
            return False
        if not self._is_matrix(a.x, a.transpose_x, dtype) or a.weight.meta["val"].dim() != 2:
            return False
        codes, scale, offset, bias = parameters
        assert codes is not None
        weight = StaticWeight(codes, a.transpose_weight, scale, offset, a.antiquant_group_size, bias)
        products = [*WEIGHT_ONLY_PRODUCTS, int4_product(a.antiquant_group_size)]
        won = self._fastest(products, weight, a.x, matrix_shape(codes, a.transpose_weight))
        if won is None:
            return False
        named = {} if won[0].adds_bias else {"bias": a.bias}

        def tail(y: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
            if "bias" in given:
                y = y.to(torch.float32) + given["bias"].reshape(-1).to(torch.float32)
            return to_float(y, dtype, a.saturate)

        self._replace(node, a.x, won, named, tail)
        return True

    def _is_matrix(self, x: Node, transposed: bool, dtype: torch.dtype) -> bool:
        """A matrix, or a stack of them whose sizes a view can name: all known, or all but one."""
        t = x.meta["val"]
        unknown = [s for s in t.shape[:-1] if not isinstance(s, int)]
        return t.dtype == dtype and not transposed and t.dim() >= 2 and len(unknown) <= 1

    def _values(self, node: Node | None) -> torch.Tensor | None:
        """The tensor behind an argument; None where it is not known, or the graph writes to it."""
        if not isinstance(node, Node) or node in self._written:
            return None
        return self._constants.values_of(node)

    def _fastest(
        self, products: Sequence[Product], weight: StaticWeight, x: Node, shape: tuple[int, int]
    ) -> tuple[Product, Tensors] | None:
        able = [p for p in products if self._constants.keeps_any_layout or not p.opaque]
        rows = x.meta["val"].shape[:-1]
        m = math.prod(rows) if all(isinstance(r, int) for r in rows) else None
        with torch.no_grad(), real_tensors():
            return fastest(able, weight, shape, x.meta["val"].dtype, m)

    def _replace(self, node: Node, x: Node, won: tuple[Product, Tensors], named: dict[str, Any], tail: Any) -> None:
        product, prepared = won
        kept = [self._keep(f"{node.name}_{i}", t, x) for i, t in enumerate(prepared)]
        others = {name: n for name, n in named.items() if n is not None}
        rows = [r if isinstance(r, int) else -1 for r in x.meta["val"].shape[:-1]]
        stacked, several = len(rows) > 1, min(rows) > 0 and math.prod(rows) > 1
        inputs = list(dict.fromkeys((x, *kept, *others.values())))
        known = {n: t for n in others.values() if (t := self._values(n)) is not None}

        def run(*values: torch.Tensor) -> torch.Tensor:
            at = dict(zip(inputs, values, strict=True))
            flat = at[x].reshape(-1, at[x].shape[-1]) if stacked else at[x]
            flat = flat.contiguous() if several else rows_apart(flat)
            acc = product.run(flat, *(at[n] for n in kept))
            acc = acc.view(*rows, acc.shape[-1]) if stacked else acc
            result: torch.Tensor = tail(acc, {name: at[n] for name, n in others.items()})
            return result

        expand(self._gm, node, run, inputs, known, partial(self._keep, like=x))

    def _keep(self, name: str, tensor: torch.Tensor, like: Node) -> Node:
        with real_tensors():
            node = self._constants.add(name, tensor)
        node.meta["val"] = like.meta["val"].new_empty(tuple(tensor.shape), dtype=tensor.dtype)
        return node


def _behind(nodes: Iterable[Node]) -> set[Node]:
    """``nodes`` and everything that they are computed from, which they may be views of."""
    found, stack = set[Node](), list(nodes)
    while stack:
        if (n := stack.pop()) not in found:
            found.add(n)
            stack.extend(n.all_input_nodes)
    return found


def _is_one(scale: torch.Tensor) -> bool:
    with real_tensors():
        return bool((scale == 1).all())


def _is_int32(bias: Node | None) -> bool:
    return bias is not None and bias.meta["val"].dtype == torch.int32


def _needs_int32(node: Node) -> bool:
    """Whether a user of integer sums wants more of them than float32 holds; PyTorch narrows to halves through it."""
    return not all(u.target is aten._to_copy.default and dict(u.kwargs) in _TO_FLOAT for u in node.users)
