"""The product of two quantized operands as ``npu_quant_matmul`` forms it, and what it has no term for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.fx import Node

from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.basics.symbolic import same_shape
from quantpass.graph import expr as ex
from quantpass.graph.expr import Call, Const, Expr
from quantpass.graph.records import Weight
from quantpass.graph.sums import summed
from quantpass.patterns.affine import Affine
from quantpass.planning import conventions
from quantpass.planning.candidates import FLOAT32_STEPS, Notes, aten, flattened
from quantpass.planning.composition import Composition
from quantpass.planning.guards import INT32_MAX, magnitude
from quantpass.planning.requantize import Requantized

_LARGEST_K = 65535
"""What the chips' rules demand of a K that only the run knows."""


@dataclass(frozen=True, slots=True)
class Product:
    """``codes_x @ codes_w`` and everything that turns it into the output, dtype of the output aside."""

    x: Expr
    weight: Weight
    composition: Composition
    columns: Expr
    rows: Expr | None
    acc_addend: Expr | None
    addend: Expr | None
    fixups: tuple[str, ...]
    reach: float
    """An upper bound of ``|codes_x @ codes_w|``."""
    lost: float = 0.0
    """What float32 sums may lose beside the bound that is relative to the products and the bias."""
    made: Requantized | None = None
    """Where an operator makes ``x`` by its own rule, how far that takes it from the graph's."""
    given: Expr | None = None
    """The graph's own scale, where it is no factor since the operator that quantizes is given it."""

    def with_row_scales(self) -> Product:
        """The same with a scale for each row, of ones where there was none: the form that takes a floating bias."""
        if self.rows is not None:
            return self
        return replace(
            self, rows=_ones(self.x), fixups=(*self.fixups, "a scale of 1 for each row: the bias stays a float")
        )


def refusals(activation: Affine, weight: Weight) -> Iterator[Reject]:
    """What the operator has no term for, whatever the chip."""
    if weight.zero_point is not None:
        yield refuse("qmm.weight.zero_point", "the weight has a zero point")
    if weight.group_size:
        yield refuse("qmm.weight.group", f"the weight has a scale for each group of {weight.group_size} rows of K")
    if weight.k_scale is not None:
        yield refuse("qmm.weight.k_scale", "the weight's scale varies along K")
    for factor in activation.factors:
        if factor.kind not in ("scalar", "rows"):
            yield refuse("qmm.activation.scale", f"the activation's scale varies along K ({factor.kind})")
    batched = len(ex.shape_of(weight.codes)) > 2
    if batched and any(f.kind == "rows" for f in activation.factors):
        yield refuse(
            "qmm.batched.rows", "both operands are computed at run time and the left one has a scale for each row"
        )
    zero = activation.zero_point
    if zero is None:
        return
    if zero.kind != "scalar" or batched:
        per = "stands beside a right operand of several matrices" if batched else "is different for each row"
        yield refuse("qmm.activation.zero_point", f"the activation's zero point {per}")
    elif zero.constant is None and ex.dtype_of(zero.expr).is_floating_point:
        yield refuse(
            "qmm.activation.zero_point.dtype", "the activation's zero point is known only at run time and is a float"
        )


class Products:
    """The products of one activation and one weight; what is the same for every epilogue is computed once."""

    def __init__(self, activation: Affine, weight: Weight) -> None:
        self._activation, self._weight = activation, weight
        self.reach = _reach(activation, weight)

    @cached_property
    def correction(self) -> Expr | None:
        """What the activation's zero point adds to the accumulator; None where it has none."""
        zero = self._activation.zero_point
        if zero is None:
            return None
        codes = ex.cast(zero.flat(), torch.float64 if ex.known(zero.expr) else torch.int32)
        return conventions.activation_correction(codes, _column_sums(self._weight))

    def of(self, c: Composition, made: Requantized | None = None) -> Product | Reject | None:
        """The product with everything that the epilogue ``c`` makes of it; None where the operator can't form it.

        ``made`` are other codes for the activation, and maybe another scale.
        """
        activation, weight, notes = self._activation, self._weight, Notes()
        codes = activation.codes if made is None else made.codes
        x = codes
        if len(ex.shape_of(codes)) != 2 and len(ex.shape_of(weight.codes)) == 2:
            x = flattened(codes)
            notes.did("x flattened to 2-D")
        columns, rows, lost = ex.mul(weight.scale, c.columns), list(c.rows), 0.0
        if len(ex.shape_of(weight.codes)) > 2 and not all(same_shape(ex.shape_of(r), (1,)) for r in rows):
            return None  # pertoken_scale has no batch dimension
        for factor in activation.factors:
            if factor.kind == "scalar" and factor.constant is not None:
                columns = ex.mul(columns, factor.flat())
                continue
            of_rows = factor.per_row(activation.shape)
            if of_rows is None:
                return None
            rows.append(of_rows)
        given = None
        if made is not None and (scale := made.scale) is not None:
            exchanged = _exchanged(made, rows)
            if exchanged is None:
                return None
            i, made, ratio = exchanged
            given = rows[i] if made.given else None
            rows[i : i + 1] = [] if made.given else [scale]
            columns = columns if ratio == 1 else ex.mul(columns, ex.scalar(ratio))
        elif made is not None and made.ratio != 1:
            if isinstance(columns, Const):
                columns = ex.mul(columns, ex.scalar(made.ratio))
            else:
                made = made.with_the_graphs_scale()  # no operator more at every call
        acc_addend, addend = c.acc_addend, c.addend
        if (correction := self.correction) is not None:
            acc_addend = correction if acc_addend is None else ex.add(acc_addend, correction)
            notes.did("activation zero point folded into the bias")
        if isinstance(acc_addend, Const) and ex.is_all(acc_addend, 0):
            acc_addend = None
        if acc_addend is not None and made is not None and made.scale is not None:
            return None  # an integer in units of the graph's scale
        if acc_addend is not None and not ex.is_whole(acc_addend):
            # Of a zero point that is no integer, only the whole part can enter the integer accumulator.
            if rows:
                return None
            if not isinstance(acc_addend, Const) or not isinstance(columns, Const):
                return refuse(
                    "qmm.activation.zero_point.fraction",
                    "the activation's zero point is no integer, and a scale or the weight is known only at run time",
                )
            whole = Const(acc_addend.tensor.round())
            rest = Const((acc_addend.tensor - whole.tensor) * columns.tensor)
            addend = rest if addend is None else ex.add(ex.wide(addend), rest)
            acc_addend, lost = None if ex.is_all(whole, 0) else whole, rounding_of(rest)
        fixups, row_scale = tuple(notes.fixups), _row_scale(rows, x)
        return Product(x, weight, c, columns, row_scale, acc_addend, addend, fixups, self.reach, lost, made, given)


