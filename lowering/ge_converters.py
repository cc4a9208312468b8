"""The ``ge`` lowering: how torchair makes GE operators of ``torch.ops.quantpass.*``.

:func:`register_converters` hands the functions below to torchair's public ``register_fx_node_ge_converter``. Attributes
and dtypes are those of the vendor's converters of the same operators, with one difference: a transposed operand is
the operator's own attribute here, not a ``Transpose`` operator in front. That is the graph that CANN's mandatory fusion
passes (QuantBatchMatmulV3TransposeFusionPass, WeightQuantBatchMatmulV2TransposeFusionPass, and its NZ form on 310P)
make of the vendor's, on every chip: they move the Transpose of a weight into the attribute and drop, with it, those
of a two-dimensional ``antiquant_scale`` and ``antiquant_offset``. So with ``transpose_weight`` the operator reads
these as ``(N, groups)``. On 310P the attribute has to be set (``weight_quant_batch_matmul_v2_proto.h:20-60``,
``quant_batch_matmul_v3_tiling_base.cpp:220-228``); setting it leaves nothing to a pass that may not match.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from quantpass.operators.ir import ND, NZ

_FORMATS = {ND: "ND", NZ: "FRACTAL_NZ"}
_OUTPUTS = (torch.int8, torch.float16, torch.bfloat16, torch.int32)


def register_converters(*, batch_matmul_v4: bool = False) -> None:
    """Make torchair convert the quantpass operators; harmless when called again.

    Args:
        batch_matmul_v4: emit QuantBatchMatmulV4, which some chips take, in place of QuantBatchMatmulV3.

    Raises:
        ImportError: torchair is not installed.
    """
    from torchair import register_fx_node_ge_converter

    for name, converter in CONVERTERS.items():
        if name == "quant_matmul":
            converter = functools.partial(converter, v4=batch_matmul_v4)
        register_fx_node_ge_converter(getattr(torch.ops.quantpass, name).default)(converter)
    for op, converter in MISSING_CONVERTERS.items():
        register_fx_node_ge_converter(op)(converter)


def weight_quant_matmul(
    x: Any,
    weight: Any,
    antiquant_scale: Any,
    antiquant_offset: Any = None,
    quant_scale: Any = None,
    quant_offset: Any = None,
    bias: Any = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    *,
    transpose_x: bool = False,
    transpose_weight: bool = False,
    template: str = "custom",
    saturate: bool = False,
    meta_outputs: Any = None,
) -> Any:
    """WeightQuantBatchMatmulV2. int4 stays packed in int32 here: the operator's kernel unpacks it."""
    del template, saturate, meta_outputs  # properties of the chip, not of the call
    from torchair.ge._ge_graph import DataType

    ge = _ge()
    if quant_scale is not None and quant_scale.dtype == DataType.DT_INT64:
        quant_scale = ge.Cast(quant_scale, dst_type=DataType.DT_UINT64)
    if transpose_weight:
        antiquant_scale, antiquant_offset = _turned(ge, antiquant_scale), _turned(ge, antiquant_offset)
    return ge.WeightQuantBatchMatmulV2(
        x,
        weight,
        antiquant_scale,
        antiquant_offset=antiquant_offset,
        quant_scale=quant_scale,
        quant_offset=quant_offset,
        bias=bias,
        transpose_x=transpose_x,
        transpose_weight=transpose_weight,
        antiquant_group_size=antiquant_group_size,
        inner_precise=inner_precise,
    )


def quant_matmul(
    x1: Any,
    x2: Any,
    scale: Any,
    *,
    offset: Any = None,
    pertoken_scale: Any = None,
    bias: Any = None,
    output_dtype: torch.dtype | None = None,
    group_sizes: Sequence[int] | None = None,
    transpose_x1: bool = False,
    transpose_x2: bool = False,
    saturate: bool = False,
    meta_outputs: Any = None,
    v4: bool = False,
) -> Any:
    """QuantBatchMatmulV3 (or V4). int4 packed in int32 becomes an INT4 tensor first."""
    del saturate, meta_outputs
    from torchair.ge._ge_graph import torch_type_to_ge_proto_type, torch_type_to_ge_type

    ge = _ge()
    dtype = output_dtype or torch.int8
    if dtype not in _OUTPUTS:
        raise RuntimeError(
            f"quantpass.quant_matmul with output_dtype {dtype} has no GE operator (it returns int8, float16, bfloat16 "
            "or int32). It was planned for the target 'cpu'; compile with the chip's name as target."
        )
    x1, x2 = _as_int4(ge, x1), _as_int4(ge, x2)
    if not v4:
        return ge.QuantBatchMatmulV3(
            x1,
            x2,
            scale,
            offset=offset,
            bias=bias,
            pertoken_scale=pertoken_scale,
            dtype=torch_type_to_ge_type(dtype),
            transpose_x1=transpose_x1,
            transpose_x2=transpose_x2,
        )
    m, n, k = group_sizes or (0, 0, 0)
    out = ge.QuantBatchMatmulV4(
        x1,
        x2,
        bias=bias,
        x1_scale=pertoken_scale,
        x2_scale=scale,
        y_scale=None,
        x1_offset=None,
        x2_offset=offset,
        y_offset=None,
        x2_table=None,
        dtype=torch_type_to_ge_type(dtype),
        transpose_x1=transpose_x1,
        transpose_x2=transpose_x2,
        group_size=(m << 32) + (n << 16) + k,
    )
    out.desc.dtype = torch_type_to_ge_proto_type(dtype)
    return out


