"""The last resort for an integer product: the product alone, in float16.

The operator multiplies by a power of two that keeps every product below float16's largest number, and the graph scales
in float32 what comes out: each product is rounded once, none overflows and none is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from quantpass.basics.reject import Reject
from quantpass.chips import NPUS
from quantpass.chips.legality import HALF_OPT_IN
from quantpass.chips.quant_matmul import QMM
from quantpass.chips.rules import Chip
from quantpass.graph import expr as ex
from quantpass.graph.expr import Const
from quantpass.graph.records import Numerics, Weight
from quantpass.operators.quant_matmul import QUANT_MATMUL
from quantpass.patterns.affine import Affine
from quantpass.patterns.sites import Reading
from quantpass.planning.candidates import (
    FLOAT32_STEPS,
    Candidate,
    LaidOut,
    call_op,
    in_output_form,
    planned_call,
    weight_layouts,
)
from quantpass.planning.composition import Composition
from quantpass.planning.guards import magnitude
from quantpass.planning.options import Options
from quantpass.planning.quant_matmul import UNDERFLOW, of_codes, scale_problem, scale_word, scaled_in_graph, wraps
from quantpass.planning.quant_product import Product, Products, refusals

_LARGEST = torch.finfo(torch.float16).max
_SMALLEST = torch.finfo(torch.float16).smallest_normal


def half_product_candidates(
    reading: Reading, compositions: list[Composition], chip: Chip, options: Options
) -> Iterator[Candidate | Reject]:
    """Candidates where the user allows float16; of an integer graph, with the graph's own roundings if it is strict."""
    activation, weight = reading.activation, reading.weight
    if HALF_OPT_IN not in options.allow or chip.name not in NPUS:
        return
    if not isinstance(activation, Affine) or not isinstance(weight, Weight):
        return
    if any(refusals(activation, weight)) or len(ex.shape_of(weight.codes)) > 2:
        return
    strict = reading.node.meta["val"].dtype == torch.int32 and options.numerics == "strict"
    layouts = tuple(weight_layouts(weight, chip, QMM, options, int4=False))
    products = Products(activation, weight)
    for c in reversed(compositions):
        if not c.complete or c.requantize is not None or not c.dtype.is_floating_point or (strict and not c.faithful):
            continue
        p = products.of(c)
        if not isinstance(p, Product) or scale_problem(p) or wraps(p, reading):
            continue
        if p.rows is None and not of_codes(reading):
            continue  # the operator takes all of it
        power = _power(p, reading)
        if power is not None:
            yield from (_emit(reading, p, power, laid_out, chip, options) for laid_out in layouts)


def _power(p: Product, reading: Reading) -> float | None:
    """The power of two that brings the largest accumulator below 65504; None where the smallest would be lost."""
    reach = p.reach + (0.0 if p.acc_addend is None else magnitude(p.acc_addend, reading.ranges))
    power = 2.0 ** min(0, math.floor(math.log2(_LARGEST / reach))) if 0 < reach < math.inf else 0.0
    return power if power >= _SMALLEST else None


def _emit(reading: Reading, p: Product, power: float, laid_out: LaidOut, chip: Chip, options: Options) -> Candidate:
    c, m, n = p.composition, ex.shape_of(p.x)[-2], p.weight.n
    bias = None if p.acc_addend is None else ex.cast(p.acc_addend, torch.int32)
    arguments = {
        "x1": p.x,
        "x2": laid_out.expr,
        "scale": ex.named(scale_word(Const(torch.full((1,), power)), 0.0), "scale_word"),
        "bias": None if bias is None else ex.named(ex.expanded(bias, (n,)), "bias"),
        "output_dtype": torch.float16,
        "transpose_x2": laid_out.transposed,
        "saturate": chip.saturates,
    }
    call = planned_call(QUANT_MATMUL, arguments, laid_out, options)
    value = scaled_in_graph(call_op(QUANT_MATMUL, arguments, torch.float16, (m, n)), _times(p, 1 / power))
    value = in_output_form(ex.cast(value, c.dtype), reading, c)
    fixups = (*p.fixups, *laid_out.fixups, "product computed in float16, scaled in float32 in the graph")
    absolute = p.lost + (0.0 if isinstance(p.columns, Const) else UNDERFLOW)
    numerics = Numerics("bounded", 2.0**-11 + FLOAT32_STEPS, absolute, ("the integer product rounded to float16",))
    notes = ("the integer product is rounded to float16, as allow permits",)
    return Candidate(call, c, value, laid_out.format, numerics, fixups, notes=notes)


def _times(p: Product, factor: float) -> Product:
    """``p`` with a factor that costs nothing in constants, and little on the vector of row scales."""
    if p.rows is None or (isinstance(p.columns, Const) and not ex.is_all(p.columns, 1.0)):
        return replace(p, columns=ex.mul(p.columns, ex.scalar(factor)))
    return p if factor == 1 else replace(p, rows=ex.mul(p.rows, ex.scalar(factor)))
