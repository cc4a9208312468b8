"""``npu_quant_matmul``: what it computes, and how each lowering carries it out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from quantpass.chips.quant_matmul import QMM
from quantpass.operators.arguments import (
    DTYPE_NUMBERS,
    Arguments,
    dtype_numbered,
    matrix_shape,
    packed_transposed,
    refuse_given,
    require,
)
from quantpass.operators.ge import Ge, dtype_name, dtype_named, padded
from quantpass.operators.grouped_int4 import int4_grouped, int8_by_int4
from quantpass.operators.int4 import unpack_int4
from quantpass.operators.integer_matmul import int_matmul
from quantpass.operators.operator import AclnnGraph, Operator
from quantpass.operators.results import requantize, scale_and_offset, to_float

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_OUTPUTS = (torch.int8, *_FLOATS[:2], torch.int32, torch.float32)
_GE_OUTPUTS = _OUTPUTS[:-1]
_WORD_RESULTS = (torch.int8, torch.float16)


def quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    group_sizes: Sequence[int] | None = None,
    transpose_x1: bool = False,
    transpose_x2: bool = False,
    saturate: bool = False,
) -> torch.Tensor:
    """An int32 matmul, dequantized and possibly quantized again on the way out.

    With ``acc = x1 @ x2`` in int32, and ``a = acc + bias`` where the bias is int32 (``a = acc`` where it is not):

    * float16: ``fp16(float32(a) * fp19(scale))``
    * int8: ``clip(clip(rne(float32(a) * fp19(scale)), -256, 255) + offset, -128, 127)``, the offset in 9 bits
    * bfloat16, float32, and float16 with ``pertoken_scale``: ``cast(float32(a) * scale * pertoken_scale + bias)``, the
      bias added here where it is floating, scales in full float32
    * int32: ``a``; the scale is not applied

    Args:
        x1: ``(..., M, K)`` int8, or int4 packed in int32 along K.
        x2: ``(..., K, N)`` int8 or packed int4; stored ``(..., N, K)`` where ``transpose_x2``.
        scale: ``(N,)`` or ``(1,)``: float32, bfloat16, or an int64 word of ``trans_quant_param``. With ``group_sizes``,
            ``(K / group, N)``: float32 for int4 x int4, int64 for int8 x int4.
        offset: ``(N,)`` or ``(1,)`` float32, for an int8 output with a float32 scale only: with an int64 scale the
            hardware reads the offset from the word and never this tensor. With ``group_sizes`` see
            :func:`int4_grouped` and :func:`int8_by_int4`.
        pertoken_scale: ``(M,)`` float32; with ``group_sizes`` also ``(M, 1)``.
        bias: ``(N,)`` or ``(batch, 1, N)``: int32, or floating.
        output_dtype: int8 (also None), float16, bfloat16, int32 or float32.
        group_sizes: ``[gm, gn, gk]``; only ``gk`` is used. Newer than LinearQuant.md.
        transpose_x1: x1 is stored ``(..., K, M)``.
        transpose_x2: x2 is stored ``(..., N, K)``.
        saturate: float16 overflow gives the largest finite number (310P) instead of infinity (A2/A3).

    Raises:
        ValueError: an argument that the operator does not take; the message names it.

    Source: LinearQuant.md; npu_quant_matmul.md; docs/semantics.md, section 1.
    """
    out = output_dtype or torch.int8
    a, b = _operand(x1, transpose_x1, "x1"), _operand(x2, transpose_x2, "x2")
    k = a.shape[-1]
    require(k == b.shape[-2], f"quant_matmul: x1 has K = {k} and x2 has K = {b.shape[-2]}", "qmm.k")
    if group_sizes is not None and group_sizes[-1]:
        grouped = int4_grouped if x1.dtype == torch.int32 else int8_by_int4
        require(bias is None, "quant_matmul: bias with group_sizes; the grouped forms take none")
        y = grouped(a, b, scale, offset, pertoken_scale, group_sizes[-1])
        require(
            out in (torch.float16, torch.bfloat16), f"quant_matmul: group_sizes gives float16 or bfloat16, not {out}"
        )
        return to_float(y, out, saturate)
    _check(a, b, scale, offset, pertoken_scale, bias, out)
    _check_batch(a, b)
    return dequantized(int_matmul(a, b), scale, offset, pertoken_scale, bias, out, saturate)


def dequantized(
    acc: torch.Tensor,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.dtype,
    saturate: bool,
) -> torch.Tensor:
    """What :func:`quant_matmul` makes of its products.

    Args:
        acc: the products, int32; where no int32 bias is added and the result is not int32, they may be rounded to
            float32 already.
        scale: as there; None for 1, where it needs no word.
        offset, pertoken_scale, bias, out, saturate: as there.
    """
    if bias is not None and bias.dtype == torch.int32:
        acc, bias = acc + bias, None
    if out == torch.int32:
        return acc
    t = acc.to(torch.float32)
    through_word = out == torch.float16 and pertoken_scale is None and bias is None
    if scale is not None and (out == torch.int8 or through_word or scale.dtype == torch.int64):
        factor, word_offset = scale_and_offset(scale, offset if out == torch.int8 else None)
        t = t * factor
        return requantize(t, word_offset) if out == torch.int8 else to_float(t, out, saturate)
    if scale is not None:
        t = t * scale.to(torch.float32)
    if pertoken_scale is not None:
        t = t * pertoken_scale.to(torch.float32).unsqueeze(-1)
    if bias is not None:
        t = t + bias.to(torch.float32)
    return to_float(t, out, saturate)


def _operand(x: torch.Tensor, transposed: bool, name: str) -> torch.Tensor:
    known = x.dtype in (torch.int8, torch.int32)
    require(known, f"quant_matmul: {name} is {x.dtype}; it must be int8, or int4 in int32", f"cpu.qmm.dtypes.{name}")
    require(x.dim() >= 2, f"quant_matmul: {name} has rank {x.dim()}; it must be at least 2", f"qmm.{name}.rank")
    codes = unpack_int4(x) if x.dtype == torch.int32 else x
    return codes.transpose(-2, -1) if transposed else codes


def _check(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.dtype,
) -> None:
    m, n = a.shape[-2], b.shape[-1]
    require(
        out in _OUTPUTS,
        f"quant_matmul: output_dtype is {out}; it must be one of {_OUTPUTS}",
        "cpu.qmm.dtypes.output_dtype",
    )
    dtypes = (torch.float32, torch.bfloat16, torch.int64)
    known = scale.dtype in dtypes
    message = f"quant_matmul: scale is {scale.dtype}; it must be float32, bfloat16 or an int64 word"
    require(known, message, "cpu.qmm.dtypes.scale")
    for name, t in (("scale", scale), ("offset", offset)):
        shape = None if t is None else tuple(t.shape)
        require(
            shape in (None, (1,), (n,)),
            f"quant_matmul: {name} has shape {shape}; it must be (1,) or ({n},)",
            f"qmm.{name}.shape",
        )
    if scale.dtype == torch.int64:
        require(
            out in (torch.int8, torch.float16),
            f"quant_matmul: an int64 scale gives int8 or float16, not {out}",
            "cpu.qmm.dtypes.scale",
        )
        require(
            pertoken_scale is None,
            "quant_matmul: pertoken_scale needs a float32 or bfloat16 scale, not int64",
            "cpu.qmm.dtypes.pertoken_scale",
        )
    if pertoken_scale is not None:
        require(
            out.is_floating_point,
            f"quant_matmul: pertoken_scale needs a floating output, not {out}",
            "cpu.qmm.dtypes.pertoken_scale",
        )
        shape = tuple(pertoken_scale.shape)
        message = f"quant_matmul: pertoken_scale has shape {shape}; it must be {(m,)}"
        require(shape == (m,), message, "qmm.pertoken.shape")
    if bias is not None:
        floating = bias.dtype in _FLOATS
        message = f"quant_matmul: bias is {bias.dtype}; it must be int32 or floating"
        require(floating or bias.dtype == torch.int32, message, "cpu.qmm.dtypes.bias")
        require(
            not floating or (out.is_floating_point and scale.dtype != torch.int64),
            f"quant_matmul: bias is {bias.dtype}; with {out} output and {scale.dtype} scale it must be int32",
            "cpu.qmm.dtypes.bias",
        )
        shape = tuple(bias.shape)
        fits = shape[-1:] == (n,) and len(shape) in (1, 3)
        require(fits, f"quant_matmul: bias has shape {shape}; it must be ({n},) or (batch, 1, {n})", "qmm.bias.shape")


def _check_batch(a: torch.Tensor, b: torch.Tensor) -> None:
    for x, y in zip(reversed(a.shape[:-2]), reversed(b.shape[:-2]), strict=False):
        batches = f"{tuple(a.shape[:-2])} and {tuple(b.shape[:-2])}"
        require(
            x == y or 1 in (x, y), f"quant_matmul: x1 and x2 have batches {batches}; they must broadcast", "qmm.batch"
        )


def _fake(a: Arguments) -> torch.Tensor:
    for name, t in (("x1", a.x1), ("x2", a.x2)):
        require(t.dim() >= 2, f"quant_matmul: {name} has rank {t.dim()}; it must be at least 2")
    m, k1 = matrix_shape(a.x1, a.transpose_x1)
    k2, n = matrix_shape(a.x2, a.transpose_x2)
    require(k1 == k2, f"quant_matmul: x1 has K = {k1} and x2 has K = {k2}")
    batch = torch.broadcast_shapes(a.x1.shape[:-2], a.x2.shape[:-2])
    return a.x1.new_empty((*batch, m, n), dtype=a.output_dtype or torch.int8)  # type: ignore[no-any-return]


def _aclnn(graph: AclnnGraph, node: Node, a: Arguments) -> None:
    """float16 and int8 results take their scale as a word, in which the offset travels: its tensor is never read."""
    out = a.output_dtype or torch.int8
    if out not in DTYPE_NUMBERS:
        raise ValueError(
            f"{node.name}: npu_quant_matmul gives {', '.join(map(str, DTYPE_NUMBERS))}, not {out}; "
            "lowering='aclnn' carries out plans for a chip, not for target='cpu'"
        )
    scale, offset = a.scale, a.offset
    if not (a.group_sizes and a.group_sizes[-1]):
        floating_bias = a.bias is not None and a.bias.meta["val"].dtype.is_floating_point
        through_word = out in _WORD_RESULTS and a.pertoken_scale is None and not floating_bias
        if through_word and scale.meta["val"].dtype == torch.float32:
            scale = graph.scale_word(node, scale, offset, "scale_word")
        offset = None
    keywords = {
        "offset": offset,
        "pertoken_scale": a.pertoken_scale,
        "bias": a.bias,
        "output_dtype": DTYPE_NUMBERS[out],
        "group_sizes": a.group_sizes,
    }
    x1, x2 = graph.viewed(node, a.x1, a.transpose_x1), graph.viewed(node, a.x2, a.transpose_x2)
    graph.replace(node, QMM, (x1, x2, scale), keywords)


def _ge(ge: Ge, a: Arguments) -> Any:
    """QuantBatchMatmulV3 (or V4). int4 packed in int32 becomes an INT4 tensor first."""
    from torchair.ge._ge_graph import torch_type_to_ge_proto_type, torch_type_to_ge_type

    dtype = a.output_dtype or torch.int8
    if dtype not in _GE_OUTPUTS:
        raise RuntimeError(
            f"quantpass.quant_matmul with output_dtype {dtype} has no GE operator (it returns int8, float16, bfloat16 "
            "or int32). It was planned for the target 'cpu'; compile with the chip's name as target."
        )
    x1, x2 = ge.as_int4(a.x1), ge.as_int4(a.x2)
    same = {
        "bias": a.bias,
        "dtype": torch_type_to_ge_type(dtype),
        "transpose_x1": a.transpose_x1,
        "transpose_x2": a.transpose_x2,
    }
    if not ge.matmul_v4:
        return ge.api.QuantBatchMatmulV3(x1, x2, a.scale, offset=a.offset, pertoken_scale=a.pertoken_scale, **same)
    m, n, k = a.group_sizes or (0, 0, 0)
    out = ge.api.QuantBatchMatmulV4(
        x1,
        x2,
        x1_scale=a.pertoken_scale,
        x2_scale=a.scale,
        y_scale=None,
        x1_offset=None,
        x2_offset=a.offset,
        y_offset=None,
        x2_table=None,
        group_size=(m << 32) + (n << 16) + k,
        **same,
    )
    out.desc.dtype = torch_type_to_ge_proto_type(dtype)
    return out


def _run_v3(inputs: list[Any], attrs: dict[str, Any], saturates: bool) -> torch.Tensor:
    x1, x2, scale, offset, bias, pertoken = padded(inputs, 6)
    return quant_matmul(
        x1,
        x2,
        scale,
        offset=offset,
        bias=bias,
        pertoken_scale=pertoken,
        output_dtype=dtype_named(dtype_name(attrs["dtype"])),
        transpose_x1=attrs["transpose_x1"],
        transpose_x2=attrs["transpose_x2"],
        saturate=saturates,
    )


def _run_v4(inputs: list[Any], attrs: dict[str, Any], saturates: bool) -> torch.Tensor:
    """V4 takes V3's operands in another order, and more of them."""
    x1, x2, bias, x1_scale, x2_scale, *others = padded(inputs, 10)
    if any(t is not None for t in others) or attrs["group_size"]:
        raise NotImplementedError("QuantBatchMatmulV4 with offsets, y_scale, a table or group_size")
    return _run_v3([x1, x2, x2_scale, None, bias, x1_scale], attrs, saturates)


def _emulated(a: Arguments) -> torch.Tensor:
    refuse_given("npu_quant_matmul", a, *QMM.unjudged)
    k = a.x1.shape[-1] * (8 if a.x1.dtype == torch.int32 else 1)
    transposed = a.x2.dtype == torch.int32 and packed_transposed(a.x2.shape[-2], k)
    x2 = a.x2.transpose(-2, -1) if transposed else a.x2
    return torch.ops.quantpass.quant_matmul(  # type: ignore[no-any-return]
        a.x1, x2, a.scale, offset=a.offset, pertoken_scale=a.pertoken_scale, bias=a.bias, group_sizes=a.group_sizes,
        output_dtype=dtype_numbered(a.output_dtype, torch.int8), transpose_x2=transposed,
    )  # fmt: skip


QUANT_MATMUL = Operator(
    vendor=QMM,
    kernel=quant_matmul,
    fake=_fake,
    aclnn=_aclnn,
    ge=_ge,
    ge_kernels={"QuantBatchMatmulV3": _run_v3, "QuantBatchMatmulV4": _run_v4},
    emulate=_emulated,
)
