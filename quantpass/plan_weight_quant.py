"""Planning ``npu_weight_quant_batchmatmul``: floating activation, quantized weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantpass import conventions
from quantpass import expr as ex
from quantpass.candidates import (
    Candidate,
    Notes,
    call_op,
    flattened,
    in_output_form,
    ops,
    rows_of,
    spec_of,
    weight_layouts,
)
from quantpass.chips.calls import WQMM, OpCall
from quantpass.chips.rules import Chip
from quantpass.composition import Composition
from quantpass.expr import Const, Expr, Ref
from quantpass.options import Options
from quantpass.records import Numerics, Reject, Weight
from quantpass.sites import Reading

_HALF_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
_WEIGHT_ROUNDING = {torch.float16: 2 * 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2 * 2.0**-24}
_WORST_PARAMETER = 2.0**-8


def weight_quant_candidates(
    reading: Reading, compositions: list[Composition], chip: Chip, options: Options
) -> Iterator[Candidate | Reject]:
    """Candidates from the most to the least complete epilogue, and reasons where there can be none."""
    weight, c = reading.weight, reading.contraction
    assert isinstance(weight, Weight) and c is not None
    x = c.lhs.meta["val"]
    if not x.dtype.is_floating_point:
        return
    for composition in reversed(compositions):
        fits = composition.complete and not composition.rows and composition.requantize is None
        if fits and composition.dtype == x.dtype:
            yield from _candidates(reading, composition, weight, chip, options)


def _candidates(
    reading: Reading, c: Composition, weight: Weight, chip: Chip, options: Options
) -> Iterator[Candidate | Reject]:
    assert reading.contraction is not None
    lhs = reading.contraction.lhs
    dtype = lhs.meta["val"].dtype
    notes = Notes()
    x = flattened(Ref(lhs))
    if ex.shape_of(x) != tuple(lhs.meta["val"].shape):
        notes.did("x flattened to 2-D")
    scale = _scale(weight, c, notes)
    offset = None if weight.zero_point is None else conventions.antiquant_offset(weight.zero_point)
    error, scale16, offset16 = _parameter_error(scale, offset, dtype)
    if error > _WORST_PARAMETER:
        yield Reject(
            "wqmm.scale.value",
            f"rounding the weight's scale to {dtype} would change it by a factor of up to {error:.2g}",
            f"at most {_WORST_PARAMETER:.2g}",
            "its smallest scales are below the normal range of the dtype: run the model in bfloat16",
        )
        return
    bias, bias_error = _bias(c, dtype, notes)
    why = tuple(w for e, w in ((error, f"scale rounded to {dtype}"), (bias_error, f"bias rounded to {dtype}")) if e)
    relative = _WEIGHT_ROUNDING[dtype] + weight.k * 2.0**-24 + error
    numerics = Numerics("bounded" if why else "exact", relative, bias_error, why)
    m, n = rows_of(tuple(lhs.meta["val"].shape)), weight.n
    for int4 in [True, False] if _is_int4(weight) else [False]:
        for laid_out in weight_layouts(weight, chip, WQMM, options, int4=int4):
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
            specs = {
                "x": spec_of(x, (m, weight.k)),
                "weight": laid_out.spec,
                "antiquant_scale": spec_of(scale16),
                "antiquant_offset": spec_of(offset16),
                "bias": spec_of(bias),
                "antiquant_group_size": weight.group_size,
            }
            value = call_op(ops.weight_quant_matmul.default, arguments, dtype, (m, n))
            yield Candidate(
                OpCall(WQMM, options.mode, specs),
                c,
                in_output_form(value, reading, c),
                laid_out.format,
                numerics,
                (*notes.fixups, *laid_out.fixups),
            )


def _is_int4(weight: Weight) -> bool:
    return isinstance(weight.codes, Const) and weight.low >= -8 and weight.high <= 7


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


def _parameter_error(scale: Expr, offset: Expr | None, dtype: torch.dtype) -> tuple[float, Expr, Expr | None]:
    """Scale and offset in the operator's dtype, and how much that changes the weight, relative to the weight."""
    offset = None if offset is None else ex.expanded(offset, ex.shape_of(scale))
    narrow = ex.cast(scale, dtype)
    narrow_offset = None if offset is None else ex.cast(offset, dtype)
    error = _relative_change(scale, narrow, dtype)
    if offset is not None and narrow_offset is not None:
        error += _relative_change(offset, narrow_offset, dtype)
    named_offset = None if narrow_offset is None else ex.named(narrow_offset, "offset")
    return error, ex.named(narrow, "scale"), named_offset


def _relative_change(wide: Expr, narrow: Expr, dtype: torch.dtype) -> float:
    if not isinstance(wide, Const) or not isinstance(narrow, Const):
        return 0.0 if ex.dtype_of(wide) == dtype else _HALF_UNIT[dtype]
    a, b = wide.tensor.double(), narrow.tensor.double()
    change = ((b - a).abs() / a.abs()).nan_to_num(0.0, posinf=float("inf"))
    return float(change.max())


def _bias(c: Composition, x_dtype: torch.dtype, notes: Notes) -> tuple[Expr | None, float]:
    """The bias in the dtype that the operator takes, and the largest change that makes."""
    if c.addend is None:
        return None, 0.0
    wanted = torch.float16 if x_dtype == torch.float16 else torch.float32
    bias = ex.expanded(ex.cast(c.addend, wanted), (c.output.meta["val"].shape[-1],))
    bias = ex.named(bias, "bias")
    if ex.dtype_of(c.addend) != wanted and ex.dtype_of(c.addend) != torch.float64:
        notes.did(f"bias cast to {str(wanted).removeprefix('torch.')}")
    if isinstance(c.addend, Const) and isinstance(bias, Const):
        change = float((bias.tensor.double() - c.addend.tensor.double()).abs().max())
        return bias, change if change > 2.0**-24 * float(c.addend.tensor.double().abs().max()) else 0.0
    return bias, 0.0
