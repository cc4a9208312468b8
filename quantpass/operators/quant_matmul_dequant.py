"""``npu_quant_matmul_dequant``: what it computes, and how each lowering carries it out."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from quantpass.chips.quant_matmul_dequant import QMMD
from quantpass.operators.arguments import Arguments, require
from quantpass.operators.ge import Ge, Inputs
from quantpass.operators.integer_matmul import int_matmul
from quantpass.operators.operator import AclnnGraph, Operator
from quantpass.operators.results import to_float

_LEVELS = 127.0


def quant_matmul_dequant(
    x: torch.Tensor,
    quantized_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    x_scale: torch.Tensor | None = None,
    smooth_scale: torch.Tensor | None = None,
    quant_mode: str = "pertoken",
    saturate: bool = False,
) -> torch.Tensor:
    """Rows quantized to int8, an int32 matmul, both scales: ``fp16(float32(codes @ weight.T) * weight_scale * s)``.

    With ``t = x * smooth_scale`` in float32, ``s = x_scale`` or ``max|t| / 127`` of each row, and
    ``codes = clip(rne(t * (1 / s)), -128, 127)``. A row of zeros gives zeros.

    Args:
        x: ``(M, K)`` float16.
        quantized_weight: ``(N, K)`` int8.
        weight_scale: ``(N,)`` float32.
        x_scale: float32, ``(1,)`` with ``"pertensor"``, ``(M,)`` with ``"pertoken"``; None to find one for each row.
        smooth_scale: ``(K,)`` float16.
        quant_mode: ``"pertoken"`` or ``"pertensor"``.
        saturate: float16 overflow gives the largest finite number (310P) instead of infinity.

    Raises:
        ValueError: an argument that the operator does not take; the message names it.

    Source: aclnnQuantMatmulDequant.md; the vendor's golden in test_quant_matmul_dequant.py, a test that is skipped, so
    that how the device rounds is documented and no more: a code may be off by one. docs/semantics.md, section 5.
    """
    _check(x, quantized_weight, weight_scale, x_scale, smooth_scale, quant_mode)
    wide = x.to(torch.float32)
    if smooth_scale is not None:
        wide = wide * smooth_scale.to(torch.float32)
    scale = wide.abs().amax(-1, keepdim=True) / _LEVELS if x_scale is None else x_scale.reshape(-1, 1)
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    codes = (wide * inverse).round().clamp(-128, 127).to(torch.int8)
    acc = int_matmul(codes, quantized_weight.t())
    return to_float(acc.to(torch.float32) * weight_scale * scale, torch.float16, saturate)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor | None,
    smooth_scale: torch.Tensor | None,
    quant_mode: str,
) -> None:
    modes = ("pertoken", "pertensor")
    require(quant_mode in modes, f"quant_matmul_dequant: quant_mode is {quant_mode!r}; accepted: {modes}", "qmmd.mode")
    dynamic = f"quant_matmul_dequant: quant_mode is {quant_mode!r} without x_scale; it must be 'pertoken'"
    require(x_scale is not None or quant_mode == "pertoken", dynamic, "qmmd.dynamic")
    _require("x", x, torch.float16, (None, None), "qmmd.x")
    m, k = x.shape
    _require("quantized_weight", weight, torch.int8, (None, k), "qmmd.weight")
    _require("weight_scale", weight_scale, torch.float32, (weight.shape[0],), "qmmd.scale")
    rows, which = (m, "token") if quant_mode == "pertoken" else (1, "tensor")
    if x_scale is not None:
        _require("x_scale", x_scale, torch.float32, (rows,), f"qmmd.x_scale.{which}")
    if smooth_scale is not None:
        _require("smooth_scale", smooth_scale, torch.float16, (k,), "qmmd.smooth")


def _require(name: str, t: torch.Tensor, dtype: torch.dtype, shape: tuple[int | None, ...], rule: str) -> None:
    fits = t.dim() == len(shape) and all(w in (None, s) for s, w in zip(t.shape, shape, strict=True))
    wanted = ", ".join("any" if s is None else str(s) for s in shape)
    is_ = f"quant_matmul_dequant: {name} is {t.dtype} of shape {tuple(t.shape)}"
    require(t.dtype == dtype and fits, f"{is_}; it must be {dtype} of shape ({wanted})", rule)


def _fake(a: Arguments) -> torch.Tensor:
    x, weight = a.x, a.quantized_weight
    require(x.dim() == 2, f"quant_matmul_dequant: x has rank {x.dim()}; it must be (M, K)", "qmmd.x.rank")
    require(weight.dim() == 2, f"quant_matmul_dequant: quantized_weight has rank {weight.dim()}", "qmmd.weight.rank")
    sizes = f"quant_matmul_dequant: x has K = {x.shape[1]} and quantized_weight has K = {weight.shape[1]}"
    require(x.shape[1] == weight.shape[1], sizes, "qmmd.k")
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float16)  # type: ignore[no-any-return]


def _aclnn(graph: AclnnGraph, node: Node, a: Arguments) -> None:
    keywords = {"x_scale": a.x_scale, "smooth_scale": a.smooth_scale, "quant_mode": a.quant_mode}
    graph.replace(node, QMMD, (a.x, a.quantized_weight, a.weight_scale), keywords)


def _ge(ge: Ge, a: Arguments) -> Any:
    """QuantMatmulDequant."""
    return ge.api.QuantMatmulDequant(
        a.x,
        a.quantized_weight,
        a.weight_scale,
        bias=None,
        x_scale=a.x_scale,
        x_offset=None,
        smooth_scale=a.smooth_scale,
        x_quant_mode=a.quant_mode,
        transpose_weight=True,
    )


def _run(inputs: Inputs, attrs: dict[str, Any], saturates: bool) -> torch.Tensor:
    given = dict(inputs.named)
    x, weight, weight_scale = (given.pop(name) for name in ("x", "quantized_weight", "weight_scale"))
    x_scale, smooth_scale = given.pop("x_scale", None), given.pop("smooth_scale", None)
    if any(t is not None for t in given.values()) or not attrs.get("transpose_weight", True):
        raise NotImplementedError("QuantMatmulDequant with a bias, an offset of x, or a weight (k, n)")
    mode = attrs.get("x_quant_mode", "pertoken")
    return quant_matmul_dequant(
        x, weight, weight_scale, x_scale=x_scale, smooth_scale=smooth_scale, quant_mode=mode, saturate=saturates
    )


def _emulated(a: Arguments) -> torch.Tensor:
    for name in ("bias", "x_offset"):
        message = f"npu_quant_matmul_dequant: {name} is given; the operator takes none"
        require(getattr(a, name) is None, message, f"qmmd.{name}")
    return torch.ops.quantpass.quant_matmul_dequant(  # type: ignore[no-any-return]
        a.x, a.quantized_weight, a.weight_scale, x_scale=a.x_scale, smooth_scale=a.smooth_scale,
        quant_mode=a.quant_mode or "pertoken", saturate=True,
    )  # fmt: skip


QUANT_MATMUL_DEQUANT = Operator(
    vendor=QMMD,
    kernel=quant_matmul_dequant,
    fake=_fake,
    aclnn=_aclnn,
    ge=_ge,
    ge_kernels={"QuantMatmulDequant": _run},
    emulate=_emulated,
)
