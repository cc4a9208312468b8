"""The calls that a stack of experts allows, all of a layer's in one: of ``npu_grouped_matmul``, or on the 310P of the
operator that quantizes their rows itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quantpass.basics.reject import Reject
from quantpass.basics.tensor_spec import TensorSpec
from quantpass.basics.torch_types import BF16, F16, F32, I8, I32, I64
from quantpass.checkpoints.calls import ROWS, Call, Engine, refusals, regular_group
from quantpass.checkpoints.scheme import Quantized
from quantpass.chips.calls import INT4_PER_INT32, OpCall
from quantpass.chips.expert_matmuls import QGMMD
from quantpass.chips.grouped_matmul import GMM
from quantpass.chips.legality import HALF_OPT_IN
from quantpass.chips.rules import Chip

_LAYOUTS = (("NZ", False), ("NZ", True), ("ND", True))
"""How servers store the stack, best first: format, and whether each matrix lies as ``(N, K)``."""


def grouped_calls(q: Quantized, experts: int, chip: Chip, engine: Engine) -> Iterator[Call | Reject]:
    """Possible calls for ``experts`` linears of one scheme, the best first, and reasons where there can be none."""
    if QGMMD in chip.layouts:
        yield from _dequantizing_call(q, experts, engine)
    yield from _multiplying_calls(q, experts, engine)


def _dequantizing_call(q: Quantized, experts: int, engine: Engine) -> Iterator[Call]:
    """The operator that takes rows of floats and quantizes them; a bias is added behind it."""
    w, x = q.weight, q.activation
    if w is None or x is None or x.bits != 8 or w.bits != 8 or x.zero_point or any(refusals(w, x, q.k)):
        return
    if engine.dtype != F16 and HALF_OPT_IN not in engine.allow:
        return
    rows = None if x.dynamic and x.per == "token" else TensorSpec(F32, (1,))
    arguments = {
        "x": TensorSpec(F16, (ROWS, q.k)),
        "quantized_weight": TensorSpec(I8, (experts, q.n, q.k)),
        "weight_scale": TensorSpec(F32, (experts, q.n)),
        "group_list": TensorSpec(I64, (experts,)),
        "x_scale": rows,
        "quant_mode": "pertoken" if rows is None else "pertensor",
    }
    yield Call(OpCall(QGMMD, engine.mode, arguments), "ND")


def _multiplying_calls(q: Quantized, experts: int, engine: Engine) -> Iterator[Call | Reject]:
    w, x = q.weight, q.activation
    assert w is not None
    group = regular_group(w, q.k)
    forms: dict[str, TensorSpec | None]
    if x is None:
        scales = _scales(experts, q, group)
        offset = TensorSpec(engine.dtype, scales)  # zeros where the weight is symmetric: the operator wants them
        forms = {"antiquant_scale": TensorSpec(engine.dtype, scales), "antiquant_offset": offset}
        bias = F32 if engine.dtype == BF16 else engine.dtype
        yield from _calls(q, experts, engine, engine.dtype, w.bits <= 4, forms, bias)
        return
    problems = [r for r in refusals(w, x, q.k) if not (group and w.bits <= 4 and r.rule == "qmm.weight.group")]
    if problems:
        yield from problems
        return
    token = TensorSpec(F32, (ROWS,)) if x.dynamic else None
    packed = w.bits <= 4
    scale = TensorSpec(I64 if packed else BF16 if engine.dtype == BF16 else F32, _scales(experts, q, group))
    forms = {"scale": scale, "per_token_scale": token}
    yield from _calls(q, experts, engine, I32 if x.bits <= 4 and packed else I8, packed, forms, I32)


def _scales(experts: int, q: Quantized, group: int) -> tuple[int, ...]:
    return (experts, q.k // group, q.n) if group else (experts, q.n)


def _calls(
    q: Quantized, experts: int, engine: Engine, x: str, packed: bool, more: dict[str, Any], bias: str
) -> Iterator[Call]:
    eights = INT4_PER_INT32 if x == I32 else 1
    if packed and x == I8:
        bias = F32  # 8 * sum_k(scale * codes): the kernel multiplies x - 8
    with_bias = q.bias or (packed and x == I8)
    for format, transposed in _LAYOUTS:
        shape = _packed(q, transposed) if packed else (q.k, q.n)
        if shape is None:
            continue
        weight = TensorSpec(I32 if packed else I8, (experts, *shape), format, transposed)
        arguments = {
            "x": (TensorSpec(x, (ROWS, q.k // eights)),),
            "weight": (weight,),
            "bias": (TensorSpec(engine.bias or bias, (experts, q.n)),) if with_bias else None,
            **{name: None if spec is None else (spec,) for name, spec in more.items()},
            "group_list": TensorSpec(I64, (experts,)),
            "split_item": 2,
            "group_type": 0,
            "group_list_type": 1,
            "output_dtype": engine.dtype,
        }
        yield Call(OpCall(GMM, engine.mode, arguments), format)


def _packed(q: Quantized, transposed: bool) -> tuple[int, int] | None:
    """A matrix of int4 in int32; None where its last stored axis is no multiple of eight."""
    if (q.k if transposed else q.n) % INT4_PER_INT32:
        return None
    return (q.k // INT4_PER_INT32, q.n) if transposed else (q.k, q.n // INT4_PER_INT32)
