"""Planning ``npu_quant_matmul``: quantized activation, quantized weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.basics.symbolic import broadcast_shape
from quantpass.chips.legality import HALF_OPT_IN
from quantpass.chips.quant_matmul import QMM
from quantpass.chips.rules import Chip
from quantpass.graph import expr as ex
from quantpass.graph.expr import Const, Expr
from quantpass.graph.records import Numerics, Weight
from quantpass.operators.quant_matmul import QUANT_MATMUL
from quantpass.patterns.affine import Affine
from quantpass.patterns.sites import Reading
from quantpass.planning import conventions
from quantpass.planning.candidates import (
    FLOAT32_STEPS,
    Candidate,
    LaidOut,
    Layouts,
    aten,
    call_op,
    in_output_form,
    no_layout,
    ops,
    planned_call,
    saturated,
    weight_layouts,
)
from quantpass.planning.composition import Composition
from quantpass.planning.guards import SMALLEST_NORMAL, all_finite, fits_float32, is_normal
from quantpass.planning.options import Options
from quantpass.planning.quant_product import (
    Product,
    Products,
    accumulator_problem,
    refusals,
    rounding_of,
    wide_node,
)
from quantpass.planning.requantize import Requantized

_FP19 = 2.0**-10
UNDERFLOW = 2.0**31 * SMALLEST_NORMAL
"""What an accumulator times a scale below float32's normal numbers may be off by."""


def quant_matmul_candidates(
    reading: Reading,
    compositions: list[Composition],
    chip: Chip,
    options: Options,
    made: Requantized | Reject | None = None,
) -> Iterator[Candidate | Reject]:
    """Candidates from the most to the least complete epilogue, and reasons where there can be none.

    ``made`` are the activation's codes as an operator makes them, or why none can.
    """
    activation, weight = reading.activation, reading.weight
    assert isinstance(activation, Affine)
    assert isinstance(weight, Weight)
    if isinstance(made, Requantized):
        made = None if made.already else made.refused or made
    rejects = list(refusals(activation, weight))
    if rejects:
        yield from rejects
        return
    layouts = Layouts(weight_layouts(weight, chip, QMM, options, int4=False))
    if not layouts:
        yield no_layout(QMM, chip)
        return
    products = Products(activation, weight)
    for composition in reversed(compositions):
        if not composition.complete:
            continue
        if isinstance(made, Requantized):
            product = products.of(composition, made)
            if isinstance(product, Product) and wraps(product, reading) is None:
                yield from _only_candidates(_candidates(reading, product, layouts, chip, options))
        product = products.of(composition)
        if isinstance(product, Product):
            problem = wraps(product, reading)
            if problem is not None:
                yield problem
            else:
                yield from _noted(_candidates(reading, product, layouts, chip, options), made)
        elif product is not None:
            yield product


def _only_candidates(found: Iterator[Candidate | Reject]) -> Iterator[Candidate | Reject]:
    """Without the reasons: they stand against the same with the graph's own codes."""
    return (f for f in found if isinstance(f, Candidate))


def _noted(found: Iterator[Candidate | Reject], made: Requantized | Reject | None) -> Iterator[Candidate | Reject]:
    """With a note of why the graph quantizes the activation itself."""
    if isinstance(made, Requantized):
        made = refuse("requantize.factor", "the scale of the codes is no factor of what is fused")
    for f in found:
        if made is not None and isinstance(f, Candidate):
            f = replace(f, notes=(f"the graph quantizes the activation itself: {made.rule}: {made.fact}",))
        yield f


def of_codes(reading: Reading) -> bool:
    """True where the graph multiplies codes and scales the product: in float16 that overflows soon."""
    return isinstance(reading.activation, Affine) and not reading.activation.factors


def wraps(p: Product, reading: Reading) -> Reject | None:
    """A sum that wraps around in the operator and not in the graph."""
    assert reading.contraction is not None
    if reading.contraction.product_dtype == torch.int32 and not isinstance(p.acc_addend, Const):
        return None  # the graph adds in int32 as well: both wrap alike
    return accumulator_problem(p, p.acc_addend, reading.ranges)


