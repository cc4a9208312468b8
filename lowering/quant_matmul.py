"""``npu_quant_matmul``: what it computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantpass.lowering.int4 import unpack_int4
from quantpass.lowering.integer_matmul import int_matmul
from quantpass.lowering.scale_words import pack_scale_word, unpack_scale_word
from quantpass.operators.ir import OUTPUT_DTYPES, require

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_FLOAT16_MAX = 65504.0


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
    acc = int_matmul(a, b)
    if bias is not None and bias.dtype == torch.int32:
        acc, bias = acc + bias, None
    if out == torch.int32:
        return acc
    through_word = out == torch.float16 and pertoken_scale is None and bias is None
    if out == torch.int8 or scale.dtype == torch.int64 or through_word:
        factor, word_offset = scale_and_offset(scale, offset if out == torch.int8 else None)
        t = acc.to(torch.float32) * factor
        return requantize(t, word_offset) if out == torch.int8 else to_float(t, out, saturate)
    t = acc.to(torch.float32) * scale.to(torch.float32)
    if pertoken_scale is not None:
        t = t * pertoken_scale.to(torch.float32).unsqueeze(-1)
    if bias is not None:
        t = t + bias.to(torch.float32)
    return to_float(t, out, saturate)


def int4_grouped(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    """A4W4 with a scale and a zero point for each group of K (newer than LinearQuant.md).

    ``y = pertoken_scale * sum_g scale_g * (a_g @ (b_g - offset_g))``; integer inside a group, float32 across groups.
    The offset is **subtracted** here, unlike everywhere else in the vendor's operators.

    Source: aclnnQuantMatmulV5.md:59-62; test_npu_quant_matmul.py, cpu_quant_matmul_a4w4_pergroup.
    """
    k, n = b.shape
    groups = _groups(k, group)
    _require_shape("scale", scale, (groups, n))
    _require_dtype("scale", scale, torch.float32)
    if offset is not None:
        _require_shape("offset", offset, (groups, n))
    y = torch.zeros((a.shape[0], n), dtype=torch.float32)
    for g in range(groups):
        rows = slice(g * group, (g + 1) * group)
        weight = b[rows].to(torch.int32)
        if offset is not None:
            weight = weight - offset[g].to(torch.int32)
        y = y + (a[:, rows].to(torch.float64) @ weight.to(torch.float64)).to(torch.float32) * scale[g]
    return y if pertoken_scale is None else y * _column(pertoken_scale, a.shape[0])


def int8_by_int4(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    """A8W4: int8 activation, int4 weight, int64 scale words for each group of K (newer than LinearQuant.md).

    The activation is split into int4 halves, ``hi = a // 16`` and ``lo = (a & 15) - 8``; each group's integer sums
    are scaled and accumulated in **float16**; ``y = (16 * hi_sum + lo_sum + offset) * pertoken_scale``. Since
    ``16 * hi + lo = a - 8``, the caller's ``offset`` has to hold ``8 * sum_k scale * b``.

    Source: test_npu_quant_matmul.py, a8w4_quant_golden.
    """
    k, n = b.shape
    groups = _groups(k, group)
    _require_shape("scale", scale, (groups, n))
    _require_dtype("scale", scale, torch.int64)
    factor, _ = unpack_scale_word(scale)
    high = torch.div(a.to(torch.int32), 16, rounding_mode="floor")
    low = (a.to(torch.int32) & 15) - 8
    sums = []
    for half in (high, low):
        total = torch.zeros((a.shape[0], n), dtype=torch.float16)
        for g in range(groups):
            rows = slice(g * group, (g + 1) * group)
            part = (half[:, rows].to(torch.float64) @ b[rows].to(torch.float64)).to(torch.float32) * factor[g]
            total = total + part.to(torch.float16)
        sums.append(total.to(torch.float32))
    y = sums[0] * 16 + sums[1]
    if offset is not None:
        _require_shape("offset", offset, (n,))
        y = y + offset.to(torch.float32)
    return y if pertoken_scale is None else y * _column(pertoken_scale, a.shape[0])


def scale_and_offset(scale: torch.Tensor, offset: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What the hardware reads: the FP19 scale and the 9-bit offset, packed first where the scale is a float."""
    return unpack_scale_word(scale if scale.dtype == torch.int64 else pack_scale_word(scale, offset))


def requantize(t: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The fixpipe's float32 to int8: round half to even, clip to 9 bits, add the offset, clip to 8."""
    return (t.round().clamp(-256, 255) + offset).clamp(-128, 127).to(torch.int8)


def to_float(t: torch.Tensor, dtype: torch.dtype, saturate: bool) -> torch.Tensor:
    """Float32 to the output's dtype, half to even."""
    if saturate and dtype == torch.float16:
        t = t.clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
    return t.to(dtype)


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
        out in OUTPUT_DTYPES,
        f"quant_matmul: output_dtype is {out}; it must be one of {OUTPUT_DTYPES}",
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
        _require_shape("pertoken_scale", pertoken_scale, (m,), "qmm.pertoken.shape")
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


def _groups(k: int, group: int) -> int:
    require(group > 0, f"quant_matmul: group_sizes[-1] is {group}; it must be positive")
    require(k % group == 0, f"quant_matmul: K = {k} is no multiple of the group size {group}")
    return k // group


def _require_shape(name: str, t: torch.Tensor, shape: tuple[int, ...], rule: str = "qmm.grouped.shape") -> None:
    require(tuple(t.shape) == shape, f"quant_matmul: {name} has shape {tuple(t.shape)}; it must be {shape}", rule)


def _require_dtype(name: str, t: torch.Tensor, dtype: torch.dtype) -> None:
    require(t.dtype == dtype, f"quant_matmul: {name} is {t.dtype}; it must be {dtype}")


def _column(pertoken_scale: torch.Tensor, m: int) -> torch.Tensor:
    shape = tuple(pertoken_scale.shape)
    require(shape in ((m,), (m, 1)), f"quant_matmul: pertoken_scale has shape {shape}; it must be ({m},) or ({m}, 1)")
    return pertoken_scale.to(torch.float32).reshape(m, 1)