def trans_quant_param(scale: Any, offset: Any = None, round_mode: int = 0, meta_outputs: Any = None) -> Any:
    """TransQuantParamV2, for a scale that is known only when the graph runs; constants are packed before."""
    del meta_outputs
    return _ge().TransQuantParamV2(scale, offset=offset, round_mode=round_mode)


def format_cast(x: Any, acl_format: int, meta_outputs: Any = None) -> Any:
    """TransData, for an operand that is computed in the graph; casts of parameters are carried out before it runs."""
    del meta_outputs
    if acl_format not in _FORMATS:
        known = ", ".join(f"{number} ({name})" for number, name in _FORMATS.items())
        raise RuntimeError(f"quantpass.format_cast to format {acl_format}; accepted: {known}")
    source, target = ("ND", _FORMATS[acl_format]) if acl_format == NZ else ("FRACTAL_NZ", "ND")
    return _ge().TransData(x, src_format=source, dst_format=target)


def pack_int4(codes: Any, meta_outputs: Any = None) -> Any:
    """Cast to INT4, then eight of them read as one int32: the words of ``npu_convert_weight_to_int4pack``."""
    del meta_outputs
    from torchair.ge._ge_graph import DataType

    ge = _ge()
    narrow = ge.Cast(codes, dst_type=DataType.DT_INT4)
    *leading, last = codes.symsize
    eights = ge.Reshape(narrow, ge.Const(_whole([*leading, last // 8, 8], "pack_int4")))
    return ge.Bitcast(eights, type=DataType.DT_INT32)


CONVERTERS: dict[str, Callable[..., Any]] = {
    "weight_quant_matmul": weight_quant_matmul,
    "quant_matmul": quant_matmul,
    "trans_quant_param": trans_quant_param,
    "format_cast": format_cast,
    "pack_int4": pack_int4,
}


def amax(self: Any, dim: Sequence[int] = (), keepdim: bool = False, meta_outputs: Any = None) -> Any:
    """ReduceMax."""
    del meta_outputs
    return _ge().ReduceMax(self, list(dim) or list(range(self.rank)), keep_dims=keepdim)


def amin(self: Any, dim: Sequence[int] = (), keepdim: bool = False, meta_outputs: Any = None) -> Any:
    """ReduceMin."""
    del meta_outputs
    return _ge().ReduceMin(self, list(dim) or list(range(self.rank)), keep_dims=keepdim)


def int_mm(self: Any, mat2: Any, meta_outputs: Any = None) -> Any:
    """MatMulV2, whose result for int8 operands is int32."""
    del meta_outputs
    return _ge().MatMulV2(self, mat2, None, None)


MISSING_CONVERTERS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.amax.default: amax,
    torch.ops.aten.amin.default: amin,
    torch.ops.aten._int_mm.default: int_mm,
}
"""ATen operators of quantized models for which torchair 2.13.0 has no converter, or one that raises."""


def _ge() -> Any:
    from torchair._ge_concrete_graph import ge_apis

    return ge_apis


def _turned(ge: Any, parameter: Any) -> Any:
    """A scale or offset as an operator with ``transpose_weight`` reads it."""
    if parameter is None or parameter.rank < 2:
        return parameter
    return ge.Transpose(parameter, [1, 0])


def _as_int4(ge: Any, x: Any) -> Any:
    """``(..., C / 8)`` int32 as ``(..., C)`` INT4: Bitcast adds a last dimension of eight, Reshape folds it in."""
    from torchair.ge._ge_graph import DataType

    if x.dtype != DataType.DT_INT32:
        return x
    *leading, last = x.symsize
    if all(isinstance(size, int) for size in x.symsize):
        shape = ge.Const(_whole([*leading, last * 8], "an int4 operand"))
    else:
        shape = ge.Mul(ge.Shape(x), ge.Const([1] * len(leading) + [8]))
    return ge.Reshape(ge.Bitcast(x, type=DataType.DT_INT4), shape)


def _whole(sizes: list[Any], what: str) -> list[int]:
    if not all(isinstance(size, int) for size in sizes):
        raise RuntimeError(f"quantpass: {what} of dynamic shape {sizes}; compile with dynamic=False")
    return sizes
