"""CPU kernels of the fused operators. They define what the operators compute.

Every rounding step of the hardware is a rounding step here. Where the vendor leaves a choice open (which kernel
template runs, what a float16 overflow gives) it is an argument. Formulas and sources: ``docs/semantics.md``.
"""

from __future__ import annotations

from functools import cache

import torch
from quantpass.lowering.int4 import pack_int4, unpack_int4
from quantpass.lowering.scale_words import fp19, pack_scale_word, unpack_scale_word

from quantpass.ir import LIBRARY, OUTPUT_DTYPES, matrix_shape, require

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_FLOAT16_MAX = 65504.0


# -- quantized x quantized -----------------------------------------------------------------------------------------


def quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    transpose_x1: bool = False,
    transpose_x2: bool = False,
    saturate: bool = False,
) -> torch.Tensor:
    """``npu_quant_matmul``: an int32 matmul, dequantized and possibly quantized again on the way out.

    With ``acc = x1 @ x2`` in int32, and ``a = acc + bias`` where the bias is int32 (``a = acc`` where it is not):

    * float16: ``fp16(float32(a) * fp19(scale))``
    * int8: ``clip(clip(rne(float32(a) * fp19(scale)), -256, 255) + offset, -128, 127)``, the offset in 9 bits
    * bfloat16, float32, and float16 with ``pertoken_scale``: ``cast(float32(a) * scale * pertoken_scale + bias)``, the
      bias added here where it is floating, scales in full float32
    * int32: ``a``; the scale is not applied

    Args:
        x1: ``(..., M, K)`` int8, or int4 packed in int32 along K.
        x2: ``(..., K, N)`` int8 or packed int4; stored ``(..., N, K)`` where ``transpose_x2``.
        scale: ``(N,)`` or ``(1,)``: float32, bfloat16, or an int64 word of :func:`trans_quant_param`.
        offset: ``(N,)`` or ``(1,)`` float32, int8 output with a float32 scale only: with an int64 scale the hardware
            reads the offset from the word and never this tensor.
        pertoken_scale: ``(M,)`` float32.
        bias: ``(N,)`` or ``(batch, 1, N)``: int32, or floating.
        output_dtype: int8 (also None), float16, bfloat16, int32 or float32.
        saturate: float16 overflow gives the largest finite number (310P) instead of infinity (A2/A3).

    Source: LinearQuant.md; npu_quant_matmul.md; docs/semantics.md, section 1.
    """
    out = output_dtype or torch.int8
    a, b = _operand(x1, transpose_x1, "x1"), _operand(x2, transpose_x2, "x2")
    _check_quant_matmul(a, b, scale, offset, pertoken_scale, bias, out)
    acc = int_matmul(a, b)
    if bias is not None and bias.dtype == torch.int32:
        acc, bias = acc + bias, None
    if out == torch.int32:
        return acc
    if (
        out == torch.int8
        or scale.dtype == torch.int64
        or (out == torch.float16 and pertoken_scale is None and bias is None)
    ):
        factor, word_offset = _scale_and_offset(scale, offset if out == torch.int8 else None)
        t = acc.to(torch.float32) * factor
        return _requantize(t, word_offset) if out == torch.int8 else _to_float(t, out, saturate)
    t = acc.to(torch.float32) * scale.to(torch.float32)
    if pertoken_scale is not None:
        t = t * pertoken_scale.to(torch.float32).unsqueeze(-1)
    if bias is not None:
        t = t + bias.to(torch.float32)
    return _to_float(t, out, saturate)


def _operand(x: torch.Tensor, transposed: bool, name: str) -> torch.Tensor:
    require(
        x.dtype in (torch.int8, torch.int32),
        f"quant_matmul: {name} is {x.dtype}; it must be int8, or int4 packed in int32",
    )
    require(x.dim() >= 2, f"quant_matmul: {name} has rank {x.dim()}; it must be at least 2")
    codes = unpack_int4(x) if x.dtype == torch.int32 else x
    return codes.transpose(-2, -1) if transposed else codes


