"""Planning ``npu_weight_quant_batchmatmul``: floating activation, quantized weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.chips import NPUS
from quantpass.chips.legality import HALF_OPT_IN
from quantpass.chips.rules import Chip
from quantpass.chips.weight_quant_matmul import WQMM
from quantpass.graph import expr as ex
from quantpass.graph.expr import Const, Expr
from quantpass.graph.records import Numerics, Weight
from quantpass.operators.weight_quant_matmul import WEIGHT_QUANT_MATMUL
from quantpass.patterns.proof import FLOAT64
from quantpass.patterns.sites import Reading
from quantpass.patterns.weights_by_value import shifted_by_group
from quantpass.planning import conventions
from quantpass.planning.candidates import (
    Candidate,
    Layouts,
    Notes,
    aten,
    call_op,
    flattened,
    in_output_form,
    no_layout,
    planned_call,
    rows_of,
    saturated,
    weight_layouts,
)
from quantpass.planning.composition import Composition
from quantpass.planning.guards import all_finite, held_dtype, lossless, relative_change, same_range
from quantpass.planning.options import Options
from quantpass.planning.quant_matmul import of_codes

_HALF_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
_WEIGHT_ROUNDING = {torch.float16: 2 * 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2 * 2.0**-24}
_WORST_PARAMETER = 2.0**-8


def weight_quant_candidates(
    reading: Reading, compositions: list[Composition], chip: Chip, options: Options
) -> Iterator[Candidate | Reject]:
    """Candidates from the most to the least complete epilogue, and reasons where there can be none."""
    weight, x = reading.weight, reading.x
    assert isinstance(weight, Weight)
    assert x is not None
    if not ex.dtype_of(x).is_floating_point:
        return
    if ex.dtype_of(x) not in _WEIGHT_ROUNDING:
        yield refuse("wqmm.x.dtype", f"the activation is {ex.dtype_of(x)}")
        return
    if len(ex.shape_of(weight.codes)) > 2:
        yield refuse("wqmm.weight.batched", f"a weight of rank {len(ex.shape_of(weight.codes))}")
        return
    narrow = _as_int4(weight)
    weight = weight if narrow is None else narrow
    forms = (False,) if narrow is None else (True, False)
    layouts = Layouts(*(weight_layouts(weight, chip, WQMM, options, int4=form) for form in forms))
    if not layouts:
        yield no_layout(WQMM, chip)
        return
    dtypes = [ex.dtype_of(x)]
    wider = dtypes == [torch.float32] or (dtypes == [torch.bfloat16] and chip.name in NPUS)
    bare = of_codes(reading) and ex.is_all(weight.scale, 1.0)  # a product of codes soon leaves float16
    if wider and HALF_OPT_IN in options.allow and not bare:
        dtypes.append(torch.float16)
    for dtype in dtypes:
        for composition in reversed(compositions):
            fits = composition.complete and not composition.rows and composition.requantize is None
            if fits and composition.dtype == ex.dtype_of(x):
                yield from _candidates(reading, weight, layouts, composition, dtype, chip, options)
    if dtypes == [torch.float32] and chip.rules and HALF_OPT_IN not in options.allow:
        yield refuse(HALF_OPT_IN, "the activation is float32")


def _candidates(
    reading: Reading,
    weight: Weight,
    layouts: Layouts,
    c: Composition,
    dtype: torch.dtype,
    chip: Chip,
    options: Options,
) -> Iterator[Candidate | Reject]:
    """Candidates for one epilogue.

    ``weight`` has int4 codes where it can; ``layouts`` are the ways to lay it out, best first; ``dtype`` is what the
    operator computes in.
    """
    assert reading.x is not None
    shape, notes = ex.shape_of(reading.x), Notes()
    problem = _unseen(weight, c, dtype, reading) or _bias_problem(c, dtype, chip)
    if problem is not None:
        yield problem
        return
    x, x_error, x_absolute = _activation(reading.x, weight, dtype, notes)
    scale = _scale(weight, c, notes)
    offset = None if weight.zero_point is None else conventions.antiquant_offset(weight.zero_point)
    error, of_x, scale16, offset16 = _parameter_error(scale, offset, dtype)
    problem = _parameter_problem(error, dtype) or _product_problem(weight, scale16, offset16, dtype)
    if problem is not None:
        yield problem
        return
    if not x_error <= _WORST_PARAMETER:
        yield refuse(
            "wqmm.k_scale.value",
            f"the weight's scale along K, on x, would change by a factor of up to {x_error:.2g} in {dtype}",
            want=f"at most {_WORST_PARAMETER:.2g}",
        )
        return
    bias, bias_error = _bias(c, dtype, weight.n, notes)
    reasons = {f"scale or zero point rounded to {dtype}": error, f"bias rounded to {dtype}": bias_error}
    if weight.k_scale is not None:
        reasons["x multiplied by the weight's scale along K"] = x_error
    if dtype != ex.dtype_of(reading.x):
        reasons["computed in float16, which overflows above 65504"] = x_error
        x_absolute += torch.finfo(torch.float16).smallest_normal  # of the result
    why = tuple(w for w, e in reasons.items() if e)
    relative = _WEIGHT_ROUNDING[dtype] + weight.k * 2.0**-24 + error + x_error
    numerics = Numerics("bounded" if why else "exact", relative, bias_error + x_absolute, why, of_x)
    m, n = rows_of(shape), weight.n
    for laid_out in layouts:
        arguments = {
            "x": x,
            "weight": laid_out.expr,
            "antiquant_scale": scale16,
            "antiquant_offset": offset16,
            "bias": bias,
            "antiquant_group_size": weight.group_size,
            "transpose_weight": laid_out.transposed,
            "saturate": chip.saturates,
        }
        value = ex.cast(call_op(WEIGHT_QUANT_MATMUL, arguments, dtype, (m, n)), c.dtype)
        yield Candidate(
            planned_call(WEIGHT_QUANT_MATMUL, arguments, laid_out, options, x=(m, weight.k)),
            c,
            in_output_form(value, reading, c),
            laid_out.format,
            numerics,
            (*notes.fixups, *laid_out.fixups),
        )


def _as_int4(weight: Weight) -> Weight | None:
    """``weight`` with codes in [-8, 7], moved together with its zero point where needed; None where it can't be."""
    if not isinstance(weight.codes, Const):
        return None
    if weight.low >= -8 and weight.high <= 7:
        return weight
    if weight.high - weight.low > 15 and not weight.group_size:
        return None  # moving each channel by itself could help, but no tool packs 4-bit codes that way
    codes = weight.codes.tensor.t() if weight.transposed else weight.codes.tensor
    group = weight.group_size or weight.k
    zero = weight.zero_point if weight.zero_point is not None else ex.scalar(0.0)
    if not isinstance(zero, Const) or not isinstance(weight.scale, Const):
        return None
    if weight.high - weight.low <= 15:
        shift = weight.low + 8
        wide = zero.tensor.double().expand_as(weight.scale.tensor)
        moved, zero_point = (codes - shift).to(torch.int8), wide - shift
        if not bool(((zero_point + shift - wide).abs() <= FLOAT64).all()):
            return None  # so far from the codes that a step of one is lost
    else:
        shifted = shifted_by_group(codes, zero.tensor.double(), group, bits=4)
        if shifted is None:
            return None
        moved, zero_point = shifted
        if not bool((zero_point.abs() < 1 / FLOAT64).all()):
            return None
    stored = moved.t().contiguous() if weight.transposed else moved.contiguous()
    scale = Const(weight.scale.tensor.expand_as(zero_point).contiguous(), label=weight.scale.label)
    return replace(
        weight,
        codes=Const(stored, label=weight.codes.label),
        scale=scale,
        zero_point=None if not bool(zero_point.any()) else Const(zero_point),
        low=int(stored.min()),
        high=int(stored.max()),
    )


