"""What brings parameters into the form that fused operators take: scale words, storage formats, packed int4."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from quantpass.chips.companions import FORMAT_CAST as NPU_FORMAT_CAST
from quantpass.chips.companions import INT4PACK, TQP
from quantpass.graph.scale_words import pack_scale_word
from quantpass.operators.arguments import ND, NZ, Arguments, require
from quantpass.operators.ge import Ge, whole
from quantpass.operators.int4 import pack_int4
from quantpass.operators.operator import AclnnGraph, Operator

_FORMATS = {ND: "ND", NZ: "FRACTAL_NZ"}


def trans_quant_param(scale: torch.Tensor, offset: torch.Tensor | None = None, round_mode: int = 0) -> torch.Tensor:
    """``npu_trans_quant_param``: scale and offset as the int64 word of :mod:`quantpass.graph.scale_words`.

    Args:
        scale: float32, ``(n,)``, ``(1,)`` or ``(1, n)``.
        offset: float32; 1-D sizes broadcast, 2-D ones must be equal.
        round_mode: 0 truncates to FP19, 1 rounds half to even.
    """
    require(
        scale.dtype == torch.float32,
        f"trans_quant_param: scale is {scale.dtype}; it must be float32",
        "tqp.scale.dtype",
    )
    require(round_mode in (0, 1), f"trans_quant_param: round_mode is {round_mode}; it must be 0 or 1", "tqp.round_mode")
    require(
        scale.numel() > 0, f"trans_quant_param: scale has shape {tuple(scale.shape)}; it may not be empty", "tqp.empty"
    )
    if offset is not None:
        require(
            offset.dtype == torch.float32,
            f"trans_quant_param: offset is {offset.dtype}; it must be float32",
            "tqp.offset.dtype",
        )
        same_rank = scale.dim() == offset.dim() and (scale.dim() == 1 or scale.shape == offset.shape)
        shapes = f"scale has shape {tuple(scale.shape)}, offset {tuple(offset.shape)}"
        require(same_rank, f"trans_quant_param: {shapes}; 1-D sizes broadcast, 2-D ones must be equal", "tqp.shapes")
    return pack_scale_word(scale, offset, round_mode)


def format_cast(x: torch.Tensor, acl_format: int) -> torch.Tensor:
    """``npu_format_cast``: the same tensor in another storage format. On a CPU this is a copy."""
    del acl_format
    return x.clone()


# -- scale words -------------------------------------------------------------------------------------------------------


def _word_fake(a: Arguments) -> torch.Tensor:
    shape = a.scale.shape if a.offset is None else torch.broadcast_shapes(a.scale.shape, a.offset.shape)
    return a.scale.new_empty(shape, dtype=torch.int64)  # type: ignore[no-any-return]


def _word_aclnn(graph: AclnnGraph, node: Node, a: Arguments) -> None:
    graph.replace(node, TQP, (a.scale,), {"offset": a.offset, "round_mode": a.round_mode})


def _word_ge(ge: Ge, a: Arguments) -> Any:
    """TransQuantParamV2, for a scale that is known only when the graph runs; constants are packed before."""
    return ge.api.TransQuantParamV2(a.scale, offset=a.offset, round_mode=a.round_mode)


def _run_word(inputs: list[Any], attrs: dict[str, Any], saturates: bool) -> torch.Tensor:
    del saturates
    return pack_scale_word(inputs[0], inputs[1] if len(inputs) > 1 else None, attrs.get("round_mode", 0))


def _emulated_word(a: Arguments) -> torch.Tensor:
    return torch.ops.quantpass.trans_quant_param(a.scale, a.offset, a.round_mode or 0)  # type: ignore[no-any-return]


TRANS_QUANT_PARAM = Operator(
    vendor=TQP,
    kernel=trans_quant_param,
    fake=_word_fake,
    aclnn=_word_aclnn,
    ge=_word_ge,
    ge_kernels={"TransQuantParamV2": _run_word},
    emulate=_emulated_word,
)


# -- storage formats ---------------------------------------------------------------------------------------------------


def _refuse_cast(graph: AclnnGraph, node: Node, a: Arguments) -> None:
    del graph, a
    raise ValueError(
        f"{node.name} casts a tensor that the graph computes to another format. With lowering='aclnn' the cast becomes "
        "part of a captured NPU graph, and aborts the capture. Cast the tensor before the graph, or compile through GE "
        "(quantpass.npu_backend with torchair's default mode)."
    )


def _cast_ge(ge: Ge, a: Arguments) -> Any:
    """TransData, for an operand that is computed in the graph; casts of parameters are carried out before it runs."""
    if a.acl_format not in _FORMATS:
        known = ", ".join(f"{number} ({name})" for number, name in _FORMATS.items())
        raise RuntimeError(f"quantpass.format_cast to format {a.acl_format}; accepted: {known}")
    source, target = ("ND", _FORMATS[NZ]) if a.acl_format == NZ else (_FORMATS[NZ], "ND")
    return ge.api.TransData(a.x, src_format=source, dst_format=target)


def _run_cast(inputs: list[Any], attrs: dict[str, Any], saturates: bool) -> torch.Tensor:
    """Tensors have one format here."""
    del attrs, saturates
    same: torch.Tensor = inputs[0]
    return same


def _emulated_cast(a: Arguments) -> torch.Tensor:
    """What chooses the tiles (``customize_dtype``, ``input_dtype``) means nothing to a CPU tensor, which has none."""
    return torch.ops.quantpass.format_cast(a.input, a.acl_format)  # type: ignore[no-any-return]


FORMAT_CAST = Operator(
    vendor=NPU_FORMAT_CAST,
    kernel=format_cast,
    fake=lambda a: torch.empty_like(a.x),
    aclnn=_refuse_cast,
    ge=_cast_ge,
    ge_kernels={"TransData": _run_cast},
    emulate=_emulated_cast,
    vendor_fake="missing",
)


# -- packed int4 -------------------------------------------------------------------------------------------------------


def _packed_fake(a: Arguments) -> torch.Tensor:
    codes = a.codes
    require(codes.dim() >= 1, "pack_int4: codes must have at least one dimension")
    require(codes.shape[-1] % 8 == 0, f"pack_int4: the last dimension is {codes.shape[-1]}; it must be a multiple of 8")
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] // 8), dtype=torch.int32)  # type: ignore[no-any-return]


def _refuse_pack(graph: AclnnGraph, node: Node, a: Arguments) -> None:
    del graph, a
    raise ValueError(
        f"{node.name} packs int4 codes that the graph computes; npu_convert_weight_to_int4pack runs on the host and "
        "can't be part of a compiled graph. Pack the weight before the graph runs."
    )


def _packed_ge(ge: Ge, a: Arguments) -> Any:
    """Cast to INT4, then eight of them read as one int32: the words of ``npu_convert_weight_to_int4pack``."""
    narrow = ge.api.Cast(a.codes, dst_type=ge.dtypes.DT_INT4)
    *leading, last = a.codes.symsize
    eights = ge.api.Reshape(narrow, ge.api.Const(whole([*leading, last // 8, 8], "pack_int4")))
    return ge.api.Bitcast(eights, type=ge.dtypes.DT_INT32)


def _emulated_pack(a: Arguments) -> torch.Tensor:
    """``inner_k_tiles`` is unused by the vendor as well."""
    require(
        a.weight.dtype == torch.int32,
        f"npu_convert_weight_to_int4pack: weight is {a.weight.dtype}; it must be int32, one value an element",
    )
    return torch.ops.quantpass.pack_int4(a.weight)  # type: ignore[no-any-return]


PACK_INT4 = Operator(
    vendor=INT4PACK,
    kernel=pack_int4,
    fake=_packed_fake,
    aclnn=_refuse_pack,
    ge=_packed_ge,
    emulate=_emulated_pack,
    vendor_fake="missing",
)
