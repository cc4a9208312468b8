"""``npu_weight_quant_batchmatmul``: what it computes, kernel template by kernel template.

On A2/A3 the vendor's library picks one of several kernels by shape, and they round differently. ``template`` names the
arithmetic: ``"custom"`` (the documented one, and the default), ``"msd"``, ``"fixpipe"``, ``"310p"``, or ``"auto"`` for
what the library would pick. docs/semantics.md, section 2, states each and what is not known about it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from quantpass.chips.weight_quant_matmul import WQMM
from quantpass.graph.scale_words import unpack_scale_word
from quantpass.operators.arguments import Arguments, matrix_shape, packed_transposed, refuse_given, require
from quantpass.operators.ge import Ge, padded, turned
from quantpass.operators.int4 import unpack_int4
from quantpass.operators.multi_scale import INT4_PLANES, INT8_PLANES, accumulated, half_away
from quantpass.operators.operator import AclnnGraph, Operator
from quantpass.operators.results import requantize, scale_and_offset, to_float
from quantpass.operators.weight_dequantization import dequantized_to

TEMPLATES = ("custom", "msd", "fixpipe", "310p", "auto")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


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
    """``x @ ((weight + antiquant_offset) * antiquant_scale) + bias``.

    The custom template dequantizes the weight in float16 where x is float16 (two roundings) and in float32, rounded
    once to x's dtype, where it is not; products accumulate in float32, the bias enters the accumulator.

    Args:
        x: ``(..., M, K)`` float16, bfloat16 or float32; stored ``(..., K, M)`` where ``transpose_x``.
        weight: ``(K, N)`` int8, or int4 packed in int32 along the stored last axis; stored ``(N, K)`` where
            ``transpose_weight``.
        antiquant_scale: ``(1,)``, ``(N,)``, ``(1, N)`` or, with groups, ``(ceil(K / group), N)``; the dtype of x, or
            int64 words (per channel, float16 x).
        antiquant_offset: the same shape; **added** to the codes (minus the zero point). The dtype of the scale; int32
            with an int64 scale.
        quant_scale: ``(1,)``, ``(N,)`` or ``(1, N)``: float32 or an int64 word; makes the output int8.
        quant_offset: float32; read only where ``quant_scale`` is float32 (an int64 word carries its own offset).
        bias: ``(N,)`` or ``(1, N)``, floating.
        antiquant_group_size: rows of K that share a scale; 0 for all.
        inner_precise: 1 recombines the planes of the grouped int4 MSD template in float16.
        transpose_x: x is stored ``(..., K, M)``.
        transpose_weight: weight is stored ``(N, K)``.
        template: one of ``TEMPLATES``.
        saturate: float16 overflow gives the largest finite number (310P) instead of infinity (A2/A3).

    Raises:
        ValueError: an argument that the operator does not take; the message names it.

    Source: LinearWeightQuant.md; npu_weight_quant_batchmatmul.md; docs/semantics.md, section 2.
    """
    require(template in TEMPLATES, f"weight_quant_matmul: template is {template!r}; accepted: {TEMPLATES}")
    require(
        x.dtype in _FLOATS,
        f"weight_quant_matmul: x is {x.dtype}; it must be float16, bfloat16 or float32",
        "cpu.wqmm.dtypes.x",
    )
    require(
        inner_precise in (0, 1),
        f"weight_quant_matmul: inner_precise is {inner_precise}; it must be 0 or 1",
        "wqmm.inner_precise",
    )
    left = x.transpose(-2, -1) if transpose_x else x
    codes = weight_codes(weight, transpose_weight)
    k, n = codes.shape
    require(left.shape[-1] == k, f"weight_quant_matmul: x has K = {left.shape[-1]} and weight has K = {k}", "wqmm.k")
    scale, offset = _parameters(antiquant_scale, antiquant_offset, x.dtype, k, n, antiquant_group_size)
    group = antiquant_group_size
    added = _bias(bias, n)
    if template == "auto":
        template = chosen_template(
            x, weight, antiquant_scale, quant_scale, antiquant_group_size, transpose_x, transpose_weight
        )
    if template == "msd":
        require(antiquant_scale.dtype != torch.int64, "weight_quant_matmul: the msd template takes no int64 scale")
        planes = INT4_PLANES if weight.dtype == torch.int32 else INT8_PLANES
        spread = _spread(scale, k, group), None if offset is None else _spread(offset, k, group)
        acc = accumulated(left, codes, *spread, group, planes, bool(inner_precise))
    else:
        acc = left.to(torch.float32) @ _dequantized(codes, scale, offset, group, x.dtype, torch.float32)
    if added is not None:
        acc = acc + added
    if quant_scale is None:
        require(
            quant_offset is None, "weight_quant_matmul: quant_offset is given without quant_scale", "wqmm.quant_offset"
        )
        return half_away(acc, x.dtype, saturate) if template == "msd" else to_float(acc, x.dtype, saturate)
    offsets = None if quant_offset is None else quant_offset.reshape(-1)
    factor, word_offset = scale_and_offset(quant_scale.reshape(-1), offsets)
    return requantize(acc * factor, word_offset)


def chosen_template(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    quant_scale: torch.Tensor | None,
    group_size: int,
    transpose_x: bool,
    transpose_weight: bool,
) -> str:
    """What the A2/A3 library would pick, of the templates that are modelled.

    Source: weight_quant_batch_matmul_v2_tiling_registry.cpp:33-54, tiling_msd.cpp:104-155, tiling_fixpipe.cpp:67-123.
    """
    if antiquant_scale.dtype == torch.int64:
        return "fixpipe"
    k, n = matrix_shape(weight, transpose_weight)
    m = x.shape[-1] if transpose_x else x.shape[-2]
    if transpose_x or quant_scale is not None or x.dtype == torch.float32:
        return "custom"
    if weight.dtype == torch.int8:
        # Above these sizes the library splits K in a variant whose factors are not modelled.
        fits = group_size == 0 and m <= 64 and k % 32 == 0 and n % 32 == 0 and k <= 13696 and n <= 32000
        return "msd" if fits else "custom"
    if group_size == 0:
        return "msd" if m <= 64 and k % 32 == 0 and n % 32 == 0 and transpose_weight and n >= 2 * m else "custom"
    fits = group_size in (64, 128) and m <= group_size // 8 and k % group_size == 0 and n % 64 == 0
    return "msd" if fits and not transpose_weight else "custom"


def weight_codes(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The integers of a stored weight as an int8 ``(K, N)`` view."""
    require(
        weight.dim() == 2,
        f"weight_quant_matmul: weight has rank {weight.dim()}; it must be a matrix",
        "wqmm.weight.rank",
    )
    known = weight.dtype in (torch.int8, torch.int32)
    require(
        known,
        f"weight_quant_matmul: weight is {weight.dtype}; it must be int8, or int4 in int32",
        "cpu.wqmm.dtypes.weight",
    )
    codes = unpack_int4(weight) if weight.dtype == torch.int32 else weight
    return codes.t() if transposed else codes