def _candidates(
    reading: Reading, p: Product, layouts: Layouts, chip: Chip, options: Options
) -> Iterator[Candidate | Reject]:
    integer_graph = reading.node.meta["val"].dtype == torch.int32
    for laid_out in layouts:
        c = p.composition
        if c.requantize is not None:
            yield from _int8_output(reading, p, laid_out, chip, options)
        elif c.dtype == torch.int32:
            if p.rows is None and p.addend is None and ex.is_all(p.columns, 1.0):
                yield _emit(reading, p, laid_out, chip, options, torch.int32, bias=_int32(p.acc_addend))
        elif c.dtype == torch.float16 and p.rows is None:
            yield from _word_output(reading, p, laid_out, chip, options)
        elif integer_graph and options.numerics == "strict" and not c.faithful:
            continue  # a shorter part of the epilogue keeps the graph's own roundings
        elif c.dtype.is_floating_point:
            yield from _float_output(reading, p, laid_out, chip, options)
            if c.dtype == torch.float32 and not integer_graph and scale_problem(p) is None:
                yield _emit(reading, p, laid_out, chip, options, torch.int32, bias=_int32(p.acc_addend))
            in_half = HALF_OPT_IN in options.allow and not of_codes(reading)
            if in_half and c.dtype != torch.float16 and p.rows is None:
                yield from _word_output(reading, p, laid_out, chip, options)


def _word_output(
    reading: Reading, p: Product, laid_out: LaidOut, chip: Chip, options: Options
) -> Iterator[Candidate | Reject]:
    """float16 without per-token scales: the scale goes through the int64 word."""
    problem = _word_problem(p) or _bias_problem(p, reading)
    if problem is None:
        yield _emit(reading, p, laid_out, chip, options, torch.float16, bias=_folded_bias(p), word=True)
        return
    yield problem
    if p.composition.dtype == torch.float16:  # without the word: a floating bias needs no division by the scale
        if p.addend is not None:
            yield from _float_output(reading, p, laid_out, chip, options)
        yield from _float_output(reading, p.with_row_scales(), laid_out, chip, options)


def _float_output(
    reading: Reading, p: Product, laid_out: LaidOut, chip: Chip, options: Options
) -> Iterator[Candidate | Reject]:
    dtype = p.composition.dtype
    problem = scale_problem(p) or _addend_problem(p, chip)
    if problem is not None:
        yield problem
        return
    if p.acc_addend is not None and p.addend is not None:
        if p.rows is not None or dtype == torch.float32:
            return  # an integer bias is scaled by rows, a floating one is not; in float32 the sum would lose digits
        correction = ex.mul(wide_node(p.acc_addend), p.columns)
        if not isinstance(correction, Const):
            return  # the sum may cancel it, and nothing bounds what is lost then
        merged = ex.add(ex.wide(p.addend), correction)
        p = replace(p, lost=p.lost + rounding_of(correction))
        yield _emit(reading, p, laid_out, chip, options, dtype, bias=ex.cast(merged, torch.float32))
        return
    if p.acc_addend is not None:
        yield _emit(reading, p, laid_out, chip, options, dtype, bias=_int32(p.acc_addend))
        return
    own = None if p.addend is None else p.addend
    if own is not None and ex.dtype_of(own) != dtype:
        own = ex.cast(own, torch.float32)
    yield _emit(reading, p, laid_out, chip, options, dtype, bias=own)


