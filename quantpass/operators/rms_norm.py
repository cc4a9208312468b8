"""``npu_rms_norm``, ``npu_add_rms_norm`` and ``npu_add_rms_norm_dynamic_quant``: RMSNorm over the last dimension.

All of them compute ``x / sqrt(mean(x^2) + epsilon) * gamma`` in float32. Which values are rounded to the dtype of x on
the way is the kernel's own affair, and differs from one to the next; what is written here is what the kernels of A2 do.
An epsilon of 0 makes a row of zeros NaN; a NaN or an infinity makes its whole row NaN or zero, as the formula says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from quantpass.chips import norms
from quantpass.operators.arguments import Arguments, refuse_given, require
from quantpass.operators.ge import Ge, Inputs, padded
from quantpass.operators.operator import AclnnGraph, Operator

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_GE_INT8 = 2
_FIRST_ONLY = [True, False]
"""``output_mask``: the first of two quantized results."""


def rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """``x / sqrt(mean(x^2) + epsilon) * gamma`` over the last dimension, rounded once, and the inverse roots.

    Args:
        x: ``(..., K)`` float16, bfloat16 or float32.
        gamma: ``(K,)``, the dtype of x.
        epsilon: at least 0.

    Returns:
        The normalised rows, in the shape and dtype of x, and ``(..., 1)`` float32.

    Source: aclnnRmsNorm.md; rms_norm.h:144-222.
    """
    _check("rms_norm", x, gamma, epsilon)
    wide, inverse = _normalised(x.to(torch.float32), epsilon)
    return (wide * gamma.to(torch.float32)).to(x.dtype), inverse


def add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`rms_norm` of ``x1 + x2``, and the sum.

    The sum is rounded to its dtype before it is normalised; what is normalised is rounded before gamma is multiplied.

    Args:
        x1: ``(..., K)`` float16, bfloat16 or float32.
        x2: likewise.
        gamma: ``(K,)``, the same dtype.
        epsilon: at least 0.

    Returns:
        The normalised rows, the inverse roots ``(..., 1)`` float32, the sum.

    Source: aclnnAddRmsNorm.md; add_rms_norm_single_n.h:71-330.
    """
    _check("add_rms_norm", x1, gamma, epsilon, x2)
    x = x1 + x2
    wide, inverse = _normalised(x.to(torch.float32), epsilon)
    return wide.to(x.dtype) * gamma, inverse, x


def add_rms_norm_dynamic_quant(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm of ``x1 + x2``, quantized with a scale for each row, and the sum.

    What is normalised is the sum before rounding, and what is quantized is the norm before rounding.

    Args:
        x1: ``(..., K)`` float16 or bfloat16.
        x2: likewise.
        gamma: ``(K,)``, the same dtype.
        epsilon: at least 0.

    Returns:
        int8 codes, nothing (int8), the sum, a float32 scale for each row ``(...)``, nothing (float32): the operator can
        quantize in two ways, and this is one.

    Source: aclnnAddRmsNormDynamicQuantV2.md; add_rms_norm_dynamic_quant_normal_kernel.h:95-260.
    """
    _check("add_rms_norm_dynamic_quant", x1, gamma, epsilon, x2)
    total = x1.to(torch.float32) + x2.to(torch.float32)
    wide, _ = _normalised(total, epsilon)
    codes, scale = _quantized_rows(wide * gamma.to(torch.float32))
    return codes, codes.new_empty(0), total.to(x1.dtype), scale, scale.new_empty(0)


def _normalised(wide: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    inverse = 1 / torch.sqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return wide * inverse, inverse


def _quantized_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``npu_dynamic_quant`` does it, of float32."""
    largest = rows.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest == 0, 0.0, 127.0 / largest)
    codes = (rows * inverse).round().clamp(-128, 127).to(torch.int8)
    return codes, (largest / 127.0).squeeze(-1)


def _check(name: str, x: torch.Tensor, gamma: torch.Tensor, epsilon: float, other: torch.Tensor | None = None) -> None:
    require(x.dtype in _FLOATS, f"{name}: x is {x.dtype}; it must be one of {_FLOATS}")
    require(x.dim() > 0, f"{name}: x has no dimensions; it must be (..., K)")
    require(gamma.dtype == x.dtype, f"{name}: gamma is {gamma.dtype}; it must be {x.dtype}, as x is")
    shape = tuple(gamma.shape)
    require(shape == (x.shape[-1],), f"{name}: gamma has shape {shape}; it must be ({x.shape[-1]},)")
    require(epsilon >= 0, f"{name}: epsilon is {epsilon}; it must be at least 0")
    if other is not None:
        alike = other.shape == x.shape and other.dtype == x.dtype
        found = f"x2 is {other.dtype} {tuple(other.shape)}"
        require(alike, f"{name}: {found}; it must be {x.dtype} {tuple(x.shape)}, as x1 is")


# -- shapes ------------------------------------------------------------------------------------------------------------


