"""The vendor's quantize and dequantize operators: ``npu_quantize``, ``npu_dynamic_quant``, ``npu_anti_quant``."""

from __future__ import annotations

import torch

from quantpass.chips import companions
from quantpass.operators.arguments import Arguments, dtype_numbered, refuse_given, require
from quantpass.operators.int4 import pack_int4, unpack_int4
from quantpass.operators.operator import Emulated

_QINT8, _QUINT8, _QINT32, _QUINT4X2 = torch.qint8, torch.quint8, torch.qint32, torch.quint4x2
_CONTAINERS = {_QINT8: torch.int8, _QUINT8: torch.uint8, _QINT32: torch.int32}


def npu_quantize(
    x: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: torch.dtype,
    axis: int = 1,
    div_mode: bool = True,
) -> torch.Tensor:
    """``npu_quantize``.

    * ``div_mode=True``: ``saturate(round(x / scales + zero_points))`` along ``axis``, to qint8 (int8), quint8 (uint8)
      or qint32 (int32)
    * ``div_mode=False``: ``saturate(round(x * scales + zero_points))`` along the last axis, to qint8 (int8) or
      quint4x2 (eight int4 packed in int32 along the last axis)

    Rounding is half to even, arithmetic float32.

    Args:
        x: floating, any shape.
        scales: ``(1,)`` or the size of the axis.
        zero_points: the same shape, or None.
        dtype: ``torch.qint8``, ``torch.quint8``, ``torch.qint32`` or ``torch.quint4x2``.
        axis: which axis the parameters belong to.
        div_mode: divide by the scales, or multiply by them.

    Source: npu_quantize.md; ascend_quant_v2.h:150-190.
    """
    accepted = (_QINT8, _QUINT8, _QINT32) if div_mode else (_QINT8, _QUINT4X2)
    require(dtype in accepted, f"npu_quantize: dtype is {dtype}; with div_mode={div_mode} it must be one of {accepted}")
    axis = axis % x.dim() if div_mode else x.dim() - 1
    wide = x.to(torch.float32)
    scale = _along("scales", scales, x, axis)
    value = wide / scale if div_mode else wide * scale
    if zero_points is not None:
        value = value + _along("zero_points", zero_points, x, axis)
    value = value.round()
    if dtype == _QUINT4X2:
        return pack_int4(value.clamp(-8, 7).to(torch.int8))
    container = _CONTAINERS[dtype]
    info = torch.iinfo(container)
    return value.to(torch.float64).clamp(info.min, info.max).to(container)