def _activation(x: Expr, weight: Weight, dtype: torch.dtype, notes: Notes) -> tuple[Expr, float, float]:
    """x as the operator takes it, with the relative and the absolute change that this makes to a sum over K."""
    error = absolute = 0.0
    if len(ex.shape_of(x)) != 2:
        x = flattened(x)
        notes.did("x flattened to 2-D")
    if weight.k_order is not None:
        shape = ex.shape_of(x)
        x = ex.apply(
            aten.index_select.default, x, -1, Const(weight.k_order, label="order"), dtype=ex.dtype_of(x), shape=shape
        )
        notes.did("columns of x reordered as the weight's groups are")
    if weight.k_scale is not None:
        # At most 1 in magnitude, so x can't overflow; it can underflow, hence the absolute part.
        if dtype != ex.dtype_of(x):
            x = ex.cast(x, torch.float32)
        of_k = Const(weight.k_scale.to(ex.dtype_of(x)), label="k_scale")
        x = ex.apply(aten.mul.Tensor, x, of_k, dtype=ex.dtype_of(x), shape=ex.shape_of(x))
        error += _HALF_UNIT[ex.dtype_of(x)] + relative_change(weight.k_scale, of_k.tensor)
        absolute += _largest_column(weight) * torch.finfo(ex.dtype_of(x)).smallest_normal
        notes.did("the weight's scale along K moved onto x")
    if dtype != ex.dtype_of(x):
        x = ex.cast(x, dtype)
        error += 2 * _HALF_UNIT[dtype]
        absolute += _largest_column(weight) * torch.finfo(dtype).smallest_normal
        notes.did(f"computed in {str(dtype).removeprefix('torch.')}")
    return x, error, absolute