def _roots(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _like(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _fake(a: Arguments) -> tuple[torch.Tensor, ...]:
    return _like(a.x), _roots(a.x)


def _fake_added(a: Arguments) -> tuple[torch.Tensor, ...]:
    return _like(a.x1), _roots(a.x1), _like(a.x1)


def _fake_quantized(a: Arguments) -> tuple[torch.Tensor, ...]:
    codes = a.x1.new_empty(a.x1.shape, dtype=torch.int8)
    scale = a.x1.new_empty(a.x1.shape[:-1], dtype=torch.float32)
    return codes, codes.new_empty(0), _like(a.x1), scale, scale.new_empty(0)


# -- aclnn -------------------------------------------------------------------------------------------------------------


def _aclnn(graph: AclnnGraph, node: Node, a: Arguments) -> None:
    graph.replace(node, norms.RMS_NORM, (a.x, a.gamma, a.epsilon), {})


def _aclnn_added(graph: AclnnGraph, node: Node, a: Arguments) -> None:
    graph.replace(node, norms.ADD_RMS_NORM, (a.x1, a.x2, a.gamma, a.epsilon), {})


def _aclnn_quantized(graph: AclnnGraph, node: Node, a: Arguments) -> None:
    keywords = {"epsilon": a.epsilon, "output_mask": _FIRST_ONLY}
    graph.replace(node, norms.ADD_RMS_NORM_DYNAMIC_QUANT, (a.x1, a.x2, a.gamma), keywords)


# -- GE ----------------------------------------------------------------------------------------------------------------


def _ge(ge: Ge, a: Arguments) -> Any:
    return ge.api.RmsNorm(a.x, a.gamma, epsilon=a.epsilon)


def _ge_added(ge: Ge, a: Arguments) -> Any:
    return ge.api.AddRmsNorm(a.x1, a.x2, a.gamma, epsilon=a.epsilon)


def _ge_quantized(ge: Ge, a: Arguments) -> Any:
    """AddRmsNormDynamicQuant, with constants for what it does not give, as the vendor's converter has them.

    Its ``dst_type`` came with generation F of torchair; before, the result is int8.
    """
    from torchair.ge._ge_graph import torch_type_to_ge_proto_type, torch_type_to_ge_type

    dst = torch_type_to_ge_type(torch.int8)
    dtype = {"dst_type": dst} if ge.api.takes("AddRmsNormDynamicQuant", "dst_type") else {}
    y1, _, x, scale1, _ = ge.api.AddRmsNormDynamicQuant(
        a.x1, a.x2, a.gamma, None, None, None, epsilon=a.epsilon, output_mask=_FIRST_ONLY, **dtype
    )
    y1.desc.dtype = torch_type_to_ge_proto_type(torch.int8)
    nothing = (ge.api.Const([], dtype=dst), ge.api.Const([], dtype=ge.dtypes.DT_FLOAT))
    return y1, nothing[0], x, scale1, nothing[1]


def _run(inputs: Inputs, attrs: dict[str, Any], saturates: bool) -> tuple[torch.Tensor, ...]:
    del saturates
    x, gamma = inputs
    return rms_norm(x, gamma, attrs.get("epsilon", 1e-6))


def _run_added(inputs: Inputs, attrs: dict[str, Any], saturates: bool) -> tuple[torch.Tensor, ...]:
    del saturates
    x1, x2, gamma = inputs
    return add_rms_norm(x1, x2, gamma, attrs.get("epsilon", 1e-6))


def _run_quantized(inputs: Inputs, attrs: dict[str, Any], saturates: bool) -> tuple[torch.Tensor, ...]:
    del saturates
    x1, x2, gamma, *more = padded(inputs, 6)
    if any(x is not None for x in more) or list(attrs.get("output_mask", _FIRST_ONLY)) != _FIRST_ONLY:
        raise NotImplementedError("AddRmsNormDynamicQuant with factors, an addend or a second result")
    if attrs.get("dst_type", _GE_INT8) != _GE_INT8:
        raise NotImplementedError("AddRmsNormDynamicQuant to another dtype than int8")
    return add_rms_norm_dynamic_quant(x1, x2, gamma, attrs.get("epsilon", 1e-6))


# -- emulation ---------------------------------------------------------------------------------------------------------


def _emulated_quantized(a: Arguments) -> tuple[torch.Tensor, ...]:
    refuse_given("npu_add_rms_norm_dynamic_quant", a, "smooth_scale1", "smooth_scale2", "beta", "y_dtype")
    mask = a.output_mask
    given = mask is None or list(mask) == _FIRST_ONLY
    require(given, f"npu_add_rms_norm_dynamic_quant: output_mask is {mask}; the emulation takes None and [True, False]")
    return add_rms_norm_dynamic_quant(a.x1, a.x2, a.gamma, a.epsilon)


RMS_NORM = Operator(
    vendor=norms.RMS_NORM,
    kernel=rms_norm,
    fake=_fake,
    aclnn=_aclnn,
    ge=_ge,
    ge_kernels={"RmsNorm": _run},
    emulate=lambda a: rms_norm(a.input, a.gamma, a.epsilon),
)

ADD_RMS_NORM = Operator(
    vendor=norms.ADD_RMS_NORM,
    kernel=add_rms_norm,
    fake=_fake_added,
    aclnn=_aclnn_added,
    ge=_ge_added,
    ge_kernels={"AddRmsNorm": _run_added},
    emulate=lambda a: add_rms_norm(a.x1, a.x2, a.gamma, a.epsilon),
)

ADD_RMS_NORM_DYNAMIC_QUANT = Operator(
    vendor=norms.ADD_RMS_NORM_DYNAMIC_QUANT,
    kernel=add_rms_norm_dynamic_quant,
    fake=_fake_quantized,
    aclnn=_aclnn_quantized,
    ge=_ge_quantized,
    ge_kernels={"AddRmsNormDynamicQuant": _run_quantized},
    emulate=_emulated_quantized,
)