def _check_quant_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.dtype,
) -> None:
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    require(k == b.shape[-2], f"quant_matmul: x1 has K = {k} and x2 has K = {b.shape[-2]}")
    require(out in OUTPUT_DTYPES, f"quant_matmul: output_dtype is {out}; it must be one of {OUTPUT_DTYPES}")
    require(
        scale.dtype in (torch.float32, torch.bfloat16, torch.int64),
        f"quant_matmul: scale is {scale.dtype}; it must be float32, bfloat16 or an int64 word",
    )
    for name, t in (("scale", scale), ("offset", offset)):
        ok = t is None or (t.dim() == 1 and t.shape[0] in (1, n))
        require(
            ok, f"quant_matmul: {name} has shape {None if t is None else tuple(t.shape)}; it must be (1,) or ({n},)"
        )
    if scale.dtype == torch.int64:
        require(out in (torch.int8, torch.float16), f"quant_matmul: an int64 scale gives int8 or float16, not {out}")
        require(pertoken_scale is None, "quant_matmul: pertoken_scale needs a float32 or bfloat16 scale, not int64")
    if pertoken_scale is not None:
        require(out.is_floating_point, f"quant_matmul: pertoken_scale needs a floating output, not {out}")
        shape = tuple(pertoken_scale.shape)
        require(shape == (m,), f"quant_matmul: pertoken_scale has shape {shape}; it must be ({m},)")
    if bias is not None:
        floating = bias.dtype in _FLOATS
        require(
            floating or bias.dtype == torch.int32, f"quant_matmul: bias is {bias.dtype}; it must be int32 or floating"
        )
        require(
            not floating or (out.is_floating_point and scale.dtype != torch.int64),
            f"quant_matmul: bias is {bias.dtype}; with {out} output and {scale.dtype} scale it must be int32",
        )
        shape = tuple(bias.shape)
        require(
            shape[-1] == n and len(shape) in (1, 3),
            f"quant_matmul: bias has shape {shape}; it must be ({n},) or (batch, 1, {n})",
        )