def _int8_output(
    reading: Reading, p: Product, laid_out: LaidOut, chip: Chip, options: Options
) -> Iterator[Candidate | Reject]:
    q = p.composition.requantize
    assert q is not None
    if p.rows is not None:
        yield refuse("qmm.requantize.pertoken", "the result is quantized and x has a scale for each row")
        return
    shift = 128 if q.low >= 0 else 0
    low, high, zero = q.low - shift, q.high - shift, q.zero_point - shift
    if (low, high) != (-128, 127):
        yield refuse("qmm.requantize.range", f"the result is quantized to [{q.low:g}, {q.high:g}]")
        return
    if not low <= zero <= high:
        yield refuse(
            "qmm.requantize.zero_point",
            f"the result is quantized with zero point {q.zero_point:g}, outside of its range",
            want=f"a zero point in [{q.low:g}, {q.high:g}]: the operator clips to 9 bits before it adds the zero point",
        )
        return
    if p.composition.relu and zero != low:
        yield refuse(
            "qmm.requantize.relu",
            f"a ReLU stands before a quantize with zero point {q.zero_point:g}",
            want=f"zero point {q.low:g}, where the lower bound is the ReLU",
        )
        return
    problem = _word_problem(p) or _bias_problem(p, reading)
    if problem is not None:
        yield problem
        return
    offset = conventions.requantize_offset(zero)
    yield _emit(
        reading, p, laid_out, chip, options, torch.int8, bias=_folded_bias(p), word=True, offset=offset, shift=shift
    )


def _word_problem(p: Product) -> Reject | None:
    """A scale that the hardware's word can't hold."""
    if not isinstance(p.columns, Const):
        return None  # what the run brings goes into the word as it is; zeros give zeros
    return None if is_normal(p.columns.tensor) else _scale_reject(p.columns)


def scale_problem(p: Product) -> Reject | None:
    """A constant scale that float32 can't hold."""
    if isinstance(p.columns, Const) and not fits_float32(p.columns.tensor):
        return _scale_reject(p.columns)
    return None


def _scale_reject(columns: Const) -> Reject:
    scale = columns.tensor.abs()
    return refuse("qmm.scale.value", f"a scale of {float(scale.min()):g} to {float(scale.max()):g}")


def _addend_problem(p: Product, chip: Chip) -> Reject | None:
    """A floating bias that is changed on its way through the operator."""
    if not p.composition.dtype.is_floating_point:
        return None
    if chip.saturates and p.composition.dtype == torch.float16 and not all_finite(p.addend):
        return saturated(QMM, chip)
    if isinstance(p.addend, Const) and not bool((p.addend.tensor.abs() <= torch.finfo(torch.float32).max).all()):
        narrow = p.addend.tensor.to(torch.float32)
        if not bool((torch.isfinite(narrow) == torch.isfinite(p.addend.tensor)).all()):
            return refuse("qmm.bias.range", "the bias does not fit float32", want="a bias that float32 holds")
    return None


def _bias_problem(p: Product, reading: Reading) -> Reject | None:
    """A bias that does not fit the int32 accumulator beside the product."""
    if p.addend is not None and not ex.known(p.addend, p.columns):
        what = "bias" if ex.known(p.columns) else "scale that the bias is divided by"
        return refuse("qmm.bias.runtime", f"the {what} is known only at run time")
    return accumulator_problem(p, _units(p), reading.ranges) if p.addend is not None else None


def _folded_bias(p: Product) -> Expr | None:
    """Everything that is added, as int32 in units of the accumulator: ``round(addend / scale) + acc_addend``."""
    return _int32(p.acc_addend if p.addend is None else _units(p))


def _units(p: Product) -> Expr:
    assert p.addend is not None
    units = ex.div(ex.wide(p.addend), p.columns)
    units = ex.apply(aten.round.default, units, dtype=ex.dtype_of(units), shape=ex.shape_of(units))
    if p.acc_addend is None:
        return units
    if isinstance(p.acc_addend, Const):
        return ex.add(ex.wide(p.acc_addend), units)
    return ex.add(ex.cast(p.acc_addend, torch.int32), units)  # integers, so that no digit is lost in float32


def _int32(e: Expr | None) -> Expr | None:
    return None if e is None else ex.cast(e, torch.int32)


