"""``npu_dynamic_quant``: symmetric quantization with scales found at run time."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from quantpass.chips import companions
from quantpass.operators.arguments import Arguments, dtype_numbered, refuse_given, require
from quantpass.operators.ge import Ge, padded
from quantpass.operators.int4 import pack_int4
from quantpass.operators.operator import AclnnGraph, Operator

_QINT8, _QUINT4X2 = torch.qint8, torch.quint4x2
_GE_INT8 = 2
"""GE's number of INT8, which attributes leave out."""


def dynamic_quant(
    x: torch.Tensor, smooth_scales: torch.Tensor | None = None, *, quant_mode: str = "pertoken"
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of ``x`` and the float32 scales that the operator finds: :func:`npu_dynamic_quant` to int8.

    Args:
        x: ``(..., K)`` float16 or bfloat16.
        smooth_scales: ``(K,)``, the dtype of x; x is multiplied by them first.
        quant_mode: ``"pertoken"``, a scale for each row, ``(...)``, or ``"pertensor"``, one, ``(1,)``.
    """
    return npu_dynamic_quant(x, smooth_scales=smooth_scales, quant_mode=quant_mode)


def npu_dynamic_quant(
    x: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: torch.dtype = torch.int8,
    quant_mode: str = "pertoken",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``npu_dynamic_quant``: symmetric quantization with scales found at run time.

    ``inverse = L / max|x|; y = rne(x * inverse); scale = max|x| / L`` with L = 127 (int8) or 7 (quint4x2), over each
    row (``"pertoken"``) or the whole tensor (``"pertensor"``). x is multiplied by ``smooth_scales`` first. A row of
    zeros gives zeros with the scale 0; on A2/A3 the kernel computes ``127 / 0 * 0`` there, undefined in int8.

    Args:
        x: ``(..., K)`` float16 or bfloat16.
        smooth_scales: ``(K,)``, the dtype of x; ``(groups, K)`` beside ``group_index``.
        group_index: ``(groups,)`` int32: behind which row each group ends. Rows behind the last are not smoothed.
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
        wide = wide * _smoothing(smooth_scales, group_index, x)
    require(
        group_index is None or smooth_scales is not None,
        "npu_dynamic_quant: group_index shares out smooth_scales, which are not given",
        "dynamic_quant.group.scales",
    )
    levels = 7.0 if dst_type == _QUINT4X2 else 127.0
    largest = wide.abs().amax() if quant_mode == "pertensor" else wide.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest == 0, 0.0, levels / largest)
    codes = (wide * inverse).round().clamp(-levels - 1, levels).to(torch.int8)
    scale = largest * (1.0 / levels)
    scale = scale.reshape(1) if quant_mode == "pertensor" else scale.squeeze(-1)
    return (pack_int4(codes) if dst_type == _QUINT4X2 else codes), scale


def _smoothing(scales: torch.Tensor, ends: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Smoothing scales in float32, as they multiply x."""
    wanted = (x.shape[-1],) if ends is None else (ends.numel(), x.shape[-1])
    shape = tuple(scales.shape)
    require(shape == wanted, f"npu_dynamic_quant: smooth_scales has shape {shape}; it must be {wanted}")
    if ends is None:
        return scales.to(torch.float32)
    fits = ends.dtype == torch.int32 and ends.dim() == 1
    require(
        fits,
        f"npu_dynamic_quant: group_index is {ends.dtype}, shape {tuple(ends.shape)}; it must be int32 of one dimension",
        "dynamic_quant.group.dtype",
    )
    rows = torch.arange(x.shape[:-1].numel())
    of_row = torch.searchsorted(ends.long(), rows, right=True)
    each = torch.cat([scales.to(torch.float32), torch.ones_like(scales[:1], dtype=torch.float32)])[of_row]
    return each.reshape(x.shape)


def _fake(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    return a.x.new_empty(a.x.shape, dtype=torch.int8), _fake_scale(a.x, a.quant_mode)


def _fake_scale(x: torch.Tensor, quant_mode: str) -> torch.Tensor:
    return x.new_empty(x.shape[:-1] if quant_mode == "pertoken" else (1,), dtype=torch.float32)


def _aclnn(graph: AclnnGraph, node: Node, a: Arguments) -> None:
    keywords = {"smooth_scales": a.smooth_scales, "quant_mode": a.quant_mode}
    graph.replace(node, companions.DYNAMIC_QUANT, (a.x,), keywords)


def _ge(ge: Ge, a: Arguments) -> Any:
    """DynamicQuant; for one scale DynamicQuantV2, as the vendor's converter chooses."""
    from torchair.ge._ge_graph import torch_type_to_ge_proto_type, torch_type_to_ge_type

    dst = torch_type_to_ge_type(torch.int8)
    if a.quant_mode == "pertoken":
        y, scale = ge.api.DynamicQuant(a.x, smooth_scales=a.smooth_scales, group_index=None, dst_type=dst)
    else:
        y, scale, _ = ge.api.DynamicQuantV2(
            a.x,
            a.smooth_scales,
            None,
            dst_type=dst,
            is_symmetrical=True,
            quant_mode=a.quant_mode,
            dst_type_max=0.0,
        )
    y.desc.dtype = torch_type_to_ge_proto_type(torch.int8)
    return y, scale


def _run(inputs: list[Any], attrs: dict[str, Any], saturates: bool) -> tuple[torch.Tensor, ...]:
    del saturates
    x, smooth, groups = padded(inputs, 3)
    if attrs.get("dst_type", _GE_INT8) != _GE_INT8:
        raise NotImplementedError("DynamicQuant to another dtype than int8")
    mode = attrs.get("quant_mode", "pertoken")
    return npu_dynamic_quant(x, smooth_scales=smooth, group_index=groups, quant_mode=mode)


def _run_v2(inputs: list[Any], attrs: dict[str, Any], saturates: bool) -> tuple[torch.Tensor, ...]:
    if not attrs.get("is_symmetrical", False) or attrs.get("dst_type_max", 0.0):
        raise NotImplementedError("DynamicQuantV2 with a zero point, or with dst_type_max")
    codes, scale = _run(inputs, attrs, saturates)
    return codes, scale, torch.zeros_like(scale)


def _emulated(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    refuse_given("npu_dynamic_quant", a, "dst_type_max")
    dtype = dtype_numbered(a.dst_type, torch.int8)
    assert dtype is not None
    groups = a.group_index
    return npu_dynamic_quant(
        a.input, smooth_scales=a.smooth_scales, group_index=groups, dst_type=dtype, quant_mode=a.quant_mode
    )


def _emulated_fake(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    x, scale = a.input, _fake_scale(a.input, a.quant_mode)
    if dtype_numbered(a.dst_type) == _QUINT4X2:
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 8), dtype=torch.int32), scale
    return torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format), scale


DYNAMIC_QUANT = Operator(
    vendor=companions.DYNAMIC_QUANT,
    kernel=dynamic_quant,
    fake=_fake,
    aclnn=_aclnn,
    ge=_ge,
    ge_kernels={"DynamicQuant": _run, "DynamicQuantV2": _run_v2},
    emulate=_emulated,
    emulate_fake=_emulated_fake,
    renamed={"x": "input"},
)
