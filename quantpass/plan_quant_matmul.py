"""Planning ``npu_quant_matmul``: quantized activation, quantized weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from quantpass import conventions
from quantpass import expr as ex
from quantpass.candidates import (
    FLOAT32_STEPS,
    Candidate,
    LaidOut,
    aten,
    call_op,
    in_output_form,
    no_layout,
    ops,
    spec_of,
    weight_layouts,
)
from quantpass.chips.calls import QMM, OpCall
from quantpass.chips.rules import Chip
from quantpass.composition import Composition
from quantpass.expr import Const, Expr
from quantpass.legality import HALF_OPT_IN
from quantpass.options import Options
from quantpass.patterns.affine import Affine
from quantpass.quant_product import Product, product_of, refusals, rounding_of, wide, wide_node
from quantpass.records import Numerics, Reject, Weight
from quantpass.sites import Reading
from quantpass.symbolic import broadcast_shape

_FP19 = 2.0**-10
_INT32 = 2**31 - 1
_SMALLEST_NORMAL = 2.0**-126


def quant_matmul_candidates(
    reading: Reading, compositions: list[Composition], chip: Chip, options: Options
) -> Iterator[Candidate | Reject]:
    """Candidates from the most to the least complete epilogue, and reasons where there can be none."""
    activation, weight = reading.activation, reading.weight
    assert isinstance(activation, Affine) and isinstance(weight, Weight)
    rejects = list(refusals(activation, weight))
    if rejects:
        yield from rejects
        return
    layouts = tuple(weight_layouts(weight, chip, QMM, options, int4=False))
    if not layouts:
        yield no_layout("qmm", chip)
        return
    for composition in reversed(compositions):
        if not composition.complete:
            continue
        product = product_of(activation, weight, composition)
        problem = None if product is None else _overflow(product.acc_addend, weight.k)
        if problem is not None:
            yield problem
        elif product is not None:
            yield from _candidates(reading, product, layouts, chip, options)


def _candidates(
    reading: Reading, p: Product, layouts: tuple[LaidOut, ...], chip: Chip, options: Options
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
            if c.dtype == torch.float32 and not integer_graph:
                yield _emit(reading, p, laid_out, chip, options, torch.int32, bias=_int32(p.acc_addend))
            if c.dtype == torch.float32 and p.rows is None and HALF_OPT_IN in options.allow:
                yield from _word_output(reading, p, laid_out, chip, options)


def _word_output(
    reading: Reading, p: Product, laid_out: LaidOut, chip: Chip, options: Options
) -> Iterator[Candidate | Reject]:
    """float16 without per-token scales: the scale goes through the int64 word."""
    problem = _word_problem(p) or _bias_problem(p)
    if problem is not None:
        yield problem
        return
    yield _emit(reading, p, laid_out, chip, options, torch.float16, bias=_folded_bias(p), word=True)


def _float_output(
    reading: Reading, p: Product, laid_out: LaidOut, chip: Chip, options: Options
) -> Iterator[Candidate | Reject]:
    dtype = p.composition.dtype
    if p.acc_addend is not None and p.addend is not None:
        if p.rows is not None or dtype == torch.float32:
            return  # an integer bias is scaled by rows, a floating one is not; in float32 the sum would lose digits
        correction = ex.mul(wide_node(p.acc_addend), p.columns)
        if not isinstance(correction, Const):
            return  # the sum may cancel it, and nothing bounds what is lost then
        merged = ex.add(wide(p.addend), correction)
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
        yield Reject(
            "qmm.requantize.pertoken",
            "the result is quantized and x has a scale for each row",
            "an int8 result without pertoken_scale",
        )
        return
    shift = 128 if q.low >= 0 else 0
    low, high, zero = q.low - shift, q.high - shift, q.zero_point - shift
    if (low, high) != (-128, 127):
        yield Reject(
            "qmm.requantize.range",
            f"the result is quantized to [{q.low:g}, {q.high:g}]",
            "[-128, 127] or [0, 255]: the operator saturates there and nowhere else",
            "use the full range for this activation",
        )
        return
    if not low <= zero <= high:
        yield Reject(
            "qmm.requantize.zero_point",
            f"the result is quantized with zero point {q.zero_point:g}, outside of its range",
            f"a zero point in [{q.low:g}, {q.high:g}]: the operator clips to 9 bits before it adds the zero point",
            "check the calibration of this activation",
        )
        return
    if p.composition.relu and zero != low:
        yield Reject(
            "qmm.requantize.relu",
            f"a ReLU stands before a quantize with zero point {q.zero_point:g}",
            f"zero point {q.low:g}, where the lower bound is the ReLU",
        )
        return
    problem = _word_problem(p) or _bias_problem(p)
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
        return None
    scale = p.columns.tensor.abs()
    if bool(torch.isfinite(scale).all()) and float(scale.min()) >= _SMALLEST_NORMAL and float(scale.max()) < 2.0**127:
        return None
    return Reject(
        "qmm.scale.value",
        f"a scale of {float(scale.min()):g} to {float(scale.max()):g}",
        "finite scales in the normal range of float32",
    )


def _bias_problem(p: Product) -> Reject | None:
    """A bias that does not fit the int32 accumulator beside the product."""
    return _overflow(_folded_bias(p, check=False), p.weight.k)


def _overflow(bias: Expr | None, k: int) -> Reject | None:
    if not isinstance(bias, Const):
        return None
    largest = float(bias.tensor.abs().max())
    if bool(torch.isfinite(bias.tensor).all()) and largest + k * 2**14 <= _INT32:
        return None
    return Reject(
        "qmm.bias.range",
        f"the bias is up to {largest:.3g} in units of the scale",
        f"a sum with the product of at most {_INT32}",
        "the scale is very small beside the bias, or a zero point is very large: check the calibration",
    )


def _folded_bias(p: Product, *, check: bool = True) -> Expr | None:
    """Everything that is added, as int32 in units of the accumulator: ``round(addend / scale) + acc_addend``."""
    total = p.acc_addend
    if p.addend is not None:
        units = ex.div(wide(p.addend), p.columns)
        units = ex.apply(aten.round.default, units, dtype=ex.dtype_of(units), shape=ex.shape_of(units))
        if total is None:
            total = units
        elif ex.known(total, units):
            total = ex.add(wide(total), units)
        else:  # integers, so that no digit is lost in float32
            total = ex.add(ex.cast(total, torch.int32), ex.cast(units, torch.int32))
    return _int32(total) if check else total


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
    *batch, m, k = ex.shape_of(p.x)
    scale = ex.named(ex.cast(p.columns, torch.float32), "scale")
    float_epilogue = out == torch.int32 and c.dtype.is_floating_point
    if out == torch.int32:
        scale = Const(torch.ones(1), label="unit_scale")  # not applied to an int32 result
    elif word:
        scale = ex.named(_scale_word(scale, offset), "scale_word")
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
    specs = {
        "x1": spec_of(p.x, (*batch, m, k)),
        "x2": laid_out.spec,
        "scale": spec_of(scale),
        "pertoken_scale": spec_of(rows, (m,)),
        "bias": spec_of(bias),
        "output_dtype": out,
    }
    fixups = [*p.fixups, *laid_out.fixups]
    lead = broadcast_shape(batch, ex.shape_of(laid_out.expr)[:-2])
    value: Expr = call_op(ops.quant_matmul.default, arguments, out, (*lead, m, n))
    int8_codes = None
    if float_epilogue:
        value = _scaled_in_graph(value, p)
        fixups.append("int32 result, scaled in float32 in the graph")
    in_half = out == torch.float16 and c.dtype == torch.float32
    if in_half:
        value = ex.cast(value, torch.float32)
        fixups.append("computed in float16")
    value = in_output_form(value, reading, c)
    if c.requantize is not None:
        fixups.append("quantize folded into the matmul")
        int8_codes, value = value, _as_codes(value, c, shift)
    if word and p.addend is not None:
        fixups.append("bias rounded to int32")
    numerics = _numerics(p, word, in_half=in_half)
    return Candidate(OpCall(QMM, options.mode, specs), c, value, laid_out.format, numerics, tuple(fixups), int8_codes)


def _scale_word(scale: Expr, offset: float) -> Expr:
    shape = ex.shape_of(scale)
    arguments = (scale,) if not offset else (scale, Const(torch.full((1,), float(offset))))
    return ex.apply(ops.trans_quant_param.default, *arguments, dtype=torch.int64, shape=shape)


def _scaled_in_graph(acc: Expr, p: Product) -> Expr:
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
    why, absolute = [], 0.0
    if word and p.addend is not None:
        absolute = float(p.columns.tensor.abs().max()) / 2 if isinstance(p.columns, Const) else float("inf")
        why.append("bias rounded to a multiple of the scale")
    if p.lost:
        absolute += p.lost
        why.append("the activation's zero point added in float32")
    if in_half:
        absolute += torch.finfo(torch.float16).smallest_normal
        why.append("computed in float16, which overflows above 65504")
    return Numerics("bounded" if why else "exact", relative, absolute, tuple(why))
