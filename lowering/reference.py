"""The ``reference`` lowering: CPU kernels that define what the fused operators compute.

Every rounding step of the hardware is a rounding step there. Where the vendor leaves a choice open (which kernel
template runs, what a float16 overflow gives) it is an argument. Formulas and sources: ``docs/semantics.md``.
"""

from __future__ import annotations

import torch

from quantpass.lowering.int4 import pack_int4
from quantpass.lowering.quant_matmul import quant_matmul
from quantpass.lowering.scale_words import pack_scale_word
from quantpass.lowering.weight_quant_matmul import weight_quant_matmul
from quantpass.operators.ir import LIBRARY, require


def trans_quant_param(scale: torch.Tensor, offset: torch.Tensor | None = None, round_mode: int = 0) -> torch.Tensor:
    """``npu_trans_quant_param``: scale and offset as the int64 word of :mod:`quantpass.lowering.scale_words`.

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


KERNELS = {
    "quant_matmul": quant_matmul,
    "weight_quant_matmul": weight_quant_matmul,
    "trans_quant_param": trans_quant_param,
    "format_cast": format_cast,
    "pack_int4": pack_int4,
}

for _name, _kernel in KERNELS.items():
    LIBRARY.impl(_name, _kernel, "CPU")