def _largest_column(weight: Weight) -> float:
    """An upper bound of ``sum_k |w_kn|`` over all columns."""
    assert isinstance(weight.scale, Const)
    assert ex.known(weight.zero_point)
    zero = weight.zero_point.tensor.abs().max() if isinstance(weight.zero_point, Const) else 0.0
    return weight.k * (max(abs(weight.low), abs(weight.high)) + float(zero)) * float(weight.scale.tensor.abs().max())


def _unseen(weight: Weight, c: Composition, dtype: torch.dtype, reading: Reading) -> Reject | None:
    """What can't be done with parameters that only the run knows: every step where one could overflow or vanish."""
    if ex.known(weight.scale, weight.zero_point, c.columns):
        return None
    why = ""
    if not ex.is_all(c.columns, 1.0):
        why = (
            "a scale after the matmul, and codes * scale could overflow or vanish where the graph forms no such product"
        )
    elif (reading.x is not None and dtype != ex.dtype_of(reading.x)) or weight.k_scale is not None:
        why = f"a parameter of the weight, which the graph does not take to {dtype}"
    elif not ex.known(weight.scale) and not same_range(held_dtype(weight.scale), dtype):
        why = f"the weight's scale, in {held_dtype(weight.scale)}, and {dtype} has a smaller range"
    elif weight.zero_point is not None and not _zero_point_survives(weight.zero_point, dtype):
        why = f"the weight's zero point, in {held_dtype(weight.zero_point)}, and {dtype} may not hold it"
    if not why:
        return None
    return refuse("wqmm.scale.runtime", f"known only at run time: {why}")


def _zero_point_survives(zero: Expr, dtype: torch.dtype) -> bool:
    """True where a cast to ``dtype`` changes ``codes - zero`` by no more than a rounding of ``dtype`` would.

    An integer that the cast rounds is far larger than any code, and then so is the difference.
    """
    source = held_dtype(zero)
    if isinstance(zero, Const) or lossless(source, dtype):
        return True
    whole = not source.is_floating_point
    return whole and float(torch.iinfo(source).max) <= torch.finfo(dtype).max


def _parameter_problem(error: float, dtype: torch.dtype) -> Reject | None:
    if error <= _WORST_PARAMETER:
        return None
    return refuse(
        "wqmm.scale.value",
        f"rounding the weight's scale to {dtype} would change it by a factor of up to {error:.2g}",
        want=f"at most {_WORST_PARAMETER:.2g}",
    )