def _exchanged(made: Requantized, rows: list[Expr]) -> tuple[int, Requantized, float] | None:
    """Which of ``rows`` is the graph's scale; ``made`` with its roundings; and its multiple."""
    for i, factor in enumerate(rows):
        found = made.in_place_of(factor)
        if found is not None:
            return i, *found
    return None


def _reach(activation: Affine, weight: Weight) -> float:
    largest_x = max(map(abs, activation.span))
    largest_w = max(abs(weight.low), abs(weight.high))
    k = weight.k if isinstance(weight.k, int) else _LARGEST_K
    return float(k * largest_x * largest_w)


def accumulator_problem(p: Product, addend: Expr | None, ranges: Mapping[Node, tuple[float, float]]) -> Reject | None:
    """Why ``acc + addend`` might not fit int32, ``addend`` in units of the accumulator.

    Args:
        p: the product.
        addend: constants, or integers of the run.
        ranges: what the graph guarantees of integer nodes.
    """
    if addend is None:
        return None
    largest = magnitude(addend, ranges)
    if largest + p.reach <= INT32_MAX:
        return None
    if isinstance(addend, Const):
        return refuse(
            "qmm.bias.range",
            f"the bias is up to {largest:.3g} in units of the scale",
            want=f"a sum with the product of at most {INT32_MAX}",
        )
    return refuse(
        "qmm.bias.runtime",
        "what is added to the accumulator is known only at run time, and nothing in the graph bounds it",
        want=f"a sum with the product of at most {INT32_MAX}, whatever the run brings",
        hint="clamp the zero point to the codes' range, keep it in an int8 or uint8 tensor, or quantize symmetrically",
    )


def rounding_of(addend: Const) -> float:
    """How far a float32 sum with ``addend`` may be off where the rest of the sum cancels it."""
    return FLOAT32_STEPS * float(addend.tensor.abs().max())


def _column_sums(weight: Weight) -> Expr:
    """Sum of the codes of each column, ``(N,)``."""
    dim = 1 if weight.transposed else 0
    if isinstance(weight.codes, Const):
        return Const(summed(weight.codes.tensor, dim, torch.int64).to(torch.float64))
    return Call(aten.sum.dim_IntList, (weight.codes, [dim]), {"dtype": torch.int32}, torch.int32, (weight.n,))


def _row_scale(rows: list[Expr], x: Expr) -> Expr | None:
    """The product of the row factors as a float32 vector ``(M,)``."""
    if not rows:
        return None
    product = ex.cast(rows[0], torch.float32)
    for factor in rows[1:]:
        product = ex.mul(product, ex.cast(factor, torch.float32))
    if not same_shape(ex.shape_of(product), (1,)):
        return product
    m = ex.shape_of(x)[-2]
    if isinstance(m, int) and m == 1:
        return product
    ones = ex.apply(aten.new_ones.default, product, [_rows_size(x)], dtype=torch.float32, shape=(m,))
    return ex.mul(product, ones)


def _ones(x: Expr) -> Expr:
    """``(M,)`` ones in float32; M is that of ``x``."""
    m = ex.shape_of(x)[-2]
    if isinstance(m, int):
        return Const(torch.ones(m), label="unit_rows")
    return Call(aten.new_ones.default, (x, [_rows_size(x)]), {"dtype": torch.float32}, torch.float32, (m,))


def _rows_size(x: Expr) -> object:
    m = ex.shape_of(x)[-2]
    return m if isinstance(m, int) else Call(aten.sym_size.int, (x, -2), {}, torch.int64, ())


def wide_node(e: Expr) -> Expr:
    """A node in float32; a constant as it is."""
    return e if isinstance(e, Const) else ex.cast(e, torch.float32)
