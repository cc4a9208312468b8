"""The fused calls that a linear's scheme allows, described for :mod:`quantpass.chips.legality`, the best first.

These are the calls that planning builds for the same linear in a graph, from sizes and schemes alone: what depends on
values (a scale that is zero, a bias that does not fit) is not asked here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.basics.tensor_spec import TensorSpec
from quantpass.basics.torch_types import BF16, F16, F32, I8, I32, I64
from quantpass.checkpoints.scheme import ActivationScheme, Quantized, WeightScheme
from quantpass.chips import NPUS
from quantpass.chips.calls import INT4_PER_INT32, OpCall, VendorOp
from quantpass.chips.legality import HALF_OPT_IN
from quantpass.chips.quant_matmul import QMM
from quantpass.chips.quant_matmul_dequant import QMMD
from quantpass.chips.rules import Chip
from quantpass.chips.weight_quant_matmul import WQMM

ROWS = 16
"""How many rows of x a call is judged with; no rule of these calls tells one number from another."""


_BLOCK, _MOST = 16, 2.0
"""To which multiples ``npu_quant_matmul_dequant`` has its weight padded, and how much larger that may make it."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What is not in a checkpoint.

    Attributes:
        dtype: of activations and results.
        bias: of the bias; None for what the operator takes: int32 beside a scale word, else a float.
        mode: ``"graph"`` (GE) or ``"eager"`` (aclnn).
        allow: rules to lift, by id.
    """

    dtype: str
    bias: str | None = None
    mode: str = "graph"
    allow: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """One possible call and the format of its weight."""

    call: OpCall
    format: str


def calls_of(q: Quantized, chip: Chip, engine: Engine) -> Iterator[Call | Reject]:
    """Possible calls for a linear, the best first, and reasons where there can be none."""
    assert q.weight is not None
    x = q.activation
    if x is not None:
        yield from _integer_calls(q, q.weight, x, chip, engine)
        if QMMD in chip.layouts:
            yield from _dequantizing_calls(q, q.weight, x, engine)
    if x is None or not x.codes:
        yield from _weight_only_calls(q, q.weight, chip, engine)
    if x is not None and HALF_OPT_IN in engine.allow and chip.name in NPUS:
        yield from _product_in_half(q, q.weight, x, chip, engine)


# -- npu_weight_quant_batchmatmul ----------------------------------------------------------------------------------


def _weight_only_calls(q: Quantized, w: WeightScheme, chip: Chip, engine: Engine) -> Iterator[Call | Reject]:
    layouts = list(_layouts(q, chip, WQMM, engine, int4=False))
    if w.bits <= 4:
        layouts = [*_layouts(q, chip, WQMM, engine, int4=True), *layouts]
    dtypes = [engine.dtype]
    wider = engine.dtype == F32 or (engine.dtype == BF16 and chip.name in NPUS)
    if wider and HALF_OPT_IN in engine.allow:
        dtypes.append(F16)
    group = regular_group(w, q.k)
    if group == 1:
        yield refuse("read.weight.along_k", f"{q.k} rows of K in groups of {w.group}: no group is regular")
        return
    scales = (-(-q.k // group), q.n) if group else (q.n,)
    for dtype in dtypes:
        own = TensorSpec(engine.bias or (F16 if dtype == F16 else F32), (q.n,))
        for bias, weight in product(_biases(q, own, engine), layouts):
            arguments = {
                "x": TensorSpec(dtype, (ROWS, q.k)),
                "weight": weight,
                "antiquant_scale": TensorSpec(dtype, scales),
                "antiquant_offset": TensorSpec(dtype, scales) if w.zero_point else None,
                "bias": bias,
                "antiquant_group_size": group,
            }
            yield Call(OpCall(WQMM, engine.mode, arguments), weight.format)
    if dtypes == [F32] and chip.rules:
        yield refuse(HALF_OPT_IN, "the activation is float32")


def _biases(q: Quantized, bias: TensorSpec, engine: Engine) -> tuple[TensorSpec | None, ...]:
    """The bias, and none: it can be added behind the operator, unless an engine is said to hand it over."""
    if not q.bias:
        return (None,)
    return (bias,) if engine.bias is not None else (bias, None)


def regular_group(w: WeightScheme, k: int) -> int:
    """How many rows share a scale, as operators count: a last group that is shorter makes all as short as divides K."""
    return math.gcd(k, w.group) if 0 < w.group < k else 0


# -- npu_quant_matmul ----------------------------------------------------------------------------------------------


def _integer_calls(
    q: Quantized, w: WeightScheme, x: ActivationScheme, chip: Chip, engine: Engine
) -> Iterator[Call | Reject]:
    problems = [*refusals(w, x, q.k)]
    if problems:
        yield from problems
        return
    layouts = list(_layouts(q, chip, QMM, engine, int4=False))
    if x.codes and w.bits == x.bits == 4:
        layouts = [*_layouts(q, chip, QMM, engine, int4=True), *layouts]
    in_half = HALF_OPT_IN in engine.allow and not x.dynamic and engine.dtype != F16 and not x.codes
    plain = replace(q, bias=False)
    if corrected_in_graph(x):
        parts: tuple[Quantized, ...] = (plain,)
    else:
        parts = (q, plain) if q.bias and not q.whole and engine.bias is None else (q,)
    for part, weight in product(parts, layouts):
        yield _integer_call(part, x, weight, engine, engine.dtype)
        if in_half:
            yield _integer_call(part, x, weight, engine, F16)
    if x.codes and not q.whole and engine.bias is None:
        for weight in layouts:
            yield _integer_call(plain, x, weight, engine, I32)


def corrected_in_graph(x: ActivationScheme) -> bool:
    """True where the graph multiplies codes and takes its zero points from the product: one for each row."""
    return x.codes and x.zero_point and x.dynamic and x.per == "token"


def refusals(w: WeightScheme, x: ActivationScheme, k: int) -> Iterator[Reject]:
    """What ``npu_quant_matmul`` has no term for, whatever the chip."""
    if w.zero_point:
        yield refuse("qmm.weight.zero_point", "the weight has a zero point")
    group = regular_group(w, k)
    if group:
        yield refuse("qmm.weight.group", f"the weight has a scale for each group of {group} rows of K")
    if x.per == "group":
        yield refuse("qmm.activation.scale", "the activation's scale varies along K")
    elif x.zero_point and x.dynamic and x.per == "token" and not x.codes:
        yield refuse("qmm.activation.zero_point", "the activation's zero point is different for each row")


def _integer_call(q: Quantized, x: ActivationScheme, weight: TensorSpec, engine: Engine, out: str) -> Call:
    packed = weight.dtype_name == I32
    codes = TensorSpec(I32 if packed else I8, (ROWS, q.k // INT4_PER_INT32 if packed else q.k))
    word = out == F16 and not x.dynamic
    per_tensor = corrected_in_graph(x) or (q.weight is not None and q.weight.per_tensor)
    scale = TensorSpec(I64 if word else F32, (1,) if per_tensor else (q.n,))
    bias, rows = _bias(q, x, out, word), TensorSpec(F32, (ROWS,)) if x.dynamic else None
    result = out
    if out in (F32, I32):  # an int32 result, scaled in the graph
        scale, rows, result = TensorSpec(F32, (1,)), None, I32
        bias = I32 if x.zero_point and not x.dynamic else None
    if q.bias and engine.bias is not None:
        bias = engine.bias
    arguments: dict[str, Any] = {
        "x1": codes,
        "x2": weight,
        "scale": scale,
        "pertoken_scale": rows,
        "bias": None if bias is None else TensorSpec(bias, (q.n,)),
        "output_dtype": result,
    }
    return Call(OpCall(QMM, engine.mode, arguments), weight.format)


def _bias(q: Quantized, x: ActivationScheme, out: str, word: bool) -> str | None:
    """The bias that planning gives: a static zero point of x is part of it."""
    shifted = x.zero_point and not x.dynamic
    if word:
        return I32 if q.bias or shifted else None
    if shifted:
        return F32 if q.bias else I32
    return out if q.bias else None


def _product_in_half(q: Quantized, w: WeightScheme, x: ActivationScheme, chip: Chip, engine: Engine) -> Iterator[Call]:
    """The integer product alone in float16, scaled in the graph: where the user allows float16."""
    if any(refusals(w, x, q.k)) or (not x.dynamic and not x.codes):
        return
    shifted = x.zero_point and not x.dynamic
    for weight in _layouts(q, chip, QMM, engine, int4=False):
        arguments = {
            "x1": TensorSpec(I8, (ROWS, q.k)),
            "x2": weight,
            "scale": TensorSpec(I64, (1,)),
            "bias": TensorSpec(I32, (q.n,)) if shifted else None,
            "output_dtype": F16,
        }
        yield Call(OpCall(QMM, engine.mode, arguments), weight.format)


# -- npu_quant_matmul_dequant --------------------------------------------------------------------------------------


def _dequantizing_calls(q: Quantized, w: WeightScheme, x: ActivationScheme, engine: Engine) -> Iterator[Call]:
    """The operator that quantizes rows of x itself; the bias is added behind it."""
    fits = x.dynamic and x.bits == w.bits == 8 and not x.zero_point and not any(refusals(w, x, q.k))
    if not fits or x.opaque or (engine.dtype != F16 and HALF_OPT_IN not in engine.allow):
        return
    n, k = -(-q.n // _BLOCK) * _BLOCK, -(-q.k // _BLOCK) * _BLOCK
    if n * k > _MOST * q.n * q.k:
        n, k = q.n, q.k
    arguments = {
        "x": TensorSpec(F16, (ROWS, k)),
        "quantized_weight": TensorSpec(I8, (n, k)),
        "weight_scale": TensorSpec(F32, (n,)),
        "x_scale": TensorSpec(F32, (1,)) if x.per == "tensor" else None,
        "quant_mode": "pertensor" if x.per == "tensor" else "pertoken",
    }
    yield Call(OpCall(QMMD, engine.mode, arguments), "ND")


# -- weights -------------------------------------------------------------------------------------------------------


def _layouts(q: Quantized, chip: Chip, op: VendorOp, engine: Engine, *, int4: bool) -> Iterator[TensorSpec]:
    """The weight as the chip likes it best first; stored ``(N, K)`` unless the chip asks otherwise."""
    for layout in chip.layouts_of(op, engine.mode):
        transposed = layout.transposed is not False
        shape, dtype = (q.k, q.n), I8
        if int4:
            if (q.k if transposed else q.n) % INT4_PER_INT32:
                continue
            dtype = I32
            shape = (q.k // INT4_PER_INT32, q.n) if transposed else (q.k, q.n // INT4_PER_INT32)
        yield TensorSpec(dtype, shape, layout.format, transposed)


def refitted(q: Quantized) -> Quantized | None:
    """The linear with its weight re-fitted as symmetric int8 per channel; None where it has that form."""
    w = q.weight
    if w is None or not (q.rejects or w.group or w.zero_point or w.ordered):
        return None
    return replace(q, weight=WeightScheme(8), rejects=())