def _product_problem(weight: Weight, scale: Expr, offset: Expr | None, dtype: torch.dtype) -> Reject | None:
    """A weight that overflows when the operator forms ``(codes + offset) * scale``, in ``dtype`` step by step."""
    if not isinstance(scale, Const) or not ex.known(offset):
        return None  # the graph forms this very product
    limit = torch.finfo(dtype).max

    def largest(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        if isinstance(offset, Const):
            low, high = ((bound.to(dtype) + offset.tensor).double() for bound in (low, high))
        return torch.maximum(low.abs(), high.abs()) * scale.tensor.double().abs()

    if bool((largest(*_code_range(weight)) <= limit).all()):
        return None  # whichever codes the large scales are for
    reached = largest(*_code_bounds(weight))
    if bool((reached <= limit).all()):
        return None
    return refuse(
        "wqmm.scale.product",
        f"codes times scale reach {float(reached.max()):.3g} in the weight",
        want=f"at most {limit:g}, the largest {dtype}",
    )


def _code_range(weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest of all codes."""
    low, high = (torch.tensor(float(bound), dtype=torch.float64) for bound in (weight.low, weight.high))
    return low, high


def _code_bounds(weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest code for each scale: ``(N,)``, or ``(groups, N)``; for all where they are not known."""
    if not isinstance(weight.codes, Const):
        return _code_range(weight)
    codes = weight.codes.tensor.t() if weight.transposed else weight.codes.tensor
    if not weight.group_size:
        return codes.amin(0).double(), codes.amax(0).double()
    blocks = codes.split(weight.group_size)
    return torch.stack([b.amin(0) for b in blocks]).double(), torch.stack([b.amax(0) for b in blocks]).double()


def _scale(weight: Weight, c: Composition, notes: Notes) -> Expr:
    """The weight's scale times the epilogue's factors: ``(N,)``, or ``(groups, N)``."""
    scale = weight.scale
    if not ex.is_all(c.columns, 1.0):
        scale = ex.mul(scale, c.columns)
        notes.did("scale after the matmul folded into the weight's scale")
    if ex.shape_of(scale) == (1,):
        # Per-channel is legal wherever per-tensor is, and the reverse does not hold.
        scale = ex.expanded(scale, (weight.n,))
        notes.did("per-tensor scale repeated for each channel")
    return scale


def _parameter_error(scale: Expr, offset: Expr | None, dtype: torch.dtype) -> tuple[float, float, Expr, Expr | None]:
    """Scale and offset in the operator's dtype, and what that changes: relative to the weight, and as a part of x."""
    narrow = ex.named(ex.cast(scale, dtype), "scale")
    narrow_offset: Expr | None = None
    error, of_x = _change(scale, dtype), 0.0
    if offset is not None:
        offset = ex.expanded(offset, ex.shape_of(scale))
        narrow_offset = ex.named(ex.cast(offset, dtype), "offset")
        error += _change(offset, dtype)
        if isinstance(offset, Const) and isinstance(scale, Const):
            moved = (offset.tensor.to(dtype).double() - offset.tensor.double()).abs()
            of_x = float((moved * scale.tensor.double().abs()).max())
    return error, of_x, narrow, narrow_offset


def _change(wide: Expr, dtype: torch.dtype) -> float:
    """How far a cast to ``dtype`` may change an element, relative to it."""
    if isinstance(wide, Const):
        return relative_change(wide.tensor, wide.tensor.to(dtype))
    return 0.0 if lossless(held_dtype(wide), dtype) else 2 * _HALF_UNIT[dtype]


def _bias_problem(c: Composition, x_dtype: torch.dtype, chip: Chip) -> Reject | None:
    """An addend that is changed on its way through the operator."""
    if c.addend is None:
        return None
    wanted = _bias_dtype(x_dtype)
    if chip.saturates and not all_finite(c.addend):
        return saturated(WQMM, chip)
    if not isinstance(c.addend, Const):
        source = held_dtype(c.addend)
        if lossless(source, wanted) or (wanted == torch.float32 and not source.is_floating_point):
            return None  # float32 rounds an int64 as the graph's own sum does
        return refuse(
            "wqmm.bias.runtime",
            f"the bias is known only at run time, in {source}",
            want=f"{wanted}, which the operator takes: {source} holds values that it does not",
            hint=f"keep the bias in {wanted}, or run the model in bfloat16",
        )
    wide = c.addend.tensor.double()
    narrow = wide.to(wanted).double()
    if bool((torch.isfinite(wide) == torch.isfinite(narrow)).all()):
        return None
    return refuse(
        "wqmm.bias.value", f"the bias does not fit {wanted}", want=f"a bias of at most {torch.finfo(wanted).max:g}"
    )


def _bias_dtype(x_dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if x_dtype == torch.float16 else torch.float32


def _bias(c: Composition, x_dtype: torch.dtype, n: int, notes: Notes) -> tuple[Expr | None, float]:
    """The bias in the dtype that the operator takes, and the largest change that makes."""
    if c.addend is None:
        return None, 0.0
    wanted = _bias_dtype(x_dtype)
    bias = ex.expanded(ex.cast(c.addend, wanted), (n,))
    bias = ex.named(bias, "bias")
    if ex.dtype_of(c.addend) != wanted and ex.dtype_of(c.addend) != torch.float64:
        notes.did(f"bias cast to {str(wanted).removeprefix('torch.')}")
    if not isinstance(c.addend, Const) or not isinstance(bias, Const):
        return bias, 0.0
    wide, narrow = c.addend.tensor.double(), bias.tensor.double()
    finite = torch.isfinite(wide)  # the others are the same in both
    if not bool(finite.any()):
        return bias, 0.0
    change = float(torch.where(finite, (narrow - wide).abs(), 0.0).max())
    return bias, change if change > 2.0**-24 * float(wide[finite].abs().max()) else 0.0
