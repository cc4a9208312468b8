"""``npu_anti_quant``: dequantization along the last axis."""

from __future__ import annotations

import torch

from quantpass.chips import companions
from quantpass.operators.arguments import Arguments, dtype_numbered, require
from quantpass.operators.int4 import unpack_int4
from quantpass.operators.operator import Emulated

_QUINT4X2 = torch.quint4x2


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


ANTI_QUANT = Emulated(vendor=companions.ANTI_QUANT, emulate=_anti_quant, emulate_fake=_anti_quant_fake)
