"""The fused operators as ``torch.ops.quantpass.*``: schemas and shapes.

A rewritten graph holds these, whatever it will be lowered to, so one graph means one thing everywhere. Their schemas
are the vendor's plus what the vendor leaves to strides or to the chip: ``transpose_*``, ``template``, ``saturate``.
What they compute is defined by their CPU kernels in :mod:`quantpass.lowering.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.library import Library, register_fake

LIBRARY = Library("quantpass", "DEF")

NZ = 29
"""The vendor's number of the FRACTAL_NZ format."""

ND = 2
"""The vendor's number of the ND format."""

_PURE = (torch.Tag.pt2_compliant_tag,)

LIBRARY.define(
    "weight_quant_matmul(Tensor x, Tensor weight, Tensor antiquant_scale, Tensor? antiquant_offset=None, "
    "Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? bias=None, int antiquant_group_size=0, "
    "int inner_precise=0, *, bool transpose_x=False, bool transpose_weight=False, str template='custom', "
    "bool saturate=False) -> Tensor",
    tags=_PURE,
)
LIBRARY.define(
    "quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? pertoken_scale=None, "
    "Tensor? bias=None, ScalarType? output_dtype=None, int[]? group_sizes=None, bool transpose_x1=False, "
    "bool transpose_x2=False, bool saturate=False) -> Tensor",
    tags=_PURE,
)
LIBRARY.define("trans_quant_param(Tensor scale, Tensor? offset=None, int round_mode=0) -> Tensor", tags=_PURE)
LIBRARY.define("format_cast(Tensor x, int acl_format) -> Tensor", tags=_PURE)
LIBRARY.define("pack_int4(Tensor codes) -> Tensor", tags=_PURE)

DTYPE_NUMBERS = {torch.int8: 1, torch.int32: 3, torch.float16: 5, torch.bfloat16: 15}
"""PyTorch's numbers of the dtypes that the vendor's ``output_dtype`` can ask for."""

OUTPUT_DTYPES = (torch.int8, torch.float16, torch.bfloat16, torch.int32, torch.float32)


def require(condition: Any, message: str, rule: str = "") -> None:
    """Raise ``ValueError`` unless ``condition``; a symbolic condition becomes a guard.

    Args:
        condition: what must hold.
        message: the argument, its value, and what is accepted.
        rule: the legality rule that says so, added to the message.
    """
    if not condition:
        raise ValueError(f"{message} [{rule}]" if rule else message)


def matrix_shape(t: torch.Tensor, transposed: bool) -> tuple[Any, Any]:
    """Logical ``(rows, columns)`` of a stored matrix; int32 holds eight int4 along its last stored axis."""
    rows, columns = t.shape[-2], t.shape[-1] * (8 if t.dtype == torch.int32 else 1)
    return (columns, rows) if transposed else (rows, columns)


@register_fake("quantpass::weight_quant_matmul", lib=LIBRARY)
def _weight_quant_matmul_fake(
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
    del antiquant_scale, antiquant_offset, quant_offset, bias, antiquant_group_size, inner_precise, template, saturate
    require(x.dim() >= 2, f"weight_quant_matmul: x has rank {x.dim()}; it must be (..., M, K)")
    require(weight.dim() == 2, f"weight_quant_matmul: weight has rank {weight.dim()}; it must be a matrix")
    m, k = (x.shape[-1], x.shape[-2]) if transpose_x else (x.shape[-2], x.shape[-1])
    kw, n = matrix_shape(weight, transpose_weight)
    require(k == kw, f"weight_quant_matmul: x has K = {k} and weight has K = {kw}")
    return x.new_empty((*x.shape[:-2], m, n), dtype=torch.int8 if quant_scale is not None else x.dtype)


@register_fake("quantpass::quant_matmul", lib=LIBRARY)
def _quant_matmul_fake(
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
    del scale, offset, pertoken_scale, bias, group_sizes, saturate
    for name, t in (("x1", x1), ("x2", x2)):
        require(t.dim() >= 2, f"quant_matmul: {name} has rank {t.dim()}; it must be at least 2")
    m, k1 = matrix_shape(x1, transpose_x1)
    k2, n = matrix_shape(x2, transpose_x2)
    require(k1 == k2, f"quant_matmul: x1 has K = {k1} and x2 has K = {k2}")
    batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
    return x1.new_empty((*batch, m, n), dtype=output_dtype or torch.int8)


@register_fake("quantpass::trans_quant_param", lib=LIBRARY)
def _trans_quant_param_fake(
    scale: torch.Tensor, offset: torch.Tensor | None = None, round_mode: int = 0
) -> torch.Tensor:
    del round_mode
    shape = scale.shape if offset is None else torch.broadcast_shapes(scale.shape, offset.shape)
    return scale.new_empty(shape, dtype=torch.int64)


@register_fake("quantpass::format_cast", lib=LIBRARY)
def _format_cast_fake(x: torch.Tensor, acl_format: int) -> torch.Tensor:
    del acl_format
    return torch.empty_like(x)


@register_fake("quantpass::pack_int4", lib=LIBRARY)
def _pack_int4_fake(codes: torch.Tensor) -> torch.Tensor:
    require(codes.dim() >= 1, "pack_int4: codes must have at least one dimension")
    require(codes.shape[-1] % 8 == 0, f"pack_int4: the last dimension is {codes.shape[-1]}; it must be a multiple of 8")
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] // 8), dtype=torch.int32)
