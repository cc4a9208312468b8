"""``npu_quantize``: quantization with parameters that are given."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from quantpass.chips import companions
from quantpass.operators.arguments import Arguments, dtype_numbered, require
from quantpass.operators.ge import Ge, padded
from quantpass.operators.int4 import pack_int4
from quantpass.operators.operator import AclnnGraph, Operator

_QINT8, _QUINT8, _QINT32, _QUINT4X2 = torch.qint8, torch.quint8, torch.qint32, torch.quint4x2
_CONTAINERS = {_QINT8: torch.int8, _QUINT8: torch.uint8, _QINT32: torch.int32}
_GE_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"sqrt_mode": False, "round_mode": "round", "dst_type": 2, "axis": -1}
)
"""Attributes of AscendQuantV2 that give int8 along the last axis; 2 is GE's number of it."""

_QINT8_NUMBER = 12
"""PyTorch's number of ``torch.qint8``."""


def quantize(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
    """int8 codes ``saturate(round(x * scale + offset))``: :func:`npu_quantize` that multiplies, to int8.

    Args:
        x: floating, any shape.
        scale: ``(1,)`` or ``(K,)`` for the last axis, float32: the inverse of what a code stands for.
        offset: the same shape, float32: the zero point.
    """
    return npu_quantize(x, scale, offset, _QINT8, -1, False)


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
    * ``div_mode=False``: ``saturate(round(x * scales + zero_points))`` along the last axis, or with ``axis=-2`` along
      the one before it (a scale for each head), to qint8 (int8) or quint4x2 (eight int4 packed in int32 along the last
      axis)

    Rounding is half to even, arithmetic float32.

    Args:
        x: floating, any shape.
        scales: ``(1,)`` or the size of the axis; where they multiply, also with all dimensions of x, 1 in the others.
        zero_points: the same shape, or None.
        dtype: ``torch.qint8``, ``torch.quint8``, ``torch.qint32`` or ``torch.quint4x2``.
        axis: which axis the parameters belong to; where they multiply, every value but -2 means the last.
        div_mode: divide by the scales, or multiply by them.

    Source: npu_quantize.md; aclnnAscendQuantV3.md; ascend_quant_v2.h:150-190.
    """
    accepted = (_QINT8, _QUINT8, _QINT32) if div_mode else (_QINT8, _QUINT4X2)
    require(dtype in accepted, f"npu_quantize: dtype is {dtype}; with div_mode={div_mode} it must be one of {accepted}")
    axis = axis % x.dim() if div_mode else x.dim() - (2 if axis == -2 else 1)
    require(axis >= 0, f"npu_quantize: axis is -2; input has {x.dim()} dimension")
    wide = x.to(torch.float32)
    scale = _along("scales", scales, x, axis, not div_mode)
    value = wide / scale if div_mode else wide * scale
    if zero_points is not None:
        value = value + _along("zero_points", zero_points, x, axis, not div_mode)
    value = value.round()
    if dtype == _QUINT4X2:
        return pack_int4(value.clamp(-8, 7).to(torch.int8))
    container = _CONTAINERS[dtype]
    info = torch.iinfo(container)
    return value.to(torch.float64).clamp(info.min, info.max).to(container)


def _along(name: str, parameter: torch.Tensor, x: torch.Tensor, axis: int, whole: bool) -> torch.Tensor:
    """A parameter as float32 that broadcasts along ``axis`` of x; ``whole``: it may have all the dimensions of x."""
    shape, size = tuple(parameter.shape), x.shape[axis]
    view = [1] * x.dim()
    view[axis] = shape[0] if len(shape) == 1 else size
    as_long = whole and shape in (tuple(view), (1,) * x.dim())
    fits = shape in ((1,), (size,)) or as_long
    require(fits, f"npu_quantize: {name} has shape {shape}; it must be (1,) or ({size},) for axis {axis}")
    return parameter.to(torch.float32).reshape(shape if as_long else view)


def _fake(a: Arguments) -> torch.Tensor:
    return a.x.new_empty(a.x.shape, dtype=torch.int8)  # type: ignore[no-any-return]


def _aclnn(graph: AclnnGraph, node: Node, a: Arguments) -> None:
    graph.replace(node, companions.QUANTIZE, (a.x, a.scale, a.offset, _QINT8_NUMBER, -1, False), {})


def _ge(ge: Ge, a: Arguments) -> Any:
    """AscendQuantV2, to which the vendor's converter gives qint8 as int8."""
    from torchair.ge._ge_graph import torch_type_to_ge_proto_type, torch_type_to_ge_type

    dst = torch_type_to_ge_type(torch.int8)
    y = ge.api.AscendQuantV2(a.x, a.scale, a.offset, sqrt_mode=False, round_mode="round", dst_type=dst, axis=-1)
    y.desc.dtype = torch_type_to_ge_proto_type(torch.int8)
    return y


def _run(inputs: list[Any], attrs: dict[str, Any], saturates: bool) -> torch.Tensor:
    del saturates
    x, scale, offset = padded(inputs, 3)
    given = {name: attrs.get(name, default) for name, default in _GE_DEFAULTS.items()}
    if given != _GE_DEFAULTS:
        raise NotImplementedError("AscendQuantV2 that is not to int8 along the last axis, rounding to the nearest")
    return quantize(x, scale, offset)


def _emulated(a: Arguments) -> torch.Tensor:
    dtype = dtype_numbered(a.dtype)
    assert dtype is not None
    return npu_quantize(a.input, a.scales, a.zero_points, dtype, a.axis, a.div_mode)


def _emulated_fake(a: Arguments) -> torch.Tensor:
    dtype, x = dtype_numbered(a.dtype), a.input
    if dtype == _QUINT4X2:
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 8), dtype=torch.int32)  # type: ignore[no-any-return]
    require(dtype in _CONTAINERS, f"npu_quantize: dtype is {dtype}; it must be qint8, quint8, qint32 or quint4x2")
    return torch.empty_like(x, dtype=_CONTAINERS[dtype])  # type: ignore[index]


QUANTIZE = Operator(
    vendor=companions.QUANTIZE,
    kernel=quantize,
    fake=_fake,
    aclnn=_aclnn,
    ge=_ge,
    ge_kernels={"AscendQuantV2": _run},
    emulate=_emulated,
    emulate_fake=_emulated_fake,
    renamed={"x": "input", "scale": "scales", "offset": "zero_points"},
    always={"dtype": "qint8", "axis": -1, "div_mode": False},
)