def _emit(
    reading: Reading,
    p: Product,
    laid_out: LaidOut,
    chip: Chip,
    options: Options,
    out: torch.dtype,
    *,
    bias: Expr | None,
    word: bool = False,
    offset: float = 0.0,
    shift: int = 0,
) -> Candidate:
    """The call with result dtype ``out``; int32 results are scaled in the graph where the site is floating."""
    c, n = p.composition, p.weight.n
    *batch, m, _ = ex.shape_of(p.x)
    scale = ex.named(ex.cast(p.columns, torch.float32), "scale")
    float_epilogue = out == torch.int32 and c.dtype.is_floating_point
    if out == torch.int32:
        scale = Const(torch.ones(1), label="unit_scale")  # not applied to an int32 result
    elif word:
        scale = ex.named(scale_word(scale, offset), "scale_word")
    bias = None if bias is None else ex.named(ex.expanded(bias, (n,)), "bias")
    rows = None if out == torch.int32 else p.rows
    arguments = {
        "x1": p.x,
        "x2": laid_out.expr,
        "scale": scale,
        "pertoken_scale": rows,
        "bias": bias,
        "output_dtype": out,
        "transpose_x2": laid_out.transposed,
        "saturate": chip.saturates and out == torch.float16,
    }
    call = planned_call(QUANT_MATMUL, arguments, laid_out, options, pertoken_scale=(m,))
    fixups = [*p.fixups, *laid_out.fixups]
    if p.made is not None:
        fixups.append(f"quantized by {p.made.call.op}")
    lead = broadcast_shape(batch, ex.shape_of(laid_out.expr)[:-2])
    value: Expr = call_op(QUANT_MATMUL, arguments, out, (*lead, m, n))
    int8_codes = None
    if float_epilogue:
        value = scaled_in_graph(value, p)
        fixups.append("int32 result, scaled in float32 in the graph")
    in_half = out == torch.float16 and c.dtype != torch.float16
    if in_half:
        value = ex.cast(value, c.dtype)
        fixups.append("computed in float16")
    value = in_output_form(value, reading, c)
    if c.requantize is not None:
        fixups.append("quantize folded into the matmul")
        int8_codes, value = value, _as_codes(value, c, shift)
    if word and p.addend is not None:
        fixups.append("bias rounded to int32")
    numerics = _numerics(p, word, in_half=in_half)
    return Candidate(call, c, value, laid_out.format, numerics, tuple(fixups), int8_codes, shift)


def scale_word(scale: Expr, offset: float) -> Expr:
    shape = ex.shape_of(scale)
    arguments = (scale,) if not offset else (scale, Const(torch.full((1,), float(offset))))
    return ex.apply(ops.trans_quant_param.default, *arguments, dtype=torch.int64, shape=shape)


def scaled_in_graph(acc: Expr, p: Product) -> Expr:
    value = ex.mul(ex.cast(acc, torch.float32), ex.named(ex.cast(p.columns, torch.float32), "scale"))
    if p.rows is not None:
        value = ex.mul(value, ex.reshape(p.rows, (-1, 1)))
    if p.addend is not None:
        value = ex.add(value, ex.named(ex.cast(p.addend, torch.float32), "bias"))
    return value


def _as_codes(int8: Expr, c: Composition, shift: int) -> Expr:
    """int8 results as the codes that the graph had: uint8, or integers in a float tensor."""
    if not shift:
        return ex.cast(int8, c.dtype)
    whole = ex.cast(int8, torch.int32)
    more = ex.apply(aten.add.Scalar, whole, shift, dtype=torch.int32, shape=ex.shape_of(whole))
    return ex.cast(more, c.dtype)


def _numerics(p: Product, word: bool, *, in_half: bool) -> Numerics:
    relative = FLOAT32_STEPS + (_FP19 if word else 0.0) + (2.0**-11 if in_half else 0.0)
    why, absolute = [], 0.0 if isinstance(p.columns, Const) else UNDERFLOW
    if word and p.addend is not None:
        assert isinstance(p.columns, Const), "a bias is divided by known scales only"
        absolute += float(p.columns.tensor.abs().max()) / 2
        why.append("bias rounded to a multiple of the scale")
    if p.lost:
        absolute += p.lost
        why.append("the activation's zero point added in float32")
    if in_half:
        absolute += torch.finfo(torch.float16).smallest_normal
        why.append("computed in float16, which overflows above 65504")
    if p.made is None:
        return Numerics("bounded" if why else "exact", relative, absolute, tuple(why))
    why.insert(0, p.made.why)
    return Numerics("bounded", relative, absolute, tuple(why), of_step=p.made.steps, of_w=p.made.absolute)