def dequantized_weight(
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    group_size: int = 0,
    transpose_weight: bool = False,
) -> torch.Tensor:
    """The weight that the custom template multiplies by, ``(K, N)`` in ``dtype``, which is that of x.

    The other arguments are those of :func:`weight_quant_matmul`.
    """
    codes = weight_codes(weight, transpose_weight)
    k, n = codes.shape
    scale, offset = _parameters(antiquant_scale, antiquant_offset, dtype, k, n, group_size)
    return _dequantized(codes, scale, offset, group_size, dtype, dtype)


def _dequantized(
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    group_size: int,
    dtype: torch.dtype,
    held_in: torch.dtype,
) -> torch.Tensor:
    if scale.dtype == torch.int64:  # the fixpipe template: integers, then one FP19 multiplication
        factor, _ = unpack_scale_word(scale)
        whole = codes.to(torch.int32) if offset is None else codes.to(torch.int32) + offset
        return (whole.to(torch.float32) * factor).to(torch.float16).to(held_in)
    return dequantized_to(held_in, codes, scale, offset, group_size, dtype)


def _parameters(
    scale: torch.Tensor, offset: torch.Tensor | None, dtype: torch.dtype, k: int, n: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and offset checked, ``(1, 1)``, ``(1, N)`` or a row a group."""
    word = scale.dtype == torch.int64
    if word:
        fits = dtype == torch.float16 and group_size == 0
        require(
            fits,
            "weight_quant_matmul: an int64 antiquant_scale needs float16 x and one scale a channel",
            "wqmm.int64.no_group",
        )
    else:
        require(
            scale.dtype == dtype,
            f"weight_quant_matmul: antiquant_scale is {scale.dtype}; it must have the dtype of x, {dtype}",
            "wqmm.scale.dtype",
        )
    if offset is not None:
        same = tuple(offset.shape) == tuple(scale.shape)
        shapes = f"antiquant_offset is {tuple(offset.shape)}, antiquant_scale {tuple(scale.shape)}"
        require(same, f"weight_quant_matmul: {shapes}; they must have one shape", "wqmm.offset.shape")
        wanted = torch.int32 if word else scale.dtype
        require(
            offset.dtype == wanted,
            f"weight_quant_matmul: antiquant_offset is {offset.dtype}; with a {scale.dtype} scale it must be {wanted}",
            "wqmm.offset.dtype",
        )
    _check_shape(tuple(scale.shape), k, n, group_size)
    if group_size:
        return scale, offset
    return scale.reshape(1, -1), None if offset is None else offset.reshape(1, -1)


def _check_shape(shape: tuple[int, ...], k: int, n: int, group_size: int) -> None:
    if group_size == 0:
        accepted = ((1,), (1, 1), (n,), (1, n))
        require(
            shape in accepted,
            f"weight_quant_matmul: antiquant_scale has shape {shape}; accepted: {accepted}",
            "wqmm.scale.shape",
        )
        return
    require(
        group_size > 0,
        f"weight_quant_matmul: antiquant_group_size is {group_size}; it must be 0 or positive",
        "wqmm.group",
    )
    groups = -(-k // group_size)
    require(
        shape == (groups, n),
        f"weight_quant_matmul: antiquant_scale is {shape}; with groups of {group_size} it must be ({groups}, {n})",
        "wqmm.scale.shape.group",
    )


def _spread(parameter: torch.Tensor, k: int, group_size: int) -> torch.Tensor:
    """A row for each row of K where there are groups."""
    return parameter.repeat_interleave(group_size, dim=0)[:k] if group_size else parameter


def _bias(bias: torch.Tensor | None, n: int) -> torch.Tensor | None:
    if bias is None:
        return None
    shape = tuple(bias.shape)
    require(
        shape in ((n,), (1, n)),
        f"weight_quant_matmul: bias has shape {shape}; it must be ({n},) or (1, {n})",
        "wqmm.bias.shape",
    )
    require(
        bias.dtype in _FLOATS, f"weight_quant_matmul: bias is {bias.dtype}; it must be floating", "cpu.wqmm.dtypes.bias"
    )
    return bias.reshape(n).to(torch.float32)


def _fake(a: Arguments) -> torch.Tensor:
    x, weight = a.x, a.weight
    require(x.dim() >= 2, f"weight_quant_matmul: x has rank {x.dim()}; it must be (..., M, K)")
    require(weight.dim() == 2, f"weight_quant_matmul: weight has rank {weight.dim()}; it must be a matrix")
    m, k = (x.shape[-1], x.shape[-2]) if a.transpose_x else (x.shape[-2], x.shape[-1])
    kw, n = matrix_shape(weight, a.transpose_weight)
    require(k == kw, f"weight_quant_matmul: x has K = {k} and weight has K = {kw}")
    dtype = torch.int8 if a.quant_scale is not None else x.dtype
    return x.new_empty((*x.shape[:-2], m, n), dtype=dtype)  # type: ignore[no-any-return]


def _aclnn(graph: AclnnGraph, node: Node, a: Arguments) -> None:
    """The group scales of a transposed weight are a transposed view of ``(N, groups)``, as the weight is of (N, K)."""
    scale, offset = a.antiquant_scale, a.antiquant_offset
    if _has_turned_groups(a):
        scale = graph.stored_transposed(node, scale, _reads_turned)
        offset = None if offset is None else graph.stored_transposed(node, offset, _reads_turned)
    quant_scale = a.quant_scale
    if quant_scale is not None and quant_scale.meta["val"].dtype == torch.float32:
        quant_scale = graph.scale_word(node, quant_scale, a.quant_offset, "quant_word")
    x, weight = graph.viewed(node, a.x, a.transpose_x), graph.viewed(node, a.weight, a.transpose_weight)
    keywords = {
        "antiquant_offset": offset,
        "quant_scale": quant_scale,
        "quant_offset": None,
        "bias": a.bias,
        "antiquant_group_size": a.antiquant_group_size,
        "inner_precise": a.inner_precise,
    }
    graph.replace(node, WQMM, (x, weight, scale), keywords)


def _has_turned_groups(a: Arguments) -> bool:
    return bool(a.antiquant_group_size and a.transpose_weight)


def _reads_turned(user: Node) -> bool:
    """True for a grouped matmul of a transposed weight."""
    if user.target is not WEIGHT_QUANT_MATMUL.overload:
        return False
    return _has_turned_groups(WEIGHT_QUANT_MATMUL.bind(user))


def _ge(ge: Ge, a: Arguments) -> Any:
    """WeightQuantBatchMatmulV2. int4 stays packed in int32 here: the operator's kernel unpacks it."""
    quant_scale, scale, offset = a.quant_scale, a.antiquant_scale, a.antiquant_offset
    if quant_scale is not None and quant_scale.dtype == ge.dtypes.DT_INT64:
        quant_scale = ge.api.Cast(quant_scale, dst_type=ge.dtypes.DT_UINT64)
    if a.transpose_weight:
        scale, offset = ge.turned(scale), ge.turned(offset)
    return ge.api.WeightQuantBatchMatmulV2(
        a.x,
        a.weight,
        scale,
        antiquant_offset=offset,
        quant_scale=quant_scale,
        quant_offset=a.quant_offset,
        bias=a.bias,
        transpose_x=a.transpose_x,
        transpose_weight=a.transpose_weight,
        antiquant_group_size=a.antiquant_group_size,
        inner_precise=a.inner_precise,
    )


def _run(inputs: list[Any], attrs: dict[str, Any], saturates: bool) -> torch.Tensor:
    activation, weight, scale, offset, quant_scale, quant_offset, bias = padded(inputs, 7)
    scale, offset = _as_activation(scale, activation), _as_activation(offset, activation)
    transposed = attrs["transpose_weight"]
    if transposed:
        scale, offset = turned(scale), turned(offset)
    elif weight.dtype == torch.int32 and weight.shape[-2] * 8 == activation.shape[-1]:
        weight, transposed = weight.transpose(-2, -1), True  # a Transpose of (N, K / 8) words is not undone by words
    return weight_quant_matmul(
        activation,
        weight,
        scale,
        offset,
        quant_scale,
        quant_offset,
        bias,
        attrs["antiquant_group_size"],
        attrs["inner_precise"],
        transpose_x=attrs["transpose_x"],
        transpose_weight=transposed,
        saturate=saturates,
    )


def _as_activation(parameter: Any, x: torch.Tensor) -> Any:
    """In a graph, npu_weight_quant_batchmatmul.md says, float16 and bfloat16 parameters take the dtype of x."""
    halves = (torch.float16, torch.bfloat16)
    mixed = parameter is not None and parameter.dtype in halves and x.dtype in halves
    return parameter.to(x.dtype) if mixed else parameter


def _emulated(a: Arguments) -> torch.Tensor:
    refuse_given("npu_weight_quant_batchmatmul", a, *WQMM.unjudged)
    if a.weight.dim() > 2:
        return _emulated_batch(a)
    transposed = a.weight.dtype == torch.int32 and packed_transposed(a.weight.shape[-2], a.x.shape[-1])
    weight = a.weight.transpose(-2, -1) if transposed else a.weight
    return torch.ops.quantpass.weight_quant_matmul(  # type: ignore[no-any-return]
        a.x, weight, a.antiquant_scale, a.antiquant_offset, a.quant_scale, a.quant_offset, a.bias,
        a.antiquant_group_size, a.inner_precise, transpose_weight=transposed,
    )  # fmt: skip


def _emulated_batch(a: Arguments) -> torch.Tensor:
    """A matrix for each batch, as the 310P has it: one after the other."""
    leading = torch.broadcast_shapes(a.x.shape[:-2], a.weight.shape[:-2])
    x = a.x.expand(*leading, *a.x.shape[-2:]).reshape(-1, *a.x.shape[-2:])
    weight = a.weight.expand(*leading, *a.weight.shape[-2:]).reshape(-1, *a.weight.shape[-2:])
    each = [_emulated(Arguments(**(vars(a) | {"x": i, "weight": w}))) for i, w in zip(x, weight, strict=True)]
    return torch.stack(each).reshape(*leading, *each[0].shape)


def _emulated_fake(a: Arguments) -> torch.Tensor:
    transposed = a.weight.dtype == torch.int32 and packed_transposed(a.weight.shape[-2], a.x.shape[-1])
    if a.weight.dim() == 2:
        return _emulated(a)
    leading = torch.broadcast_shapes(a.x.shape[:-2], a.weight.shape[:-2])
    n = a.weight.shape[-1] * (8 if a.weight.dtype == torch.int32 and not transposed else 1)
    dtype = torch.int8 if a.quant_scale is not None else a.x.dtype
    return a.x.new_empty((*leading, a.x.shape[-2], n), dtype=dtype)  # type: ignore[no-any-return]


WEIGHT_QUANT_MATMUL = Operator(
    vendor=WQMM,
    kernel=weight_quant_matmul,
    fake=_fake,
    aclnn=_aclnn,
    ge=_ge,
    ge_kernels={"WeightQuantBatchMatmulV2": _run},
    emulate=_emulated,
    emulate_fake=_emulated_fake,
    vendor_fake="wrong",  # for x of rank above 2
)
