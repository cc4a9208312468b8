"""The int64 word in which the hardware takes a dequantization scale, and the FP19 number inside it.

Bits 13 to 31 hold the scale as FP19 (sign, 8-bit exponent, 10-bit mantissa: a float32 without its last 13 bits), bits
37 to 45 a 9-bit two's-complement offset, bit 46 is 1. Source: npu_trans_quant_param.md; the kernel is
``trans_quant_param_v2.h:245-325``.
"""

from __future__ import annotations

import torch

_KEPT = -(1 << 13)  # 0xFFFFE000 as a signed number
_SIGN_BIT = 1 << 46
_OFFSET_AT = 37
_OFFSET_MASK = 0x1FF


def fp19(scale: torch.Tensor, round_mode: int = 0) -> torch.Tensor:
    """The float32 number that the hardware uses for ``scale``.

    Args:
        scale: float32, any shape.
        round_mode: 0 truncates the mantissa towards zero; 1 rounds it half to even and flushes subnormals to zero.
    """
    bits = scale.to(torch.float32).contiguous().view(torch.int32)
    if round_mode == 0:
        kept = bits & _KEPT
    else:
        odd = (bits >> 13) & 1
        rounded = (bits + 0xFFF + odd) & _KEPT
        exponent = (bits >> 23) & 0xFF
        kept = torch.where(exponent == 0, bits & -(1 << 31), torch.where(exponent == 255, bits & _KEPT, rounded))
    return kept.view(torch.float32)


def pack_scale_word(scale: torch.Tensor, offset: torch.Tensor | None, round_mode: int = 0) -> torch.Tensor:
    """Scale (float32) and offset (float32, rounded half to even, clamped to [-256, 255]) as int64 words."""
    low = fp19(scale, round_mode).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    word = low | _SIGN_BIT
    if offset is not None:
        whole = offset.to(torch.float32).round().clamp(-256, 255).to(torch.int64)
        word, whole = torch.broadcast_tensors(word, whole)
        word = word | ((whole & _OFFSET_MASK) << _OFFSET_AT)
    return word


def unpack_scale_word(word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(scale, offset)`` of int64 words: float32 and int32."""
    low = word & 0xFFFFE000
    scale = torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32).view(torch.float32)
    offset = (word >> _OFFSET_AT) & _OFFSET_MASK
    return scale, torch.where(offset >= 256, offset - 512, offset).to(torch.int32)