def npu_dynamic_quant(
    x: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    dst_type: torch.dtype = torch.int8,
    quant_mode: str = "pertoken",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``npu_dynamic_quant``: symmetric quantization with scales found at run time.

    ``inverse = L / max|x|; y = rne(x * inverse); scale = max|x| / L`` with L = 127 (int8) or 7 (quint4x2), over each
    row (``"pertoken"``) or the whole tensor (``"pertensor"``). x is multiplied by ``smooth_scales`` first. A row of
    zeros gives zeros with the scale 0; on A2/A3 the kernel computes ``127 / 0 * 0`` there, undefined in int8.

    Args:
        x: ``(..., K)`` float16 or bfloat16.
        smooth_scales: ``(K,)``, the dtype of x.
        dst_type: ``torch.int8`` (or ``torch.qint8``), or ``torch.quint4x2``.
        quant_mode: ``"pertoken"`` or ``"pertensor"``.

    Returns:
        Codes (int8, or int32 with eight int4 along the last axis) and float32 scales, ``(...)`` or ``(1,)``.

    Source: npu_dynamic_quant.md; dynamic_quant.h:163-179.
    """
    require(
        x.dtype in (torch.float16, torch.bfloat16),
        f"npu_dynamic_quant: input is {x.dtype}; it must be float16 or bfloat16",
    )
    require(
        quant_mode in ("pertoken", "pertensor"),
        f"npu_dynamic_quant: quant_mode is {quant_mode!r}; accepted: 'pertoken', 'pertensor'",
    )
    known = (torch.int8, _QINT8, _QUINT4X2)
    require(dst_type in known, f"npu_dynamic_quant: dst_type is {dst_type}; it must be one of {known}")
    wide = x.to(torch.float32)
    if smooth_scales is not None:
        shape = tuple(smooth_scales.shape)
        require(
            shape == (x.shape[-1],), f"npu_dynamic_quant: smooth_scales has shape {shape}; it must be ({x.shape[-1]},)"
        )
        wide = wide * smooth_scales.to(torch.float32)
    levels = 7.0 if dst_type == _QUINT4X2 else 127.0
    largest = wide.abs().amax() if quant_mode == "pertensor" else wide.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest == 0, 0.0, levels / largest)
    codes = (wide * inverse).round().clamp(-levels - 1, levels).to(torch.int8)
    scale = largest * (1.0 / levels)
    scale = scale.reshape(1) if quant_mode == "pertensor" else scale.squeeze(-1)
    return (pack_int4(codes) if dst_type == _QUINT4X2 else codes), scale


def npu_anti_quant(
    x: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    dst_dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """``npu_anti_quant``: ``(x + offset) * scale`` in float32, cast to float16 or bfloat16.

    Args:
        x: int8, or int32 with eight int4 along the last axis.
        scale: ``(1,)`` or the size of the last (unpacked) axis.
        offset: the same shape; added.
        dst_dtype: ``torch.float16`` or ``torch.bfloat16``.

    Source: npu_anti_quant.md.
    """
    require(
        x.dtype in (torch.int8, torch.int32),
        f"npu_anti_quant: x is {x.dtype}; it must be int8, or int4 packed in int32",
    )
    floats = (torch.float16, torch.bfloat16)
    require(dst_dtype in floats, f"npu_anti_quant: dst_dtype is {dst_dtype}; it must be float16 or bfloat16")
    codes = unpack_int4(x) if x.dtype == torch.int32 else x
    value = codes.to(torch.float32)
    for name, parameter in (("scale", scale), ("offset", offset)):
        shape = None if parameter is None else tuple(parameter.shape)
        fits = shape in (None, (1,), (codes.shape[-1],))
        require(fits, f"npu_anti_quant: {name} has shape {shape}; it must be (1,) or ({codes.shape[-1]},)")
    if offset is not None:
        value = value + offset.to(torch.float32)
    return (value * scale.to(torch.float32)).to(dst_dtype)


def _along(name: str, parameter: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    """A parameter as float32 that broadcasts along ``axis`` of x."""
    shape = tuple(parameter.shape)
    fits = shape in ((1,), (x.shape[axis],))
    require(fits, f"npu_quantize: {name} has shape {shape}; it must be (1,) or ({x.shape[axis]},) for axis {axis}")
    view = [1] * x.dim()
    view[axis] = shape[0]
    return parameter.to(torch.float32).reshape(view)


def _eighth(x: torch.Tensor) -> tuple[int, ...]:
    """The shape of ``x`` with int4 packed along its last axis."""
    return (*x.shape[:-1], x.shape[-1] // 8)


def _quantize(a: Arguments) -> torch.Tensor:
    dtype = dtype_numbered(a.dtype)
    assert dtype is not None
    return npu_quantize(a.input, a.scales, a.zero_points, dtype, a.axis, a.div_mode)


def _quantize_fake(a: Arguments) -> torch.Tensor:
    dtype, x = dtype_numbered(a.dtype), a.input
    if dtype == _QUINT4X2:
        return x.new_empty(_eighth(x), dtype=torch.int32)  # type: ignore[no-any-return]
    require(dtype in _CONTAINERS, f"npu_quantize: dtype is {dtype}; it must be qint8, quint8, qint32 or quint4x2")
    return torch.empty_like(x, dtype=_CONTAINERS[dtype])  # type: ignore[index]


def _dynamic_quant(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    refuse_given("npu_dynamic_quant", a, "group_index", "dst_type_max")
    dtype = dtype_numbered(a.dst_type, torch.int8)
    assert dtype is not None
    return npu_dynamic_quant(a.input, smooth_scales=a.smooth_scales, dst_type=dtype, quant_mode=a.quant_mode)


def _dynamic_quant_fake(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    x = a.input
    scale = x.new_empty(x.shape[:-1] if a.quant_mode == "pertoken" else (1,), dtype=torch.float32)
    if dtype_numbered(a.dst_type) == _QUINT4X2:
        return x.new_empty(_eighth(x), dtype=torch.int32), scale
    return torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format), scale


def _anti_quant(a: Arguments) -> torch.Tensor:
    source = dtype_numbered(a.src_dtype)
    message = f"npu_anti_quant: src_dtype is {source}; it must be int8, quint4x2 or None"
    require(source in (None, torch.int8, _QUINT4X2), message)
    dtype = dtype_numbered(a.dst_dtype, torch.float16)
    assert dtype is not None
    return npu_anti_quant(a.x, a.scale, offset=a.offset, dst_dtype=dtype)


def _anti_quant_fake(a: Arguments) -> torch.Tensor:
    last = a.x.shape[-1] * (8 if a.x.dtype == torch.int32 else 1)
    dtype = dtype_numbered(a.dst_dtype, torch.float16)
    return a.x.new_empty((*a.x.shape[:-1], last), dtype=dtype)  # type: ignore[no-any-return]


QUANTIZE = Emulated(vendor=companions.QUANTIZE, emulate=_quantize, emulate_fake=_quantize_fake)
DYNAMIC_QUANT = Emulated(vendor=companions.DYNAMIC_QUANT, emulate=_dynamic_quant, emulate_fake=_dynamic_quant_fake)
ANTI_QUANT = Emulated(vendor=companions.ANTI_QUANT, emulate=_anti_quant, emulate_fake=_anti_quant_fake)