def int_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` of int8 tensors with int32 accumulation, exact; leading dimensions broadcast."""
    # PyTorch 2.13's _int_mm leaves its result unwritten where K is 1 and b is a transposed view.
    if a.dim() == b.dim() == 2 and a.numel() and b.numel() and a.shape[1] > 1 and _int_mm_is_exact():
        return torch._int_mm(a.contiguous(), b)
    # Products are at most 2^14 in size: float64 holds any sum of 65535 of them exactly.
    return torch.matmul(a.to(torch.float64), b.to(torch.float64)).to(torch.int32)


@cache
def _int_mm_is_exact() -> bool:
    """Some CPUs add pairs of products in 16 bits and saturate; extreme operands show it."""
    signs = torch.where(torch.arange(64 * 64).reshape(64, 64) % 3 == 0, 127, -128).to(torch.int8)
    worst = torch.full((64, 64), -128, dtype=torch.int8)
    return all(
        torch.equal(torch._int_mm(x, y).double(), x.double() @ y.double())
        for x in (signs, worst)
        for y in (signs, worst)
    )


def _scale_and_offset(scale: torch.Tensor, offset: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    word = scale if scale.dtype == torch.int64 else pack_scale_word(scale, offset)
    return unpack_scale_word(word)


def _requantize(t: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return (t.round().clamp(-256, 255) + offset).clamp(-128, 127).to(torch.int8)


def _to_float(t: torch.Tensor, dtype: torch.dtype, saturate: bool) -> torch.Tensor:
    if saturate and dtype == torch.float16:
        t = t.clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
    return t.to(dtype)


# -- float x quantized ---------------------------------------------------------------------------------------------


def weight_quant_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    *,
    transpose_x: bool = False,
    transpose_weight: bool = False,
    template: str = "custom",
    saturate: bool = False,
) -> torch.Tensor:
    """``npu_weight_quant_batchmatmul``: ``x @ ((weight + antiquant_offset) * antiquant_scale) + bias``.

    The weight is dequantized in float16 where x is float16 (two roundings) and in float32, rounded once, where x is
    bfloat16 or float32; products accumulate in float32 and the bias enters the accumulator.

    Args:
        x: ``(..., M, K)`` float16, bfloat16 or float32; stored ``(..., K, M)`` where ``transpose_x``.
        weight: ``(K, N)`` int8, or int4 packed in int32 along the stored last axis; stored ``(N, K)`` where
            ``transpose_weight``.
        antiquant_scale: ``(1,)``, ``(N,)``, ``(1, N)`` or, with groups, ``(ceil(K / group), N)``; the dtype of x.
        antiquant_offset: the same shape and dtype; **added** to the codes (minus the zero point).
        quant_scale: ``(1,)``, ``(N,)`` or ``(1, N)``: float32 or an int64 word; makes the output int8.
        quant_offset: float32; read only where ``quant_scale`` is float32 (an int64 word carries its own offset).
        bias: ``(N,)`` or ``(1, N)``, floating.
        antiquant_group_size: rows of K that share a scale; 0 for all.
        inner_precise: kept for the vendor's signature; the custom template has one precision.
        template: ``"custom"``.
        saturate: float16 overflow gives the largest finite number (310P) instead of infinity (A2/A3).

    Source: LinearWeightQuant.md; npu_weight_quant_batchmatmul.md; docs/semantics.md, section 2.
    """
    del inner_precise
    require(template == "custom", f"weight_quant_matmul: template is {template!r}; accepted: 'custom'")
    require(x.dtype in _FLOATS, f"weight_quant_matmul: x is {x.dtype}; it must be float16, bfloat16 or float32")
    left = x.transpose(-2, -1) if transpose_x else x
    w = dequantize_weight(
        weight, antiquant_scale, antiquant_offset, x.dtype, antiquant_group_size, transposed=transpose_weight
    )
    require(
        left.shape[-1] == w.shape[0], f"weight_quant_matmul: x has K = {left.shape[-1]} and weight has K = {w.shape[0]}"
    )
    acc = left.to(torch.float32) @ w.to(torch.float32)
    if bias is not None:
        n = w.shape[1]
        shape = tuple(bias.shape)
        require(shape in ((n,), (1, n)), f"weight_quant_matmul: bias has shape {shape}; it must be ({n},) or (1, {n})")
        acc = acc + bias.reshape(n).to(torch.float32)
    if quant_scale is None:
        require(quant_offset is None, "weight_quant_matmul: quant_offset is given without quant_scale")
        return _to_float(acc, x.dtype, saturate)
    factor, offset = _scale_and_offset(
        quant_scale.reshape(-1), None if quant_offset is None else quant_offset.reshape(-1)
    )
    return _requantize(acc * factor, offset)


def dequantize_weight(
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    dtype: torch.dtype,
    group_size: int = 0,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """``(weight + offset) * scale`` as ``(K, N)`` in ``dtype``, rounded as the operator rounds it."""
    require(weight.dim() == 2, f"weight_quant_matmul: weight has rank {weight.dim()}; it must be a matrix")
    require(
        weight.dtype in (torch.int8, torch.int32),
        f"weight_quant_matmul: weight is {weight.dtype}; it must be int8, or int4 packed in int32",
    )
    k, n = matrix_shape(weight, transposed)
    codes = unpack_int4(weight) if weight.dtype == torch.int32 else weight
    codes = codes.t() if transposed else codes
    work = torch.float16 if dtype == torch.float16 else torch.float32
    w = codes.to(work)
    if offset is not None:
        require(
            tuple(offset.shape) == tuple(scale.shape),
            f"weight_quant_matmul: antiquant_offset is {tuple(offset.shape)}, antiquant_scale {tuple(scale.shape)}",
        )
        w = w + _spread(offset, k, n, group_size).to(work)
    return (w * _spread(scale, k, n, group_size).to(work)).to(dtype)


def _spread(parameter: torch.Tensor, k: int, n: int, group_size: int) -> torch.Tensor:
    """A scale or offset as something that broadcasts against ``(K, N)``."""
    shape = tuple(parameter.shape)
    if group_size == 0:
        accepted = ((1,), (1, 1), (n,), (1, n))
        require(shape in accepted, f"weight_quant_matmul: antiquant_scale has shape {shape}; accepted: {accepted}")
        return parameter.reshape(1, -1)
    groups = -(-k // group_size)
    require(
        shape == (groups, n),
        f"weight_quant_matmul: antiquant_scale is {shape}; with groups of {group_size} it must be ({groups}, {n})",
    )
    return parameter.repeat_interleave(group_size, dim=0)[:k]


# -- parameters ----------------------------------------------------------------------------------------------------


def trans_quant_param(scale: torch.Tensor, offset: torch.Tensor | None = None, round_mode: int = 0) -> torch.Tensor:
    """``npu_trans_quant_param``: scale and offset as the int64 word of :mod:`quantpass.lowering.scale_words`.

    Args:
        scale: float32, ``(n,)``, ``(1,)`` or ``(1, n)``.
        offset: float32; 1-D sizes broadcast, 2-D ones must be equal.
        round_mode: 0 truncates to FP19, 1 rounds half to even.
    """
    require(scale.dtype == torch.float32, f"trans_quant_param: scale is {scale.dtype}; it must be float32")
    require(round_mode in (0, 1), f"trans_quant_param: round_mode is {round_mode}; it must be 0 or 1")
    require(scale.numel() > 0, f"trans_quant_param: scale has shape {tuple(scale.shape)}; it may not be empty")
    if offset is not None:
        require(offset.dtype == torch.float32, f"trans_quant_param: offset is {offset.dtype}; it must be float32")
    return pack_scale_word(scale, offset, round_mode)


def format_cast(x: torch.Tensor, acl_format: int) -> torch.Tensor:
    """``npu_format_cast``: the same tensor in another storage format. On a CPU this is a copy."""
    del acl_format
    return x.clone()


__all__ = ["dequantize_weight", "fp19", "int_matmul", "quant_matmul", "trans_quant_param", "weight_quant_matmul"]

for _name, _kernel in {
    "quant_matmul": quant_matmul,
    "weight_quant_matmul": weight_quant_matmul,
    "trans_quant_param": trans_quant_param,
    "format_cast": format_cast,
    "pack_int4": pack_int4,
}.items():
    LIBRARY.impl(_name, _kernel, "CPU")
