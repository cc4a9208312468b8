"""Planning ``npu_quant_matmul_dequant``: rows of float16 that the operator quantizes itself, and a quantized weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.chips.legality import HALF_OPT_IN
from quantpass.chips.quant_matmul_dequant import QMMD
from quantpass.chips.rules import Chip
from quantpass.graph import expr as ex
from quantpass.graph.expr import Call, Const, Expr, Ref
from quantpass.graph.records import Numerics, Weight
from quantpass.graph.torch_internals import known_contiguous
from quantpass.operators.quant_matmul_dequant import QUANT_MATMUL_DEQUANT
from quantpass.patterns.affine import Affine
from quantpass.patterns.sites import Reading
from quantpass.planning.candidates import (
    FLOAT32_STEPS,
    Candidate,
    LaidOut,
    aten,
    call_op,
    in_output_form,
    planned_call,
    weight_layouts,
)
from quantpass.planning.composition import Composition
from quantpass.planning.guards import INT32_MAX
from quantpass.planning.options import Options
from quantpass.planning.quant_matmul import UNDERFLOW, scale_problem
from quantpass.planning.quant_product import Product, Products, refusals
from quantpass.planning.requantize import Requantized

_BLOCK = 16
"""Sizes of a weight in ND are multiples of it."""

_MOST = 2.0
"""How much larger padding may make a weight: each call reads all of it."""

_HALF = torch.finfo(torch.float16)

_SMALL = 16.0
"""Half a unit of the largest float16."""


def has_it(chip: Chip) -> bool:
    """True for a chip that has the operator."""
    return QMMD in chip.layouts


def quant_matmul_dequant_candidates(
    reading: Reading,
    compositions: list[Composition],
    chip: Chip,
    options: Options,
    made: Requantized | Reject | None,
) -> Iterator[Candidate | Reject]:
    """Candidates from the most to the least complete epilogue; none where the graph finds no scale for x.

    A scale for each row the operator finds itself; one for all of x is the graph's.

    ``made`` are the activation's codes as an operator makes them, or why none can.
    """
    activation, weight = reading.activation, reading.weight
    if not has_it(chip) or not isinstance(made, Requantized) or made.scale is None:
        return
    made = replace(made, given=made.how.kind == "tensor")
    assert isinstance(activation, Affine)
    assert isinstance(weight, Weight)
    if any(refusals(activation, weight)) or len(ex.shape_of(weight.codes)) != 2:
        return
    layouts = [x for x in weight_layouts(weight, chip, QMMD, options, int4=False) if x.transposed and _is_dense(x.expr)]
    if not layouts:
        yield refuse("qmmd.weight.runtime", "the weight is computed when the graph runs, or is stored as (K, N)")
        return
    notes: tuple[str, ...] = ()
    products = Products(activation, weight)
    for c in reversed(compositions):
        if not c.complete or c.requantize is not None or not c.dtype.is_floating_point:
            continue
        if c.addend is not None:
            notes = ("the bias is added behind the operator, which takes none",)
            if not _can_be_added(c.addend):
                continue  # the graph's own addition stays
        if c.dtype != torch.float16 and HALF_OPT_IN not in options.allow:
            continue
        p = products.of(c, made)
        if not isinstance(p, Product) or p.acc_addend is not None or p.rows is not (None if made.given else made.scale):
            continue
        problem = scale_problem(p) or _reach_problem(p)
        if problem is None:
            yield from (_candidate(reading, p, laid_out, chip, options, notes) for laid_out in layouts)
        else:
            yield problem


def _can_be_added(addend: Expr) -> bool:
    """True for a bias that does not bring a product above 65504 back below it: the sum of such a one is not known."""
    return isinstance(addend, Const) and bool((addend.tensor.abs() <= _SMALL).all())


def _is_dense(weight: Expr) -> bool:
    """True for a weight that lies in memory as it is described, or that can be laid out once."""
    return isinstance(weight, Const) or (isinstance(weight, Ref) and known_contiguous(weight.node.meta["val"]))


def _reach_problem(p: Product) -> Reject | None:
    if p.reach <= INT32_MAX:
        return None
    return refuse("qmmd.reach", f"K is {p.weight.k}: a sum may reach {p.reach:.3g}")


def _candidate(
    reading: Reading, p: Product, laid_out: LaidOut, chip: Chip, options: Options, notes: tuple[str, ...]
) -> Candidate:
    c, made, n = p.composition, p.made, p.weight.n
    assert made is not None
    x = made.x if len(ex.shape_of(made.x)) == 2 else ex.reshape(made.x, (-1, ex.shape_of(made.x)[-1]))
    fixups = [*p.fixups, *laid_out.fixups]
    in_half = {ex.dtype_of(x), c.dtype} != {torch.float16}
    if HALF_OPT_IN in options.allow:
        x = ex.cast(x, torch.float16)
    scale = ex.expanded(ex.cast(p.columns, torch.float32), (n,))
    more_n, more_k = _padding(p.weight, laid_out, scale)
    if more_n or more_k:
        fixups.append(f"weight padded with zeros to {(n + more_n, p.weight.k + more_k)}")
        laid_out = replace(laid_out, expr=_padded(laid_out.expr, more_k, more_n))
        scale = _padded(scale, more_n)
        x = _padded(x, more_k)
    arguments = {
        "x": x,
        "quantized_weight": laid_out.expr,
        "weight_scale": ex.named(scale, "scale"),
        "smooth_scale": made.smooth and _padded(made.smooth, more_k),
        "x_scale": None if p.given is None else ex.reshape(ex.cast(p.given, torch.float32), (1,)),
        "quant_mode": "pertoken" if p.given is None else "pertensor",
        "saturate": chip.saturates,
    }
    call = planned_call(QUANT_MATMUL_DEQUANT, arguments, laid_out, options)
    m = ex.shape_of(x)[0]
    value: Expr = call_op(QUANT_MATMUL_DEQUANT, arguments, torch.float16, (m, n + more_n))
    if more_n:
        value = Call(aten.slice.Tensor, (value, 1, 0, n), {}, torch.float16, (m, n))
    value = ex.cast(value, c.dtype)
    if c.addend is not None:
        bias = ex.named(ex.cast(c.addend, c.dtype), "bias")
        value = ex.apply(aten.add.Tensor, value, bias, dtype=c.dtype, shape=(m, n))
    if in_half:
        fixups.append("computed in float16")
    fixups.append(f"quantized by {call.op}")
    value = in_output_form(value, reading, c)
    numerics = _numerics(p, replace(made, call=call), in_half=in_half)
    return Candidate(call, c, value, laid_out.format, numerics, tuple(fixups), notes=notes)


def _padding(weight: Weight, laid_out: LaidOut, scale: Expr) -> tuple[int, int]:
    """How many rows of N and columns of K of zeros to add; none where the operator should rather refuse the sizes.

    Zeros along K change no row's largest magnitude and no sum; what zeros along N give is cut off.
    """
    n, k = weight.n, weight.k
    if not ex.known(laid_out.expr, scale) or not isinstance(k, int):
        return 0, 0
    more_n, more_k = -n % _BLOCK, -k % _BLOCK
    return (more_n, more_k) if (n + more_n) * (k + more_k) <= _MOST * n * k else (0, 0)


def _padded(e: Expr, *last: int) -> Expr:
    """``e`` with zeros behind its last dimensions, the last one first."""
    if not any(last):
        return e
    pads = [p for more in last for p in (0, more)]
    shape = list(ex.shape_of(e))
    for d, more in enumerate(last, 1):
        shape[-d] += more
    padded = ex.apply(aten.constant_pad_nd.default, e, pads, dtype=ex.dtype_of(e), shape=shape)
    return Const(padded.tensor, label="weight") if isinstance(padded, Const) else padded


def _numerics(p: Product, made: Requantized, *, in_half: bool) -> Numerics:
    divisor = made.how.divisor
    # Of how the device rounds only the formula is documented: it may take either of the two nearest codes.
    steps = made.steps + 0.51 * max(1.0, divisor / 127)
    relative, absolute, of_w = FLOAT32_STEPS, 0.0 if isinstance(p.columns, Const) else UNDERFLOW, made.absolute
    why = [made.why]
    if p.addend is not None:  # it is rounded, and so is the product before it
        info = torch.finfo(p.composition.dtype)
        relative += info.eps / 2
        absolute += info.smallest_normal * info.eps
    if in_half:
        relative += 2.0**-11
        steps += divisor * 2.0**-11
        absolute += _HALF.smallest_normal
        of_w += _HALF.smallest_normal * _HALF.eps
        why.append("computed in float16, which overflows above 65504")
    return Numerics("bounded", relative, absolute, tuple(why), of_step=steps, of_w=of_w)
